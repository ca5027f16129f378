"""Device code of grad/columns.py on simulated threads, against jax.numpy."""

import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks
from gdn2_jax.pallas.gdn2.grad import columns
from tests.aot.test_turns import modules
from tests.pallas import threads
from tests.pallas.test_inline import Ref, in_numpy

C, N, KEPT = 64, 16, 16 * 64
DISTANCES = (1, 2, 4, 8)
BFLOAT16 = ml_dtypes.bfloat16


@functools.cache
def lowered():
  """Bodies by name, from a kernel that calls every function once."""
  names = []

  def body(x_gm, o_gm, tile, square, saved, diagonal, kinds):
    del x_gm

    def call(name, function, *args, **options):
      names.append(name)
      return function(*args, **options)

    x = blocks.load(tile)
    for distance in DISTANCES:
      x += call(f"{distance}", columns.neighbour, x, distance)
      x += call(
        f"{distance} in pairs",
        columns.neighbour,
        x,
        distance,
        in_pairs=distance > 1,
      )
      second = call(f"second {distance}", columns.is_second, N, distance)
      x = jnp.where(second, x, -x)
    call("keep", columns.keep, saved, x)
    x += call("kept", columns.kept, saved, (C, N))
    call("norms", columns.store_norms, diagonal, blocks.load(square), kinds)
    wg = lax.axis_index("wg")
    y = call("load", columns.load_global, o_gm.at[wg])
    tile[...] = x + y
    call("store", columns.store_global, o_gm.at[wg], x.astype(jnp.bfloat16))

  shape = blocks.struct((4, N, C), jnp.bfloat16)

  def run(x):
    return blocks.call(
      "columns",
      body,
      shape,
      scratch_types=[
        blocks.tiled((C, N), jnp.float32, N),
        blocks.smem((C, C), jnp.float32),
        plgpu.SMEM((KEPT,), jnp.float32),
        plgpu.SMEM((C,), jnp.float32),
        plgpu.SMEM((C,), jnp.int32),
      ],
      num_threads=4,
      thread_name="wg",
    )(x)

  (module,) = modules(run, shape)
  parsed, found = threads.bodies(module)
  assert len(found) == len(names)
  return parsed, dict(zip(names, found, strict=True))


def device(name, *operands, wg=3):
  return threads.Warpgroup(wg).run(lowered()[1][name], *operands)


@pytest.mark.parametrize("distance", DISTANCES)
def test_neighbours(distance, rng):
  x = rng.standard_normal((C, N)).astype(np.float32)
  want = x[:, np.arange(N) ^ distance]
  np.testing.assert_array_equal(device(f"{distance}", x), want)
  np.testing.assert_array_equal(
    in_numpy(columns.neighbour, jnp.asarray(x), distance), want
  )
  if distance > 1:
    x[:, 1::2] = x[:, ::2]
  want = x[:, np.arange(N) ^ distance]
  np.testing.assert_array_equal(device(f"{distance} in pairs", x), want)


@pytest.mark.parametrize("half", DISTANCES)
def test_second_halves(half):
  want = np.broadcast_to(np.arange(N) & half != 0, (C, N))
  np.testing.assert_array_equal(device(f"second {half}") != 0, want)


def test_norms(rng):
  x = rng.standard_normal((C, C)).astype(np.float32)
  np.fill_diagonal(x, rng.uniform(0, 2, C))
  kinds = rng.integers(0, 3, C).astype(np.int32)
  want, actual = np.full((2, C), np.nan, np.float32)
  x[:, kinds == 0] = np.nan
  exact = np.where(kinds == 0, 0, x.diagonal().astype(np.float64))
  exact = 1 / np.sqrt(exact + 1e-6)
  in_numpy(columns.store_norms, Ref(want), jnp.asarray(x), Ref(kinds))
  np.testing.assert_allclose(want, exact, rtol=1e-6)
  device("norms", actual, x, kinds)
  np.testing.assert_allclose(actual, exact, rtol=1e-6)


def test_every_thread_finds_what_it_kept(rng):
  x = rng.standard_normal((C, N)).astype(np.float32)
  saved = np.full(KEPT, np.nan, np.float32)
  device("keep", saved, x)
  assert sorted(saved) == sorted(x.flat)
  np.testing.assert_array_equal(device("kept", saved), x)


@pytest.mark.parametrize("name", ["load", "store"])
def test_transposition_between_registers_moves_no_number(name, rng):
  shape = (N, C) if name == "load" else (C, N)
  x = rng.standard_normal(shape).astype(BFLOAT16)
  np.testing.assert_array_equal(device(name, x), x.T)
