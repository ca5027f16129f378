"""Small layers of Mamba-2 and Mamba-3, and comparisons in float64."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gdn2_jax.model.mixers.mamba2 import (
  Mamba2Config,
  Mamba2Mixer,
  init_mamba2_cache,
)
from gdn2_jax.model.mixers.mamba3 import (
  Mamba3Config,
  Mamba3Mixer,
  init_mamba3_cache,
)
from tests.numerics import assert_close

D, NUM_LAYERS = 32, 3  # width of the model, and its layers
SIZES = {"inner_dim": 64, "head_dim": 16, "state_dim": 24}


@dataclasses.dataclass(frozen=True)
class Case:
  """A layer with random parameters.

  Attributes:
    mixer: the module.
    params: its parameters, none at its initial value.
    apply: jitted (params, x, segment_ids, cache) -> y, cache.
    init_cache: batch size -> empty cache.
  """

  mixer: nn.Module
  params: Any
  apply: Callable[..., Any]
  init_cache: Callable[[int], Any]


CONFIGS = {
  "M": Mamba2Config(**SIZES, conv_init="current", implementation="reference"),
  "N": Mamba3Config(**SIZES, implementation="reference"),
  "N rank 3": Mamba3Config(
    **SIZES,
    mimo_rank=3,
    rope_fraction=1.0,
    a_rule="heavy_tail",
    out_norm=True,
    implementation="reference",
  ),
}


def make_mixer(config: Any, **fields: Any) -> nn.Module:
  """The module of a config."""
  is_mamba2 = isinstance(config, Mamba2Config)
  make = Mamba2Mixer if is_mamba2 else Mamba3Mixer
  return make(config, NUM_LAYERS, **fields)


def case_of(config: Any) -> Case:
  """A layer of this config with random parameters."""
  mixer = make_mixer(config)
  x = jax.ShapeDtypeStruct((1, 4, D), jnp.float32)
  shapes = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x))["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: jnp.asarray(rng.normal(0.2, 0.3, a.shape), a.dtype), shapes
  )
  is_mamba2 = isinstance(config, Mamba2Config)
  init = init_mamba2_cache if is_mamba2 else init_mamba3_cache

  @jax.jit
  def apply(params, x, segment_ids=None, cache=None):
    return mixer.apply({"params": params}, x, segment_ids, cache)

  return Case(mixer, params, apply, lambda rows: init(config, rows, "float32"))


@functools.cache
def case(name: str) -> Case:
  """The case of CONFIGS of this name."""
  return case_of(CONFIGS[name])


def inputs(rows: int, length: int) -> jax.Array:
  """Random inputs [rows, length, D]."""
  return jax.random.normal(jax.random.key(1), (rows, length, D))


def assert_equals_textbook(
  config: Any, textbook: Callable[..., Any], length: int = 9
) -> None:
  """Compares a layer in float32 with a loop over tokens in float64.

  Args:
    config: of the layer.
    textbook: textbook(params, config, u [T, D]) -> [T, D].
    length: tokens.

  Values and all gradients must agree to 1e-5 of their root mean square.
  """
  layer, x = case_of(config), inputs(2, length)
  weights = jax.random.normal(jax.random.key(2), x.shape)

  def loss(run, params, x, weights):
    y = run(params, x)
    return (weights * y).sum(), y

  def of(run, *arrays):
    grad = jax.grad(functools.partial(loss, run), (0, 1), has_aux=True)
    grads, y = jax.jit(grad)(*arrays)
    return {"y": y, "dx": grads[1]} | {
      jax.tree_util.keystr(path): leaf
      for path, leaf in jax.tree_util.tree_flatten_with_path(grads[0])[0]
    }

  actual = of(lambda p, x: layer.apply(p, x)[0], layer.params, x, weights)
  # A textbook broadcasts freely.
  with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
    wide = jax.tree.map(
      lambda a: jnp.asarray(np.asarray(a), jnp.float64),
      (layer.params, x, weights),
    )
    rows = jax.vmap(
      lambda p, x: textbook(p, config, x), in_axes=(None, 0), out_axes=0
    )
    exact = jax.tree.map(np.asarray, of(rows, *wide))
  assert exact["y"].dtype == np.float64
  assert set(actual) == set(exact)
  assert_close(actual, exact)
