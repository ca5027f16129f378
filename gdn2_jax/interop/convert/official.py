"""config.json of the official GPT (`lit_gpt`), and its published sizes."""

import math
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
from gdn2_jax.interop.names import FULL, GDN2, WINDOW
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.attention import AttentionConfig

_COMMON = {
  "vocab_size": 32000,
  "padding_multiple": 64,
  "n_layer": 18,
  "n_head": 18,
  "n_embd": 2304,
  "rotary_percentage": 1.0,
  "parallel_residual": False,
  "bias": False,
  "norm_eps": 1e-5,
  "local_window": 2048,
}
# Names of the official program, and all parameters of each with embedding and
# head, which its own count leaves out.
PRESETS: dict[str, tuple[dict[str, Any], int]] = {
  "gdn2_1.3B": (
    _COMMON | {"gdn2_per_layer": 1, "intermediate_size": 6208},
    1_450_096_416,
  ),
  "swa_gdn2_1.3B": (
    _COMMON | {"gdn2_per_layer": 2, "intermediate_size": 6784},
    1_447_772_688,
  ),
}

HARMLESS = (
  "architectures",
  "block_size",
  "dtype",
  "mamba_init",
  "model_type",
  "name",
  "org",
  "rwkv7_head_size",
  "rwkv7_head_size_divisor",
  "torch_dtype",
  "transformers_version",
)
OUTPUT_NORM_EPS = 1e-5  # no key of the config sets it

# Keys that choose between layers, and the values that exist here. A key that is
# left out has the value of the published models.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
  "parallel_residual": (False,),
  "bias": (False,),
  "shared_attention_norm": (False,),
  "mlp": (True,),
  "token_mixer": ("gdn2",),
  "use_short_conv": (True,),
  "conv_bias": (False,),
  "use_qk_l2norm_in_kernel": (True,),
  "gdn2_use_qk_l2norm_in_kernel": (True,),
  "_norm_class": ("RMSNorm", "FusedRMSNorm"),
  "_mlp_class": ("LLaMAMLP",),
}
# The same for keys that only layers of attention read.
_SUPPORTED_IN_ATTENTION: dict[str, tuple[Any, ...]] = {
  "rotary_percentage": (1.0,),
  "condense_ratio": (1,),
  "nope": (False,),
}
_ATTENTION_SIZES = ("n_head", "n_query_groups", "local_window", "rope_base")


def read_config(claims: Claims, shown: Shown, output_gate: str) -> ModelConfig:
  """The model that a config and its tensors describe."""
  c = claims
  for name, values in _SUPPORTED.items():
    c.only(name, *values)
  num_layers = c.size("n_layer", shown=len(shown.kinds))
  model_dim = c.size("n_embd", shown=shown.model_dim)
  kinds = _kinds(c, shown.kinds)
  attention = AttentionConfig()
  if set(kinds) != {GDN2}:
    attention = _attention(c, shown, model_dim, WINDOW in kinds)
  else:  # the program writes these keys although nothing reads them
    c.pass_over(*_SUPPORTED_IN_ATTENTION, *_ATTENTION_SIZES)
  return ModelConfig(
    vocab_size=_vocab_size(c, shown),
    model_dim=model_dim,
    num_layers=num_layers,
    pattern=shortest_pattern(kinds),
    mlp_dim=c.size("intermediate_size", shown=shown.mlp_dim),
    gdn2=gdn2_config(c, shown, output_gate, OUTPUT_NORM_EPS),
    attention=attention,
    norm_eps=c.number("norm_eps", 1e-5),
  )


