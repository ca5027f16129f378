"""Which implementation runs the ops around the recurrence."""

import types
import warnings

import jax
import jax.numpy as jnp
import pytest

from gdn2_jax.kernels import choice, self_check
from gdn2_jax.ops import norm
from gdn2_jax.ops import short_conv as conv
from gdn2_jax.ops.attention.api import sliding_window_attention
from gdn2_jax.ops.attention.xla import blockwise_attention
from gdn2_jax.ops.norm import gated_rms_norm
from gdn2_jax.ops.short_conv import short_conv
from gdn2_jax.pallas import gated_norm
from gdn2_jax.pallas import short_conv as conv_kernels
from gdn2_jax.pallas.attention import api as attention_kernels

HOPPER = types.SimpleNamespace(
  device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0"
)


def call_norm(implementation=None, T=64, V=64, dtype=jnp.bfloat16):
  x = jnp.ones((1, T, 2, V), dtype)
  weight = jnp.ones(V)
  return gated_rms_norm(x, x, weight, implementation=implementation)


def call_conv(implementation=None, T=64, W=4, dtype=jnp.bfloat16, **options):
  x = jnp.ones((1, T, 64), dtype)
  options = {"activation": "silu"} | options
  return short_conv(
    x, jnp.ones((W, 64), dtype), implementation=implementation, **options
  )


def call_attention(
  implementation=None, T=64, D=64, dtype=jnp.bfloat16, context=0, same=True
):
  q = jnp.ones((1, T, 1, D), dtype)
  k = jnp.ones((1, T + context, 1, D), dtype)
  ids = jnp.ones((1, T), jnp.int32)
  return sliding_window_attention(
    q,
    k,
    k,
    window=9,
    q_segment_ids=ids if not context else None,
    kv_segment_ids=(ids if same else ids + 0) if not context else None,
    implementation=implementation,
  )


CALLS = {
  "gated_rms_norm": call_norm,
  "short_conv": call_conv,
  "sliding_window_attention": call_attention,
}
KERNELS = {
  "gated_rms_norm": (gated_norm, "gated_rms_norm_mosaic_gpu"),
  "short_conv": (conv_kernels, "short_conv_silu_mosaic_gpu"),
  "sliding_window_attention": (attention_kernels, "attention_mosaic_gpu"),
}


@pytest.mark.parametrize("op", CALLS)
def test_without_a_gpu(op):
  call = CALLS[op]
  for name in (None, "xla"):
    call(name)
  with pytest.raises(NotImplementedError, match=f"{op}: mosaic_gpu: needs an"):
    call("mosaic_gpu")


@pytest.mark.parametrize("op", ["gated_rms_norm", "short_conv"])
def test_unknown_names_are_refused(op):
  with pytest.raises(ValueError, match=f"{op}: implementation: got 'cuda'"):
    CALLS[op]("cuda")


@pytest.mark.parametrize(
  ("op", "arguments", "reason"),
  [
    ("gated_rms_norm", {"T": 63}, "T = 63, expected at least 64"),
    ("gated_rms_norm", {"V": 48}, "V = 48, expected one of"),
    ("gated_rms_norm", {"dtype": jnp.float32}, "dtypes float32, expected"),
    ("short_conv", {"T": 1}, "T = 1, expected at least 64"),
    ("short_conv", {"W": 5}, "W = 5, expected 2 to 4"),
    ("short_conv", {"dtype": jnp.float32}, "dtype float32, expected"),
    ("short_conv", {"activation": None}, "the kernels take no bias, and"),
    ("sliding_window_attention", {"T": 63}, "T = 63, expected at least 64"),
    ("sliding_window_attention", {"D": 96}, "D = 96, expected one of"),
    ("sliding_window_attention", {"dtype": jnp.float32}, "dtype float32, exp"),
    ("sliding_window_attention", {"context": 1}, "needs S == T, got S = 65"),
    ("sliding_window_attention", {"same": False}, "needs the same array of"),
  ],
)
def test_what_the_kernels_do_not_take(op, arguments, reason, monkeypatch):
  monkeypatch.setattr(choice, "device_of", lambda x: HOPPER)
  monkeypatch.setattr(self_check, "_enabled", False)
  with pytest.raises(NotImplementedError, match=f"{op}: mosaic_gpu: {reason}"):
    CALLS[op]("mosaic_gpu", **arguments)
  CALLS[op](**arguments)  # "xla" does


def stand_in(op, factor=1.0):
  """What the kernel should give, times a factor."""
  if op == "gated_rms_norm":
    return lambda *a: factor * norm._gated_rms_norm(*a)
  if op == "sliding_window_attention":

    def attend(q, k, v, ids, window, scale):
      return factor * blockwise_attention(q, k, v, ids, ids, window, scale)

    return attend

  def run(x, kernel, state, reach):
    past_x = jnp.concatenate([state, x], axis=1)
    ids = None
    if reach is not None:
      # Any ids with this reach: a token that sees no other begins a segment.
      ids = jnp.where(reach < 0, 0, 1 + jnp.cumsum(reach == 0, axis=1))
      ids = conv._with_state_ids(ids, len(kernel))
    return factor * conv._taps(past_x, kernel, None, ids, "silu")

  return run


@pytest.mark.parametrize("op", CALLS)
def test_right_kernels_are_chosen_in_silence(op, checks, monkeypatch):
  module, name = KERNELS[op]
  ran = []
  right = stand_in(op)
  monkeypatch.setattr(module, name, lambda *a: (ran.append(1), right(*a))[1])
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    jax.jit(lambda: CALLS[op]())()
  before = len(ran)
  CALLS[op]("xla")
  assert len(ran) == before
  CALLS[op]()
  assert len(ran) == before + 1  # it is not checked twice


@pytest.mark.parametrize("op", CALLS)
def test_wrong_kernels_are_passed_over_with_a_warning(op, checks, monkeypatch):
  module, name = KERNELS[op]
  monkeypatch.setattr(module, name, stand_in(op, 1.1))
  with pytest.warns(
    RuntimeWarning, match=f"{op} fails its self-check.*differs"
  ):
    wrong = jax.jit(lambda: CALLS[op]())()
  expected = CALLS[op]("xla")
  assert jax.tree.all(
    jax.tree.map(lambda a, b: (a == b).all(), wrong, expected)
  )
