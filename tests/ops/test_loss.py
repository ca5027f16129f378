"""Chunked cross-entropy against float64 and against the plain program."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from gdn2_jax.ops.loss import cross_entropy
from tests.numerics import rel_rms

B, T, D, VOCAB = 2, 7, 12, 33


def oracle(hidden, head, targets, d_nll, z_loss=0.0):
  """float64 nll and its gradients."""
  hidden, head = hidden.astype(np.float64), head.astype(np.float64)
  logits = hidden @ head
  top = logits.max(-1, keepdims=True)
  lse = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
  onehot = np.eye(head.shape[1])[targets]
  nll = (lse[..., 0] - (logits * onehot).sum(-1)) + z_loss * lse[..., 0] ** 2
  d_logits = np.exp(logits - lse) * (1 + 2 * z_loss * lse) - onehot
  d_logits = d_logits * d_nll[..., None]
  d_head = np.einsum("btd,btv->dv", hidden, d_logits)
  return nll, d_logits @ head.T, d_head


def plain(hidden, head, targets, z_loss=0.0):
  logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
  lse = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return lse - picked + z_loss * lse**2


@pytest.fixture
def arrays(rng):
  hidden = rng.normal(size=(B, T, D)).astype(np.float32)
  head = rng.normal(size=(D, VOCAB)).astype(np.float32)
  targets = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
  d_nll = rng.normal(size=(B, T)).astype(np.float32)
  return hidden, head, targets, d_nll


@functools.partial(jax.jit, static_argnames=("chunk", "z_loss"))
def run(hidden, head, targets, d_nll, chunk=256, z_loss=0.0):
  """nll and the gradients of hidden and head."""

  def loss(hidden, head):
    return cross_entropy(hidden, head, targets, chunk=chunk, z_loss=z_loss)

  nll, vjp = jax.vjp(loss, hidden, head)
  return nll, *vjp(d_nll)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_values_and_gradients(arrays, chunk, z_loss):
  results = run(*arrays, chunk=chunk, z_loss=z_loss)
  exact = oracle(*arrays, z_loss)
  for name, x, want in zip(
    ("nll", "hidden", "head"), results, exact, strict=True
  ):
    assert x.shape == want.shape and x.dtype == jnp.float32, name
    assert rel_rms(x, want) < 1e-6, name


def test_equals_the_plain_program(arrays):
  hidden, head, targets, d_nll = map(jnp.asarray, arrays)
  nll, vjp = jax.vjp(lambda h, w: plain(h, w, targets, 0.1), hidden, head)
  results = run(*arrays, chunk=3, z_loss=0.1)
  for name, x, want in zip(
    ("nll", "hidden", "head"), results, (nll, *vjp(d_nll)), strict=True
  ):
    assert rel_rms(x, np.asarray(want, np.float64)) < 1e-6, name


def test_float64(arrays):
  hidden, head, targets, d_nll = arrays
  with jax.enable_x64(True):
    results = run(
      hidden.astype(np.float64),
      head.astype(np.float64),
      targets,
      d_nll.astype(np.float64),
      chunk=3,
    )
    for x, want in zip(results, oracle(*arrays), strict=True):
      assert rel_rms(x, want) < 1e-14


def test_bfloat16_hidden_float32_head(arrays):
  """Twice what rounding d_logits and the result to bfloat16 costs anyone."""
  hidden, head, targets, d_nll = arrays
  hidden = jnp.asarray(hidden, jnp.bfloat16)
  head = jnp.asarray(head, jnp.bfloat16).astype(jnp.float32)
  nll, d_hidden, d_head = run(hidden, head, targets, d_nll, chunk=3)
  assert (nll.dtype, d_hidden.dtype) == (jnp.float32, jnp.bfloat16)
  assert d_head.dtype == jnp.float32
  exact = oracle(np.asarray(hidden), np.asarray(head), targets, d_nll)
  assert rel_rms(nll, exact[0]) < 1e-6  # float32 logits of the same inputs
  for name, x, want in zip(
    ("hidden", "head"), (d_hidden, d_head), exact[1:], strict=True
  ):
    floor = rel_rms(jnp.asarray(want, jnp.bfloat16), want)
    assert rel_rms(x, want) < 2 * floor, name


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_stay_finite(arrays, size):
  hidden, head, targets, d_nll = arrays
  results = run(size * hidden, head, targets, d_nll, chunk=3)
  exact = oracle(size * hidden, head, targets, d_nll)
  np.testing.assert_allclose(results[0], exact[0], atol=2e-6 * size)
  # A logit of 1e5 is good to 0.01, so a softmax between two such is too.
  np.testing.assert_allclose(results[1], exact[1], atol=0.05)
  np.testing.assert_allclose(results[2], exact[2], atol=0.05 * size)


def test_confident_token_costs_nothing():
  hidden = jnp.full((1, 1, 1), 200.0)
  head = jnp.asarray([[1.0, -1.0]])
  targets = jnp.zeros((1, 1), jnp.int32)
  nll, d_hidden, d_head = run(hidden, head, targets, np.ones((1, 1)))
  for x in (nll, d_hidden, d_head):
    np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("target", [-1, VOCAB])
def test_target_outside_the_vocabulary(arrays, target):
  """Documented: the loss is the logsumexp, never NaN, never another row."""
  hidden, head, targets, d_nll = arrays
  targets = np.full_like(targets, target)
  nll, d_hidden, d_head = run(hidden, head, targets, d_nll, chunk=3)
  logits = (hidden @ head).astype(np.float64)
  np.testing.assert_allclose(nll, np.log(np.exp(logits).sum(-1)), rtol=1e-5)
  assert np.all(np.isfinite(d_hidden)) and np.all(np.isfinite(d_head))


def test_padding_of_the_last_chunk_has_no_effect(arrays):
  hidden, head, targets, d_nll = arrays
  cut = slice(0, 5)
  short = run(hidden[:, cut], head, targets[:, cut], d_nll[:, cut], chunk=4)
  whole = run(hidden[:, cut], head, targets[:, cut], d_nll[:, cut], chunk=5)
  for x, want in zip(short, whole, strict=True):
    assert rel_rms(x, np.asarray(want, np.float64)) < 5e-7


def test_never_holds_all_logits():
  """Compiled temporaries, forward and backward, vocabulary >> width."""
  batch, time, width, vocab = 2, 512, 16, 4096
  logits_bytes = 4 * batch * time * vocab
  args = (
    jax.ShapeDtypeStruct((batch, time, width), jnp.float32),
    jax.ShapeDtypeStruct((width, vocab), jnp.float32),
    jax.ShapeDtypeStruct((batch, time), jnp.int32),
  )

  def temporaries(loss):
    fn = jax.jit(
      jax.value_and_grad(lambda h, w, t: loss(h, w, t).mean(), (0, 1))
    )
    return fn.lower(*args).compile().memory_analysis().temp_size_in_bytes

  assert temporaries(plain) > logits_bytes
  chunked = temporaries(lambda h, w, t: cross_entropy(h, w, t, chunk=32))
  assert chunked < logits_bytes / 4


def test_saves_no_logits_for_the_backward_pass(arrays):
  hidden, head, targets, _ = arrays
  _, vjp = jax.vjp(
    lambda h, w: cross_entropy(h, w, jnp.asarray(targets), chunk=3),
    jnp.asarray(hidden),
    jnp.asarray(head),
  )
  saved = sum(x.size for x in jax.tree.leaves(vjp))
  assert saved < hidden.size + head.size + B * T * VOCAB / 2


def test_shard_map_over_sequences(arrays):
  hidden, head, targets, d_nll = map(jnp.asarray, arrays)
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
  data, whole = PartitionSpec("data"), PartitionSpec()
  sharded = jax.shard_map(
    lambda h, w, t: cross_entropy(h, w, t, chunk=3),
    mesh=mesh,
    in_specs=(data, whole, data),
    out_specs=data,
  )

  @jax.jit
  def gradients(hidden, head):
    nll, vjp = jax.vjp(lambda h, w: sharded(h, w, targets), hidden, head)
    return nll, *vjp(d_nll)

  for x, want in zip(
    gradients(hidden, head), run(*arrays, chunk=3), strict=True
  ):
    assert rel_rms(x, np.asarray(want, np.float64)) < 5e-7


@pytest.mark.parametrize(
  ("change", "name"),
  [
    ({"hidden": jnp.ones((B, D))}, "hidden"),
    ({"hidden": jnp.ones((B, T, D), jnp.int32)}, "hidden"),
    ({"head": jnp.ones((D + 1, VOCAB))}, "head"),
    ({"head": jnp.ones((D, VOCAB), jnp.int32)}, "head"),
    ({"targets": jnp.zeros((B, T + 1), jnp.int32)}, "targets"),
    ({"targets": jnp.zeros((B, T))}, "targets"),
    ({"chunk": 0}, "chunk"),
    ({"z_loss": -1.0}, "z_loss"),
  ],
)
def test_bad_inputs_are_named(change, name):
  args = {
    "hidden": jnp.ones((B, T, D)),
    "head": jnp.ones((D, VOCAB)),
    "targets": jnp.zeros((B, T), jnp.int32),
    **change,
  }
  with pytest.raises(ValueError, match=f"^{name}: expected"):
    inspect.unwrap(cross_entropy)(**args)
