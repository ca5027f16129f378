"""The Mamba-2 layer: definition, initial values, counts, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gdn2_jax.model.mixers.mamba2 import (
  Mamba2Config,
  Mamba2Mixer,
  init_mamba2_cache,
)
from tests.model.mixers.cases import CONFIGS, D, assert_equals_textbook, case


def silu(x):
  return x / (1 + jnp.exp(-x))


def textbook(p, c, u):
  """The layer of one row u [T, D], token by token."""
  z, x, B, C, dt = (
    jnp.tensordot(u, p[f"{name}_proj"]["kernel"], 1)
    for name in ("z", "x", "B", "C", "dt")
  )

  def conv(name, y):
    past = jnp.concatenate([jnp.zeros_like(y[: c.conv_width - 1]), y])
    taps = enumerate(p[f"{name}_conv"])
    y = sum(tap * past[i : i + len(u)] for i, tap in taps)
    return silu(p[f"{name}_conv_bias"] + y)

  x, B, C = conv("x", x), conv("B", B), conv("C", C)
  dt = jnp.log1p(jnp.exp(dt + p["dt_bias"]))[:, :, None, None]
  decay = jnp.exp(-jnp.exp(p["A_log"])[:, None, None] * dt)

  def token(h, xs):
    z, x, B, C, dt, decay = xs
    h = decay * h + dt * B[None, :, None] * x[:, None, :]
    y = jnp.einsum("n,hnp->hp", C, h) + p["D"][:, None] * x
    y = y * silu(z)
    y = y / jnp.sqrt(jnp.mean(y * y) + c.norm_eps) * p["o_norm"]
    return h, jnp.tensordot(y, p["o_proj"]["kernel"], 2)

  h = jnp.zeros((c.num_heads, c.state_dim, c.head_dim))
  return jax.lax.scan(token, h, (z, x, B, C, dt, decay))[1]


@pytest.mark.parametrize(
  "implementation",
  ["reference", pytest.param("xla", marks=pytest.mark.deep)],
)
def test_the_layer_and_its_gradients_equal_the_textbook(implementation):
  config = dataclasses.replace(CONFIGS["M"], implementation=implementation)
  assert_equals_textbook(config, textbook)


BIG = {"inner_dim": 2048, "head_dim": 16, "state_dim": 64}


@pytest.mark.parametrize(
  "decay_init",
  [
    "paper",
    *(
      pytest.param(x, marks=pytest.mark.deep) for x in ("long", "long_small_dt")
    ),
  ],
)
def test_initial_moments_of_every_parameter(decay_init):
  mixer = Mamba2Mixer(Mamba2Config(**BIG, decay_init=decay_init), num_layers=8)
  x = jnp.zeros((1, 4, 256))
  params = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), x))["params"]
  a, dt = {
    "paper": ((1, 16), (1e-3, 1e-1)),
    "long": ((0.01, 0.015), (0.1, 1)),
    "long_small_dt": ((1, 1.5), (1e-3, 1e-2)),
  }[decay_init]
  into, taps = 1 / np.sqrt(256), 1 / np.sqrt(4)
  limits = {
    **{f"{n}_proj": (-into, into) for n in ("z", "x", "B", "C", "dt")},
    **{f"{n}_conv": (-taps, taps) for n in "xBC"},
    **{f"{n}_conv_bias": (-taps, taps) for n in "xBC"},
    # fan-in 2048, and 16 residual branches.
    "o_proj": (-1 / np.sqrt(2048 * 16), 1 / np.sqrt(2048 * 16)),
    "A": a,
    "log dt": tuple(np.log(dt)),
  }
  values = {n: np.asarray(jax.tree.leaves(v)[0]) for n, v in params.items()}
  np.testing.assert_array_equal(values.pop("D"), 1)
  np.testing.assert_array_equal(values.pop("o_norm"), 1)
  values["A"] = np.exp(values.pop("A_log").astype(np.float64))
  bias = values.pop("dt_bias").astype(np.float64)
  values["log dt"] = np.log(np.log1p(np.exp(bias)))
  assert set(values) == set(limits)
  for name, value in values.items():
    low, high = limits[name]
    width, n = high - low, value.size
    # float32 rounding of dt_bias moves the smallest dt by about 1e-4.
    slack = 1e-3 * width
    assert low - slack <= value.min() <= low + 20 * width / n + slack, name
    assert high - 20 * width / n - slack <= value.max() <= high + slack, name
    # Uniform: five standard errors of the mean, and of the deviation.
    error = width / np.sqrt(12 * n)
    assert abs(value.mean() - (low + high) / 2) < 5 * error, name
    assert abs(value.std() - width / np.sqrt(12)) < 5 * error, name


@pytest.mark.deep
def test_convolutions_may_start_on_the_current_token():
  x = jnp.zeros((1, 4, D))
  starts = []
  for conv_init in ("uniform", "current"):
    config = dataclasses.replace(CONFIGS["M"], conv_init=conv_init)
    mixer = Mamba2Mixer(config, num_layers=1)
    params = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), x))["params"]
    starts.append([params[f"{n}_conv"] for n in "xBC"])
  for uniform, current in zip(*starts, strict=True):
    moved = np.asarray(current - uniform)
    np.testing.assert_array_equal(moved[:-1], 0)
    np.testing.assert_allclose(moved[-1], 1, rtol=1e-6)


def test_parameters_are_as_many_as_those_of_the_reference_layer():
  c = Mamba2Config(inner_dim=4096)
  mixer = Mamba2Mixer(c, num_layers=1)
  x = jax.ShapeDtypeStruct((1, 4, 2048), jnp.float32)
  shapes = jax.eval_shape(mixer.init, jax.random.key(0), x)
  # The reference: in_proj for z, x, B, C and dt; one convolution with bias over
  # x, B and C; A_log, D and dt_bias; the norm; out_proj.
  in_proj = 2048 * (2 * 4096 + 2 * 64 + 64)
  conv = (4 + 1) * (4096 + 2 * 64)
  want = in_proj + conv + 3 * 64 + 4096 + 4096 * 2048
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == want


def test_the_state_has_as_many_floats_as_that_of_gdn2():
  cache = jax.eval_shape(
    lambda: init_mamba2_cache(Mamba2Config(inner_dim=4096), 1, "bfloat16")
  )
  assert cache.state.size == 16 * 128 * 128
  assert cache.state.dtype == jnp.float32
  tails = [cache.conv_x, cache.conv_b, cache.conv_c]
  assert sum(tail.size for tail in tails) == 3 * (4096 + 2 * 64)


def test_decay_parameters_stay_float32():
  mixer = Mamba2Mixer(CONFIGS["M"], 1, "bfloat16", "bfloat16")
  x = jnp.zeros((1, 4, D), jnp.bfloat16)
  shapes = jax.eval_shape(mixer.init, jax.random.key(0), x)
  params = nn.unbox(shapes)["params"]
  for name in ("A_log", "dt_bias", "D"):
    assert params.pop(name).dtype == jnp.float32
  assert {str(a.dtype) for a in jax.tree.leaves(params)} == {"bfloat16"}


def test_sown_arrays_are_those_of_the_op():
  x = jax.random.normal(jax.random.key(1), (2, 5, D))
  mixer = Mamba2Mixer(CONFIGS["M"], 1)
  params = case("M").params
  run = jax.jit(functools.partial(mixer.apply, mutable=["intermediates"]))
  _, seen = run({"params": params}, x)
  sown = {
    name: np.asarray(value[0]) for name, value in seen["intermediates"].items()
  }
  assert set(sown) == set("qkvgbwo")
  assert sown["q"].shape == sown["g"].shape == (2, 5, 4, 24)
  np.testing.assert_array_equal(sown["b"], 0)
  # g = A dt, and w = dt, the same for all channels of a head.
  a = -np.exp(np.asarray(params["A_log"]))
  np.testing.assert_allclose(
    sown["g"][..., 0], a * sown["w"][..., 0], rtol=1e-6
  )


@pytest.mark.parametrize(
  ("field", "value", "says"),
  [
    ("inner_dim", 72, "inner_dim=72: expected a positive multiple of head_dim"),
    ("inner_dim", 0, "inner_dim=0"),
    ("head_dim", 8, "head_dim=8: expected 16 to 256"),
    ("state_dim", 512, "state_dim=512: expected 16 to 256"),
    ("conv_width", 1, "conv_width=1"),
    ("norm_eps", 0.0, "norm_eps=0.0"),
    ("decay_init", "slow", "decay_init='slow'"),
    ("conv_init", "zero", "conv_init='zero'"),
    ("implementation", "cuda", "implementation='cuda'"),
  ],
)
def test_bad_fields_are_named(field, value, says):
  config = Mamba2Config()
  setattr(config, field, value)
  with pytest.raises(ValueError, match=f"model.mamba2.{says}"):
    config.validate("model.mamba2")
