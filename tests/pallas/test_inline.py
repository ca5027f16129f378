"""Device code of inline.py on simulated threads, against jax.numpy."""

import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.kernels import target
from gdn2_jax.pallas import blocks, inline
from gdn2_jax.pallas.gdn2.chunk.rows import load_row
from tests.aot.test_turns import modules
from tests.pallas import threads

C, R, ABOVE = 64, 16, 64
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Ref:
  """A NumPy array with the indexing of a reference."""

  def __init__(self, array):
    self.array = array

  dtype = property(lambda self: self.array.dtype)
  at = property(lambda self: self)

  def __getitem__(self, index):
    part = self.array[self._slices(index)]
    return Ref(part) if index is not ... else jnp.asarray(part)

  def __setitem__(self, index, x):
    self.array[self._slices(index)] = x

  def __ne__(self, other):
    return self.array != other

  def _slices(self, index):
    if not isinstance(index, tuple):
      index = (index,)
    return tuple(
      slice(i.start, i.start + i.size) if hasattr(i, "start") else i
      for i in index
    )


@functools.cache
def lowered(K):
  """Bodies by name, from a kernel that calls every function once."""
  names = []

  def body(x_gm, o_gm, x_ref, *buffers):
    narrow, broad, kinds, T, X, tile, met = buffers
    wg = lax.axis_index("wg")
    rows = [load_row(x_ref, r) for r in range(R)]

    def call(name, function, *args):
      names.append(name)
      return function(*args)

    for columns, ref in ((32, narrow), (64, broad)):
      call(
        f"store {columns}",
        inline.store_transposed,
        ref,
        ABOVE,
        wg * R,
        rows,
        columns,
      )
    call("substitute", inline.substitute, T, X)
    differs = call("any_differs", inline.any_differs, kinds, wg * R, R, 1)
    y = blocks.load(tile)
    parts = [y[:, n : n + 8] for n in range(0, 32, 8)]
    joined = call("join", inline.join, parts)
    y = joined.astype(jnp.bfloat16)
    y = call("widen", inline.widen, y)
    y = call("reciprocal", inline.reciprocal, y)
    tile[...] = call("exp2_of_minus_abs", inline.exp2_of_minus_abs, y)
    pl.when(differs)(lambda: blocks.meet(met, 4))
    plgpu.copy_smem_to_gmem(x_ref, o_gm)

  shape = blocks.struct((R, K), jnp.bfloat16)

  def run(x):
    return blocks.call(
      "inline",
      body,
      shape,
      scratch_types=[
        plgpu.SMEM((R, K), jnp.bfloat16),
        blocks.tiled((ABOVE + K, C), jnp.float16, 32),
        blocks.tiled((ABOVE + K, C), jnp.bfloat16, 64),
        plgpu.SMEM((C,), jnp.int32),
        plgpu.SMEM((C, R), jnp.float32),
        plgpu.SMEM((C, 2 * R), jnp.float32),
        blocks.tiled((C, 32), jnp.float32, 32),
        plgpu.Barrier(num_arrivals=4),
      ],
      num_threads=4,
      thread_name="wg",
    )(x)

  (module,) = modules(run, shape)
  parsed, found = threads.bodies(module)
  assert len(found) == len(names)
  return parsed, dict(zip(names, found, strict=True))


def device(name, *operands, K=128, wg=0):
  warpgroup = threads.Warpgroup(wg)
  return warpgroup.run(lowered(K)[1][name], *operands), warpgroup


def in_numpy(function, *args):
  with target.use("interpret"):
    return function(*args)


