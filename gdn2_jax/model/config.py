"""ModelConfig: everything that decides the parameters and the function."""

import dataclasses
from typing import Any

from gdn2_jax.config_class import config_class
from gdn2_jax.model.attention import AttentionConfig
from gdn2_jax.model.gdn2 import GDN2Config

KINDS = {
  "G": "Gated DeltaNet-2",
  "S": "sliding-window attention",
  "A": "full attention",
}
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_REMAT = ("none", "dots", "full")

# Fields of ModelConfig and of its parts that do not decide the function. Any
# other field does: a checkpoint and a state of another value are refused.
# The function is the same but for rounding. A run may go on with another dtype;
# a saved state may not, whose numbers were rounded on the way.
NUMERICS = ("dtype",)
# The same parameters, stacked or layer by layer: a checkpoint stores them as
# they are, a state has none.
LAYOUT = ("scan_layers",)
# Neither parameters nor results, beyond the order of sums:
EXECUTION = (
  "implementation",  # which kernels compute the op
  "loss_chunk",  # tokens whose logits exist at a time
  "remat",  # what the backward pass computes again
  "scan_unroll",  # groups of layers in a turn of the loop
)


@config_class
class ModelConfig:
  """A language model: embedding, layers by pattern, final norm, head.

  Attributes:
    vocab_size: rows of the embedding and columns of the untied head.
    model_dim: width D of the residual stream.
    num_layers: layers (mixer and MLP each), a multiple of the pattern.
    pattern: layer kinds, repeated: "G" recurrent, "GS" hybrid, "A" the
      softmax transformer, whose cache grows with the tokens it may read.
    mlp_dim: hidden width F of every SwiGLU MLP.
    gdn2: mixer of the layers "G".
    attention: mixer of the layers "S" and "A".
    norm_eps: of the RMS norms of the residual stream.
    dtype: of activations and matrix products.
    param_dtype: of the parameters (A_log and dt_bias are float32 always).
    remat: what the backward recomputes: "none" keeps all activations, "dots"
      keeps the results of matrix products, "full" keeps the layers' inputs.
    scan_layers: compile one group of layers once and scan over the groups.
    scan_unroll: groups in a turn of that scan, a divisor of their number; 0 is
      all of them. Parameters are the same. More groups take longer to compile;
      with all there is no loop, whose activations would be copied into stacks.
    loss_chunk: tokens whose logits exist at a time in the loss.
  """

  vocab_size: int = 32000
  model_dim: int = 2304
  num_layers: int = 18
  pattern: str = "G"
  mlp_dim: int = 6208
  gdn2: GDN2Config = dataclasses.field(default_factory=GDN2Config)
  attention: AttentionConfig = dataclasses.field(
    default_factory=AttentionConfig
  )
  norm_eps: float = 1e-5
  dtype: str = "bfloat16"
  param_dtype: str = "float32"
  remat: str = "none"
  scan_layers: bool = True
  scan_unroll: int = 1
  loss_chunk: int = 512

  @property
  def num_groups(self) -> int:
    """Repetitions of the pattern."""
    return self.num_layers // len(self.pattern)

  @property
  def groups_per_turn(self) -> int:
    """Groups in a turn of the scan; `num_groups` of them leave no loop."""
    return self.scan_unroll or self.num_groups

  def validate(self, path: str = "model") -> None:
    """Raises ValueError naming the first field under `path` that is wrong."""
    for name in ("vocab_size", "model_dim", "mlp_dim", "loss_chunk"):
      if getattr(self, name) < 1:
        raise ValueError(f"{path}.{name}={getattr(self, name)}: expected >= 1")
    if not self.pattern or set(self.pattern) - set(KINDS):
      known = ", ".join(f"{k} ({v})" for k, v in KINDS.items())
      raise ValueError(
        f"{path}.pattern={self.pattern!r}: expected letters among {known}"
      )
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
    choices = {"dtype": _DTYPES, "param_dtype": _DTYPES, "remat": _REMAT}
    for name, allowed in choices.items():
      if getattr(self, name) not in allowed:
        raise ValueError(
          f"{path}.{name}={getattr(self, name)!r}: expected one of {allowed}"
        )
    self.gdn2.validate(f"{path}.gdn2")
    self.attention.validate(f"{path}.attention")


def without(tree: dict[str, Any], *names: str) -> dict[str, Any]:
  """A config as nested dicts, without the fields of these names."""
  return {
    name: without(value, *names) if isinstance(value, dict) else value
    for name, value in tree.items()
    if name not in names
  }
