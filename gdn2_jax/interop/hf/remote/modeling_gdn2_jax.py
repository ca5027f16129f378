# Copyright 2026 The gdn2_jax Authors. SPDX-License-Identifier: Apache-2.0
"""Language models of the Gated DeltaNet-2 family in plain torch.

Written by gdn2_jax, whose model this is: embedding, pre-norm residual layers by
a pattern of letters, final norm, head. Recurrent layers are computed chunk by
chunk in torch, or by flash-linear-attention where it is installed, on CUDA and
in half precision.
"""

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
  BaseModelOutputWithPast,
  CausalLMOutputWithPast,
)

from .attention import AttentionMixer
from .cache import Gdn2JaxCache
from .configuration_gdn2_jax import GDN2_LETTERS, Gdn2JaxConfig
from .gdn2 import GDN2Mixer, linear
from .mamba import Mamba2Mixer, Mamba3Mixer
from .recurrence import rms_norm

# Field of the outputs that holds the cache; it has another name since 5.24.
_FIELDS = CausalLMOutputWithPast.__dataclass_fields__
_CACHE = "cache" if "cache" in _FIELDS else "past_key_values"


class RMSNorm(nn.Module):
  """Root-mean-square norm over the last axis with a learned weight."""

  def __init__(self, size, eps):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(size))
    self.eps = eps

  def forward(self, x):
    """Norm of x in float32, returned in x's dtype."""
    return rms_norm(x, self.weight, self.eps).to(x.dtype)


class SwiGLU(nn.Module):
  """MLP down(silu(gate x) * up x)."""

  def __init__(self, model_dim, mlp_dim):
    super().__init__()
    self.gate = linear(model_dim, mlp_dim)
    self.up = linear(model_dim, mlp_dim)
    self.down = linear(mlp_dim, model_dim)

  def forward(self, x):
    """Applies the MLP to every token."""
    return self.down(functional.silu(self.gate(x)) * self.up(x))


class Block(GradientCheckpointingLayer):
  """Residual layer: x += mixer(norm(x)), then x += mlp(norm(x))."""

  def __init__(self, config, letter):
    super().__init__()
    part, eps = config.part(letter), config.norm_eps
    self.mixer_norm = RMSNorm(config.model_dim, eps)
    if letter in GDN2_LETTERS:
      self.mixer = GDN2Mixer(config.model_dim, part)
    elif letter in "MN":
      mixer = Mamba2Mixer if letter == "M" else Mamba3Mixer
      self.mixer = mixer(config.model_dim, part)
    else:
      self.mixer = AttentionMixer(config.model_dim, part, full=letter == "A")
    self.mlp_norm = RMSNorm(config.model_dim, eps)
    self.mlp = SwiGLU(config.model_dim, config.mlp_dim)

  def forward(self, x, mask, positions, tensors):
    """Activations [B, T, D] and the tensors of the layer's cache."""
    y, tensors = self.mixer(self.mixer_norm(x), mask, positions, tensors)
    x = x + y
    return x + self.mlp(self.mlp_norm(x)), tensors


class Gdn2JaxPreTrainedModel(PreTrainedModel):
  """Facts about the models for transformers."""

  config_class = Gdn2JaxConfig
  base_model_prefix = "model"
  supports_gradient_checkpointing = True
  _no_split_modules = ["Block"]  # noqa: RUF012, as in the base class
  _is_stateful = True  # tokens cannot be taken back
  _supports_sdpa = True
  # Rounding decays to 16 bits would change those of slow heads noticeably.
  _keep_in_fp32_modules_strict = [  # noqa: RUF012, as in the base class
    "mixer.A_log",
    "mixer.dt_bias",
    "mixer.D",
    "mixer.B_bias",
    "mixer.C_bias",
    "mixer.mimo_x",
    "mixer.mimo_z",
    "mixer.mimo_o",
  ]

  @torch.no_grad()
  def _init_weights(self, module):
    """Initial values of a new model; decays as in the paper."""
    if isinstance(module, nn.Linear | nn.Embedding):
      nn.init.normal_(module.weight, std=0.02)
      if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv1d):
      limit = module.kernel_size[0] ** -0.5
      nn.init.uniform_(module.weight, -limit, limit)
    for name, value in module.named_parameters(recurse=False):
      if getattr(value, "_is_hf_initialized", False):
        continue
      if name == "A_log":
        value.copy_(torch.empty_like(value).uniform_(1, 16).log())
      elif name == "dt_bias":
        ends = math.log(1e-3), math.log(1e-1)
        dt = torch.empty_like(value).uniform_(*ends).exp()
        value.copy_(dt + torch.log(-torch.expm1(-dt)))


