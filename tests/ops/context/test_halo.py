"""Convolution, attention and positions over shards equal the whole row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from gdn2_jax.ops.attention.api import sliding_window_attention
from gdn2_jax.ops.context.borders import runs_and_positions
from gdn2_jax.ops.gdn2.api import gdn2
from gdn2_jax.ops.gdn2.variants import mamba3
from gdn2_jax.ops.segments import reset_counts, segment_positions
from gdn2_jax.ops.short_conv import short_conv
from tests.numerics import assert_close, rel_rms

pytestmark = pytest.mark.slow

B, T, C = 4, 32, 8
TOKENS, WHOLE = PartitionSpec(None, "context"), PartitionSpec()


def over_devices(devices, fun, in_specs, out_specs):
  mesh = jax.make_mesh(
    (devices,),
    ("context",),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:devices],
  )
  return jax.shard_map(
    functools.partial(fun, axis_name="context"),
    mesh=mesh,
    in_specs=in_specs,
    out_specs=out_specs,
  )


def documents():
  """Padding between documents and at the end, where ops agree on it."""
  ids = np.zeros((B, T), np.int32)
  ids[0] = np.repeat([1, 2, 3], (8, 19, 5))
  ids[1, :7] = 4  # what follows is padding, whole shards of it
  ids[2] = 9
  ids[3, :9], ids[3, 14:31] = 2, 1
  return jnp.asarray(ids)


def value_and_grads(fun, *args):
  """Outputs, and gradients of the floating arguments, by number."""
  diff = tuple(
    i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating)
  )

  def loss(*args):
    out = fun(*args)
    rng = np.random.default_rng(5)
    weights = [rng.standard_normal(x.shape) for x in jax.tree.leaves(out)]
    total = sum(
      (x * w.astype(np.float32)).sum()
      for x, w in zip(jax.tree.leaves(out), weights, strict=True)
    )
    return total, out

  grads, out = jax.jit(jax.grad(loss, diff, has_aux=True))(*args)
  out = {f"out{i}": x for i, x in enumerate(jax.tree.leaves(out))}
  return out | {f"d{i}": x for i, x in zip(diff, grads, strict=True)}


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_convolution(rng, devices, packed):
  x, kernel, bias, state = (
    jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for shape in ((B, T, C), (4, C), (C,), (B, 3, C))
  )
  ids = documents() if packed else jnp.ones((B, T), jnp.int32)

  def call(fun):
    def run(x, kernel, bias, state, ids, **axis):
      ids = ids if packed else None
      return fun(x, kernel, bias=bias, state=state, segment_ids=ids, **axis)

    return run

  split = over_devices(
    devices,
    call(short_conv),
    (TOKENS, WHOLE, WHOLE, WHOLE, TOKENS),
    (TOKENS, WHOLE),
  )
  args = x, kernel, bias, state, ids
  got, want = (value_and_grads(f, *args) for f in (split, call(short_conv)))
  np.testing.assert_array_equal(got["out0"], want["out0"])
  np.testing.assert_array_equal(got["out1"], want["out1"])
  assert_close(got, want, 1e-6)


@pytest.mark.parametrize(
  ("devices", "window", "packed"),
  [
    (2, 7, True),
    (8, 5, False),
    pytest.param(8, 12, True, marks=pytest.mark.deep),
    (4, None, True),
    pytest.param(4, None, False, marks=pytest.mark.deep),
    (2, 1, True),
  ],
)
def test_attention(rng, devices, window, packed):
  """Windows within a neighbour, over several shards, over all, and of one."""
  q, k, v = (
    jnp.asarray(rng.standard_normal((B, T, heads, 8)), jnp.float32)
    for heads in (4, 2, 2)
  )
  ids = documents() if packed else None
  runs = jnp.ones((B, T), jnp.int32)
  if packed:
    runs = jnp.where(ids != 0, reset_counts(ids) + 1, 0)

  def local(q, k, v, runs, axis_name):
    ids = runs if packed else None
    return sliding_window_attention(
      q,
      k,
      v,
      axis_name=axis_name,
      window=window,
      q_segment_ids=ids,
      kv_segment_ids=ids,
    )

  def whole(q, k, v, runs):
    ids = runs if packed else None
    return sliding_window_attention(
      q, k, v, window=window, q_segment_ids=ids, kv_segment_ids=ids
    )

  split = over_devices(devices, local, TOKENS, TOKENS)
  got, want = (value_and_grads(f, q, k, v, runs) for f in (split, whole))
  assert_close(got, want, 1e-6)


@pytest.mark.parametrize("devices", [2, 8])
def test_runs_and_positions_are_those_of_the_row(devices):
  rng = np.random.default_rng(0)
  ids = jnp.concatenate(
    [
      documents(),
      jnp.asarray(np.sort(rng.integers(0, 4, (8, T)), axis=1)),
      # Padding anywhere, ids that come back.
      jnp.asarray(rng.integers(0, 3, (8, T))),
    ]
  ).astype(jnp.int32)
  split = over_devices(devices, runs_and_positions, TOKENS, TOKENS)
  runs, positions = jax.jit(split)(ids)
  np.testing.assert_array_equal(
    runs, jnp.where(ids != 0, reset_counts(ids) + 1, 0)
  )
  first = jnp.zeros(len(ids), jnp.int32)
  np.testing.assert_array_equal(positions, segment_positions(ids, first))


def test_too_few_tokens_for_the_taps_are_refused():
  split = over_devices(8, short_conv, (TOKENS, WHOLE), (TOKENS, WHOLE))
  with pytest.raises(ValueError, match=r"x: expected .* T >= 4 tokens"):
    split(jnp.ones((1, 24, 2)), jnp.ones((5, 2)))


def test_calls_outside_shard_map_are_refused():
  x = jnp.ones((1, 4, 1, 16))
  with pytest.raises(ValueError, match=r"axis_name: got 'context'"):
    gdn2(x, x, x, -x, x, x, axis_name="context")
  with pytest.raises(ValueError, match=r"axis_name: got 'context'"):
    sliding_window_attention(x, x, x, axis_name="context", window=2)
  with pytest.raises(ValueError, match=r"axis_name: got 'context'"):
    short_conv(x[:, :, 0], x[0, :, 0], axis_name="context")


def test_arguments_that_do_not_go_together_are_refused():
  x = jnp.ones((1, 4, 1, 16))
  with pytest.raises(ValueError, match=r"scheme: got 'ring' without axis_name"):
    gdn2(x, x, x, -x, x, x, scheme="ring")
  scalar = {"g": -x[..., 0], "dt": x[..., 0], "lam": x[..., 0]}
  with pytest.raises(ValueError, match="mamba3: axis_name: got 'context'"):
    mamba3(x, x, x, **scalar, axis_name="context")
  split = over_devices(
    2,
    functools.partial(sliding_window_attention, window=2),
    (TOKENS, WHOLE, WHOLE),
    TOKENS,
  )
  with pytest.raises(ValueError, match="k: expected S = T = 2 with axis_name"):
    split(x, x, x)


def test_convolution_in_bfloat16_sums_as_the_whole_row_does(rng):
  x = jnp.asarray(rng.standard_normal((B, T, C)), jnp.bfloat16)
  kernel = jnp.asarray(rng.standard_normal((4, C)), jnp.bfloat16)
  split = over_devices(4, short_conv, (TOKENS, WHOLE), (TOKENS, WHOLE))
  y, state = jax.jit(split)(x, kernel)
  want, want_state = jax.jit(short_conv)(x, kernel)
  assert y.dtype == want.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, want)
  np.testing.assert_array_equal(state, want_state)
  assert rel_rms(y, want) == 0
