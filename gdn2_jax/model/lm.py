"""The language model: embedding, groups of layers, final norm, untied head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from gdn2_jax.model.block import Group, init_mixer_cache
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.kv_cache import lost_tokens
from gdn2_jax.model.layers import Embedding, RMSNorm, fan_in_uniform
from gdn2_jax.model.on_shards import shards_as_rows
from gdn2_jax.ops.loss import cross_entropy
from gdn2_jax.typing import Activations, SegmentIds, Tokens

_POLICIES = {
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class LM(nn.Module):
  """Tokens to logits, with or without a cache.

  Parameters carry logical axis names; with `scan_layers` those of the layers
  are stacked along a leading axis "layers", one entry per group.

  Attributes:
    config: what to build.
  """

  config: ModelConfig

  def setup(self):
    """Declares embedding, groups, final norm and head."""
    c = self.config
    types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
    self.embedding = Embedding(c.vocab_size, c.model_dim, **types)
    group = Group
    if c.remat != "none":
      # A loop keeps the backward's second pass apart from the forward; without
      # one XLA would find them equal, and keep what remat is to drop.
      looped = c.scan_layers and c.groups_per_turn < c.num_groups
      group = nn.remat(Group, policy=_POLICIES[c.remat], prevent_cse=not looped)
    if c.scan_layers:
      self.groups = nn.scan(
        group,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=c.num_groups,
        unroll=c.groups_per_turn,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )(c)
    else:
      self.group_list = [
        group(c, name=f"group_{i}") for i in range(c.num_groups)
      ]
    self.final_norm = RMSNorm(c.norm_eps, c.param_dtype)
    self.head = self.param(
      "head",
      nn.with_logical_partitioning(fan_in_uniform(), ("embed", "vocab")),
      (c.model_dim, c.vocab_size),
      jnp.dtype(c.param_dtype),
    )

  def hidden(
    self,
    tokens: Tokens,
    segment_ids: SegmentIds | None = None,
    cache: Any = None,
  ) -> tuple[Activations, Any]:
    """Activations after the final norm, and the cache after the tokens.

    Those of a token for which a cache of layers "A" has no room are NaN.

    Args:
      tokens: ids in [0, vocab_size); others give NaN.
      segment_ids: see `gdn2_jax.ops.segments`; 0 is padding. None: one run.
      cache: from `init_cache` or an earlier call; None starts from nothing and
        returns None.
    """
    x = self.embedding(tokens)
    x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
    lost = None
    if cache is not None:
      lost = lost_tokens(cache, segment_ids, tokens.shape[1])
    carry = x, cache
    if self.config.scan_layers:
      # An index is for caches; training programs stay free of it.
      groups = jnp.arange(self.config.num_groups, dtype=jnp.int32)
      carry, _ = self.groups(
        carry, segment_ids, None if cache is None else groups
      )
    else:
      for i, group in enumerate(self.group_list):
        carry, _ = group(carry, segment_ids, i)
    x, cache = carry
    x = self.final_norm(x)
    if lost is not None:  # here: inside, a NaN would reach other tokens
      x = jnp.where(lost[..., None], jnp.nan, x)
    return x, cache

  def __call__(
    self,
    tokens: Tokens,
    segment_ids: SegmentIds | None = None,
    cache: Any = None,
  ) -> tuple[Float[Array, "B T VOCAB"], Any]:
    """Next-token logits in float32; arguments as in `hidden`."""
    x, cache = self.hidden(tokens, segment_ids, cache)
    return self.logits(x), cache

  def logits(self, x: Float[Array, "*b D"]) -> Float[Array, "*b VOCAB"]:
    """Head applied to activations, accumulated and returned in float32."""
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(
      x, self.head.astype(x.dtype), preferred_element_type=accumulate
    )

  def token_losses(
    self,
    tokens: Tokens,
    targets: Tokens,
    segment_ids: SegmentIds | None = None,
  ) -> Float[Array, "B T"]:
    """Negative log-likelihood of every target in nats, padding included.

    Never holds all logits: see `gdn2_jax.ops.loss.cross_entropy`.
    """
    x, _ = self.hidden(tokens, segment_ids)
    (x, targets), join = shards_as_rows(x, targets)
    nll = cross_entropy(
      x, self.head.astype(x.dtype), targets, chunk=self.config.loss_chunk
    )
    return join(nll)


def init_cache(
  config: ModelConfig, batch_size: int, max_length: int | None = None
) -> Any:
  """The empty cache: a tuple over the pattern, leaves [group, B, ...].

  Float32 recurrent states; convolution tails, attention rings, keys and values
  in the model's dtype. Constant in the number of tokens seen; that of layers
  "A" is made for a fixed number of tokens, beyond which logits are NaN.

  Args:
    config: of the model.
    batch_size: rows B.
    max_length: tokens that a row may read, prompt and generated ones together;
      for patterns with "A", ignored by others.

  Raises:
    ValueError: batch_size < 1, or a max_length that is needed is missing or
      below 1.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size}: expected >= 1")
  if "A" in config.pattern and (max_length is None or max_length < 1):
    raise ValueError(
      f"max_length={max_length}: expected >= 1, the tokens that a sequence may "
      f"read, prompt and generated ones together; the cache of pattern="
      f"{config.pattern!r} is made for that many"
    )
  return tuple(
    init_mixer_cache(kind, config, batch_size, max_length)
    for kind in config.pattern
  )
