"""Parameter names of each dialect.

A dialect is a table: for every part of the model its prefix, and rows
(names of ours, name of theirs, layout) relative to it. The names of a GDN-2
layer are the same in both. Letters of our mixers occur here and nowhere else in
this folder.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping

from gdn2_jax.interop import layouts
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.registry import kind_of

# Letters of our mixers that other programs have.
GDN2, KDA = "G", "K"
WINDOW, FULL = "S", "A"
RECURRENT = {"gdn2": GDN2, "kda": KDA}

Row = tuple[str, str, layouts.Layout]

_SAME, _FLAT, _LINEAR = layouts.Layout(), layouts.Flat(), layouts.Linear()
_FROM_HEADS = layouts.Linear(in_axes=2)
_CONV = layouts.Conv()

GDN2_ROWS: tuple[Row, ...] = (
  ("q_proj.kernel", "q_proj.weight", _LINEAR),
  ("k_proj.kernel", "k_proj.weight", _LINEAR),
  ("v_proj.kernel", "v_proj.weight", _LINEAR),
  ("q_conv", "q_conv1d.weight", _CONV),
  ("k_conv", "k_conv1d.weight", _CONV),
  ("v_conv", "v_conv1d.weight", _CONV),
  ("f_down.kernel", "f_proj.0.weight", _LINEAR),
  ("f_up.kernel", "f_proj.1.weight", _LINEAR),
  ("b_proj.kernel", "b_proj.weight", _LINEAR),
  ("w_proj.kernel", "w_proj.weight", _LINEAR),
  ("A_log", "A_log", _SAME),
  ("dt_bias", "dt_bias", _FLAT),
  ("g_down.kernel", "g_proj.0.weight", _LINEAR),
  ("g_up.kernel", "g_proj.1.weight", _LINEAR),
  ("g_up.bias", "g_proj.1.bias", _FLAT),
  ("o_norm", "o_norm.weight", _SAME),
  ("o_proj.kernel", "o_proj.weight", _FROM_HEADS),
)
FLOAT32 = ("A_log", "dt_bias")

# The row that differs in Kimi Delta Attention, which has one gate beta, and the
# one that makes GDN-2 of it.
_KDA_GATE: Row = ("beta_proj.kernel", "b_proj.weight", _LINEAR)
_TIED_GATES: Row = (
  "b_proj.kernel w_proj.kernel",
  "b_proj.weight",
  layouts.TiedGates(),
)
_OF_KEY_HEADS = (
  "q_proj.weight",
  "k_proj.weight",
  "q_conv1d.weight",
  "k_conv1d.weight",
)


@dataclasses.dataclass(frozen=True)
class Dialect:
  """Names of one program."""

  name: str
  output_gate: str  # its activation, which no name tells
  model: tuple[Row, ...]
  layer: str  # prefix of a layer, {} for its number
  block: tuple[Row, ...]  # of every layer
  mixer: str  # prefix in a layer
  recurrent: tuple[str, ...]  # letters of its recurrent mixers
  attention: tuple[Row, ...]  # of a softmax attention mixer

  def layer_names(self, names: Collection[str]) -> dict[int, set[str]]:
    """Names by number of the layer, without their prefix."""
    prefix = re.escape(self.layer).replace(r"\{\}", r"(0|[1-9]\d{0,5})")
    found: dict[int, set[str]] = {}
    for name in names:
      if match := re.fullmatch(prefix + "(.+)", name):
        found.setdefault(int(match[1]), set()).add(match[2])
    return found

  def recognises(self, names: Collection[str]) -> bool:
    """True where these look like names of this dialect."""
    tops = {theirs for _, theirs, _ in self.model} - {"lm_head.weight"}
    return bool(tops & set(names)) or bool(self.layer_names(names))


OFFICIAL = Dialect(
  name="official",
  output_gate="silu",
  model=(
    ("embedding.table", "transformer.wte.weight", _SAME),
    ("final_norm.weight", "transformer.ln_f.weight", _SAME),
    ("head", "lm_head.weight", _LINEAR),
  ),
  layer="transformer.h.{}.",
  block=(
    ("mixer_norm.weight", "norm_1.weight", _SAME),
    ("mlp_norm.weight", "norm_2.weight", _SAME),
    ("mlp.gate.kernel", "mlp.swiglu.w1.weight", _LINEAR),
    ("mlp.up.kernel", "mlp.swiglu.w2.weight", _LINEAR),
    ("mlp.down.kernel", "mlp.swiglu.w3.weight", _LINEAR),
  ),
  mixer="attn.",
  recurrent=(GDN2,),
  attention=(
    (
      "q_proj.kernel k_proj.kernel v_proj.kernel",
      "attn.weight",
      layouts.FusedQKV(),
    ),
    ("o_proj.kernel", "proj.weight", _FROM_HEADS),
  ),
)

FLA = Dialect(
  name="fla",
  output_gate="sigmoid",
  model=(
    ("embedding.table", "model.embeddings.weight", _SAME),
    ("final_norm.weight", "model.norm.weight", _SAME),
    ("head", "lm_head.weight", _LINEAR),
  ),
  layer="model.layers.{}.",
  block=(
    ("mixer_norm.weight", "attn_norm.weight", _SAME),
    ("mlp_norm.weight", "mlp_norm.weight", _SAME),
    ("mlp.gate.kernel", "mlp.gate_proj.weight", _LINEAR),
    ("mlp.up.kernel", "mlp.up_proj.weight", _LINEAR),
    ("mlp.down.kernel", "mlp.down_proj.weight", _LINEAR),
  ),
  mixer="attn.",
  recurrent=(GDN2, KDA),
  attention=(
    ("q_proj.kernel", "q_proj.weight", _LINEAR),
    ("k_proj.kernel", "k_proj.weight", _LINEAR),
    ("v_proj.kernel", "v_proj.weight", _LINEAR),
    ("o_proj.kernel", "o_proj.weight", _FROM_HEADS),
  ),
)

DIALECTS = {dialect.name: dialect for dialect in (OFFICIAL, FLA)}


@dataclasses.dataclass(frozen=True)
class Move:
  """Parameters of ours and the tensor of theirs that holds them."""

  ours: tuple[str, ...]
  theirs: str
  layout: layouts.Layout


def recurrent_letters(pattern: str) -> str:
  """Letters of a pattern that are recurrent layers of other programs."""
  return "".join(x for x in RECURRENT.values() if x in pattern)


def check_letters(dialect: Dialect, config: ModelConfig) -> None:
  """Raises ValueError for a mixer that a dialect has not, or has not with it.

  fla has one kind of recurrent layer in a model.
  """
  allowed = (*dialect.recurrent, WINDOW, FULL)
  for letter in config.pattern:
    if letter not in allowed:
      names = ", ".join(f"{x} ({kind_of(x).name})" for x in allowed)
      raise ValueError(
        f"pattern={config.pattern!r}: the dialect {dialect.name!r} has no "
        f"{kind_of(letter).name}, expected letters among {names}"
      )
  if len(found := recurrent_letters(config.pattern)) > 1:
    raise ValueError(
      f"pattern={config.pattern!r}: recurrent layers {found}, expected one "
      f"kind, as in the dialect {dialect.name!r}"
    )


def moves(
  dialect: Dialect,
  config: ModelConfig,
  *,
  conv_order: str = "oldest_first",
  kda_heads: int | None = None,
) -> list[Move]:
  """All moves of a model; `kda_heads`: key heads of a KDA model of theirs."""
  check_letters(dialect, config)
  found = []

  def add(ours: str, theirs: str, rows: Iterable[Row]) -> None:
    for names, name, layout in rows:
      all_ours = tuple(ours + n for n in names.split())
      found.append(Move(all_ours, theirs + name, layout))

  group = config.gdn2.num_heads // kda_heads if kda_heads else 1
  gate = {GDN2: _TIED_GATES if kda_heads else None, KDA: _KDA_GATE}
  mixers: Mapping[str, Iterable[Row]] = {
    WINDOW: dialect.attention,
    FULL: dialect.attention,
    **{x: _recurrent_rows(conv_order, group, gate[x]) for x in gate},
  }
  add("", "", dialect.model)
  for n in range(config.num_layers):
    ours, theirs = f"layers.{n}.", dialect.layer.format(n)
    add(ours, theirs, dialect.block)
    rows = mixers[config.pattern[n % len(config.pattern)]]
    add(f"{ours}mixer.", f"{theirs}{dialect.mixer}", rows)
  return found


def _recurrent_rows(conv_order: str, group: int, gate: Row | None) -> list[Row]:
  """Rows of a layer.

  Args:
    conv_order: Order of the taps of their convolutions.
    group: Key heads of ours for each of theirs.
    gate: Row in place of those of GDN-2's two gates.
  """
  rows = []
  for ours, theirs, layout in GDN2_ROWS:
    if layout is _CONV:
      layout = layouts.Conv(conv_order)
    if group > 1 and theirs in _OF_KEY_HEADS:
      layout = layouts.RepeatedHeads(layout, group)
    if gate is None or theirs not in ("b_proj.weight", "w_proj.weight"):
      rows.append((ours, theirs, layout))
  return rows + [gate] * (gate is not None)