def write_config(config: ModelConfig) -> dict[str, Any]:
  """The config.json of a model; refuses models without one."""
  c = config
  kinds = written_kinds(c, "the official program")
  if GDN2 in kinds and c.gdn2.norm_eps != OUTPUT_NORM_EPS:
    raise ValueError(
      f"gdn2.norm_eps={c.gdn2.norm_eps}: the output norm of the official "
      f"program has {OUTPUT_NORM_EPS}"
    )
  tree: dict[str, Any] = {
    "n_embd": c.model_dim,
    "n_layer": c.num_layers,
    "intermediate_size": c.mlp_dim,
    "vocab_size": c.vocab_size,
    "padded_vocab_size": c.vocab_size,
    "norm_eps": c.norm_eps,
    "gdn2_per_layer": _every(kinds),
    "bias": False,
    "parallel_residual": False,
    "head_v_dim": c.gdn2.value_dim,
    **gdn2_keys(c),
  }
  if c.gdn2.conv_width != 4:
    tree["conv_size"] = c.gdn2.conv_width
  if set(kinds) == {GDN2}:
    # The official program demands a divisor, but does not use it.
    return tree | {"n_head": math.gcd(c.model_dim, c.gdn2.num_heads)}
  a = c.attention
  if a.rope_base != 10000.0:
    raise ValueError(
      f"attention.rope_base={a.rope_base}: the official program has 10000"
    )
  return tree | {
    "n_head": a.num_heads,
    "n_query_groups": a.kv_heads,
    "local_window": -1 if FULL in kinds else a.window,
    "rotary_percentage": 1.0,
  }


def _vocab_size(c: Claims, shown: Shown) -> int:
  """Rows of the embedding: the vocabulary, padded to a multiple or not."""
  rows, multiple = shown.vocab_size, c.size("padding_multiple", default=64)
  if c.raw("padded_vocab_size") is not None:
    padded = c.size("padded_vocab_size", shown=rows)
    if c.size("vocab_size", default=padded) > padded:
      c.refuse("vocab_size", f"at most padded_vocab_size={padded}")
    return padded
  vocab_size = c.size("vocab_size", default=rows)
  if rows == -(-vocab_size // multiple) * multiple:
    return rows
  return c.size("vocab_size", shown=rows)


def _kinds(c: Claims, kinds: str) -> str:
  """Kinds of the layers; with gdn2_per_layer = p, every p-th is recurrent."""
  every = c.size("gdn2_per_layer", default=0)
  if every and (told := _periodic(every, len(kinds), WINDOW)) != kinds:
    raise ValueError(
      f"gdn2_per_layer={every} makes the layers {told}, the tensors are those "
      f"of {kinds} ({GDN2} recurrent, {WINDOW} attention)"
    )
  if c.stated("local_window") and c.raw("local_window", -1) == -1:
    return kinds.replace(WINDOW, FULL)
  return kinds


def _attention(
  c: Claims, shown: Shown, model_dim: int, windowed: bool
) -> AttentionConfig:
  for name, values in _SUPPORTED_IN_ATTENTION.items():
    c.only(name, *values)
  heads, head_dim = split_width(c, "n_head", model_dim)
  groups, rows = None, shown.qkv_rows
  if rows is not None:
    groups, rest = divmod(rows - heads * head_dim, 2 * head_dim)
    if rest or groups < 1:
      c.refuse(
        "n_head", f"heads that divide the {rows} rows of q, k and v together"
      )
  options = {"window": c.size("local_window")} if windowed else {}
  return AttentionConfig(
    num_heads=heads,
    num_kv_heads=c.size("n_query_groups", shown=groups, default=heads),
    head_dim=head_dim,
    rope_base=c.number("rope_base", 10000.0),
    **options,
  )


def _periodic(every: int, count: int, other: str) -> str:
  return "".join(other if n % every else GDN2 for n in range(count))


def _every(kinds: str) -> int:
  """The number p for which every p-th layer is recurrent."""
  other = max(set(kinds) - {GDN2}, default=WINDOW)
  for every in range(1, len(kinds) + 1):
    if kinds == _periodic(every, len(kinds), other):
      return every
  raise ValueError(
    f"layers {kinds}: in the official program every n-th layer is recurrent, "
    "from the first one on, and the others are attention of one kind"
  )
