"""The embedding: its values, and the sum of its gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gdn2_jax.model.layers import Embedding
from gdn2_jax.sharding import MeshConfig, make_mesh, use_mesh

VOCAB, D = 16, 8


def table_of(dtype=jnp.float32):
  return jax.random.normal(jax.random.key(0), (VOCAB, D), dtype)


def apply(table, tokens, dtype="bfloat16"):
  embedding = Embedding(VOCAB, D, dtype=dtype, param_dtype=table.dtype.name)
  return embedding.apply({"params": {"table": table}}, tokens)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_frequent_token_is_the_whole_sum(param_dtype):
  """4,096 terms of one size: a bfloat16 sum of ones ends at 256."""
  tokens = np.full((4, 1025), 5, np.int32)
  tokens[:, 7] = 3
  dy = 1 + jax.random.uniform(jax.random.key(1), (4, 1025, D))
  dy = dy.astype(jnp.bfloat16)
  _, pullback = jax.vjp(
    lambda t: apply(t, jnp.asarray(tokens)), table_of(param_dtype)
  )
  (got,) = pullback(dy)
  assert got.dtype == param_dtype
  want = np.zeros((VOCAB, D))
  np.add.at(want, tokens, np.asarray(dy, np.float64))
  # One rounding of the sum; float32 sums of 4,096 terms are far below 2**-16.
  bound = {"float32": 2**-16, "bfloat16": 2**-8}[param_dtype]
  np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=bound)


def test_rows_are_those_of_the_table_in_both_modes():
  table, tokens = table_of(), jnp.asarray([[3, 15, 3, 0]])
  dtable = table[::-1]
  rows, drows = jax.jvp(lambda t: apply(t, tokens), (table,), (dtable,))
  low = table.astype(jnp.bfloat16)
  np.testing.assert_array_equal(rows, low[tokens])
  np.testing.assert_array_equal(drows, dtable.astype(jnp.bfloat16)[tokens])
  rows = apply(table, jnp.asarray([[VOCAB, 1]]))
  assert np.isnan(np.asarray(rows[0, 0], np.float32)).all()
  np.testing.assert_array_equal(rows[0, 1], low[1])


def test_float32_is_the_gather_and_its_transpose_bit_for_bit():
  tokens = jax.random.randint(jax.random.key(1), (4, 64), 0, VOCAB)
  dy = jax.random.normal(jax.random.key(2), (4, 64, D))

  def gather(table):
    return jnp.take(table, tokens, axis=0, mode="fill")

  want, want_pullback = jax.vjp(gather, table_of())
  got, pullback = jax.vjp(lambda t: apply(t, tokens, "float32"), table_of())
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(pullback(dy)[0], want_pullback(dy)[0])


@pytest.mark.parametrize(
  "mesh", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2}]
)
def test_devices_exchange_16_bits_and_sum_in_32(mesh):
  names = ("batch", "length", "act_embed")

  def gradient(table, tokens, dy):
    y, pullback = jax.vjp(lambda t: apply(t, tokens), table)
    (dtable,) = pullback(nn.with_logical_constraint(dy, names))
    dtable = nn.with_logical_constraint(dtable, ("vocab", "embed"))
    return nn.with_logical_constraint(y, names), dtable

  shape = (4, 6, D)
  with use_mesh(make_mesh(MeshConfig(**mesh), jax.devices()[:4])):
    lowered = jax.jit(gradient).lower(
      jax.ShapeDtypeStruct((VOCAB, D), jnp.float32),
      jax.ShapeDtypeStruct(shape[:2], jnp.int32),
      jax.ShapeDtypeStruct(shape, jnp.bfloat16),
    )
    compiled = lowered.compile().as_text()
  # What the constraints move: rows there, and their gradients back.
  moved = re.findall(
    r"sharding_constraint .*tensor<4x6x8x(\w+)>", lowered.as_text()
  )
  assert len(moved) >= 6 and set(moved) == {"bf16"}, moved
  # What a vocabulary that is split adds up.
  gathered = re.findall(r" = (\w+)\[\S* gather\(", compiled)
  assert gathered == ["bf16"], gathered
  scattered = re.findall(r" = (\w+)\[\S* scatter\(", compiled)
  assert scattered == ["f32"], scattered
