"""Record of batches that made no update.

WORKDIR/skipped.jsonl has one line per such batch: step, loss, gradient norm,
and the rows as [source, row], to look them up:

    dataset.train_rows(source)[row]
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax

from gdn2_jax.data.batches import TrainBatches
from gdn2_jax.data.packed.rows import PackedRows

_SHOWN = 8
_STRIDE = 10**12


@dataclasses.dataclass(frozen=True)
class _RowNumbers(PackedRows):
  """Rows whose content is their number and that of their source."""

  source: int = 0

  def __getitem__(self, index: int) -> dict[str, int]:
    return {"row": self.source * _STRIDE + index}


def rows_of(dataset: Any, step: int) -> list[tuple[int, int]]:
  """(source, row) of every row of the batch of `step`, which counts from 0."""
  sources = []
  for number in range(len(dataset.parts)):
    rows = dataset.train_rows(number)
    sources.append(
      _RowNumbers(rows.tokens, rows.offsets, rows.seq_len, source=number)
    )
  batches = TrainBatches(
    sources,
    dataset.weights,
    seed=dataset.config.seed,
    batch_size=dataset.config.batch_size,
    start_step=step,
  )
  found = [divmod(int(row), _STRIDE) for row in next(batches)["row"]]
  batches.close()
  return found


class SkippedBatches:
  """Writer of skipped.jsonl, on process 0 only."""

  def __init__(self, path: pathlib.Path, dataset: Any):
    self._path = path
    self._dataset = dataset

  def note(self, step: int, loss: float, grad_norm: float) -> str:
    """Appends the batch of `step`, from 1; returns text that names its rows."""
    rows = rows_of(self._dataset, step - 1)
    numbers = {"loss": loss, "grad_norm": grad_norm}
    line = {
      "step": step,
      **{k: x if math.isfinite(x) else str(x) for k, x in numbers.items()},
      "data_seed": self._dataset.config.seed,
      "rows": rows,
    }
    if jax.process_index() == 0:
      with open(self._path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    shown = ", ".join(
      f"{source}:{row}" if source else str(row) for source, row in rows[:_SHOWN]
    )
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"rows {shown}{more}"
