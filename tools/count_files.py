r"""Counts the files and functions that a training step enters.

  .venv/bin/python tools/count_files.py

Trains the tiny hybrid in this process. A step is one turn of the loop, from
asking for a batch to asking for the next one. The first turn traces the model,
so it enters everything that decides what is computed; a later one is what the
loop itself does. Evaluation and checkpoints fall outside of both.
"""

import collections
import os
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gdn2_jax"
COUNTED = (0, 5)  # turns of the loop
NUM_STEPS = 8


class Counter:
  """Counter of the package's functions that are entered, by file."""

  def __init__(self):
    self.entered: dict[str, set[str]] = collections.defaultdict(set)
    self._on = False
    monitoring = sys.monitoring
    tool = monitoring.PROFILER_ID
    monitoring.use_tool_id(tool, "count_files")
    events = monitoring.events
    # A generator that goes on has been entered too.
    monitoring.register_callback(tool, events.PY_START, self._note)
    monitoring.register_callback(tool, events.PY_RESUME, self._note)
    monitoring.set_events(tool, events.PY_START | events.PY_RESUME)

  def _note(self, code, offset: int) -> None:
    del offset
    path = pathlib.Path(code.co_filename)
    if self._on and path.is_relative_to(PACKAGE):
      name = str(path.relative_to(PACKAGE))
      self.entered[name].add(f"{code.co_qualname}:{code.co_firstlineno}")

  def start(self) -> None:
    """Counts from zero."""
    self.entered.clear()
    self._on = True

  def stop(self) -> dict[str, set[str]]:
    """Functions entered since `start`, by file."""
    self._on = False
    return {name: set(found) for name, found in self.entered.items()}

  def close(self) -> None:
    """Gives the tool id back."""
    sys.monitoring.set_events(sys.monitoring.PROFILER_ID, 0)
    sys.monitoring.free_tool_id(sys.monitoring.PROFILER_ID)


class Turns:
  """Dataset that tells the counter when a turn of the loop begins."""

  def __init__(self, dataset, counter: Counter):
    self._dataset, self._counter = dataset, counter
    self.counted: dict[int, dict[str, set[str]]] = {}

  def __getattr__(self, name):
    return getattr(self._dataset, name)

  def train_batches(self, start_step: int = 0, **hosts):
    """Yields batches; a turn begins when one is asked for."""
    batches = self._dataset.train_batches(start_step=start_step, **hosts)
    for step in range(start_step, NUM_STEPS):
      if step - 1 in COUNTED:
        self.counted[step - 1] = self._counter.stop()
      if step in COUNTED:
        self._counter.start()
      yield next(batches)


def main() -> None:
  """Trains, and prints the files of both turns."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  sys.path.insert(0, str(ROOT))
  from gdn2_jax.data.pipeline import open_dataset
  from gdn2_jax.train.loop import train
  from tests.faults.tiny import tiny_config

  counter = Counter()
  with tempfile.TemporaryDirectory() as folder:
    config = tiny_config(folder, NUM_STEPS)
    config.model.gdn2.implementation = ""
    config.checkpoint.every_steps = 0
    dataset = Turns(open_dataset(config.data), counter)
    train(config, f"{folder}/run", dataset=dataset, say=lambda line: None)
  counter.close()
  names = ("the first step, tracing the model", "a step once it is compiled")
  for turn, name in zip(COUNTED, names, strict=True):
    found = dataset.counted[turn]
    lines = {f: len((PACKAGE / f).read_text().splitlines()) for f in found}
    functions = sum(map(len, found.values()))
    print(
      f"{name}: {functions} functions in {len(found)} files of "
      f"{sum(lines.values()):,} lines"
    )
    for file in sorted(found):
      print(f"  {file}: {len(found[file])} functions, {lines[file]} lines")


if __name__ == "__main__":
  main()
