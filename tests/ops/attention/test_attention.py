"""Sliding-window attention against a dense float64 program."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from gdn2_jax.ops.attention.api import (
  cudnn_unsupported_reason,
  sliding_window_attention,
)
from tests.numerics import rel_rms

B, T, HQ, HKV, D = 2, 21, 4, 2, 8

IDS = np.asarray([[1] * 6 + [2] * 4 + [0] * 2 + [3] * 9, [5] * 14 + [0] * 7])


def allowed(time, keys, window, q_ids, kv_ids):
  """[B or 1, T, S] by the definition."""
  i = np.arange(time)[:, None] + keys - time
  j = np.arange(keys)[None]
  mask = (j <= i) & (i - j < (keys if window is None else window))
  if q_ids is None:
    return mask[None]
  same = q_ids[:, :, None] == kv_ids[:, None, :]
  return mask & same & (q_ids != 0)[:, :, None]


def oracle(q, k, v, d_out, window, q_ids=None, kv_ids=None):
  """Output and dq, dk, dv, keys and values repeated for every query head."""
  q, k, v, d_out = (np.asarray(a, np.float64) for a in (q, k, v, d_out))
  group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
  key_shape = (*k.shape[:3], group, k.shape[3])
  k, v = (np.repeat(a, group, axis=2) for a in (k, v))
  mask = allowed(q.shape[1], k.shape[1], window, q_ids, kv_ids)[:, None]
  scores = np.einsum("bthd,bshd->bhts", q, k) * scale
  top = np.max(np.where(mask, scores, -1e300), axis=-1, keepdims=True)
  weights = np.where(mask, np.exp(np.where(mask, scores - top, 0)), 0)
  total = weights.sum(-1, keepdims=True)
  weights = weights / np.where(total == 0, 1, total)
  d_weights = np.einsum("bthd,bshd->bhts", d_out, v)
  inner = (weights * d_weights).sum(-1, keepdims=True)
  d_scores = weights * (d_weights - inner) * scale
  d_k = np.einsum("bhts,bthd->bshd", d_scores, q).reshape(key_shape).sum(3)
  d_v = np.einsum("bhts,bthd->bshd", weights, d_out)
  return (
    np.einsum("bhts,bshd->bthd", weights, v),
    np.einsum("bhts,bshd->bthd", d_scores, k),
    d_k,
    d_v.reshape(key_shape).sum(3),
  )


@functools.cache
def inputs(time=T, keys=T, dtype="float32", batch=B, heads=(HQ, HKV), width=D):
  rng = np.random.default_rng(time + keys)
  shapes = [
    (batch, n, h, width)
    for n, h in zip(
      (time, keys, keys, time), (*heads, heads[1], heads[0]), strict=True
    )
  ]
  return [
    jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)
    for shape in shapes
  ]


@functools.partial(jax.jit, static_argnums=4, static_argnames="options")
def run(q, k, v, d_out, window, q_ids=None, kv_ids=None, options=()):
  """Output and dq, dk, dv."""

  def attend(q, k, v):
    return sliding_window_attention(
      q,
      k,
      v,
      window=window,
      q_segment_ids=q_ids,
      kv_segment_ids=kv_ids,
      **dict(options),
    )

  out, vjp = jax.vjp(attend, q, k, v)
  return out, *vjp(d_out)


NAMES = ("o", "q", "k", "v")


@pytest.mark.parametrize("window", [1, 3, 16, 100, None])
@pytest.mark.parametrize("context", [0, 7])
def test_values_and_gradients(window, context):
  """Windows below, at and above the block; T no multiple of a block."""
  args = inputs(T, T + context)
  results = run(*args, window)
  for name, x, exact in zip(NAMES, results, oracle(*args, window), strict=True):
    assert x.shape == exact.shape, name
    if np.any(exact):
      assert rel_rms(x, exact) < 1e-6, name  # measured 2e-7
    else:  # one visible key: its weight is 1 whatever the scores
      assert np.max(np.abs(x)) < 2e-6, name


@pytest.mark.parametrize("window", [4, None])
def test_segments(window):
  """Context keys of the first segment, of another one and of padding."""
  context = np.asarray([[0, 9, 1, 1], [0, 5, 5, 5]])
  kv_ids = np.concatenate([context, IDS], axis=1)
  args = inputs(T, T + 4)
  results = run(*args, window, IDS, kv_ids)
  exact = oracle(*args, window, IDS, kv_ids)
  for name, x, want in zip(NAMES, results, exact, strict=True):
    assert rel_rms(x, want) < 1e-6, name
    assert np.all(np.asarray(x)[want == 0] == 0), name
  np.testing.assert_array_equal(results[0][IDS == 0], 0)


@pytest.mark.parametrize(
  "window", [40, pytest.param(None, marks=pytest.mark.deep)]
)
def test_several_full_blocks(window):
  """Longer than the largest block, so that spans start inside the keys."""
  args = inputs(530, 530, batch=1, heads=(1, 1), width=4)
  for name, x, exact in zip(
    NAMES, run(*args, window), oracle(*args, window), strict=True
  ):
    assert rel_rms(x, exact) < 1e-6, name


def test_float64():
  with jax.enable_x64(True):
    args = [jnp.asarray(a, jnp.float64) for a in inputs()]
    for x, exact in zip(run(*args, 5), oracle(*args, 5), strict=True):
      assert x.dtype == jnp.float64
      assert rel_rms(x, exact) < 1e-14


@pytest.mark.parametrize("peak", [1.0, 3.0])
def test_bfloat16(peak):
  """Twice what rounding the exact result costs; measured 1.5 times."""
  q, k, v, d_out = inputs(128, 128, heads=(2, 1), width=64)
  args = [a.astype(jnp.bfloat16) for a in (peak * q, peak * k, v, d_out)]
  for name, x, exact in zip(
    NAMES, run(*args, 32), oracle(*args, 32), strict=True
  ):
    floor = rel_rms(jnp.asarray(exact, jnp.bfloat16), exact)
    assert x.dtype == jnp.bfloat16
    assert rel_rms(x, exact) < 2 * floor, name


def test_scale_multiplies_the_scores():
  q, k, v, d_out = inputs()
  out = run(q, k, v, d_out, 5, options=(("scale", 0.7),))[0]
  exact = oracle(np.float64(q) * 0.7 * D**0.5, k, v, d_out, 5)[0]
  assert rel_rms(out, exact) < 1e-6


def test_huge_scores_stay_finite():
  q, k, v, d_out = inputs()
  for x in run(1e6 * q, 1e6 * k, v, d_out, 5):
    assert np.all(np.isfinite(x))


@pytest.mark.parametrize("window", [1, 4, None])
def test_reach_is_exact(window):
  """The gradient of one output is nonzero for the allowed keys alone."""
  q, k, v, _ = inputs()
  mask = allowed(T, T, window, IDS, IDS)
  ids = {name: jnp.asarray(IDS) for name in ("q_segment_ids", "kv_segment_ids")}

  @jax.jit
  def gradient(q, k, v, i):
    def pick(q, k, v):
      out = sliding_window_attention(q, k, v, window=window, **ids)
      return (out[:, i] ** 2).sum()

    return jax.grad(pick, (0, 1, 2))(q, k, v)

  for i in range(T):
    d_q, d_k, d_v = (np.any(x != 0, (2, 3)) for x in gradient(q, k, v, i))
    np.testing.assert_array_equal(d_v, mask[:, i])
    assert not np.any(d_k & ~mask[:, i])
    assert not np.any(np.delete(d_q, i, axis=1))


def test_later_tokens_change_no_bit_of_the_prefix():
  q, k, v, d_out = inputs()
  rng = np.random.default_rng(1)
  for p in (1, 5, 8, 16, 20):
    tail = (jnp.arange(T) >= p).reshape((1, T, 1, 1))
    noise = [
      jnp.asarray(rng.normal(size=a.shape), jnp.float32) for a in (q, k, v)
    ]
    edited = [
      jnp.where(tail, n, a) for a, n in zip((q, k, v), noise, strict=True)
    ]
    d_prefix = jnp.where(tail, 0, d_out)
    before = run(q, k, v, d_prefix, 6)
    after = run(*edited, d_prefix, 6)
    for name, x, y in zip(NAMES, before, after, strict=True):
      np.testing.assert_array_equal(x[:, :p], y[:, :p], name)
      if name != "o":
        np.testing.assert_array_equal(y[:, p:], 0, name)


def test_packed_equals_separate():
  args = inputs()
  packed = run(*args, 5, IDS, IDS)
  for row in range(B):
    for segment in set(IDS[row]) - {0}:
      where = np.flatnonzero(IDS[row] == segment)
      alone = run(*(a[row : row + 1, where] for a in args), 5)
      for name, x, y in zip(NAMES, packed, alone, strict=True):
        want = np.asarray(y[0], np.float64)
        assert rel_rms(x[row, where], want) < 5e-7, name


def test_context_continues_a_sequence():
  """A call on the tail with window - 1 earlier keys equals the whole call."""
  q, k, v, d_out = inputs()
  whole = run(q, k, v, d_out, 5)[0]
  for cut in (1, 4, 13, 20):
    first = max(0, cut - 4)
    tail = run(q[:, cut:], k[:, first:], v[:, first:], d_out[:, cut:], 5)[0]
    assert rel_rms(tail, np.asarray(whole[:, cut:], np.float64)) < 5e-7


def test_no_visible_key_gives_zeros_even_beside_nan():
  q, k, v, d_out = inputs()
  poison = [
    jnp.where((IDS == 0)[:, :, None, None], jnp.nan, a) for a in (q, k, v)
  ]
  clean = run(q, k, v, d_out, None, IDS, IDS)
  dirty = run(*poison, d_out, None, IDS, IDS)
  for name, x, y in zip(NAMES, clean, dirty, strict=True):
    np.testing.assert_array_equal(x, y, name)
    np.testing.assert_array_equal(y[IDS == 0], 0, name)
  nothing = np.zeros_like(IDS)
  for x in run(q, k, v, d_out, 5, IDS, nothing):
    np.testing.assert_array_equal(x, 0)


@pytest.mark.slow
@pytest.mark.parametrize("window", [256, None])
def test_memory_is_linear_in_time(window):
  """Compiled temporaries of value and gradient at T = 4096 and 8192."""

  def temporaries(time):
    shape = jax.ShapeDtypeStruct((1, time, 1, 16), jnp.float32)

    def loss(q, k, v):
      return (sliding_window_attention(q, k, v, window=window) ** 2).sum()

    fn = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    memory = fn.lower(shape, shape, shape).compile().memory_analysis()
    return memory.temp_size_in_bytes

  short, long = temporaries(4096), temporaries(8192)
  assert short < long < 2.2 * short
  one_byte_a_score = 8192 * 8192
  assert long < one_byte_a_score * (0.15 if window else 0.6)


def test_shard_map_over_sequences():
  args = inputs()
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
  data = PartitionSpec("data")
  sharded = jax.shard_map(
    lambda *args: run(*args, 5), mesh=mesh, in_specs=data, out_specs=data
  )
  for x, want in zip(jax.jit(sharded)(*args), run(*args, 5), strict=True):
    assert rel_rms(x, np.asarray(want, np.float64)) < 5e-7


def test_named_cudnn_says_why_it_cannot_run():
  q, k, v, _ = inputs()
  with pytest.raises(NotImplementedError, match=r"cudnn\): needs a GPU"):
    sliding_window_attention(q, k, v, window=4, implementation="cudnn")
  assert "GPU" in cudnn_unsupported_reason(q, k)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [100, None])
def test_cudnn_is_as_exact_as_xla(window):
  q, k, v, d_out = inputs(512, 512, "bfloat16", heads=(4, 2), width=64)
  exact = oracle(q, k, v, d_out, window)
  results = {
    name: run(q, k, v, d_out, window, options=(("implementation", name),))
    for name in ("xla", "cudnn")
  }
  for i, name in enumerate(NAMES):
    floor = rel_rms(results["xla"][i], exact[i])
    assert rel_rms(results["cudnn"][i], exact[i]) < 2 * floor, name


@pytest.mark.parametrize(
  ("change", "name"),
  [
    ({"q": jnp.ones((B, T, D))}, "q"),
    ({"q": jnp.ones((B, T, HQ, D), jnp.int32)}, "q"),
    ({"q": jnp.ones((B, T, 3, D))}, "q"),
    ({"k": jnp.ones((B, T, HKV, D + 1))}, "k"),
    (
      {"k": jnp.ones((B, T - 1, HKV, D)), "v": jnp.ones((B, T - 1, HKV, D))},
      "k",
    ),
    ({"k": jnp.ones((B, T, HKV, D), jnp.bfloat16)}, "k"),
    ({"v": jnp.ones((B, T + 1, HKV, D))}, "v"),
    ({"window": 0}, "window"),
    ({"scale": 0.0}, "scale"),
    ({"implementation": "flash"}, "implementation"),
    ({"q_segment_ids": jnp.ones((B, T), jnp.int32)}, "kv_segment_ids"),
    ({"kv_segment_ids": jnp.ones((B, T), jnp.int32)}, "q_segment_ids"),
    (
      {
        "q_segment_ids": jnp.ones((B, T), jnp.int32),
        "kv_segment_ids": jnp.ones((B, T + 1), jnp.int32),
      },
      "kv_segment_ids",
    ),
  ],
)
def test_bad_inputs_are_named(change, name):
  args = {
    "q": jnp.ones((B, T, HQ, D)),
    "k": jnp.ones((B, T, HKV, D)),
    "v": jnp.ones((B, T, HKV, D)),
    "window": 4,
    **change,
  }
  with pytest.raises(ValueError, match=f"^{name}: expected"):
    inspect.unwrap(sliding_window_attention)(**args)


def test_no_mask_is_kept_for_the_layers():
  """The masks of all blocks would be as large as all scores."""
  ids = jnp.ones((B, 32), jnp.int32)

  @jax.checkpoint
  def layer(x, w):
    q = x * w
    kv = q[:, :, :HKV]
    options = {"q_segment_ids": ids, "kv_segment_ids": ids}
    return x + sliding_window_attention(q, kv, kv, window=8, **options), None

  def loss(w, x):
    return jnp.sum(jax.lax.scan(layer, x, w)[0])

  x = jnp.ones((B, 32, HQ, D))
  program = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((3, 1, 1, 1, 1)), x))
  masks = re.findall(r"bool\[([\d,]+)\]", program)
  elements = [np.prod([int(n) for n in mask.split(",")]) for mask in masks]
  blocks, block = 32 // 8, B * HQ * 8 * (8 + 8 - 1)
  assert block in elements and max(elements) < blocks * block
