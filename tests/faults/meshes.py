"""Going on with other devices than the checkpoint was written on."""

import math
import signal
from collections.abc import Callable

from tests.faults.child import train_rows
from tests.faults.lab import Lab, digests_of, newest
from tests.faults.outcome import Outcome, tries

# (devices, data, fsdp, tensor), one after the other on one workdir.
_MESHES = ((8, 1, 8, 1), (8, 1, 4, 2), (1, 1, 1, 1), (8, 2, 2, 2))
_STEPS = 20
_TOLERANCE = 1e-5


def other_meshes(lab: Lab, count: int, tick: Callable[[], object]) -> Outcome:
  """8 -> 4 x 2 -> 1 -> 2 x 2 x 2 devices (F11).

  Every restore compares the digest with the one of the mesh before. From the
  same checkpoint, each mesh has the losses of one device to 1e-5.
  """
  outcome, largest = Outcome("other meshes"), 0.0
  for number, one in enumerate(tries(outcome, count, tick)):
    devices, data, fsdp, tensor = _MESHES[number % len(_MESHES)]
    flags = [
      f"--config.mesh.data={data}",
      f"--config.mesh.fsdp={fsdp}",
      f"--config.mesh.tensor={tensor}",
      "--config.checkpoint.every_steps=0",
    ]
    if number % len(_MESHES) == 0:
      chain = lab.workdir("chain", [10])
    # On a copy of the same checkpoint: the losses of 20 steps.
    workdir = lab.workdir("mesh", [10])
    child = lab.start(workdir, *flags, devices=devices)
    child.wait_for_step(10 + _STEPS)
    child.send(signal.SIGTERM)
    one.expect(child.end() == 0, child.output[-500:])
    rows = train_rows(workdir)
    errors = [
      abs(rows[s][0] - lab.truth[s][0]) / lab.truth[s][0]
      for s in range(11, 11 + _STEPS)
      if s in rows
    ]
    worst = max(errors, default=math.inf)
    largest = max(largest, worst)
    outcome.notes["largest relative difference"] = float(f"{largest:.1e}")
    one.silent([0] if worst > _TOLERANCE else [])
    # In the chain: what the mesh before has saved is restored on this one.
    before = newest(chain)
    child = lab.start(chain, *flags, devices=devices)
    child.wait_for_step(before + 1)
    child.send(signal.SIGTERM)
    one.expect(child.end() == 0, child.output[-500:])
    one.lost(max(before - child.resumed_from, 0))
    one.expect("WARNING" not in child.output, "the digest differs")
    one.expect(before in digests_of(chain), f"step {before} was set aside")
  return outcome
