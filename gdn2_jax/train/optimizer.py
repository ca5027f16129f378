"""The optimizer: AdamW, or another by name, with warm-up and cosine decay.

    m_t = b1 m + (1 - b1) dL        n_t = b2 n + (1 - b2) dL^2
    x  -= lr_t (m_hat / (sqrt(n_hat) + eps) + weight_decay x)

The gradient is first scaled to a global norm of at most `clip_norm`. Another
`name` puts another direction in the place of m_hat / (sqrt(n_hat) + eps); see
`gdn2_jax.train.directions`.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from gdn2_jax.config_class import check_choices, config_class
from gdn2_jax.train.directions import (
  HEAD_AXES,
  Setup,
  kind_of,
  map_boxes,
  options_of,
)


@config_class
class OptimizerConfig:
  """The optimizer and its schedule; the defaults are those of the paper.

  Attributes:
    name: "adamw"; "adam", without weight decay; "nadamw"; "muon", Adam for the
      embedding, the head and vectors; "lion"; "adafactor"; "sgd"; and what
      `register_optimizer` adds. See `gdn2_jax.train.directions`.
    options: Settings "name=value" of other optimizers than adamw: beta,
      nesterov, ns_steps, rms of muon; b1, b2 of lion; decay_rate,
      min_dim_size_to_factor, clipping_threshold, multiply_by_parameter_scale,
      momentum of adafactor; momentum, nesterov of sgd.
    lr: peak learning rate.
    final_lr: learning rate of the last step.
    warmup_fraction: share of the steps spent on the linear warm-up.
    b1: decay of Adam's first moment.
    b2: decay of Adam's second moment.
    eps: added to the root of Adam's second moment.
    weight_decay: decoupled weight decay, multiplied by the learning rate.
    decay_mask: "all" decays every parameter, as the public training script of
      the paper does; "matrices" leaves out vectors and scalars (norm weights,
      biases, A_log, dt_bias).
    clip_norm: largest global norm of the gradient; 0 turns clipping off.
    skip_norm: batches whose gradient norm before clipping is larger are left
      out and counted, like those that are not finite; 0 leaves none out.
  """

  name: str = "adamw"
  options: tuple[str, ...] = ()
  lr: float = 4e-4
  final_lr: float = 4e-5
  warmup_fraction: float = 0.01
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  decay_mask: Literal["all", "matrices"] = "all"
  clip_norm: float = 1.0
  skip_norm: float = 0.0


def validate(config: OptimizerConfig) -> None:
  """Raises ValueError naming the flag whose value makes no sense."""
  check_choices(config, "--config.optimizer")
  unit = "a number x with 0 <= x < 1"
  positive, not_negative = "a positive number", "0 or more"
  lr = f"a number from 0 to --config.optimizer.lr={config.lr}"
  for field, ok, expected in (
    ("lr", config.lr > 0, positive),
    ("final_lr", 0 <= config.final_lr <= config.lr, lr),
    ("warmup_fraction", 0 <= config.warmup_fraction < 1, unit),
    ("b1", 0 <= config.b1 < 1, unit),
    ("b2", 0 <= config.b2 < 1, unit),
    ("eps", config.eps > 0, positive),
    ("weight_decay", config.weight_decay >= 0, not_negative),
    ("clip_norm", config.clip_norm >= 0, not_negative),
    ("skip_norm", config.skip_norm >= 0, not_negative),
  ):
    if not ok:
      raise ValueError(
        f"--config.optimizer.{field}={getattr(config, field)!r}: "
        f"expected {expected}"
      )
  try:
    kind = kind_of(config.name)
  except ValueError as e:
    raise ValueError(f"--config.optimizer.name={config.name!r}: {e}") from None
  try:
    options_of(config)
  except ValueError as e:
    raise ValueError(
      f"--config.optimizer.options={config.options!r}: {e}"
    ) from None
  for field in sorted({"b1", "b2", "eps"} - set(kind.reads)):
    value, default = getattr(config, field), getattr(OptimizerConfig(), field)
    if value != default:
      raise ValueError(
        f"--config.optimizer.{field}={value!r}: {config.name} does not use it; "
        f"expected the default {default!r}"
      )
  accepted = (0, OptimizerConfig().weight_decay)
  if not kind.decays and config.weight_decay not in accepted:
    raise ValueError(
      f"--config.optimizer.weight_decay={config.weight_decay!r}: {config.name} "
      "has no weight decay; expected 0 or the default"
    )


def learning_rate(
  config: OptimizerConfig, num_steps: int
) -> Callable[[Any], jax.Array]:
  """The schedule: step (from 0) -> learning rate, float32.

  The first step is already lr / warm-up steps, not 0, so that no batch is
  wasted; the last of num_steps is final_lr.
  """
  warmup = round(config.warmup_fraction * num_steps)
  decay = max(num_steps - 1 - warmup, 1)

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    rising = config.lr * (step + 1.0) / max(warmup, 1)
    progress = jnp.minimum((step - warmup) / decay, 1.0)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    falling = config.final_lr + (config.lr - config.final_lr) * cosine
    return jnp.where(step < warmup, rising, falling)

  return schedule


def decay_mask(config: OptimizerConfig, boxed_params: Any) -> Any:
  """Tree of bool, True for parameters that decay, from their axis names."""
  # Names decide, not the number of axes: the axis that stacks scanned layers
  # must not turn a vector into a matrix, and dt_bias [H, K] is not one either.

  def decays(leaf: nn.LogicallyPartitioned) -> bool:
    axes = [name for name in leaf.names if name != "layers"]
    is_matrix = len(axes) >= 2 and not set(axes) <= HEAD_AXES
    return config.decay_mask == "all" or is_matrix

  return map_boxes(decays, boxed_params)


def make_optimizer(
  config: OptimizerConfig, num_steps: int, boxed_params: Any
) -> optax.GradientTransformation:
  """The optax transformation.

  Args:
    config: a validated config.
    num_steps: steps of the schedule.
    boxed_params: shapes of the parameters in boxes with logical axis names.
  """
  clip = optax.identity()
  if config.clip_norm:
    clip = optax.clip_by_global_norm(config.clip_norm)
  kind = kind_of(config.name)
  setup = Setup(
    options=options_of(config),
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    boxed_params=boxed_params,
  )
  decay = optax.identity()
  if kind.decays:
    mask = decay_mask(config, boxed_params)
    decay = optax.add_decayed_weights(config.weight_decay, mask=mask)
  return optax.chain(
    clip,
    kind.make(setup),
    decay,
    optax.scale_by_learning_rate(learning_rate(config, num_steps)),
  )