class Gdn2JaxModel(Gdn2JaxPreTrainedModel):
  """Model without its head."""

  _keys_to_ignore_on_load_unexpected = ["lm_head.weight"]  # noqa: RUF012

  def __init__(self, config):
    super().__init__(config)
    self.embedding = nn.Embedding(config.vocab_size, config.model_dim)
    self.layers = nn.ModuleList(
      Block(config, config.letter(n)) for n in range(config.num_layers)
    )
    self.final_norm = RMSNorm(config.model_dim, config.norm_eps)
    self.gradient_checkpointing = False
    self.post_init()

  def get_input_embeddings(self):
    """Embedding of the tokens."""
    return self.embedding

  def set_input_embeddings(self, value):
    """Replaces the embedding of the tokens."""
    self.embedding = value

  def forward(
    self,
    input_ids=None,
    attention_mask=None,
    cache=None,
    past_key_values=None,
    inputs_embeds=None,
    use_cache=None,
    output_hidden_states=None,
    **kwargs,
  ):
    """Activations after the final norm.

    Args:
      input_ids: Tokens [B, T].
      attention_mask: [B, T] or, with a cache, [B, all tokens]; 0 is padding,
        which may be anywhere in a first call and not in a later one.
      cache: Gdn2JaxCache of an earlier call, which is updated; or None.
      past_key_values: The same, under its older name.
      inputs_embeds: [B, T, D] in place of input_ids.
      use_cache: Return a cache; by default config.use_cache, except in
        training.
      output_hidden_states: Return the activations around the layers, too.
      **kwargs: Not used: positions follow from the mask.
    """
    cache = past_key_values if cache is None else cache
    if (input_ids is None) == (inputs_embeds is None):
      raise ValueError("expected one of input_ids and inputs_embeds")
    x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
    if use_cache is None:
      use_cache = self.config.use_cache and not self.training
    if cache is not None and not isinstance(cache, Gdn2JaxCache):
      raise ValueError(
        f"cache: a {type(cache).__name__}, expected a {Gdn2JaxCache.__name__}"
      )
    if cache is None and use_cache:
      cache = Gdn2JaxCache(self.config.num_layers)
    x, mask, positions, order = _left_padded(x, attention_mask, cache)
    states = [x]
    for n, layer in enumerate(self.layers):
      tensors = None if cache is None else cache.layers[n]
      x, tensors = layer(x, mask, positions, tensors)
      states.append(x)
      if cache is not None:
        cache.layers[n] = tensors
    if cache is not None:
      cache.seen += x.shape[1]
      cache.tokens = positions[:, -1] + 1
    x = self.final_norm(x)
    if order is not None:
      x, *states = (_scattered(y, order) for y in (x, *states))
    return BaseModelOutputWithPast(
      last_hidden_state=x,
      hidden_states=tuple(states) if output_hidden_states else None,
      **{_CACHE: cache if use_cache else None},
    )


