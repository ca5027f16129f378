"""Device code of intra_grad's stages on simulated threads, in NumPy."""

import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks
from gdn2_jax.pallas.gdn2.grad import channel_sums, diagonals
from tests.aot.test_turns import modules
from tests.pallas import threads
from tests.pallas.test_inline import in_tiles

C, BLOCK, LEVELS = 64, 16, (8, 4, 2, 1)


@functools.cache
def lowered():
  """Bodies of a kernel that calls every function once, in its order."""

  def body(x_gm, o_gm, sums, levels, diagonal):
    wg = lax.axis_index("wg")
    x = blocks.load_global(x_gm)
    channel_sums.store(sums.at[wg], x[:, :BLOCK], x[:, BLOCK:])
    loaded = channel_sums.load(sums)
    parts = blocks.split(x, jnp.bfloat16)
    refs = [
      [levels.at[pl.ds((2 * n + m) * C, C)] for m in range(2)] for n in range(4)
    ]
    diagonals.store(refs, parts, wg)
    diagonals.store_diagonal(diagonal, x, wg)
    blocks.store_untiled(o_gm, sum(loaded))

  def run(x):
    return blocks.call(
      "stages",
      body,
      blocks.struct((C, BLOCK), jnp.float32),
      scratch_types=[
        plgpu.SMEM((2, BLOCK, 2, channel_sums.WARPS), jnp.float32),
        blocks.tiled((len(LEVELS) * 2 * C, BLOCK), jnp.bfloat16, BLOCK),
        plgpu.SMEM((C,), jnp.float32),
      ],
      num_threads=2,
      thread_name="wg",
      auto_barriers=False,
    )(x)

  (module,) = modules(run, blocks.struct((C, 32), jnp.float32))
  parsed, found = threads.bodies(module)
  assert len(found) == 4
  return parsed, found


def device(n, *operands):
  return threads.Warpgroup().run(lowered()[1][n], *operands)


def test_sums_over_channels(rng):
  x = rng.standard_normal((2, 2, C, BLOCK)).astype(np.float32)
  sums = np.full((2, BLOCK, 2, channel_sums.WARPS), np.nan, np.float32)
  for tile in range(2):
    device(0, sums[tile], *x[tile])
  by_warp = x.reshape(2, 2, 4, 16, BLOCK).sum(axis=3, dtype=np.float64)
  np.testing.assert_allclose(
    sums, by_warp.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-5
  )
  want = x.sum(axis=(0, 2), dtype=np.float64)
  for n, actual in enumerate(device(1, sums)):
    assert actual.shape == (C, BLOCK)
    np.testing.assert_array_equal(actual, np.tile(actual[:1], (C, 1)))
    np.testing.assert_allclose(actual[0], want[n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [0, 1])
def test_diagonal_blocks_of_every_level(half, rng):
  parts = rng.standard_normal((2, C, 32)).astype(ml_dtypes.bfloat16)
  memory = np.full((2 * len(LEVELS), C, BLOCK), 7, ml_dtypes.bfloat16)
  refs = [in_tiles(x, BLOCK) for x in memory]
  device(2, half, *parts, *refs)
  rows = slice(32 * half, 32 * half + 32)
  r, c = np.indices((32, 32))
  highest = np.zeros((32, 32), int)  # bit in which row and column differ
  for bit in (1, 2, 4, 8, 16):
    highest[(r ^ c) & bit != 0] = bit
  for level, size in enumerate(LEVELS):
    own = (highest == size) & (r > c)
    for m in range(2):
      x = np.where(own, parts[m][rows], 0)
      want = memory[2 * level + m].copy()
      want[rows] = np.concatenate([x[:16, :16], x[16:, 16:]])
      np.testing.assert_array_equal(refs[2 * level + m], in_tiles(want, BLOCK))


@pytest.mark.parametrize("half", [0, 1])
def test_diagonal(half, rng):
  x = rng.standard_normal((C, 32)).astype(np.float32)
  actual = np.full(C, 7, np.float32)
  device(3, actual, half, x)
  want = np.full(C, 7, np.float32)
  want[32 * half :][:32] = np.diagonal(x[32 * half :])
  np.testing.assert_array_equal(actual, want)
