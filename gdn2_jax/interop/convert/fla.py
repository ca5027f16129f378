"""config.json of flash-linear-attention's models: GDN-2 and KDA.

The layer of GDN-2 is theirs; around it stands the model of their KDA, for
which they have names.
"""

from collections.abc import Mapping
from typing import Any

from gdn2_jax.interop.convert.claims import (
  Claims,
  Shown,
  gdn2_config,
  shortest_pattern,
)
from gdn2_jax.model.attention import AttentionConfig
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.gdn2 import GDN2Config

MODEL_TYPE = "gdn2"
KDA_MODEL_TYPE = "kda"
# Training, kernels and generation have dozens of keys in these files.
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
  if shown.kda:
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
    pattern=shortest_pattern(kinds),
    mlp_dim=c.size("intermediate_size", shown=shown.mlp_dim),
    gdn2=gdn2_config(c, shown, output_gate, norm_eps)
    if "G" in kinds
    else GDN2Config(),
    attention=attention,
    norm_eps=norm_eps,
  )


def write_config(config: ModelConfig) -> dict[str, Any]:
  """The config.json of a model; refuses models without one."""
  c, a = config, config.attention
  if "G" in c.pattern and c.norm_eps != c.gdn2.norm_eps:
    raise ValueError(
      f"norm_eps={c.norm_eps}: fla has one for all norms, the output norm has "
      f"gdn2.norm_eps={c.gdn2.norm_eps}"
    )
  ratio = c.gdn2.value_dim / c.gdn2.key_dim
  if round(c.gdn2.key_dim * ratio) != c.gdn2.value_dim:
    ratio = float(f"{ratio:.17g}")
  kinds = c.pattern * c.num_groups
  tree: dict[str, Any] = {
    "architectures": ["GDN2ForCausalLM"],
    "model_type": MODEL_TYPE,
    "attn_mode": "chunk",
    "hidden_size": c.model_dim,
    "num_hidden_layers": c.num_layers,
    "intermediate_size": c.mlp_dim,
    "hidden_act": "swish",
    "vocab_size": c.vocab_size,
    "tie_word_embeddings": False,
    "norm_eps": c.norm_eps,
    "num_heads": c.gdn2.num_heads,
    "num_v_heads": c.gdn2.value_heads,
    "head_dim": c.gdn2.key_dim,
    "expand_v": ratio,
    "use_short_conv": True,
    "conv_size": c.gdn2.conv_width,
    "allow_neg_eigval": c.gdn2.negative_eigenvalues,
    "output_gate": c.gdn2.output_gate,
    "attn": None,
    "torch_dtype": c.param_dtype,
  }
  specs = []
  for kind, window in (("S", a.window), ("A", None)):
    layers = [n for n, found in enumerate(kinds) if found == kind]
    if layers:
      specs.append(
        {
          "layers": layers,
          "num_heads": a.num_heads,
          "num_kv_heads": a.kv_heads,
          "qkv_bias": False,
          "window_size": window,
          "rope_theta": a.rope_base,
        }
      )
  if specs:
    if a.num_heads * a.head_dim != c.model_dim:
      raise ValueError(
        f"attention.num_heads={a.num_heads} of head_dim={a.head_dim}: fla has "
        f"heads of model_dim={c.model_dim} together"
      )
    tree["attn"] = specs[0] if len(specs) == 1 else specs
  return tree


def _check_type(c: Claims, shown: Shown) -> None:
  model_type = c.raw("model_type")
  if model_type is None or "G" not in shown.kinds:
    return
  expected = KDA_MODEL_TYPE if shown.kda else MODEL_TYPE
  if model_type != expected:
    c.refuse(
      "model_type",
      f"{expected!r}: the tensors are those of "
      + ("Kimi Delta Attention" if shown.kda else "Gated DeltaNet-2"),
    )


def _attention(
  c: Claims, shown: Shown, model_dim: int, num_layers: int
) -> tuple[str, AttentionConfig]:
  """Kinds of the layers, and their attention."""
  kinds, options = ["G"] * num_layers, {}
  specs = c.raw("attn", [])
  specs = [specs] if isinstance(specs, Mapping) else specs
  if not isinstance(specs, list):
    c.refuse("attn", "an object, or a list of such")
  for spec in specs:
    kind, layers, found = _attention_spec(c, spec, model_dim, num_layers)
    for n in layers:
      kinds[n] = kind
    if any(options.setdefault(k, v) != v for k, v in found.items()):
      c.refuse("attn", "layers of attention that are all alike")
  told = "".join(kinds)
  if told.replace("A", "S") != shown.kinds:
    raise ValueError(
      f"attn={specs}: makes the layers {told}, the tensors are those of "
      f"{shown.kinds} (G recurrent, S or A attention)"
    )
  return told, AttentionConfig(**options)


def _attention_spec(
  c: Claims, spec: Any, model_dim: int, num_layers: int
) -> tuple[str, list[int], dict[str, Any]]:
  if not isinstance(spec, Mapping) or not {"layers", "num_heads"} <= set(spec):
    c.refuse("attn", "objects with layers and num_heads")
  layers = spec["layers"]
  if not isinstance(layers, list) or not all(
    type(n) is int and 0 <= n < num_layers for n in layers
  ):
    c.refuse("attn", f"layers below num_hidden_layers={num_layers}")
  each = Claims(spec, "attn of config.json")
  each.raw("layers")
  each.only("qkv_bias", False)
  heads = each.size("num_heads")
  if model_dim % heads:
    each.refuse("num_heads", f"a divisor of hidden_size={model_dim}")
  found = {
    "num_heads": heads,
    "num_kv_heads": each.size("num_kv_heads", default=heads),
    "head_dim": model_dim // heads,
    "rope_base": each.number("rope_theta", 10000.0),
  }
  window = each.raw("window_size")
  if window is not None:
    found["window"] = each.size("window_size")
  each.finish()
  return "A" if window is None else "S", layers, found
