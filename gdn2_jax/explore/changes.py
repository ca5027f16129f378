"""Changes of the gates of one head: tied, scaled or switched off."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gdn2_jax.typing import QueryKey, Value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
  """Change of the gates of one head, first tied if asked, then scaled.

  Attributes:
    tie: b and w of every channel become one number per token, the common mean
      beta = (mean of b over key channels + mean of w over value channels) / 2,
      as in models with tied gates.
    decay: factor on the log-decay g, so that half-lives are divided by it; 0 is
      no decay.
    erase: factor on the erase gate b; 0 erases nothing.
    write: factor on the write gate w; 0 writes nothing.
  """

  tie: bool = False
  decay: float = 1.0
  erase: float = 1.0
  write: float = 1.0

  def check(self) -> None:
    """Raises ValueError unless all factors are finite and >= 0."""
    for name in ("decay", "erase", "write"):
      factor = getattr(self, name)
      if not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"{name}={factor}: expected a finite factor >= 0")

  @property
  def knobs(self) -> tuple[float, float, float, float]:
    """The fields in order, tie as 0 or 1."""
    return float(self.tie), self.decay, self.erase, self.write


AS_IS = "as is"
# The changes that a page holds, by the name that it shows.
CHANGES: Mapping[str, Change] = {
  AS_IS: Change(),
  "tied: w = b = their mean": Change(tie=True),
  "no erase: b = 0": Change(erase=0.0),
  "no write: w = 0": Change(write=0.0),
  "no decay: g = 0": Change(decay=0.0),
  "half erase: b / 2": Change(erase=0.5),
  "double erase: 2 b": Change(erase=2.0),
  "half write: w / 2": Change(write=0.5),
  "double write: 2 w": Change(write=2.0),
  "half decay: g / 2": Change(decay=0.5),
  "double decay: 2 g": Change(decay=2.0),
}


def change_gates(
  g: QueryKey,
  b: QueryKey,
  w: Value,
  knobs: Float[Array | np.ndarray, "B H 4"],
) -> tuple[Any, Any, Any]:
  """Gates of a layer after a change of each row and key head.

  Value heads that share a key head are changed with it.

  Args:
    g: log-decay [B, T, H, K].
    b: erase gate [B, T, H, K].
    w: write gate [B, T, HV, V], HV a multiple of H.
    knobs: `Change.knobs` by row and key head [B, H, 4].

  Returns:
    (g, b, w) of the same shapes.
  """
  H, HV = b.shape[2], w.shape[2]
  tie, decay, erase, write = (knobs[:, None, :, i, None] for i in range(4))
  w_mean = w.reshape(*w.shape[:2], H, -1).mean(-1, keepdims=True)
  beta = (b.mean(-1, keepdims=True) + w_mean) / 2

  def to_values(x):
    return jnp.repeat(x, HV // H, axis=2)

  b = erase * jnp.where(tie > 0, beta, b)
  w = to_values(write) * jnp.where(to_values(tie) > 0, to_values(beta), w)
  return decay * g, b, w