def in_tiles(x, columns):
  """A matrix as it lies in swizzled tiles of 8 by `columns`, by definition."""
  row, column = np.indices(x.shape)
  tile = row // 8 * (x.shape[1] // columns) + column // columns
  address = 2 * columns * (8 * tile + row % 8) + 2 * (column % columns)
  # 16-byte pieces are permuted by address bits 7 and up.
  piece = address >> 7 & (2 * columns // 16 - 1)
  out = np.zeros(x.size, x.dtype)
  out[(address ^ piece << 4) // 2] = x
  return out


@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize(
  ("columns", "dtype"), [(32, "float16"), (64, "bfloat16")]
)
def test_stores_into_tiles(K, columns, dtype, rng):
  rows = list(rng.standard_normal((R, K)).astype(np.float32))
  for wg in range(4):
    before = rng.standard_normal((ABOVE + K, C)).astype(DTYPES[dtype])
    want = before.copy()
    in_numpy(
      inline.store_transposed,
      Ref(want),
      ABOVE,
      wg * R,
      map_to_jax(rows),
      columns,
    )
    assert (want != before).any()
    memory = in_tiles(before, columns)
    _, warpgroup = device(f"store {columns}", memory, wg * R, *rows, K=K, wg=wg)
    np.testing.assert_array_equal(memory, in_tiles(want, columns))
    # Eight threads at a time write 16 bytes each: all 32 banks once.
    assert len(warpgroup.stores) == R // 8
    for spans in warpgroup.stores:
      for some in spans.reshape(-1, 8 * 16):
        assert len(set(some // 4 % 32)) == 32


def test_widened_numbers_are_the_same(rng):
  x = rng.standard_normal((C, 32)).astype(ml_dtypes.bfloat16)
  x[0, :4] = 0, np.inf, -np.inf, 1e-39
  actual, _ = device("widen", x)
  assert actual.dtype == np.float32
  np.testing.assert_array_equal(actual, x.astype(np.float32))


@pytest.mark.parametrize("name", ["reciprocal", "exp2_of_minus_abs"])
def test_functions_of_one_number(name, rng):
  x = rng.uniform(1, 9, (C, 32)).astype(np.float32)
  x[0, 0] = np.inf
  if name == "reciprocal":
    want = 1 / x
  else:
    x *= rng.choice([-1, 1], x.shape)
    want = np.exp2(-np.abs(x))
  actual, _ = device(name, x)
  np.testing.assert_allclose(actual, want, rtol=1e-6)
  function = getattr(inline, name)
  np.testing.assert_allclose(
    in_numpy(function, jnp.asarray(x)), want, rtol=1e-6
  )


def map_to_jax(rows):
  return [jnp.asarray(x) for x in rows]


def test_substitution(rng):
  T = rng.standard_normal((4, R, R)).astype(np.float32) / 4
  T = np.tril(T, -1)
  want, actual = np.full((2, C, 2 * R), np.nan, np.float32)
  in_numpy(inline.substitute, Ref(T.reshape(C, R)), Ref(want))
  device("substitute", T.reshape(C, R), actual)
  np.testing.assert_allclose(actual, want, rtol=1e-5, atol=1e-6)
  exact = np.linalg.inv(np.eye(R) - T.astype(np.float64))
  blocks_ = actual.reshape(4, R, 2 * R)
  np.testing.assert_allclose(blocks_[..., :R], exact, rtol=1e-4, atol=1e-5)
  assert not blocks_[..., R:].any()


@pytest.mark.parametrize("wg", range(4))
def test_a_kind_that_differs(wg):
  for special in (None, 0, 15, 16, 31, 37, 63):
    kinds = np.ones(C, np.int32)
    if special is not None:
      kinds[special] = 2
    want = in_numpy(inline.any_differs, Ref(kinds), wg * R, R, 1)
    bits, _ = device("any_differs", kinds, wg * R, wg=wg)
    assert bool(want) == (special is not None and special // R == wg)
    assert ((bits != 0) == bool(want)).all()


def test_tiles_side_by_side(rng):
  parts = list(rng.standard_normal((4, C, 8)).astype(np.float32))
  joined, _ = device("join", *parts)
  np.testing.assert_array_equal(joined, np.concatenate(parts, axis=1))
  np.testing.assert_array_equal(
    joined, in_numpy(inline.join, map_to_jax(parts))
  )