class Gdn2JaxForCausalLM(Gdn2JaxPreTrainedModel, GenerationMixin):
  """Language model: next-token logits, loss and generation."""

  def __init__(self, config):
    super().__init__(config)
    self.model = Gdn2JaxModel(config)
    self.vocab_size = config.vocab_size
    self.lm_head = linear(config.model_dim, config.vocab_size)
    self.post_init()

  def get_output_embeddings(self):
    """Head of the model."""
    return self.lm_head

  def set_output_embeddings(self, value):
    """Replaces the head."""
    self.lm_head = value

  def forward(
    self,
    input_ids=None,
    attention_mask=None,
    cache=None,
    past_key_values=None,
    inputs_embeds=None,
    labels=None,
    use_cache=None,
    output_hidden_states=None,
    return_dict=None,
    logits_to_keep=0,
    **kwargs,
  ):
    """Logits [B, T, vocabulary] in float32, and the loss of labels.

    Args:
      input_ids: Tokens [B, T]; other arguments as in Gdn2JaxModel.
      attention_mask: 0 at padding.
      cache: Of an earlier call, or None.
      past_key_values: The same, under its older name.
      inputs_embeds: In place of input_ids.
      labels: Tokens [B, T], -100 for none; the logits of a token are compared
        with the label of the next one.
      use_cache: Return a cache.
      output_hidden_states: Return the activations around the layers, too.
      return_dict: False returns a tuple.
      logits_to_keep: Number of last tokens, or indices of tokens [N], to
        compute logits of; 0 means all.
      **kwargs: For the loss, as num_items_in_batch.
    """
    outputs = self.model(
      input_ids=input_ids,
      attention_mask=attention_mask,
      cache=past_key_values if cache is None else cache,
      inputs_embeds=inputs_embeds,
      use_cache=use_cache,
      output_hidden_states=output_hidden_states,
    )
    logits = self.lm_head(_kept(outputs.last_hidden_state, logits_to_keep))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = None
    if labels is not None:
      loss = self.loss_function(
        logits=logits,
        labels=labels,
        vocab_size=self.config.vocab_size,
        **kwargs,
      )
    result = CausalLMOutputWithPast(
      loss=loss,
      logits=logits,
      hidden_states=outputs.hidden_states,
      **{_CACHE: getattr(outputs, _CACHE)},
    )
    return result.to_tuple() if return_dict is False else result

  @classmethod
  def _supports_default_dynamic_cache(cls):
    """False: the first call makes a cache of its own."""
    return False

  def prepare_inputs_for_generation(
    self,
    input_ids,
    attention_mask=None,
    cache=None,
    past_key_values=None,
    inputs_embeds=None,
    **kwargs,
  ):
    """Arguments of the next call: the tokens that it has not read."""
    cache = past_key_values if cache is None else cache
    seen = 0 if cache is None else cache.seen
    inputs = {"use_cache": kwargs.get("use_cache"), "cache": cache}
    if attention_mask is not None:
      inputs["attention_mask"] = attention_mask
    if "logits_to_keep" in kwargs:
      inputs["logits_to_keep"] = kwargs["logits_to_keep"]
    if inputs_embeds is not None and not seen:
      return inputs | {"inputs_embeds": inputs_embeds}
    total = input_ids.shape[1]
    if attention_mask is not None:
      total = attention_mask.shape[1]
    return inputs | {"input_ids": input_ids[:, -max(total - seen, 1) :]}


def _left_padded(x, attention_mask, cache):
  """Moves padding to the left of the tokens.

  Args:
    x: Activations [B, T, D].
    attention_mask: [B, T] or [B, S], S tokens being those of earlier calls,
      too; or None.
    cache: Gdn2JaxCache, or None.

  Returns:
    x in that order; mask [B, T, 1] in x's dtype, None without padding;
    positions [B, T], -1 at padding; and indices [B, T] of the tokens, None
    without padding.

  Raises:
    ValueError: A mask of another shape, or padding after the first call.
  """
  B, T = x.shape[:2]
  seen = 0 if cache is None else cache.seen
  first = 0 if seen == 0 else cache.tokens[:, None]
  if attention_mask is not None:
    if attention_mask.shape not in ((B, T), (B, seen + T)):
      raise ValueError(
        f"attention_mask: shape {tuple(attention_mask.shape)}, expected "
        f"{(B, T)} or {(B, seen + T)}"
      )
    is_token = attention_mask[:, -T:].bool()
    if not is_token.all():
      if seen:
        raise ValueError(
          "attention_mask: padding among new tokens, expected it only in the "
          "first call, without a cache"
        )
      order = torch.argsort(is_token.int(), dim=1, stable=True)
      x = x.gather(1, order[..., None].expand(x.shape))
      is_token = is_token.gather(1, order)
      positions = (is_token.cumsum(1) - 1).clamp(min=-1)
      return x, is_token[..., None].to(x.dtype), positions, order
  positions = torch.arange(T, device=x.device)[None].expand(B, T) + first
  return x, None, positions, None


def _kept(x, logits_to_keep):
  """Tokens of x [B, T, D] whose logits are computed."""
  if isinstance(logits_to_keep, int):
    return x[:, -logits_to_keep:]
  if logits_to_keep.ndim != 1:
    raise ValueError(
      f"logits_to_keep: shape {tuple(logits_to_keep.shape)}, expected a number "
      "or indices [N]"
    )
  return x[:, logits_to_keep]


def _scattered(x, order):
  """Undoes x.gather(1, order)."""
  index = order[..., None].expand(x.shape)
  return torch.empty_like(x).scatter(1, index, x)
