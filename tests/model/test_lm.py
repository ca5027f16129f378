"""One set of properties, asserted of every mixer through the whole model.

Tests share compiled programs: most arrays have the same few shapes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gdn2_jax.model.lm import LM, init_cache
from tests.model.models import (
  MAX_LENGTH,
  PATTERNS,
  RELATIVES,
  small_config,
  small_model,
  tokens_of,
)
from tests.numerics import rel_rms

# Two float32 forwards that sum in another order differ by about 1e-6 on
# logits of order one; ten times that is still far below any real mistake.
ATOL = 1e-5
# Where the chunkwise form of the op has to agree with its single tokens.
MIXERS = (
  ("G", "xla"),
  (PATTERNS[0], "reference"),
  *(pytest.param(x, "reference", marks=pytest.mark.deep) for x in PATTERNS[1:]),
  *(pytest.param(x, "xla", marks=pytest.mark.deep) for x in RELATIVES),
)
CHUNKS_SLOW = (pytest.param("G", "xla", marks=pytest.mark.deep), *MIXERS[1:])
# Attention alone is tried by itself in tests/ops/attention, too.
SLOW_ATTENTION = (
  "G",
  *(pytest.param(pattern, marks=pytest.mark.deep) for pattern in "SA"),
)


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("pattern", "implementation"), MIXERS)
def test_prefill_and_decode_equal_forward(pattern, implementation):
  _, _, apply = small_model(pattern, implementation)
  tokens = tokens_of(2, 33)
  want, none = apply(tokens)
  assert none is None
  cache, parts = init_cache(small_config(pattern), 2, MAX_LENGTH), []
  for start, end in ((0, 15), (15, 16), (16, 17), (17, 18), (18, 33)):
    logits, cache = apply(tokens[:, start:end], None, cache)
    parts.append(logits)
  close(jnp.concatenate(parts, axis=1), want)


@pytest.mark.parametrize(("pattern", "implementation"), CHUNKS_SLOW)
def test_padding_leaves_the_cache_and_others_alone(pattern, implementation):
  """Ragged prompts in one batch, then a step in which one row is idle."""
  _, _, apply = small_model(pattern, implementation)
  tokens = tokens_of(2, 33)
  want, _ = apply(tokens)
  lengths = np.array([9, 17])
  ids = jnp.asarray(np.arange(17)[None] < lengths[:, None], jnp.int32)
  empty = init_cache(small_config(pattern), 2, MAX_LENGTH)
  _, cache = apply(tokens[:, :17], ids, empty)
  step = jnp.stack([tokens[0, 9:10], tokens[1, 17:18]])
  logits, cache = apply(step, None, cache)
  close(logits[0, 0], want[0, 9])
  close(logits[1, 0], want[1, 17])
  idle = jnp.array([[1], [0]], jnp.int32)
  step = jnp.stack([tokens[0, 10:11], tokens[1, 20:21]])
  logits, after = apply(step, idle, cache)
  close(logits[0, 0], want[0, 10])
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a[:, 1], b[:, 1]), after, cache
  )


@pytest.mark.parametrize(("pattern", "implementation"), CHUNKS_SLOW)
def test_packed_equals_separate(pattern, implementation):
  _, _, apply = small_model(pattern, implementation)
  tokens = tokens_of(1, 30)
  ids = np.zeros((1, 30), np.int32)
  # The third document has the first one's id: it is another document.
  ids[:, :9], ids[:, 9:18], ids[:, 18:27] = 1, 2, 1
  packed, _ = apply(tokens, jnp.asarray(ids))
  for document in (slice(0, 9), slice(9, 18), slice(18, 27)):
    alone, _ = apply(tokens[:, document])
    close(packed[:, document], alone)


@pytest.mark.parametrize("pattern", SLOW_ATTENTION)
def test_cache_after_a_packed_row_is_that_of_its_last_document(pattern):
  _, _, apply = small_model(pattern)
  tokens = tokens_of(2, 18)
  ids = np.ones((2, 17), np.int32)
  ids[:, 9:] = 2
  empty = init_cache(small_config(pattern), 2, MAX_LENGTH)
  _, cache = apply(tokens[:, :17], jnp.asarray(ids), empty)
  got, _ = apply(tokens[:, 17:], None, cache)
  for row in range(2):
    want, _ = apply(tokens[row : row + 1, 9:])
    close(got[row, 0], want[0, -1])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_causal_by_exact_zero_gradients(pattern):
  model, params, _ = small_model(pattern)
  tokens, cut = tokens_of(1, 20), 11

  def prefix_logits(table):
    p = params | {"embedding": {"table": table}}
    return model.apply({"params": p}, tokens)[0][:, :cut].sum()

  # Rows of tokens that appear only after the cut must have no gradient.
  grad = jax.jit(jax.grad(prefix_logits))(params["embedding"]["table"])
  later = set(np.asarray(tokens[0, cut:])) - set(np.asarray(tokens[0, :cut]))
  assert later
  for token in later:
    np.testing.assert_array_equal(grad[token], 0)
  assert np.abs(grad[tokens[0, 0]]).max() > 0


@pytest.mark.parametrize("pattern", SLOW_ATTENTION)
def test_scan_equals_unrolled(pattern):
  _, params, apply = small_model(pattern)
  unrolled = LM(small_config(pattern, scan_layers=False))
  flat = {k: v for k, v in params.items() if k != "groups"}
  for i in range(2):
    flat[f"group_{i}"] = jax.tree.map(lambda a, i=i: a[i], params["groups"])
  tokens = tokens_of(2, 33)
  got, _ = jax.jit(unrolled.apply)({"params": flat}, tokens)
  close(got, apply(tokens)[0])
  tokens = tokens[:, :15]
  cache = init_cache(small_config(pattern), 2, MAX_LENGTH)
  got, got_cache = jax.jit(unrolled.apply)(
    {"params": flat}, tokens, None, cache
  )
  want, want_cache = apply(tokens, None, cache)
  close(got, want)
  jax.tree.map(close, got_cache, want_cache)


@pytest.mark.deep
@pytest.mark.deep
def test_remat_changes_no_gradient():
  _, params, _ = small_model("GS")
  tokens = tokens_of(2, 17)

  def grads(remat):
    model = LM(small_config("GS", remat=remat))

    def loss(p):
      args = (tokens[:, :-1], tokens[:, 1:])
      return model.apply({"params": p}, *args, method="token_losses").mean()

    return jax.jit(jax.grad(loss))(params)

  want = grads("none")
  for remat in ("dots", "full"):
    jax.tree.map(close, grads(remat), want)


def test_token_losses_equal_those_of_the_logits():
  model, params, apply = small_model("GS")
  tokens = tokens_of(2, 21)
  inputs, targets = tokens[:, :-1], tokens[:, 1:]
  losses = jax.jit(functools.partial(model.apply, method="token_losses"))
  got = losses({"params": params}, inputs, targets)
  log_p = jax.nn.log_softmax(apply(inputs)[0])
  want = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
  close(got, want)


def test_token_out_of_range_is_loud():
  _, _, apply = small_model("GS")
  tokens = tokens_of(2, 20).at[0, 7].set(60)
  assert np.isfinite(apply(tokens)[0]).all()
  assert np.isnan(apply(tokens.at[0, 7].set(61))[0][0, 7]).all()


def test_every_parameter_has_logical_axes():
  model = LM(small_config("GS"))
  boxed = jax.eval_shape(model.init, jax.random.key(0), tokens_of(1, 4))
  leaves = jax.tree.leaves(
    boxed["params"], is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )
  for leaf in leaves:
    assert isinstance(leaf, nn.LogicallyPartitioned)
    assert len(leaf.names) == leaf.value.ndim
    assert None not in leaf.names


def test_bfloat16_keeps_decay_parameters_in_float32():
  config = small_config("GS", dtype="bfloat16", param_dtype="bfloat16")
  shapes = jax.eval_shape(LM(config).init, jax.random.key(0), tokens_of(1, 4))
  flat = jax.tree_util.tree_flatten_with_path(nn.unbox(shapes))[0]
  for path, leaf in flat:
    kept = any(name in str(path) for name in ("A_log", "dt_bias"))
    assert leaf.dtype == (jnp.float32 if kept else jnp.bfloat16), path


def test_bfloat16_follows_float32():
  """The bf16 model is the float32 one up to rounding of its activations."""
  _, params, apply = small_model("GS")
  tokens = tokens_of(2, 20)
  model = LM(small_config("GS", dtype="bfloat16"))
  got, _ = jax.jit(model.apply)({"params": params}, tokens)
  want, _ = apply(tokens)
  # Four layers of bf16 rounding (2^-9 each operation) gave 0.7% here.
  assert 1e-4 < rel_rms(got, want) < 2e-2


def test_bad_batch_size_is_refused():
  with pytest.raises(ValueError, match="batch_size=0"):
    init_cache(small_config("GS"), 0)
