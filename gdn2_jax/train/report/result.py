"""Result of a training run."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gdn2_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Result:
  """The end of a run.

  Attributes:
    state: state after the last step; state.params are the parameters.
    step: finished steps.
    stopped_by: "" if all steps are done, else the signal or notice.
    rows: rows of metrics.jsonl, those before a resume included: "step", "kind"
      ("train", "eval" or "final") and numbers by name, None if not finite.
      Empty on processes other than 0.
  """

  state: TrainState
  step: int
  stopped_by: str
  rows: tuple[dict[str, Any], ...] = ()

  def curve(
    self, name: str, kind: str = "train"
  ) -> tuple[Int[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """Steps and values of a number of the rows, such as "grad_norm".

    Args:
      name: a number of these rows.
      kind: "train", or "eval" for the evaluations, the last one included.

    Returns:
      Steps [N] and values [N], float64, NaN where the number was not finite.

    Raises:
      ValueError: no row of this kind has the name.
    """
    kinds = ("eval", "final") if kind == "eval" else (kind,)
    rows = [row for row in self.rows if row["kind"] in kinds]
    found = [(row["step"], row[name]) for row in rows if name in row]
    if rows and not found:
      known = sorted({key for row in rows for key in row} - {"step", "kind"})
      raise ValueError(
        f"name={name!r}: expected one of {', '.join(known)} for kind={kind!r}"
      )
    steps = np.asarray([step for step, _ in found], int)
    return steps, np.asarray([value for _, value in found], float)

  @property
  def losses(self) -> tuple[Int[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """Steps and training losses in nats per token, of the logged steps."""
    return self.curve("loss")
