"""The GDN-2 mixer: initialisation, gate ranges, ablations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gdn2_jax.model.mixers.gdn2 import GDN2Config, GDN2Mixer


def run(config, x, seed=0):
  """(params, y, intermediates) of a freshly initialised mixer."""
  mixer = GDN2Mixer(config)
  params = nn.unbox(mixer.init(jax.random.key(seed), x))["params"]
  (y, _), seen = mixer.apply({"params": params}, x, mutable=["intermediates"])
  return params, y, {k: v[0] for k, v in seen["intermediates"].items()}


@pytest.fixture
def x():
  return 3 * jax.random.normal(jax.random.key(1), (2, 12, 64))


@pytest.mark.slow
def test_linear_maps_start_xavier_uniform_with_the_papers_gain(x):
  params, _, _ = run(GDN2Config(num_heads=4, key_dim=32, value_dim=64), x)
  for name, fan in {
    "q_proj": (64, 128),
    "v_proj": (64, 256),
    "f_up": (64, 128),
    "g_down": (64, 64),
    "o_proj": (256, 64),
  }.items():
    kernel = np.asarray(params[name]["kernel"])
    limit = 2**-2.5 * np.sqrt(6 / sum(fan))
    assert np.abs(kernel).max() <= limit
    # A uniform variable on (-a, a): the largest of thousands is near a, and
    # the standard deviation is a / sqrt(3) within a few percent.
    assert np.abs(kernel).max() > 0.99 * limit
    assert kernel.std() == pytest.approx(limit / np.sqrt(3), rel=0.05)
  np.testing.assert_array_equal(params["g_up"]["bias"], 0)
  np.testing.assert_array_equal(params["o_norm"], 1)


@pytest.mark.slow
def test_decay_starts_in_the_papers_ranges(x):
  config = GDN2Config(num_heads=64, key_dim=64, value_dim=16)
  params, _, _ = run(config, x)
  a = np.exp(params["A_log"])
  assert a.min() >= 1 and a.max() <= 16 and a.max() - a.min() > 10
  dt = jax.nn.softplus(params["dt_bias"])
  # Float32 inverse softplus of dt >= 1e-4 is exact to about 1e-7 / 1e-3.
  assert dt.min() >= 1e-3 * (1 - 1e-3) and dt.max() <= 0.1 * (1 + 1e-3)
  log_dt = np.log10(dt)
  assert log_dt.mean() == pytest.approx(-2, abs=0.05)  # log-uniform
  assert params["A_log"].dtype == params["dt_bias"].dtype == jnp.float32


@pytest.mark.parametrize("negative", [False, True])
def test_gates_lie_in_their_ranges(x, negative):
  config = GDN2Config(
    num_heads=2, key_dim=16, value_dim=16, negative_eigenvalues=negative
  )
  _, _, seen = run(config, 20 * x)
  top = 2 if negative else 1
  assert seen["b"].min() >= 0 and seen["b"].max() <= top
  assert seen["b"].max() > 0.9 * top
  assert seen["w"].min() >= 0 and 0.9 < seen["w"].max() <= 1
  assert seen["g"].max() <= 0 and seen["g"].dtype == jnp.float32
  norms = np.linalg.norm(seen["k"], axis=-1)
  assert norms.max() <= 1 + 1e-6


@pytest.mark.parametrize(
  "gate,axis", [("erase_gate", "b"), ("write_gate", "w")]
)
def test_ablations_average_one_gate_and_keep_the_parameters(x, gate, axis):
  config = GDN2Config(num_heads=2, num_value_heads=4, key_dim=16, value_dim=32)
  tied_config = dataclasses.replace(config, **{gate: "scalar"})
  params, y, seen = run(config, x)
  tied_params, tied_y, tied = run(tied_config, x)
  jax.tree.map(np.testing.assert_array_equal, params, tied_params)
  want = np.broadcast_to(
    np.mean(seen[axis], axis=-1, keepdims=True), seen[axis].shape
  )
  np.testing.assert_allclose(tied[axis], want, rtol=1e-6)
  other = "w" if axis == "b" else "b"
  np.testing.assert_array_equal(tied[other], seen[other])
  assert np.abs(y - tied_y).max() > 1e-4 * np.abs(y).max()


def test_output_gates_differ(x):
  config = GDN2Config(num_heads=2, key_dim=16, value_dim=16)
  _, silu, _ = run(config, x)
  _, sigmoid, _ = run(dataclasses.replace(config, output_gate="sigmoid"), x)
  assert np.abs(silu - sigmoid).max() > 0.1 * np.abs(silu).max()


def test_collecting_gates_changes_nothing(x):
  mixer = GDN2Mixer(GDN2Config(num_heads=2, key_dim=16, value_dim=16))
  params = nn.unbox(mixer.init(jax.random.key(0), x))["params"]
  off, _ = mixer.apply({"params": params}, x)
  (on, _), _ = mixer.apply({"params": params}, x, mutable=["intermediates"])
  np.testing.assert_array_equal(on, off)


@pytest.mark.parametrize(
  "field,value,says",
  [
    ("num_heads", 0, "num_heads=0"),
    ("num_value_heads", 3, "num_value_heads=3: expected a multiple"),
    ("key_dim", 8, "key_dim=8: expected 16 to 256"),
    ("value_dim", 512, "value_dim=512"),
    ("conv_width", 1, "conv_width=1"),
    ("output_gate", "tanh", "output_gate='tanh'"),
    ("erase_gate", "of", "erase_gate='of'"),
    ("implementation", "cuda", "implementation='cuda'"),
  ],
)
def test_bad_fields_are_named(field, value, says):
  config = GDN2Config(num_heads=2)
  setattr(config, field, value)
  with pytest.raises(ValueError, match=f"model.gdn2.{says}"):
    config.validate("model.gdn2")
