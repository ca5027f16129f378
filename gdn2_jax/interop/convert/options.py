"""Options of a conversion beside its folders and dialects."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gdn2_jax.interop.convert.official import PRESETS
from gdn2_jax.interop.layouts import CONV_ORDERS
from gdn2_jax.interop.names import DIALECTS, RECURRENT

OURS = "gdn2_jax"
HF = "hf"
ALL_DIALECTS = (*DIALECTS, HF, OURS)
OUTPUT_GATES = ("silu", "sigmoid")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Facts that the files may lack, and permissions.

  Attributes:
    config: config.json to use in place of the one beside the weights.
    preset: name of a published size of the official program, in place of a
      config.json; the number of parameters must be that of the preset.
    values: keys of config.json, over those of the file.
    ignored: unknown keys of config.json that change nothing.
    output_gate: activation of the output gate. Needed where it is not the one
      that the dialect's own program computes.
    from_conv_order, to_conv_order: which input the first tap of the short
      convolution multiplies; by default the oldest, as in PyTorch.
    strip_prefix: what stands before all names of the source, as wrappers of
      modules leave it.
    untie_head: give a model without a head a copy of its embedding.
    dtype: of the parameters that are written; A_log and dt_bias stay float32.
      By default that of each tensor read.
    as_mixer: mixer that Kimi Delta Attention becomes, "gdn2" (also None), in
      which training can part the tied gates, or "kda", which can be written
      back.
    step: checkpoint of a training run; by default the newest.
  """

  config: str | None = None
  preset: str | None = None
  values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  ignored: tuple[str, ...] = ()
  output_gate: str | None = None
  from_conv_order: str | None = None
  to_conv_order: str | None = None
  strip_prefix: str = ""
  untie_head: bool = False
  dtype: str | None = None
  as_mixer: str | None = None
  step: int | None = None

  def check(self, source: str, target: str) -> None:
    """Refuses options that contradict each other or the dialects."""
    choices = (
      ("preset", self.preset, (None, *PRESETS)),
      ("output_gate", self.output_gate, (None, *OUTPUT_GATES)),
      ("from_conv_order", self.from_conv_order, (None, *CONV_ORDERS)),
      ("to_conv_order", self.to_conv_order, (None, *CONV_ORDERS)),
      ("dtype", self.dtype, (None, *DTYPES)),
      ("as", self.as_mixer, (None, *RECURRENT)),
      ("from", source, ALL_DIALECTS),
      ("to", target, ALL_DIALECTS),
    )
    for name, value, allowed in choices:
      if value not in allowed:
        raise ValueError(
          f"--{name}={value}: expected one of "
          + ", ".join(filter(None, allowed))
        )
    if self.preset and self.config:
      raise ValueError("--preset and --config: expected one of the two")
    if self.preset and source != "official":
      raise ValueError(f"--preset={self.preset}: goes with --from=official")
    if self.as_mixer and source != "fla":
      raise ValueError(f"--as={self.as_mixer}: goes with --from=fla")
    if self.step is not None and source != OURS:
      raise ValueError(f"--step={self.step}: goes with --from={OURS}")
    foreign = {
      "config": self.config,
      "set": self.values,
      "ignore_config": self.ignored,
      "from_conv_order": self.from_conv_order,
      "strip_prefix": self.strip_prefix,
      "untie_head": self.untie_head,
    }
    for name, value in foreign.items():
      if value and source not in DIALECTS:
        raise ValueError(f"--{name}: does not go with --from={source}")
    if target not in DIALECTS and self.to_conv_order:
      raise ValueError(f"--to_conv_order: does not go with --to={target}")
