"""ModelConfig, and which of its fields determine the model's function."""

import dataclasses
from typing import Any, Literal

from gdn2_jax.config_class import check_choices, config_class
from gdn2_jax.model.mixers import kinds as _built_in  # noqa: F401, registers
from gdn2_jax.model.mixers.attention import AttentionConfig
from gdn2_jax.model.mixers.gdn2_config import GDN2Config
from gdn2_jax.model.mixers.mamba2 import Mamba2Config
from gdn2_jax.model.mixers.mamba3 import Mamba3Config
from gdn2_jax.model.mixers.registry import check_options, kinds_of

_Dtype = Literal["float32", "bfloat16", "float16", "float64"]

# Fields of ModelConfig and its parts that do not change the model's function.
# Any other field does: a checkpoint or a saved state with another value is
# refused.
# Rounding only. A run may continue with another dtype. A saved state may not:
# it was computed with the old one's rounding.
NUMERICS = ("dtype",)
# Layout of the parameters, stacked or one per layer. Matters for checkpoints,
# which store that layout, not for saved states, which have no parameters.
LAYOUT = ("scan_layers",)
# Neither parameters nor results, except the order of sums.
EXECUTION = (
  "implementation",
  "loss_chunk",
  "remat",
  "scan_unroll",
)


@config_class
class ModelConfig:
  """Language model: embedding, layers by pattern, final norm, head.

  Attributes:
    vocab_size: Rows of the embedding and columns of the untied head.
    model_dim: Width D of the residual stream.
    num_layers: Layers (a mixer and an MLP each), a multiple of the pattern's
      length.
    pattern: Letters of the layers' mixers, repeated: "G" Gated DeltaNet-2, "K"
      Kimi Delta Attention, "D" Gated DeltaNet, "E" DeltaNet, "M" Mamba-2,
      "N" Mamba-3, "S" sliding-window attention, "A" full attention, and what
      `register` adds. "G" is recurrent, "GS" a hybrid, "A" a softmax
      transformer, whose cache has a slot for every token.
    mlp_dim: Hidden width F of every SwiGLU MLP.
    gdn2: Mixer of layers "G", and of "K", "D" and "E" but for their gates.
    mamba2: Mixer of layers "M".
    mamba3: Mixer of layers "N".
    attention: Mixer of layers "S" and "A".
    options: Settings "name=value" of mixers that were registered from outside.
    norm_eps: Added to the mean square in the RMS norms of the residual stream.
    dtype: Dtype of activations and matrix products.
    param_dtype: Dtype of parameters; those of decays, and the skips, biases and
      factors per head of Mamba, are always float32.
    remat: Activations that the backward pass recomputes: "none"; "dots", all
      but the results of matrix products; "full", all but the groups' inputs.
    scan_layers: Compile one group (one repetition of the pattern) and scan over
      the groups; parameters are then stacked.
    scan_unroll: Groups per iteration of that scan, a divisor of their number; 0
      means all. Does not change parameters. More take longer to compile; with
      all there is no loop, and activations are not copied into stacks.
    loss_chunk: Tokens per sequence whose logits are in memory at a time.
  """

  vocab_size: int = 32000
  model_dim: int = 2304
  num_layers: int = 18
  pattern: str = "G"
  mlp_dim: int = 6208
  gdn2: GDN2Config = dataclasses.field(default_factory=GDN2Config)
  mamba2: Mamba2Config = dataclasses.field(default_factory=Mamba2Config)
  mamba3: Mamba3Config = dataclasses.field(default_factory=Mamba3Config)
  attention: AttentionConfig = dataclasses.field(
    default_factory=AttentionConfig
  )
  options: tuple[str, ...] = ()
  norm_eps: float = 1e-5
  dtype: _Dtype = "bfloat16"
  param_dtype: _Dtype = "float32"
  remat: Literal["none", "dots", "full"] = "none"
  scan_layers: bool = True
  scan_unroll: int = 1
  loss_chunk: int = 512

  @property
  def num_groups(self) -> int:
    """Number of repetitions of the pattern."""
    return self.num_layers // len(self.pattern)

  @property
  def groups_per_turn(self) -> int:
    """Groups per iteration of the scan; num_groups means no loop."""
    return self.scan_unroll or self.num_groups

  def validate(self, path: str = "model") -> None:
    """Raises ValueError naming the first field under `path` that is wrong."""
    for name in ("vocab_size", "model_dim", "mlp_dim", "loss_chunk"):
      if getattr(self, name) < 1:
        raise ValueError(f"{path}.{name}={getattr(self, name)}: expected >= 1")
    if not self.pattern:
      raise ValueError(f"{path}.pattern='': expected at least one letter")
    try:
      kinds = kinds_of(self.pattern)
    except ValueError as e:
      raise ValueError(f"{path}.pattern={self.pattern!r}: {e}") from None
    if self.num_layers < 1 or self.num_layers % len(self.pattern):
      raise ValueError(
        f"{path}.num_layers={self.num_layers}: expected a positive multiple "
        f"of the {len(self.pattern)} layers of pattern={self.pattern!r}"
      )
    if self.scan_unroll < 0 or self.num_groups % self.groups_per_turn:
      raise ValueError(
        f"{path}.scan_unroll={self.scan_unroll}: expected 0 (all) or a divisor "
        f"of the {self.num_groups} groups of layers"
      )
    check_choices(self, path)
    self.gdn2.validate(f"{path}.gdn2")
    self.mamba2.validate(f"{path}.mamba2")
    self.mamba3.validate(f"{path}.mamba3")
    self.attention.validate(f"{path}.attention")
    check_options(self, path)
    for kind in kinds.values():
      kind.validate(self, path)


def without(tree: dict[str, Any], *names: str) -> dict[str, Any]:
  """Removes the fields of these names from a config of nested dicts."""
  return {
    name: without(value, *names) if isinstance(value, dict) else value
    for name, value in tree.items()
    if name not in names
  }
