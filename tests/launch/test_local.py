"""The local launcher, with shell scripts in the place of training."""

import os
import signal
import subprocess
import sys
import time

import pytest

from gdn2_jax.launch.processes import (
  RETRYABLE,
  environment,
  exit_code,
  verdict,
)
from tests.tiny_run import ROOT

# $1 is a folder; the last three arguments are the place of the process. The
# file with the number of the process is renamed into place: a reader that sees
# it finds the number inside.
_PRELUDE = """
shift $(($# - 3))
id=${3#--process_id=}
echo "$*" >> "$folder/started-$id"
times=$(wc -l < "$folder/started-$id")
echo "$$" > "$folder/new-pid-$id"
mv "$folder/new-pid-$id" "$folder/pid-$id"
"""


class Launcher:
  """`python -m gdn2_jax.launch` of a shell script, running."""

  def __init__(self, folder, script, *launch_flags):
    self.folder = folder
    self.process = subprocess.Popen(
      [
        *(sys.executable, "-m", "gdn2_jax.launch", *launch_flags, "--"),
        *("sh", "-c", f"folder={folder}{_PRELUDE}{script}", "sh"),
      ],
      cwd=ROOT,
      stderr=subprocess.PIPE,
      text=True,
    )

  def starts(self, process: int = 0) -> list[str]:
    """The places that a process was started with."""
    path = self.folder / f"started-{process}"
    return path.read_text().splitlines() if path.exists() else []

  def wait_for(self, *names: str) -> None:
    """Returns when these files are there."""
    deadline = time.monotonic() + 60
    while not all((self.folder / name).exists() for name in names):
      assert time.monotonic() < deadline, names
      time.sleep(0.02)

  def send(self, process: int, number: signal.Signals) -> None:
    os.kill(int((self.folder / f"pid-{process}").read_text()), number)

  def end(self) -> tuple[int, str]:
    _, err = self.process.communicate(timeout=60)
    return self.process.returncode, err


def waiting(folder, trap) -> Launcher:
  """Two processes that have set a trap and wait for signals."""
  wait = 'echo > "$folder/ready-$id"\nwhile true; do sleep 0.05; done\n'
  run = Launcher(folder, f"\n{trap}\n{wait}")
  run.wait_for("ready-0", "ready-1")
  return run


@pytest.mark.parametrize(
  ("codes", "want"),
  [
    ([0, 0], 0),
    ([0, 75], 75),
    ([137, 75], 137),
    # Whoever made the mistake decides; the others lost a peer through it.
    ([134, 1], 1),
    ([75, 134, 2], 2),
    ([139, 75], 139),
  ],
)
def test_one_code_stands_for_all(codes, want):
  assert verdict(codes) == want
  assert (want in RETRYABLE) == (want in (75, 134, 137, 143))


def test_signals_become_codes_of_a_shell():
  assert [exit_code(c) for c in (0, 1, -6, -9, -15)] == [0, 1, 134, 137, 143]


def test_devices_are_shared_out():
  assert environment(1, 4, None)["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
  assert environment(0, None, None) == dict(os.environ)
  rehearsal = environment(1, None, 2)
  assert rehearsal["JAX_NUM_CPU_DEVICES"] == "2"
  assert rehearsal["JAX_PLATFORMS"] == "cpu"


def test_all_are_started_again_when_one_is_killed(tmp_path):
  """Every start has a coordinator of its own; the other one is ended too."""
  script = 'if [ "$times" = 2 ]; then exit 0; fi; exec sleep 600'
  run = Launcher(tmp_path, script, "--num_processes=3", "--grace=0.2")
  run.wait_for("pid-0", "pid-1", "pid-2")
  # A stopped process cannot end by itself.
  run.send(2, signal.SIGSTOP)
  run.send(1, signal.SIGKILL)
  code, err = run.end()
  assert code == 0, err
  assert "process 1 ended with code 137" in err
  assert "starting all again (1 of 10)" in err
  places = [run.starts(process) for process in range(3)]
  assert [len(starts) for starts in places] == [2, 2, 2]
  for start in range(2):
    assert len({p[start].split()[0] for p in places}) == 1
    for process in range(3):
      address, count, index = places[process][start].split()
      assert address.startswith("--coordinator_address=127.0.0.1:")
      assert count == "--num_processes=3"
      assert index == f"--process_id={process}"


def test_mistakes_are_not_tried_again(tmp_path):
  script = 'if [ "$id" = 1 ]; then exit 1; fi; sleep 0.2; exit 134'
  run = Launcher(tmp_path, script)
  code, err = run.end()
  assert code == 1, err
  assert "again" not in err
  assert len(run.starts()) == 1


def test_restarts_have_an_end(tmp_path):
  run = Launcher(tmp_path, "exit 75", "--max_restarts=1")
  code, err = run.end()
  assert code == 75
  assert "giving up after 1 restarts" in err
  assert len(run.starts()) == 2


def test_sigterm_is_passed_on_once(tmp_path):
  action = 'echo >> "$folder/saved-$id"; sleep 0.3; exit 0'
  run = waiting(tmp_path, f"trap '{action}' TERM")
  run.process.terminate()
  code, err = run.end()
  assert code == 0, err
  assert "again" not in err
  for process in (0, 1):
    assert (tmp_path / f"saved-{process}").read_text() == "\n"


def test_a_second_signal_kills(tmp_path):
  run = waiting(tmp_path, """trap 'echo > "$folder/deaf-$id"' TERM INT""")
  run.process.send_signal(signal.SIGINT)
  run.wait_for("deaf-0", "deaf-1")
  run.process.send_signal(signal.SIGINT)
  code, err = run.end()
  assert code == 137, err
  assert "again" not in err


def test_the_processes_do_not_outlive_the_launcher(tmp_path):
  run = waiting(tmp_path, """trap 'echo > "$folder/told-$id"; exit 0' TERM""")
  run.process.kill()
  run.end()
  run.wait_for("told-0", "told-1")


def test_unknown_commands_are_refused():
  for command in ([], ["--config=a.py"], ["no-such-command"]):
    done = subprocess.run(
      [sys.executable, "-m", "gdn2_jax.launch", "--", *command],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
