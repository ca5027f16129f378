"""Caches, packed rows, padding, causality and meshes, for Mamba-2 and 3."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gdn2_jax.sharding import MeshConfig, make_mesh, shardings_of, use_mesh
from tests.model.mixers.cases import CONFIGS, D, case, inputs
from tests.numerics import assert_close

pytestmark = pytest.mark.slow

ROWS, T = 3, 12
NAMES = tuple(CONFIGS)
# With three ranks everything of one rank is used.
QUICK = ("M", pytest.param("N", marks=pytest.mark.deep), "N rank 3")
# float32 results that sum in another order; outputs are of order ten.
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)


@functools.cache
def whole(name):
  """The outputs of ROWS rows of T tokens, and their inputs."""
  layer, x = case(name), inputs(ROWS, T)
  return x, np.asarray(layer.apply(layer.params, x)[0])


def scale_of(name):
  return np.abs(whole(name)[1]).max()


@pytest.mark.parametrize("name", QUICK)
def test_prefill_and_single_tokens_equal_the_sequence(name):
  layer, (x, want) = case(name), whole(name)
  cache, parts = layer.init_cache(ROWS), []
  for start, end in ((0, 5), (5, 6), (6, 7), (7, 12)):
    y, cache = layer.apply(layer.params, x[:, start:end], None, cache)
    parts.append(y)
  close(jnp.concatenate(parts, axis=1) / scale_of(name), want / scale_of(name))


def packed_row(x):
  """Documents of 5, 1 and 3 tokens, the first id twice, and padding of NaN."""
  ids = np.array([[1] * 5 + [0] + [2] + [1] * 3 + [0] * 2], np.int32)
  row = np.concatenate(
    [x[0, :5], x[0, :1], x[1, :1], x[2, :3], x[0, :2]], axis=0
  )[None]
  row = np.where(ids[..., None] == 0, np.nan, row)
  return jnp.asarray(np.repeat(row, ROWS, 0)), np.repeat(ids, ROWS, axis=0)


@pytest.mark.parametrize("name", QUICK)
def test_packed_equals_separate_and_padding_changes_nothing(name):
  layer, (x, want) = case(name), whole(name)
  row, ids = packed_row(np.asarray(x))
  y, cache = layer.apply(layer.params, row, ids, layer.init_cache(ROWS))
  got = [y[0, :5], y[0, 6:7], y[0, 7:10]]
  scale = scale_of(name)
  for part, document in zip(got, (want[0], want[1], want[2]), strict=True):
    close(part / scale, document[: len(part)] / scale)
  # The cache continues the last document, rows without a token keep theirs.
  next_token = jnp.repeat(x[2:, 3:4], ROWS, axis=0)
  y, _ = layer.apply(layer.params, next_token, None, cache)
  close(y[:, 0] / scale, np.repeat(want[2:, 3], ROWS, 0) / scale)
  ids = np.array([[2], [0], [1]], np.int32)
  y, after = layer.apply(layer.params, next_token, ids, cache)
  for new, old in zip(*map(jax.tree.leaves, (after, cache)), strict=True):
    np.testing.assert_array_equal(new[1], old[1])
    assert np.abs(new[2] - old[2]).max() > 0
  # A first token continues the state, whatever its id.
  close(y[2, 0] / scale, want[2, 3] / scale)
  np.testing.assert_array_equal(y[0], y[2])


@pytest.mark.parametrize("name", QUICK[1:])
def test_padding_inside_a_document_is_skipped(name):
  """Mamba-3 has no convolution, so nothing depends on places in a row."""
  layer, (x, want) = case(name), whole(name)
  kept = np.array([1, 2, 3, 6, 8, 9])
  ids = np.zeros((ROWS, T), np.int32)
  ids[:, kept] = 7
  row = np.full((ROWS, T, D), np.nan, np.float32)
  row[:, kept] = x[:, : len(kept)]
  y, cache = layer.apply(layer.params, row, ids, layer.init_cache(ROWS))
  close(y[:, kept] / scale_of(name), want[:, : len(kept)] / scale_of(name))
  y, _ = layer.apply(layer.params, x[:, 6:7], None, cache)
  close(y[:, 0] / scale_of(name), want[:, 6] / scale_of(name))


@pytest.mark.parametrize("name", QUICK)
def test_later_inputs_change_no_bit_of_earlier_outputs(name):
  layer, (x, want) = case(name), whole(name)
  cut = 7
  other = x.at[:, cut:].multiply(-3)
  got = np.asarray(layer.apply(layer.params, other)[0])
  np.testing.assert_array_equal(got[:, :cut], want[:, :cut])
  assert np.abs(got[:, cut] - want[:, cut]).max() > 0


HEADS = MeshConfig(data=2, fsdp=2, tensor=2)
TOKENS = MeshConfig(fsdp=2, context=4)


@pytest.mark.parametrize(
  ("name", "mesh"),
  [
    *(pytest.param(n, HEADS, marks=pytest.mark.deep) for n in NAMES),
    *(pytest.param(n, TOKENS, marks=pytest.mark.deep) for n in NAMES),
  ],
)
def test_sharded_equals_one_device(name, mesh):
  layer, (x, _) = case(name), whole(name)
  x = jnp.concatenate([x, x[:1]])
  ids = np.repeat([[1] * 4 + [2] * 8], 4, axis=0).astype(np.int32)
  weights = jax.random.normal(jax.random.key(2), x.shape)

  def loss(params, x):
    y, _ = layer.apply(params, x, ids)
    return (weights * y).mean(), y

  run = jax.value_and_grad(loss, has_aux=True)
  (_, want), want_grad = jax.jit(run)(layer.params, x)
  abstract = jax.ShapeDtypeStruct((1, 4, D), jnp.float32)
  boxed = jax.eval_shape(layer.mixer.init, jax.random.key(0), abstract)
  with use_mesh(make_mesh(mesh)) as devices:
    params = jax.device_put(
      layer.params, shardings_of(boxed["params"], devices)
    )
    (_, got), grad = jax.jit(run)(params, x)
  kernel = params["z_proj"]["kernel"]
  parts = (mesh.fsdp * mesh.context, mesh.tensor)
  shard = kernel.addressable_shards[0].data.shape
  assert shard == (D // parts[0], 4 // parts[1], 16)
  close(got / scale_of(name), want / scale_of(name))
  grads = (
    dict(jax.tree_util.tree_leaves_with_path(g)) for g in (grad, want_grad)
  )
  assert_close(*grads)


@pytest.mark.parametrize("name", QUICK)
def test_every_parameter_has_logical_axes(name):
  x = jax.ShapeDtypeStruct((1, 4, D), jnp.float32)
  boxed = jax.eval_shape(case(name).mixer.init, jax.random.key(0), x)
  leaves = jax.tree.leaves(
    boxed["params"], is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )
  for leaf in leaves:
    assert len(leaf.names) == leaf.value.ndim
    assert None not in leaf.names
