"""Language model: embedding, groups of layers, final norm, untied head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from gdn2_jax.model.block import Group, init_mixer_cache
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.layers import (
  Embedding,
  RMSNorm,
  fan_in_uniform,
  parameter,
)
from gdn2_jax.model.mixers.kv_cache import lost_tokens
from gdn2_jax.model.mixers.registry import kinds_of
from gdn2_jax.model.on_shards import shards_as_rows
from gdn2_jax.ops.loss import cross_entropy
from gdn2_jax.typing import Activations, SegmentIds, Tokens

_POLICIES = {
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class LM(nn.Module):
  """Language model from tokens to logits, with or without a cache.

  Parameters are boxed with logical axis names; flax.linen.unbox removes the
  boxes. With config.scan_layers those of the layers are stacked along a leading
  axis "layers", one entry per group.

  Attributes:
    config: Architecture, dtypes and execution options.
  """

  config: ModelConfig

  def setup(self):
    """Creates embedding, groups, final norm and head."""
    c = self.config
    types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
    self.embedding = Embedding(c.vocab_size, c.model_dim, **types)
    group = Group
    if c.remat != "none":
      # Without a loop XLA would merge the recomputation with the forward pass
      # (CSE) and keep the activations that remat drops.
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
    self.head = parameter(
      self,
      "head",
      fan_in_uniform(),
      ("embed", "vocab"),
      (c.model_dim, c.vocab_size),
      c.param_dtype,
    )

  def hidden(
    self,
    tokens: Tokens,
    segment_ids: SegmentIds | None = None,
    cache: Any = None,
  ) -> tuple[Activations, Any]:
    """Activations after the final norm, and the cache after the tokens.

    Args:
      tokens: Ids [B, T] in [0, vocab_size); others give NaN.
      segment_ids: [B, T] integers, one id per document and 0 for padding
        (gdn2_jax.ops.segments); None means one document per row.
      cache: From `init_cache` or an earlier call; None for training.

    Returns:
      Activations [B, T, D], NaN at tokens that a cache of full attention has no
      slot for, and the new cache, None without one.
    """
    x = self.embedding(tokens)
    x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
    lost = None
    if cache is not None:
      lost = lost_tokens(cache, segment_ids, tokens.shape[1])
    carry = x, cache
    if self.config.scan_layers:
      # Only caches need the index of the group.
      groups = jnp.arange(self.config.num_groups, dtype=jnp.int32)
      carry, _ = self.groups(
        carry, segment_ids, None if cache is None else groups
      )
    else:
      for i, group in enumerate(self.group_list):
        carry, _ = group(carry, segment_ids, i)
    x, cache = carry
    x = self.final_norm(x)
    # After the norm: inside a layer the NaN would spread to other tokens.
    if lost is not None:
      x = jnp.where(lost[..., None], jnp.nan, x)
    return x, cache

  def __call__(
    self,
    tokens: Tokens,
    segment_ids: SegmentIds | None = None,
    cache: Any = None,
  ) -> tuple[Float[Array, "B T VOCAB"], Any]:
    """Next-token logits [B, T, VOCAB] in float32; arguments as in `hidden`."""
    x, cache = self.hidden(tokens, segment_ids, cache)
    return self.logits(x), cache

  def logits(self, x: Float[Array, "*b D"]) -> Float[Array, "*b VOCAB"]:
    """Applies the head to activations; sums and result are float32."""
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

    Uses `gdn2_jax.ops.loss.cross_entropy`, which never stores all logits.
    """
    x, _ = self.hidden(tokens, segment_ids)
    (x, targets), join = shards_as_rows(x, targets)
    nll = cross_entropy(
      x, self.head.astype(x.dtype), targets, chunk=self.config.loss_chunk
    )
    return join(nll)


def without_stacks(params: Any, config: ModelConfig) -> tuple[Any, ModelConfig]:
  """Parameters with an entry for each group, and the config that they fit.

  Where a loop over tokens runs the model, XLA copies the parameters of a group
  out of those of all groups for every token. Called before such a loop, this
  copies them once. Where the groups are a loop themselves, nothing changes.

  Args:
    params: Unboxed parameters of LM(config), or what this made of them.
    config: Config of the model.
  """
  if not config.scan_layers or config.groups_per_turn < config.num_groups:
    return params, config
  alone = dataclasses.replace(config, scan_layers=False)
  if "groups" not in params:
    return params, alone
  rest = {name: x for name, x in params.items() if name != "groups"}
  groups = {
    f"group_{i}": jax.tree.map(lambda a, i=i: a[i], params["groups"])
    for i in range(config.num_groups)
  }
  return rest | groups, alone


def init_cache(
  config: ModelConfig, batch_size: int, max_length: int | None = None
) -> Any:
  """Empty cache: a tuple over the pattern with leaves [group, B, ...].

  Recurrent states are float32; inputs of convolutions, keys and values have the
  model's dtype. The size does not grow with the tokens that are read. That of
  full attention has slots for max_length tokens; logits of later ones are NaN.

  Args:
    config: Config of the model.
    batch_size: Rows B.
    max_length: Most tokens of a row, prompt and generated ones together.
      Required if `has_growing_cache(config)`, ignored otherwise.

  Raises:
    ValueError: batch_size < 1, or a required max_length is missing or below 1.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size}: expected >= 1")
  grows = has_growing_cache(config)
  if grows and (max_length is None or max_length < 1):
    raise ValueError(
      f"max_length={max_length}: expected >= 1, the tokens that a sequence may "
      f"read, prompt and generated ones together; the cache of pattern="
      f"{config.pattern!r} has that many slots"
    )
  return tuple(
    init_mixer_cache(letter, config, batch_size, max_length)
    for letter in config.pattern
  )


def has_growing_cache(config: ModelConfig) -> bool:
  """True if the cache has a slot for every token of a sequence."""
  return any(kind.grows for kind in kinds_of(config.pattern).values())
