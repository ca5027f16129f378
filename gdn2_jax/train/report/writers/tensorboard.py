"""Writer of TensorBoard events.

tensorboard/ has every number over steps. tensorboard/tokens, a run of its own
in TensorBoard, has the losses over the tokens read so far: runs with batches of
other sizes are compared on that axis.
"""

import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tensorboardX import SummaryWriter

from gdn2_jax.train.report.writers.protocol import points

# Curves over tokens, by those over steps.
_OVER_TOKENS = {
  "train/loss": "over_tokens/train_loss",
  "eval/loss_1x": "over_tokens/eval_loss",
}


class TensorBoardWriter:
  """Writes scalars and texts as events.

  Args:
    workdir: directory of the run.
    first_step: step that the run goes on from.
    tokens_per_step: tokens of a batch, padding included.
    kept: rows of metrics.jsonl that the run keeps.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    first_step: int,
    tokens_per_step: int,
    kept: Sequence[Mapping[str, Any]] = (),
  ):
    self._first_step = first_step
    self._tokens_per_step = tokens_per_step
    # TensorBoard forgets the events from purge_step on. Those of the first step
    # itself are written again: a finished run may have its last row twice.
    folder = workdir / "tensorboard"
    # Files are named by the second: two runs in one would overwrite.
    unique = {"filename_suffix": f".{time.time_ns()}"}
    self._events = SummaryWriter(str(folder), purge_step=first_step, **unique)
    self._by_tokens = SummaryWriter(
      str(folder / "tokens"), purge_step=first_step * tokens_per_step, **unique
    )
    for row in kept:
      if row["step"] == first_step:
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
        del numbers["step"]
        self.write(row["step"], row["kind"], numbers)

  def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
    """Adds the numbers of a row that are finite."""
    for name, value in points(kind, values).items():
      self._events.add_scalar(name, value, step)
      if name in _OVER_TOKENS:
        tokens = step * self._tokens_per_step
        self._by_tokens.add_scalar(_OVER_TOKENS[name], value, tokens)

  def text(self, name: str, text: str) -> None:
    """Adds a text, shown line by line as it is."""
    # TensorBoard renders Markdown, where indented lines are code.
    code = "\n".join(f"    {line}" for line in text.splitlines())
    self._events.add_text(name, code, self._first_step)

  def close(self) -> None:
    """Flushes and closes the files."""
    self._events.close()
    self._by_tokens.close()
