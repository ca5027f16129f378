"""The Mamba-3 layer: definition, initial values, counts, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gdn2_jax.model.mixers.mamba3 import (
  Mamba3Config,
  Mamba3Mixer,
  accumulate_angles,
  init_mamba3_cache,
)
from tests.model.mixers.cases import (
  CONFIGS,
  D,
  assert_equals_textbook,
  case,
  case_of,
  inputs,
)
from tests.numerics import assert_close, rel_rms


def sigmoid(x):
  return 1 / (1 + jnp.exp(-x))


def rms(x, eps):
  return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + eps)


def textbook(p, c, u):
  """The layer of one row u [T, D], token by token, by Eq. 16."""
  z, x, B, C, dt, a, lam, angle = (
    jnp.tensordot(u, p[f"{name}_proj"]["kernel"], 1)
    for name in ("z", "x", "B", "C", "dt", "A", "lam", "angle")
  )
  dt, lam = jnp.log1p(jnp.exp(dt + p["dt_bias"])), sigmoid(lam)
  if c.a_rule == "softplus":
    a = jnp.log1p(jnp.exp(a))
  else:
    a = jnp.where(a >= 0, 1 + a, 1 / (1 - a))
  H, R, N, P = c.num_heads, c.mimo_rank, c.state_dim, c.head_dim
  ones = jnp.ones((H, R, P))
  into, gate, out_of = (p.get(f"mimo_{n}", ones) for n in "xzo")

  def key(name, value, phi):  # value [R, N], result [H, R, N]
    y = rms(value, c.norm_eps) * p[f"{name}_norm"]
    y = y[None] + p[f"{name}_bias"]
    first, second = y[..., : N // 2], y[..., N // 2 :]
    turn = jnp.zeros((H, 1, N // 2)).at[:, 0, : c.num_angles].set(phi)
    cos, sin = jnp.cos(turn), jnp.sin(turn)
    return jnp.concatenate(
      [first * cos - second * sin, first * sin + second * cos], axis=-1
    )

  def token(carry, xs):
    h, phi, before = carry
    z, x, B, C, dt, a, lam, angle = xs
    phi = phi + dt[:, None] * jnp.pi * jnp.tanh(angle)
    alpha = jnp.exp(-jnp.maximum(a, 1e-4) * dt)[:, None, None]
    x = x[:, None] * into
    now = jnp.einsum("hrn,hrp->hnp", key("B", B, phi), x)
    lam, dt = lam[:, None, None], dt[:, None, None]
    h = alpha * h + (1 - lam) * dt * alpha * before + lam * dt * now
    y = jnp.einsum("hrn,hnp->hrp", key("C", C, phi), h)
    y = y + p["D"][:, None, None] * x
    if c.out_norm:
      y = rms(y, c.norm_eps) * p["o_norm"][:, None]
    gated = z[:, None] * gate
    y = (y * gated * sigmoid(gated) * out_of).sum(1)
    return (h, phi, now), jnp.tensordot(y, p["o_proj"]["kernel"], 2)

  nothing = jnp.zeros((H, N, P))
  first = nothing, jnp.zeros((H, c.num_angles)), nothing
  return jax.lax.scan(token, first, (z, x, B, C, dt, a, lam, angle))[1]


@pytest.mark.deep
@pytest.mark.parametrize("name", ["N", "N rank 3"])
def test_the_layer_and_its_gradients_equal_the_textbook(name):
  assert_equals_textbook(CONFIGS[name], textbook, length=7)


# The gradient of the angles is a small rest of large terms: programs that XLA
# does not optimize lose a digit of it, 1.7e-5 where users get below 2e-6.
@pytest.mark.deep
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", ["N", "N rank 3"])
def test_the_chunkwise_layer_equals_the_textbook(name):
  config = dataclasses.replace(CONFIGS[name], implementation="xla")
  assert_equals_textbook(config, textbook)


@pytest.mark.deep
def test_a_second_rank_that_neither_writes_nor_is_read_changes_nothing():
  siso, x = case("N"), inputs(2, 9)
  want, _ = siso.apply(siso.params, x)
  config = dataclasses.replace(CONFIGS["N"], mimo_rank=2)
  params = dict(siso.params)
  for name in "BC":
    kernel = params[f"{name}_proj"]["kernel"]
    params[f"{name}_proj"] = {"kernel": jnp.tile(kernel, (1, 2, 1))}
    params[f"{name}_bias"] = jnp.tile(params[f"{name}_bias"], (1, 2, 1))
  only_first = jnp.zeros((4, 2, 16)).at[:, 0].set(1)
  params |= {"mimo_x": only_first, "mimo_o": only_first}
  params["mimo_z"] = jnp.ones((4, 2, 16))
  apply = case_of(config).apply
  assert_close({"y": apply(params, x)[0]}, {"y": want})
  params["mimo_x"] = jnp.ones((4, 2, 16))
  assert rel_rms(apply(params, x)[0], want) > 0.1


def test_angles_of_long_rows_stay_accurate():
  rng = np.random.default_rng(0)
  step = rng.uniform(0, 1, (1, 4096, 1, 2)).astype(np.float32)
  got = jax.jit(accumulate_angles)(jnp.asarray(step))
  assert np.abs(got).max() <= 1
  exact = np.cumsum(step.astype(np.float64), axis=1)
  turns = (np.asarray(got, np.float64) - exact) / 2
  # Measured 1.3e-6; a float32 sum that reaches 2000 is off by 3e-5 and more.
  assert np.abs(turns - np.round(turns)).max() < 5e-6


BIG = {"inner_dim": 2048, "head_dim": 16, "state_dim": 64}


@pytest.mark.parametrize(
  ("decay_init", "rank"),
  [
    ("paper", 2),
    pytest.param("paper", 1, marks=pytest.mark.deep),
    pytest.param("long", 1, marks=pytest.mark.deep),
  ],
)
def test_initial_moments_of_every_parameter(decay_init, rank):
  config = Mamba3Config(
    **BIG, decay_init=decay_init, mimo_rank=rank, out_norm=rank > 1
  )
  mixer = Mamba3Mixer(config, num_layers=8)
  x = jnp.zeros((1, 4, 256))
  params = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), x))["params"]
  values = {n: np.asarray(jax.tree.leaves(v)[0]) for n, v in params.items()}
  constants = {f"{n}_{part}": 1 for n in "BC" for part in ("norm", "bias")}
  constants["D"] = 1
  if rank > 1:
    constants |= {"mimo_x": 0.5, "mimo_o": 0.5, "mimo_z": 1, "o_norm": 1}
  for name, constant in constants.items():
    np.testing.assert_array_equal(values.pop(name), constant, err_msg=name)
  into = 1 / np.sqrt(256)
  projections = ("z", "x", "B", "C", "dt", "A", "lam", "angle")
  high = {"paper": 1e-1, "long": 1e-2}[decay_init]
  limits = {
    **{f"{n}_proj": (-into, into) for n in projections},
    # fan-in 2048, and 16 residual branches.
    "o_proj": (-1 / np.sqrt(2048 * 16), 1 / np.sqrt(2048 * 16)),
    "log dt": (np.log(1e-3), np.log(high)),
  }
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


@pytest.mark.parametrize(("rank", "norm"), [(1, False), (4, False), (4, True)])
def test_parameters_are_as_many_as_those_of_the_reference_layer(rank, norm):
  config = Mamba3Config(inner_dim=4096, mimo_rank=rank, out_norm=norm)
  mixer = Mamba3Mixer(config, num_layers=1)
  x = jax.ShapeDtypeStruct((1, 4, 2048), jnp.float32)
  shapes = jax.eval_shape(mixer.init, jax.random.key(0), x)
  # The reference: in_proj for z, x, B, C, dt, A, the weight and the angles;
  # dt_bias and D; biases and norms of B and C; three arrays of MIMO; the
  # optional norm; out_proj.
  in_proj = 2048 * (2 * 4096 + 2 * 64 * rank + 3 * 64 + 16)
  of_bc = 2 * 64 * rank * 64 + 2 * 64
  mimo = 3 * 64 * rank * 64 if rank > 1 else 0
  want = in_proj + 2 * 64 + of_bc + mimo + 4096 * norm + 4096 * 2048
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == want


@pytest.mark.parametrize("rank", [1, 4])
def test_the_state_has_as_many_floats_as_that_of_gdn2(rank):
  config = Mamba3Config(inner_dim=4096, mimo_rank=rank)
  cache = jax.eval_shape(lambda: init_mamba3_cache(config, 1, "bfloat16"))
  assert cache.state.size == 16 * 128 * 128
  assert cache.state.dtype == cache.angle.dtype == jnp.float32
  assert cache.angle.size == 64 * 16
  assert (cache.b.size, cache.x.size) == (rank * 64 * 64, 4096)


def test_parameters_of_heads_stay_float32():
  config = dataclasses.replace(CONFIGS["N rank 3"])
  mixer = Mamba3Mixer(config, 1, "bfloat16", "bfloat16")
  x = jnp.zeros((1, 4, D), jnp.bfloat16)
  shapes = jax.eval_shape(mixer.init, jax.random.key(0), x)
  params = nn.unbox(shapes)["params"]
  kept = ("dt_bias", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")
  for name in kept:
    assert params.pop(name).dtype == jnp.float32
  assert {str(a.dtype) for a in jax.tree.leaves(params)} == {"bfloat16"}


@pytest.mark.parametrize(
  ("field", "value", "says"),
  [
    ("inner_dim", 72, "inner_dim=72: expected a positive multiple of head_dim"),
    ("head_dim", 8, "head_dim=8: expected 16 to 256"),
    ("state_dim", 17, "state_dim=17: expected an even number"),
    ("mimo_rank", 0, "mimo_rank=0"),
    ("rope_fraction", 0.25, "rope_fraction=0.25"),
    ("a_rule", "exp", "a_rule='exp'"),
    ("norm_eps", 0.0, "norm_eps=0.0"),
    ("decay_init", "slow", "decay_init='slow'"),
    ("implementation", "cuda", "implementation='cuda'"),
  ],
)
def test_bad_fields_are_named(field, value, says):
  config = Mamba3Config()
  setattr(config, field, value)
  with pytest.raises(ValueError, match=f"model.mamba3.{says}"):
    config.validate("model.mamba3")
