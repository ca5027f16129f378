"""The layer's token in one kernel: which layers use it, and their results."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gdn2_jax.inference.state import advance, init_state
from gdn2_jax.kernels import target
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.layers import Linear, xavier_uniform
from gdn2_jax.model.mixers.gdn2 import GDN2Config, GDN2Mixer, init_gdn2_cache
from gdn2_jax.ops.layer_step import least_rows
from tests.numerics import rel_rms
from tests.pallas.gdn2.test_step import interpret
from tests.random_params import random_params

SIZES = {"num_heads": 2, "key_dim": 64, "value_dim": 64}


def slow(options):
  return pytest.param(options, marks=pytest.mark.deep)


def kernels_of_a_token(config, mixer=GDN2Mixer, mutable=False, **types):
  """Names of the kernels that a token of a layer launches on a GPU."""
  types = {"dtype": "bfloat16", **types}
  x = jax.ShapeDtypeStruct((2, 1, 32), types["dtype"])

  def token(x):
    layer = mixer(config, **types)
    cache = init_gdn2_cache(config, 2, types["dtype"])
    params = nn.unbox(layer.init(jax.random.key(0), x))
    return layer.apply(params, x, None, cache, mutable=mutable)

  with target.use("compile"):
    program = jax.make_jaxpr(token)(x)
  return set(re.findall(r"name=(gdn2_(?:layer_)?step)\b", str(program)))


@pytest.mark.parametrize(
  "options",
  [
    {},
    slow({"gates": "tied", "decay": "scalar"}),  # Gated DeltaNet
    slow({"gates": "tied"}),  # Kimi Delta Attention
    slow({"implementation": "mosaic_gpu"}),
    slow({"value_dim": 128, "negative_eigenvalues": True}),
    slow({"erase_gate": "head", "write_gate": "head"}),
    slow({"output_gate": "sigmoid"}),
  ],
  ids=str,
)
def test_a_token_is_one_kernel(options):
  config = GDN2Config(**(SIZES | options))
  assert kernels_of_a_token(config) == {"gdn2_layer_step"}


@pytest.mark.parametrize(
  "options",
  [
    {"num_value_heads": 4},
    slow({"key_dim": 48}),
    slow({"conv_width": 5}),
    slow({"erase_gate": "scalar"}),
    slow({"gates": "tied", "decay": "none"}),  # DeltaNet
  ],
  ids=str,
)
def test_what_the_kernel_does_not_support_takes_the_step(options):
  config = GDN2Config(**(SIZES | options))
  assert kernels_of_a_token(config) == {"gdn2_step"}


class SquaredErase(GDN2Mixer):
  def gates(self, g, b, w):
    return g, b * b, w


def test_own_gates_and_recorded_values_take_the_step():
  config = GDN2Config(**SIZES)
  assert kernels_of_a_token(config, SquaredErase) == {"gdn2_step"}
  recorded = kernels_of_a_token(config, mutable=["intermediates"])
  assert recorded == {"gdn2_step"}


def test_no_kernel_runs_where_xla_is_named():
  config = GDN2Config(**SIZES, implementation="xla")
  assert kernels_of_a_token(config) == set()


def small_model(dtype, num_layers=2, **changes):
  """Config and parameters of a small model of GDN-2 layers."""
  config = ModelConfig(
    vocab_size=31,
    model_dim=16,
    num_layers=num_layers,
    pattern="G",
    gdn2=GDN2Config(num_heads=1, key_dim=64, value_dim=64),
    mlp_dim=16,
    dtype=dtype,
    **changes,
  )
  return config, random_params(config)


def decode(config, params, tokens):
  """Logits after each token, and the cache after the last."""
  # A new function per call: the target is no part of the key of jit's cache.
  step = jax.jit(lambda *args: advance(*args))
  state, logits = init_state(config, 1), []
  for token in tokens:
    out, state = step(params, jnp.asarray([token]), state)
    logits.append(out[0])
  return jnp.stack(logits), state.cache


@pytest.mark.parametrize(
  ("dtype", "layers"),
  [("float32", 1), pytest.param("bfloat16", 2, marks=pytest.mark.deep)],
)
def test_a_model_decodes_the_same(dtype, layers):
  # Not in a scan: Flax does not take the interpreter's callbacks there.
  config, params = small_model(dtype, layers, scan_layers=False)
  wanted, cache = decode(config, params, tokens := [3, 1, 4])
  actual, same = interpret(lambda: decode(config, params, tokens))
  bound = 1e-5 if dtype == "float32" else 2**-6
  assert rel_rms(actual, wanted) < bound
  np.testing.assert_array_equal(actual.argmax(-1), wanted.argmax(-1))
  for x, y in zip(jax.tree.leaves(same), jax.tree.leaves(cache), strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert rel_rms(x, y) < bound


def test_a_scan_over_layers_takes_the_kernel():
  config, params = small_model("bfloat16", scan_unroll=1)
  state = jax.eval_shape(lambda: init_state(config, 2))
  token = jax.ShapeDtypeStruct((2,), jnp.int32)
  with target.use("compile"):
    program = jax.make_jaxpr(advance)(params, token, state)
  assert "name=gdn2_layer_step" in str(program)


def test_a_product_of_one_row_is_one_of_two_equal_rows():
  x = jax.random.normal(jax.random.key(0), (1, 1, 2, 4))
  linear = functools.partial(
    Linear, (3,), ("heads", "value_dim", "embed"), xavier_uniform(1.0, 2)
  )
  params = linear().init(jax.random.key(1), x)
  y = linear(min_rows=2).apply(params, x)
  np.testing.assert_allclose(y, linear().apply(params, x), rtol=1e-6)
  program = str(jax.make_jaxpr(linear(min_rows=2).apply)(params, x))
  assert "f32[2,1,3] = dot_general" in program
  rows = [jnp.zeros((n, 1, 8)) for n in (1, 2)]
  assert [least_rows(x) for x in rows] == [1, 1]
  with target.use("compile"):
    assert [least_rows(x) for x in rows] == [2, 1]
