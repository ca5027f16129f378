"""Cross-entropy of a linear head that never stores all logits.

For a token with hidden vector x and target y, z = head^T x:

    nll = logsumexp(z) - z_y  (+ z_loss * logsumexp(z)^2)
    d nll / d z = softmax(z) * (1 + 2 * z_loss * logsumexp(z)) - onehot(y)

Only the logits of one chunk of tokens are in memory, forward and backward.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gdn2_jax.ops.attention.xla import product
from gdn2_jax.ops.checks import check_floating, check_integers


def _check(hidden, head, targets, chunk, z_loss):
  """Raises ValueError for wrong shapes, dtypes and numbers."""
  check_floating("hidden", hidden, "[B, T, D]")
  check_floating("head", head, "[D, VOCAB]")
  if head.shape[0] != hidden.shape[-1]:
    raise ValueError(
      f"head: expected [D, VOCAB] with D = {hidden.shape[-1]}, got {head.shape}"
    )
  check_integers("targets", targets, "[B, T]", hidden.shape[:2])
  if chunk < 1:
    raise ValueError(f"chunk: expected at least 1 token, got {chunk}")
  if not z_loss >= 0:
    raise ValueError(f"z_loss: expected a number >= 0, got {z_loss}")


def _split_time(x, chunk):
  """[B, T, ...] to [N, B, chunk, ...], zeros after the last token."""
  batch, time = x.shape[:2]
  count = -(-time // chunk)
  widths = [(0, 0), (0, count * chunk - time)] + [(0, 0)] * (x.ndim - 2)
  x = jnp.pad(x, widths).reshape((batch, count, chunk, *x.shape[2:]))
  return jnp.moveaxis(x, 1, 0)


def _join_time(x, time):
  """Inverse of `_split_time`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape((x.shape[0], -1, *x.shape[3:]))[:, :time]


def _logits(hidden, head):
  return product("btd,dv->btv", hidden, head)


def _is_target(targets, logits):
  # A comparison instead of a gather: XLA fuses it, and with the vocabulary
  # split over devices no logits are exchanged.
  return targets[:, :, None] == lax.broadcasted_iota(
    targets.dtype, logits.shape, 2
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _cross_entropy(hidden, head, targets, chunk, z_loss):
  return _forward(hidden, head, targets, chunk, z_loss)[0]


def _forward(hidden, head, targets, chunk, z_loss):
  narrow_head = head.astype(hidden.dtype)

  def body(_, xs):
    hidden_chunk, target_chunk = xs
    logits = _logits(hidden_chunk, narrow_head)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.where(_is_target(target_chunk, logits), logits, 0)
    nll = lse - jnp.sum(picked, axis=-1)
    if z_loss:
      nll = nll + z_loss * lse * lse
    return None, (nll, lse)

  xs = _split_time(hidden, chunk), _split_time(targets, chunk)
  _, (nll, lse) = lax.scan(body, None, xs)
  nll = _join_time(nll, hidden.shape[1])
  return nll, (hidden, head, targets, lse)


def _backward(chunk, z_loss, residuals, d_nll):
  hidden, head, targets, lse = residuals
  narrow_head = head.astype(hidden.dtype)

  def body(d_head, xs):
    hidden_chunk, target_chunk, lse_chunk, d_chunk = xs
    logits = _logits(hidden_chunk, narrow_head)
    d_logits = jnp.exp(logits - lse_chunk[:, :, None])
    if z_loss:
      d_logits = d_logits * (1 + 2 * z_loss * lse_chunk[:, :, None])
    d_logits = jnp.where(
      _is_target(target_chunk, logits), d_logits - 1, d_logits
    )
    d_logits = (d_logits * d_chunk[:, :, None]).astype(hidden.dtype)
    d_hidden = product("btv,dv->btd", d_logits, narrow_head)
    d_head = d_head + product("btd,btv->dv", hidden_chunk, d_logits)
    return d_head, d_hidden.astype(hidden.dtype)

  xs = (
    _split_time(hidden, chunk),
    _split_time(targets, chunk),
    lse,
    _split_time(d_nll, chunk),
  )
  # zeros_like: under shard_map the carry must vary over its updates' axes.
  d_head = jnp.zeros_like(lse, shape=head.shape)
  d_head, d_hidden = lax.scan(body, d_head, xs)
  d_hidden = _join_time(d_hidden, hidden.shape[1])
  return d_hidden, d_head.astype(head.dtype), None


_cross_entropy.defvjp(_forward, _backward)


def cross_entropy(
  hidden: Float[Array, "B T D"],
  head: Float[Array, "D VOCAB"],
  targets: Int[Array, "B T"],
  *,
  chunk: int = 256,
  z_loss: float = 0.0,
) -> Float[Array, "B T"]:
  """Negative log-likelihood of every target, in nats.

  The products run in hidden.dtype with float32 accumulation, the softmax in
  float32. The backward pass recomputes the logits of a chunk from the saved
  logsumexp and sums the gradient of the head in float32.

  Args:
    hidden: Activations [B, T, D].
    head: Matrix [D, VOCAB]; cast to hidden.dtype for the products. Its gradient
      has the dtype of head.
    targets: Token ids [B, T] in 0 .. VOCAB-1. Not checked on the device: a
      target outside the range matches no logit and its loss is logsumexp
      alone. Callers validate on the host.
    chunk: Tokens of each sequence whose logits are in memory at a time.
    z_loss: Coefficient of the squared logsumexp.

  Returns:
    Losses [B, T], float32 (float64 for float64 hidden). Padding is not masked:
    multiply by the loss mask.

  Raises:
    ValueError: An argument has a wrong shape, dtype or value; it is named.
  """
  _check(hidden, head, targets, chunk, z_loss)
  chunk = min(chunk, max(1, hidden.shape[1]))
  # Under shard_map over sequences, hidden varies over devices and head does
  # not. Adding a zero that varies makes the backward pass sum the gradient of
  # the head over devices. XLA removes the addition.
  head = head + jnp.zeros_like(hidden, head.dtype, shape=(1, 1))
  return _cross_entropy(hidden, head, targets, chunk, float(z_loss))
