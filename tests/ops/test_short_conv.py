"""The short convolution against a token loop in float64."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from gdn2_jax.ops.short_conv import short_conv
from tests.numerics import rel_rms

B, T, C = 4, 12, 16

# Two packed rows with padding between and after, a short one, only padding.
IDS = np.asarray(
  [
    [1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3],
    [4, 4, 4, 0, 0, 5, 6, 6, 6, 6, 0, 0],
    [7, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
  ],
  np.int32,
)


def oracle(x, kernel, bias=None, ids=None, state=None):
  """One token at a time; the state is the list of the last W-1 inputs."""
  x, kernel = np.float64(x), np.float64(kernel)
  width = len(kernel)
  out, states = np.zeros_like(x), np.zeros((len(x), width - 1, x.shape[2]))
  for row in range(len(x)):
    past = np.zeros((width - 1, x.shape[2]))
    past = past if state is None else np.float64(state[row])
    current = None
    for t in range(x.shape[1]):
      if ids is not None:
        if ids[row, t] == 0:
          continue
        if current is not None and ids[row, t] != current:
          past = np.zeros_like(past)
        current = ids[row, t]
      window = np.concatenate([past, x[row, t : t + 1]])
      out[row, t] = (kernel * window).sum(0)
      out[row, t] += 0 if bias is None else np.float64(bias)
      past = window[1:]
    states[row] = past
  return out, states


@functools.cache
def inputs(width, dtype="float32"):
  rng = np.random.default_rng(width)
  shapes = (B, T, C), (width, C), (C,), (B, width - 1, C)
  x, kernel, bias, state = (
    jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes
  )
  return x.astype(dtype), kernel, bias, state.astype(dtype)


@jax.jit
def run(x, kernel, bias=None, ids=None, state=None):
  return short_conv(x, kernel, bias=bias, segment_ids=ids, state=state)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "packed"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_output_and_state(width, ids, with_state):
  x, kernel, bias, state = inputs(width)
  args = (x, kernel, bias, ids, state if with_state else None)
  out, last = run(*args)
  exact, exact_last = oracle(*args)
  # Measured 6e-8: one rounding of each product and sum.
  assert rel_rms(out, exact) < 3e-7
  np.testing.assert_array_equal(last, exact_last)
  if ids is not None:
    np.testing.assert_array_equal(out[ids == 0], 0)


def test_row_of_padding_returns_its_state():
  x, kernel, _, state = inputs(4)
  _, last = run(x, kernel, ids=IDS, state=state)
  np.testing.assert_array_equal(last[3], state[3])
  np.testing.assert_array_equal(last[2, 0], state[2, 2])
  np.testing.assert_array_equal(last[2, 1:], x[2, :2])


@pytest.mark.parametrize(
  "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.deep)]
)
@pytest.mark.parametrize(
  "ids",
  [pytest.param(None, marks=pytest.mark.deep), IDS],
  ids=["whole", "packed"],
)
def test_split_and_carry_gives_the_same_bits(ids, dtype):
  x, kernel, bias, state = inputs(4, dtype)
  whole, last = run(x, kernel, bias, ids, state)
  for cut in (1, 2, 7, 9):
    pieces = []
    carry = state
    for part in (slice(0, cut), slice(cut, T)):
      part_ids = None if ids is None else ids[:, part]
      out, carry = run(x[:, part], kernel, bias, part_ids, carry)
      pieces.append(out)
    rows = list(range(B))
    if ids is not None:
      # The carried state has no id: only rows cut inside a segment go on.
      rows = [r for r in rows if ids[r, cut - 1] == ids[r, cut]]
      rows = [r for r in rows if ids[r, cut] != 0]
      assert rows
    joined = jnp.concatenate(pieces, axis=1)
    np.testing.assert_array_equal(joined[rows, :], whole[rows, :])
    np.testing.assert_array_equal(carry[rows, :], last[rows, :])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 4])
def test_steps_give_the_bits_of_the_sequence(width, dtype):
  x, kernel, bias, state = inputs(width, dtype)
  whole, last = run(x, kernel, bias, state=state)
  step = jax.jit(lambda x, state: short_conv(x, kernel, state=state, bias=bias))
  for t in range(T):
    out, state = step(x[:, t : t + 1], state)
    assert out.dtype == state.dtype == x.dtype
    np.testing.assert_array_equal(out[:, 0], whole[:, t])
  np.testing.assert_array_equal(state, last)


def test_packed_gives_the_bits_of_separate():
  x, kernel, bias, _ = inputs(4)
  packed, _ = run(x, kernel, bias, IDS)
  for row in range(B):
    for segment in set(IDS[row]) - {0}:
      where = np.flatnonzero(IDS[row] == segment)
      alone, _ = run(x[row : row + 1, where], kernel, bias)
      np.testing.assert_array_equal(packed[row, where], alone[0])


def test_an_id_that_comes_back_does_not_join():
  x, kernel, _, _ = inputs(4)
  ids = np.tile(
    np.asarray([1, 2, 1, 1, 0, 1, 1, 2, 2, 1, 2, 1], np.int32), (B, 1)
  )
  unique = np.cumsum(np.diff(ids, axis=1, prepend=ids[:, :1]) != 0, axis=1) + 1
  unique = np.where(ids == 0, 0, unique)
  out, last = run(x, kernel, ids=ids)
  want, want_last = oracle(x, kernel, ids=unique)
  assert rel_rms(out, want) < 3e-7
  np.testing.assert_array_equal(last, want_last)


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "packed"])
def test_gradients(ids):
  """The op is linear in each argument, so the oracle of a basis is exact."""
  x, kernel, bias, state = inputs(4)
  rng = np.random.default_rng(0)
  d_out, d_last = rng.normal(size=(B, T, C)), rng.normal(size=(B, 3, C))

  def dot(outputs):
    return sum(
      (np.asarray(o, np.float64) * d).sum()
      for o, d in zip(outputs, (d_out, d_last), strict=True)
    )

  _, vjp = jax.vjp(
    lambda *a: run(a[0], a[1], a[2], ids, a[3]), x, kernel, bias, state
  )
  grads = vjp((jnp.float32(d_out), jnp.float32(d_last)))
  args = [np.float64(a) for a in (x, kernel, bias, state)]
  base = dot(oracle(*args[:3], ids, args[3]))
  for index, name in enumerate(("x", "kernel", "bias", "state")):
    for place in rng.permutation(args[index].size)[:12]:
      moved = [a.copy() for a in args]
      moved[index].ravel()[place] += 1.0
      want = dot(oracle(*moved[:3], ids, moved[3])) - base
      got = grads[index].ravel()[place]
      assert abs(got - want) < 1e-5, (name, place)


def test_causality_and_segments_are_exact_zeros():
  x, kernel, bias, state = inputs(4)

  @jax.jit
  def gradient(x, state, t):
    def pick(x, state):
      return run(x, kernel, bias, IDS, state)[0][:, t].sum()

    return jax.grad(pick, (0, 1))(x, state)

  for t in range(T):
    grads = gradient(x, state, t)
    for row in range(B):
      reach = (np.arange(T) <= t) & (np.arange(T) > t - 4)
      reach &= (IDS[row] == IDS[row, t]) & (IDS[row, t] != 0)
      np.testing.assert_array_equal(np.any(grads[0][row] != 0, -1), reach)
    assert np.any(grads[1][0] != 0) == (t < 3)


def test_nan_in_padding_does_not_leak():
  x, kernel, bias, state = inputs(4)
  poisoned = jnp.where((IDS == 0)[:, :, None], jnp.nan, x)

  def loss(x, kernel, state):
    out, last = run(x, kernel, bias, IDS, state)
    return (out**2).sum() + (last**2).sum()

  fn = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
  for got, want in zip(
    jax.tree.leaves(fn(poisoned, kernel, state)),
    jax.tree.leaves(fn(x, kernel, state)),
    strict=True,
  ):
    np.testing.assert_array_equal(got, want)


def test_bfloat16_accumulates_in_float32():
  x, kernel, _, _ = inputs(4, "bfloat16")
  out, vjp = jax.vjp(lambda x: run(x, kernel)[0], x)
  # The gradient of a causal convolution is one that runs backward in time.
  reverse = oracle(x[:, ::-1], kernel)[0][:, ::-1]
  for got, exact in ((out, oracle(x, kernel)[0]), (vjp(x)[0], reverse)):
    floor = rel_rms(jnp.asarray(exact, jnp.bfloat16), exact)
    assert got.dtype == jnp.bfloat16
    assert rel_rms(got, exact) < 1.01 * floor


def test_saves_its_inputs_alone():
  """Not the W shifted, widened copies that autodiff of the sum would keep."""
  x = jnp.ones((2, 64, 8), jnp.bfloat16)
  kernel = jnp.ones((4, 8))
  ids = jnp.ones((2, 64), jnp.int32)
  _, vjp = jax.vjp(lambda x, k: short_conv(x, k, segment_ids=ids)[0], x, kernel)
  saved = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
  assert saved < 2.5 * x.nbytes


def test_shard_map_over_sequences():
  x, kernel, bias, state = inputs(4)
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
  data, whole = PartitionSpec("data"), PartitionSpec()
  sharded = jax.shard_map(
    lambda x, kernel, ids, state: run(x, kernel, bias, ids, state),
    mesh=mesh,
    in_specs=(data, whole, data, data),
    out_specs=data,
  )
  ids = jnp.asarray(IDS)

  def gradient(fn):
    def loss(x, kernel):
      return (fn(x, kernel)[0] ** 2).sum()

    return jax.jit(jax.grad(loss, (0, 1)))

  got = gradient(lambda x, k: sharded(x, k, ids, state))(x, kernel)
  want = gradient(lambda x, k: run(x, k, bias, ids, state))(x, kernel)
  for one, other in zip(got, want, strict=True):
    assert rel_rms(one, np.asarray(other, np.float64)) < 5e-7


@pytest.mark.parametrize(
  ("change", "name"),
  [
    ({"x": jnp.ones((B, C))}, "x"),
    ({"x": jnp.ones((B, 0, C))}, "x"),
    ({"x": jnp.ones((B, T, C), jnp.int32)}, "x"),
    ({"kernel": jnp.ones((4, C + 1))}, "kernel"),
    ({"kernel": jnp.ones((0, C))}, "kernel"),
    ({"bias": jnp.ones(C + 1)}, "bias"),
    ({"state": jnp.ones((B, 4, C))}, "state"),
    ({"state": jnp.ones((B, 3, C), jnp.bfloat16)}, "state"),
    ({"segment_ids": jnp.ones((B, T + 1), jnp.int32)}, "segment_ids"),
    ({"segment_ids": jnp.ones((B, T))}, "segment_ids"),
  ],
)
def test_bad_inputs_are_named(change, name):
  args = {"x": jnp.ones((B, T, C)), "kernel": jnp.ones((4, C)), **change}
  with pytest.raises(ValueError, match=f"^{name}: expected"):
    inspect.unwrap(short_conv)(**args)
