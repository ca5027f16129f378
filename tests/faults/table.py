"""Every fault by name, and how often the long version does it."""

from collections.abc import Callable

from tests.faults import damage, kills, meshes, pair, signals, stops, storage
from tests.faults.lab import Lab
from tests.faults.outcome import Outcome

Fault = Callable[[Lab, int, Callable[[], object]], Outcome]

FAULTS: dict[str, tuple[Fault, int]] = {
  "kill": (kills.kill_loop, 50),
  "kill_in_retention": (kills.kill_in_retention, 15),
  "sigterm": (signals.sigterm, 5),
  "second_signal": (signals.second_signal, 4),
  "flip": (damage.bit_flips, 100),
  "cut": (damage.cut_files, 60),
  "broken_steps": (damage.broken_steps, 1),
  "disk_full": (storage.disk_full, 3),
  "failed_last_save": (storage.failed_last_save, 2),
  "nan": (stops.not_a_number, 2),
  "stuck": (stops.stuck, 3),
  "in_use": (stops.in_use, 1),
  "meshes": (meshes.other_meshes, 4),
}

# Two processes have a truth of their own: sums over devices round otherwise.
PAIR_FAULTS: dict[str, tuple[Fault, int]] = {
  "kill_one_of_two": (pair.kill_one, 10),
  "sigterm_one_of_two": (pair.sigterm_one, 4),
  "stuck_one_of_two": (pair.stuck_one, 2),
}
