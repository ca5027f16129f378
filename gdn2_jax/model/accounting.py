"""Parameters, state size and floating-point operations of a model.

Counted from the config and from abstract shapes, without allocating arrays. A
multiplication and an addition are two operations.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM, init_cache
from gdn2_jax.model.mixers.registry import kind_of


@dataclasses.dataclass(frozen=True)
class ParameterCount:
  """Number of parameters in each part of a model.

  Attributes:
    blocks: Layers (mixers, MLPs and their norms).
    embedding: Token table.
    head: Untied output projection.
    final_norm: Norm before the head.
  """

  blocks: int
  embedding: int
  head: int
  final_norm: int

  @property
  def total(self) -> int:
    """Number of all parameters."""
    return self.blocks + self.embedding + self.head + self.final_norm


def abstract_params(config: ModelConfig):
  """Shapes and dtypes of the parameters, boxed with their logical axes."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  # The key is made inside: a mesh of devices that only compile cannot run it.
  variables = jax.eval_shape(
    lambda tokens: LM(config).init(jax.random.key(0), tokens), tokens
  )
  return variables["params"]


def count_parameters(config: ModelConfig) -> ParameterCount:
  """Counts parameters from shapes."""
  # jax.tree.leaves looks into the boxes. nn.unbox would raise for abstract
  # values under a mesh.
  sizes = {
    name: sum(leaf.size for leaf in jax.tree.leaves(tree))
    for name, tree in abstract_params(config).items()
  }
  embedding, head = sizes.pop("embedding"), sizes.pop("head")
  final_norm = sizes.pop("final_norm")
  return ParameterCount(sum(sizes.values()), embedding, head, final_norm)


def state_bytes(
  config: ModelConfig, max_length: int | None = None
) -> dict[str, int]:
  """Bytes of the cache of one sequence, by letter of the pattern.

  max_length, the most tokens that the sequence may have, is required for mixers
  whose cache has a slot for each.
  """
  cache = jax.eval_shape(lambda: init_cache(config, 1, max_length))
  by_kind: dict[str, int] = {}
  for kind, tree in zip(config.pattern, cache, strict=True):
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    by_kind[kind] = by_kind.get(kind, 0) + size
  return by_kind


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
  """Operations of a forward pass, mean per token of a sequence.

  Two per parameter (except the embedding table), plus what mixers compute
  without parameters: recurrences and attention products.
  """
  count = count_parameters(config)
  flops = 2.0 * (count.total - count.embedding)
  mixers = [kind_of(x).flops(config, seq_len) for x in config.pattern]
  return flops + config.num_groups * sum(mixers)


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
  """Operations of forward and backward, three times those of forward.

  Recomputed activations are not counted.
  """
  return 3.0 * forward_flops_per_token(config, seq_len)
