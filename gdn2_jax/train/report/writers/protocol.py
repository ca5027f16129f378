"""Protocol of a writer, and names of the curves that rows are points of."""

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

GATES = "gates/"  # prefix of the statistics of gates in a row


@runtime_checkable
class Writer(Protocol):
  """Receiver of the rows of a run, on process 0 only.

  `train(config, workdir, writers=[...])` calls it with every row of
  metrics.jsonl. After a kill, rows since the last checkpoint come again, with
  the same numbers except times.
  """

  def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
    """Takes a row.

    Args:
      step: finished steps.
      kind: "train" for a training step, "eval" for an evaluation, "final" for
        the one at the end.
      values: numbers by name; they may be NaN or infinite.
    """
    ...

  def text(self, name: str, text: str) -> None:
    """Takes a text; "config" is the config as JSON, at the start of a run."""
    ...

  def close(self) -> None:
    """Ends the run, also if it failed."""
    ...


def points(kind: str, values: Mapping[str, float]) -> dict[str, float]:
  """Finite numbers of a row by the name of their curve, such as "train/loss".

  Those of the last evaluation are the last points of "eval/..." as well.
  """
  found = {}
  for name, value in values.items():
    if isinstance(value, float) and not math.isfinite(value):
      continue
    if name.startswith(GATES):
      found[name] = value
      continue
    found[f"{kind}/{name}"] = value
    if kind == "final":
      found[f"eval/{name}"] = value
  return found
