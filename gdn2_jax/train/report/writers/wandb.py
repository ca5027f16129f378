"""Writer for Weights & Biases.

WORKDIR/wandb.json has the id of the run there, so that a resumed run goes on in
it. wandb's own settings apply: WANDB_MODE=offline needs no network, and `wandb
sync` uploads later.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gdn2_jax.interop.disk import read_json
from gdn2_jax.train.report.writer import write_json
from gdn2_jax.train.report.writers.protocol import points


class WandbWriter:
  """Logs rows to a run of W&B.

  Args:
    workdir: directory of the run; its name is the name there.
    project: project there.
    config: config of the run as nested dicts.
    found: rows that metrics.jsonl had; they were logged before.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    project: str,
    config: dict[str, Any],
    found: Sequence[Mapping[str, Any]] = (),
  ):
    # Imported late: it is an extra, and starts a process.
    import wandb

    path = workdir / "wandb.json"
    run_id = read_json(path)["id"] if path.exists() else None
    self._run = wandb.init(
      project=project,
      name=workdir.absolute().name,
      id=run_id,
      resume="allow",
      dir=str(workdir),
      config=config,
    )
    write_json(path, {"id": self._run.id})
    # W&B takes a step once; after a resume the same numbers come again.
    self._logged = {(row["step"], row["kind"]) for row in found}

  def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
    """Logs the numbers of a row that are finite, unless they were logged."""
    if (step, kind) not in self._logged:
      self._run.log(points(kind, values), step=step)

  def text(self, name: str, text: str) -> None:
    """Keeps a text in the summary; the config is there already."""
    if name != "config":
      self._run.summary[name] = text

  def close(self) -> None:
    """Waits until everything is sent, or on disk."""
    self._run.finish()
