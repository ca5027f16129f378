"""Config of a Gated DeltaNet-2 layer, of its relatives and its ablations."""

from typing import Literal

from gdn2_jax.config_class import check_choices, config_class
from gdn2_jax.ops.gdn2.api import IMPLEMENTATIONS

# Initial ranges of A and of dt; the log-decay of a token is -A dt.
_DECAY_INIT = {
  "paper": ((1.0, 16.0), (1e-3, 1e-1)),
  "long": ((1.0, 1.5), (1e-3, 1e-2)),
}


@config_class
class GDN2Config:
  """Config of a Gated DeltaNet-2 layer.

  Attributes:
    num_heads: Key heads H.
    num_value_heads: Value heads HV, a multiple of H; 0 means H.
    key_dim: Key channels K of a head, 16 to 256.
    value_dim: Value channels V of a head, 16 to 256; also the rank of the
      decay and output-gate bottlenecks.
    conv_width: Taps of the short convolution.
    negative_eigenvalues: Erase gate in [0, 2] instead of [0, 1]; with tied
      gates, both.
    output_gate: "silu" (the paper) or "sigmoid" (fla's variant).
    norm_eps: Added to the mean square in the output norm.
    gates: "decoupled", erase and write gates of their own; or "tied", both one
      number per head and token, which Kimi Delta Attention, Gated DeltaNet and
      DeltaNet call beta.
    erase_gate: "channel"; "scalar", b averaged over a head's key channels (the
      write-only ablation of Table 5); "head", one number per head from a
      projection of that size; or "off", nothing is erased.
    write_gate: "channel"; "scalar", w averaged over a head's value channels
      (the erase-only ablation of Table 5); or "head", as for erase_gate.
    decay: "channel"; "scalar", one decay per head and token (Gated DeltaNet);
      or "none" (DeltaNet).
    decay_init: Initial half-lives: "paper", a median of about 8 tokens (A in
      [1, 16], dt in [1e-3, 1e-1]); or "long", about 170 (A in [1, 1.5], dt in
      [1e-3, 1e-2]), for rows of a few hundred tokens.
    conv_init: "uniform" (the paper), or "current": 1 is added to the tap of the
      current token.
    implementation: Implementation of the op, for sequences and single tokens;
      "" chooses one that supports the call. A named one runs or raises:
      "triton" is for decoding and refuses to train.
  """

  num_heads: int = 16
  num_value_heads: int = 0
  key_dim: int = 128
  value_dim: int = 128
  conv_width: int = 4
  negative_eigenvalues: bool = False
  output_gate: Literal["silu", "sigmoid"] = "silu"
  norm_eps: float = 1e-5
  gates: Literal["decoupled", "tied"] = "decoupled"
  erase_gate: Literal["channel", "scalar", "head", "off"] = "channel"
  write_gate: Literal["channel", "scalar", "head"] = "channel"
  decay: Literal["channel", "scalar", "none"] = "channel"
  decay_init: Literal["paper", "long"] = "paper"
  conv_init: Literal["uniform", "current"] = "uniform"
  implementation: str = ""

  @property
  def value_heads(self) -> int:
    """Number of value heads HV."""
    return self.num_value_heads or self.num_heads

  @property
  def erase_scale(self) -> float:
    """Upper end of the erase gate's range."""
    return 2.0 if self.negative_eigenvalues else 1.0

  @property
  def decay_ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
    """Initial ranges of A and dt."""
    return _DECAY_INIT[self.decay_init]

  @property
  def has_fusible_gates(self) -> bool:
    """True if kernels can compute the gates from their projections.

    All but averaged gates, no erasing, no decay, and a write gate in [0, 2].
    """
    return (
      self.erase_gate in ("channel", "head")
      and self.write_gate in ("channel", "head")
      and self.decay != "none"
      and not (self.gates == "tied" and self.negative_eigenvalues)
    )

  def validate(self, path: str) -> None:
    """Raises ValueError naming the first field under `path` that is wrong."""
    if self.num_heads < 1:
      raise ValueError(f"{path}.num_heads={self.num_heads}: expected >= 1")
    if self.value_heads % self.num_heads:
      raise ValueError(
        f"{path}.num_value_heads={self.num_value_heads}: expected a multiple "
        f"of num_heads={self.num_heads}, or 0"
      )
    for name in ("key_dim", "value_dim"):
      if not 16 <= getattr(self, name) <= 256:
        raise ValueError(
          f"{path}.{name}={getattr(self, name)}: expected 16 to 256"
        )
    if not self.norm_eps > 0:
      raise ValueError(f"{path}.norm_eps={self.norm_eps}: expected > 0")
    if self.conv_width < 2:
      raise ValueError(f"{path}.conv_width={self.conv_width}: expected >= 2")
    check_choices(self, path)
    check_implementation(self.implementation, path)
    for name in ("erase_gate", "write_gate"):
      if self.gates == "tied" and getattr(self, name) != "channel":
        raise ValueError(
          f"{path}.{name}={getattr(self, name)!r}: expected 'channel', as "
          f"{path}.gates='tied' has no such gate"
        )


def check_implementation(name: str, path: str) -> None:
  """Refuses a name of an implementation that the op does not have."""
  allowed = ("", *IMPLEMENTATIONS)
  if name not in allowed:
    raise ValueError(
      f"{path}.implementation={name!r}: expected one of {allowed}"
    )
