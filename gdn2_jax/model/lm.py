"""The language model: embedding, groups of layers, final norm, untied head."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from gdn2_jax.model.block import Group, init_mixer_cache
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.layers import Embedding, RMSNorm, fan_in_uniform
from gdn2_jax.model.shards import shards_as_rows
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
      group = nn.remat(
        Group, policy=_POLICIES[c.remat], prevent_cse=not c.scan_layers
      )
    if c.scan_layers:
      self.groups = nn.scan(
        group,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=c.num_groups,
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

    Args:
      tokens: ids in [0, vocab_size); others give NaN.
      segment_ids: see `gdn2_jax.ops.segments`; 0 is padding. None: one run.
      cache: from `init_cache` or an earlier call; None starts from nothing and
        returns None.
    """
    x = self.embedding(tokens)
    x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
    if self.config.scan_layers:
      x, cache = self.groups(x, segment_ids, cache)
    else:
      caches = []
      for i, group in enumerate(self.group_list):
        part = None if cache is None else jax.tree.map(lambda a: a[i], cache)  # noqa: B023
        x, part = group(x, segment_ids, part)
        caches.append(part)
      if cache is not None:
        cache = jax.tree.map(lambda *a: jnp.stack(a), *caches)
    return self.final_norm(x), cache

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


def init_cache(config: ModelConfig, batch_size: int) -> Any:
  """The empty cache: a tuple over the pattern, leaves [group, B, ...].

  Constant in the number of tokens seen. Float32 recurrent states; convolution
  tails and attention rings in the model's dtype.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size}: expected >= 1")

  def stack(a):
    return jnp.broadcast_to(a[None], (config.num_groups, *a.shape)).copy()

  caches = tuple(
    init_mixer_cache(kind, config, batch_size) for kind in config.pattern
  )
  return jax.tree.map(stack, caches)
