"""Cost of a model: parameters, state and floating-point operations.

Counted from the config and from abstract shapes; nothing is allocated. A
multiply and an add are two operations.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM, init_cache


@dataclasses.dataclass(frozen=True)
class ParameterCount:
  """Parameters of a model.

  Attributes:
    blocks: of the layers (mixers, MLPs and their norms).
    embedding: of the token table.
    head: of the untied output projection.
    final_norm: of the norm before it.
  """

  blocks: int
  embedding: int
  head: int
  final_norm: int

  @property
  def total(self) -> int:
    """All of them."""
    return self.blocks + self.embedding + self.head + self.final_norm


def abstract_params(config: ModelConfig):
  """Shapes, dtypes and logical axes of the parameters, boxed."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  variables = jax.eval_shape(LM(config).init, jax.random.key(0), tokens)
  return variables["params"]


def count_parameters(config: ModelConfig) -> ParameterCount:
  """Counts parameters from shapes."""
  # The leaves of a box are those of its value: there is nothing to unbox,
  # which a mesh would not allow for shapes.
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
  """Bytes of the cache of one sequence, by mixer kind.

  Args:
    config: of the model.
    max_length: tokens that the sequence may read; only layers "A" ask, whose
      cache grows with it.
  """
  cache = jax.eval_shape(lambda: init_cache(config, 1, max_length))
  by_kind: dict[str, int] = {}
  for kind, tree in zip(config.pattern, cache, strict=True):
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    by_kind[kind] = by_kind.get(kind, 0) + size
  return by_kind


def recurrence_flops_per_token(config: ModelConfig) -> float:
  """Forward operations of one GDN-2 recurrence on one token, all heads.

  The token form's own count, whatever algorithm runs: decay KV, read 2KV,
  write 2KV, output 2KV.
  """
  c = config.gdn2
  return 7.0 * c.key_dim * c.value_dim * c.value_heads


def attention_flops_per_token(
  config: ModelConfig, seq_len: int, full: bool = False
) -> float:
  """Forward operations of one attention's scores and values, mean over T.

  Args:
    config: of the model.
    seq_len: tokens T.
    full: whether of a layer "A", which sees all tokens before its own.
  """
  c = config.attention
  window = seq_len if full else min(c.window, seq_len)
  # Token t sees min(t + 1, window) keys.
  seen = window - window * (window - 1) / (2 * seq_len)
  return 4.0 * c.head_dim * c.num_heads * seen


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
  """Operations of a forward pass, mean over the tokens of a sequence.

  Two per parameter of every matrix product (all parameters but the embedding
  table), plus those of the mixers that have no parameters.
  """
  count = count_parameters(config)
  flops = 2.0 * (count.total - count.embedding)
  mixers = {
    "G": recurrence_flops_per_token(config),
    "S": attention_flops_per_token(config, seq_len),
    "A": attention_flops_per_token(config, seq_len, full=True),
  }
  return flops + config.num_groups * sum(mixers[k] for k in config.pattern)


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
  """Forward and backward: three forwards; rematerialisation not counted."""
  return 3.0 * forward_flops_per_token(config, seq_len)
