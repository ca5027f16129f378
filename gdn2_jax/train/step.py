"""One training step, a pure function of (state, batch).

    loss = sum(nll * mask) / max(sum(mask), 1)

over the whole batch, however many microbatches it is computed in.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from gdn2_jax.sharding import batch_sharding, replicated
from gdn2_jax.train.config import TrainConfig
from gdn2_jax.train.optimizer import learning_rate
from gdn2_jax.train.state import Blueprint, TrainState

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


def masked_mean(
  nll: Float[Array, "B T"], mask: Float[Array, "B T"], count: Float[Array, ""]
) -> Float[Array, ""]:
  """sum(nll * mask) / max(count, 1) in float32; 0 where nothing counts.

  Positions with mask 0 may hold anything, NaN included: they are selected
  away, not multiplied away.
  """
  kept = jnp.where(mask > 0, nll * mask, 0.0)
  return jnp.sum(kept, dtype=jnp.float32) / jnp.maximum(count, 1.0)


def split_microbatches(batch: Batch, accumulate: int) -> dict[str, Array]:
  """[B, ...] to [accumulate, B / accumulate, ...].

  Microbatch i takes rows i, i + accumulate, ...: with contiguous microbatches
  every row would have to move to another device.
  """

  def split(x):
    x = x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:])
    return x.swapaxes(0, 1)

  return {name: split(x) for name, x in batch.items()}


def loss_and_grads(
  model: nn.Module, params: Any, batch: Batch, accumulate: int
) -> tuple[Float[Array, ""], Any]:
  """The loss over the whole batch and its gradient, both float32."""
  # One denominator for all microbatches: those with few unmasked tokens weigh
  # exactly as much as their tokens.
  count = jnp.sum(batch["loss_mask"], dtype=jnp.float32)

  def loss_fn(params, part):
    nll = model.apply(
      {"params": params},
      part["inputs"],
      part["targets"],
      part["segment_ids"],
      method="token_losses",
    )
    return masked_mean(nll, part["loss_mask"], count)

  grad_fn = jax.value_and_grad(loss_fn)
  if accumulate == 1:
    return grad_fn(params, batch)

  def add(total, part):
    return jax.tree.map(jnp.add, total, grad_fn(params, part)), None

  zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
  total, _ = jax.lax.scan(add, zero, split_microbatches(batch, accumulate))
  return total


def keep_if(ok: Array, new: Any, old: Any) -> Any:
  """`new` where `ok`, else `old` bit for bit, whatever `new` holds."""
  return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)


def make_train_step(
  config: TrainConfig, model: nn.Module, blueprint: Blueprint, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The jitted step: (state, batch) -> (state, metrics); donates the state.

  A loss or gradient that is not finite, or a gradient norm above `skip_norm`,
  leaves parameters and optimizer state as they were, to the bit, and is
  counted, however many follow: `optax.apply_if_finite` lets the NaN through
  after a number of them. Call the step under `gdn2_jax.sharding.use_mesh`.

  Metrics are scalars: loss (nats per token), grad_norm before clipping,
  param_norm, lr, tokens (targets that counted), skipped, skipped_in_a_row.
  """
  schedule = learning_rate(config.optimizer, config.num_steps)
  skip_norm = config.optimizer.skip_norm

  def train_step(state: TrainState, batch: Batch):
    loss, grads = loss_and_grads(model, state.params, batch, config.grad_accum)
    grads = jax.lax.with_sharding_constraint(grads, blueprint.shardings.params)
    grad_norm = optax.tree.norm(grads)
    ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if skip_norm:
      ok &= grad_norm <= skip_norm
    updates, opt_state = blueprint.optimizer.update(
      grads, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    failed = (~ok).astype(jnp.int32)
    new = TrainState(
      step=state.step + 1,
      params=keep_if(ok, params, state.params),
      opt_state=keep_if(ok, opt_state, state.opt_state),
      skipped=state.skipped + failed,
      skipped_in_a_row=(state.skipped_in_a_row + failed) * failed,
    )
    metrics = {
      "loss": loss,
      "grad_norm": grad_norm,
      "param_norm": optax.tree.norm(new.params),
      "lr": schedule(state.step - state.skipped),
      "tokens": jnp.sum(batch["loss_mask"], dtype=jnp.float32),
      "skipped": new.skipped,
      "skipped_in_a_row": new.skipped_in_a_row,
    }
    return new, metrics

  return jax.jit(
    train_step,
    in_shardings=(blueprint.shardings, batch_sharding(mesh)),
    out_shardings=(blueprint.shardings, replicated(mesh)),
    donate_argnums=0,
  )
