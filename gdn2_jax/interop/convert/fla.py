"""config.json of flash-linear-attention's models: GDN-2 and KDA.

They have a GDN-2 layer and no model around it: the names of that are those of
their KDA model.
"""

from collections.abc import Mapping
from typing import Any

from gdn2_jax.interop.convert.claims import (
  Claims,
  Shown,
  gdn2_config,
  gdn2_keys,
  shortest_pattern,
  split_width,
  written_kinds,
)
from gdn2_jax.interop.names import (
  FULL,
  GDN2,
  KDA,
  WINDOW,
  recurrent_letters,
)
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.attention import AttentionConfig

# Keys model_type and architectures of a config.json, by our letter.
_MODELS = {GDN2: ("gdn2", "GDN2ForCausalLM"), KDA: ("kda", "KDAForCausalLM")}

# None: these files have dozens of keys of training, kernels and generation.
HARMLESS = None


def read_config(claims: Claims, shown: Shown, output_gate: str) -> ModelConfig:
  """The model that a config and its tensors describe."""
  c = claims
  _check_type(c, shown)
  for name in ("safe_gate", "conv_bias"):
    c.only(name, False)
  c.only("lower_bound", None)
  c.only("attnres_block_size", None)
  c.only("use_short_conv", True)
  c.only("hidden_act", "swish", "silu")
  c.pass_over("hidden_ratio")  # gives intermediate_size: the tensors show it
  if shown.kda and shown.recurrent == GDN2:
    # Their beta = 2 sigmoid would double the write gate too.
    c.only("allow_neg_eigval", False)
  model_dim = c.size("hidden_size", shown=shown.model_dim)
  num_layers = c.size("num_hidden_layers", shown=len(shown.kinds))
  kinds, attention = _attention(c, shown, model_dim, num_layers)
  norm_eps = c.number("norm_eps")
  return ModelConfig(
    vocab_size=c.size("vocab_size", shown=shown.vocab_size),
    model_dim=model_dim,
    num_layers=num_layers,
    pattern=shortest_pattern(kinds.replace(GDN2, shown.recurrent)),
    mlp_dim=c.size("intermediate_size", shown=shown.mlp_dim),
    gdn2=gdn2_config(c, shown, output_gate, norm_eps),
    attention=attention,
    norm_eps=norm_eps,
  )


def write_config(config: ModelConfig) -> dict[str, Any]:
  """The config.json of a model; refuses models without one."""
  c, a = config, config.attention
  recurrent = recurrent_letters(c.pattern)
  if recurrent and c.norm_eps != c.gdn2.norm_eps:
    raise ValueError(
      f"norm_eps={c.norm_eps}: fla has one for all norms, the output norm has "
      f"gdn2.norm_eps={c.gdn2.norm_eps}"
    )
  kinds = written_kinds(c, "fla")
  specs = [
    {
      "layers": [n for n, found in enumerate(kinds) if found == kind],
      "num_heads": a.num_heads,
      "num_kv_heads": a.kv_heads,
      "qkv_bias": False,
      "window_size": window,
      "rope_theta": a.rope_base,
    }
    for kind, window in ((WINDOW, a.window), (FULL, None))
    if kind in kinds
  ]
  model_type, architecture = _MODELS[recurrent or GDN2]
  return {
    "architectures": [architecture],
    "model_type": model_type,
    "attn_mode": "chunk",
    "hidden_size": c.model_dim,
    "num_hidden_layers": c.num_layers,
    "intermediate_size": c.mlp_dim,
    "hidden_act": "swish",
    "vocab_size": c.vocab_size,
    "tie_word_embeddings": False,
    "norm_eps": c.norm_eps,
    "expand_v": c.gdn2.value_dim / c.gdn2.key_dim,
    "use_short_conv": True,
    "conv_size": c.gdn2.conv_width,
    **gdn2_keys(c),
    "attn": specs if len(specs) > 1 else (specs or [None])[0],
    "torch_dtype": c.param_dtype,
  }


def _check_type(c: Claims, shown: Shown) -> None:
  expected, name = "gdn2", "Gated DeltaNet-2"
  if shown.kda:
    expected, name = "kda", "Kimi Delta Attention"
  if c.raw("model_type", expected) != expected and GDN2 in shown.kinds:
    c.refuse("model_type", f"{expected!r}: the tensors are those of {name}")


def _attention(
  c: Claims, shown: Shown, model_dim: int, num_layers: int
) -> tuple[str, AttentionConfig]:
  """Kinds of the layers, and their attention."""
  kinds, options = [GDN2] * num_layers, {}
  specs = c.raw("attn", [])
  for spec in specs if isinstance(specs, list) else [specs]:
    kind, layers, found = _attention_spec(c, spec, model_dim, num_layers)
    for n in layers:
      kinds[n] = kind
    if any(options.setdefault(k, v) != v for k, v in found.items()):
      c.refuse("attn", "layers of attention that are all alike")
  told = "".join(kinds)
  if told.replace(FULL, WINDOW) != shown.kinds:
    raise ValueError(
      f"attn={specs}: makes the layers {told}, the tensors are those of "
      f"{shown.kinds} ({GDN2} recurrent, {WINDOW} or {FULL} attention)"
    )
  return told, AttentionConfig(**options)


def _attention_spec(
  c: Claims, spec: Any, model_dim: int, num_layers: int
) -> tuple[str, list[int], dict[str, Any]]:
  if not isinstance(spec, Mapping) or not {"layers", "num_heads"} <= set(spec):
    c.refuse("attn", "an object with layers and num_heads, or a list of such")
  layers = spec["layers"]
  if not isinstance(layers, list) or not all(
    type(n) is int and 0 <= n < num_layers for n in layers
  ):
    c.refuse("attn", f"layers below num_hidden_layers={num_layers}")
  each = Claims(spec, "attn of config.json")
  each.raw("layers")
  each.only("qkv_bias", False)
  heads, head_dim = split_width(each, "num_heads", model_dim)
  found = {
    "num_heads": heads,
    "num_kv_heads": each.size("num_kv_heads", default=heads),
    "head_dim": head_dim,
    "rope_base": each.number("rope_theta", 10000.0),
  }
  window = each.raw("window_size")
  if window is not None:
    found["window"] = each.size("window_size")
  each.finish()
  return FULL if window is None else WINDOW, layers, found
