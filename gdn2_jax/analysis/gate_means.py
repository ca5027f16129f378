"""Means of the gates of every layer, reduced on the device.

For a run's report: `collect_gates` returns the gates themselves.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from gdn2_jax.analysis.gates import layers_with, sow, sown_values
from gdn2_jax.model.config import ModelConfig

_GATES = ("g", "b", "w")


def gate_means(
  config: ModelConfig,
  params: Any,
  tokens: Int[Array | np.ndarray, "B T"],
  segment_ids: Int[Array | np.ndarray, "B T"],
) -> dict[int, dict[str, float]]:
  """Half-life of the decay and means of the gates of every layer with gates.

  Args:
    config: model config.
    params: unboxed parameters of LM(config), on any devices.
    tokens: ids [B, T].
    segment_ids: [B, T], 0 for padding, which is left out.

  Returns:
    By layer, {"half_life": tokens, "erase": mean of b, "write": mean of w}. A
    channel's half-life is that of its mean log-decay over the tokens, and a
    layer's the geometric mean over channels, inf without decay. {} if no layer
    has these gates.
  """
  if not layers_with(config, _GATES):
    return {}
  means = jax.device_get(_means(params, tokens, segment_ids, config=config))
  return {
    layer: {name: float(value) for name, value in values.items()}
    for layer, values in means.items()
  }


@functools.partial(jax.jit, static_argnames="config")
def _means(params, tokens, segment_ids, *, config):
  seen = sow(config, params, tokens, segment_ids)
  real = (segment_ids != 0)[..., None, None]

  def over_tokens(gate):
    total = jnp.sum(jnp.where(real, gate, 0), axis=(0, 1), dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(real), 1)

  means = {}
  for layer, group, place in layers_with(config, _GATES):
    sown = sown_values(seen, config, group, place, _GATES)
    g, b, w = (over_tokens(sown[name]) for name in _GATES)
    means[layer] = {
      "half_life": jnp.exp(jnp.mean(jnp.log(math.log(2) / -g))),
      "erase": jnp.mean(b),
      "write": jnp.mean(w),
    }
  if not jax.sharding.get_abstract_mesh().empty:
    # Replicated, because every process reads them.
    means = jax.lax.with_sharding_constraint(means, PartitionSpec())
  return means
