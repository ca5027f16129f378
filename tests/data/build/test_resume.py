"""Builds that are killed, damaged or disturbed end with the same bytes."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from gdn2_jax.data.build import build, recipe
from gdn2_jax.data.build.workers import run_tasks
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.text.readers import find_files
from tests.data import parquet_files
from tests.data.build.small import (
  OPTIONS,
  SHARD_BYTES,
  SOURCE,
  build_small,
  content,
)
from tests.data.packing import documents

ROOT = pathlib.Path(__file__).parents[3]

_KILLED = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
from gdn2_jax.data.build import build, recipe
from gdn2_jax.data.text.readers import find_files
left = 0
def dying(function):
  def call(*arguments):
    global left
    left -= 1
    if left == 0:
      os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)
  return call
os.replace, os.rename = dying(os.replace), dying(os.rename)
recipe.SHARD_BYTES = LIMIT
for moment in map(int, sys.argv[3].split(",")):
  if child := os.fork():  # one interpreter, a process per build
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("status", status, os.path.exists(sys.argv[2]), flush=True)
    if status == 0:
      break
    continue
  left = moment
  build.build_rows(
    recipe.Inputs(find_files(sys.argv[1]), SOURCE), sys.argv[2],
    recipe.Options(**OPTIONS), say=lambda line: print(line, flush=True),
  )
  os._exit(0)
"""


def _run_killed(folder, out, moments):
  """Builds until done, each process killed at a moment; the lines printed."""
  program = _KILLED.replace("LIMIT", str(SHARD_BYTES))
  program = program.replace("OPTIONS", repr(OPTIONS), 1)
  program = program.replace("SOURCE", repr(SOURCE), 1)
  moments = ",".join(map(str, moments))
  done = subprocess.run(
    [sys.executable, "-c", program, str(folder), str(out), moments],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
  """The content of a build that nothing interrupted."""
  out = tmp_path_factory.mktemp("straight") / "rows"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(recipe, "SHARD_BYTES", SHARD_BYTES)
    build_small(find_files(folder[0]), out)
  return content(out)


@pytest.fixture(scope="module")
def killed(folder, tmp_path_factory):
  """A folder in which a build of `rows` was killed after some shards."""
  path = tmp_path_factory.mktemp("killed")
  (line,) = _run_killed(folder[0], path / "rows", [12])
  assert line == f"status {-signal.SIGKILL} False"
  return path


def test_killed_builds_go_on_and_end_with_the_same_bytes(
  folder, straight, tmp_path
):
  out = tmp_path / "killed"
  lines = _run_killed(folder[0], out, [1, 2, 4, 7, 3, 8, 5] * 9)
  states = [line for line in lines if line.startswith("status")]
  assert states[-1] == "status 0 True"
  assert set(states[:-1]) == {f"status {-signal.SIGKILL} False"}
  assert len(states) > 7
  assert content(out) == straight
  assert list(tmp_path.glob(".*")) == []
  resumed = [int(n.split()[1]) for n in lines if n.startswith("resuming")]
  assert resumed == sorted(resumed)  # finished shards are never lost
  assert len(set(resumed)) > 2


def test_a_kill_after_the_rename_leaves_a_whole_folder(folder, tmp_path):
  paths = find_files(folder[0])
  out = tmp_path / "rows"
  build_small(paths, out)
  expected = content(out)
  for name in ("records/a.json", "plan.json", "lock"):
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).touch()
  assert len(documents(packed.open_packed(out), "train")) == 120
  assert build_small(paths, out).rates is None
  assert content(out) == expected


def test_a_killed_command_takes_its_workers_along(tmp_path):
  path = tmp_path / "text.jsonl"
  with open(path, "w") as file:
    for text in parquet_files.texts() * 60:
      file.write(json.dumps({"text": text}) + "\n")
  out = tmp_path / "rows"
  command = [sys.executable, "-m", "gdn2_jax.data", "text", str(path)]
  command += [f"--out={out}", "--tokenizer=bytes", "--workers=1"]
  running = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  children = pathlib.Path(f"/proc/{running.pid}/task/{running.pid}/children")
  deadline = time.monotonic() + 60
  while not (workers := children.read_text().split()):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  with pytest.raises(ValueError, match="another build is at work here"):
    build.build_rows(
      recipe.Inputs({"text.jsonl": path}, SOURCE), out, recipe.Options()
    )
  running.kill()
  running.wait()
  while any(_is_alive(worker) for worker in workers):
    assert time.monotonic() < deadline
    time.sleep(0.05)


def _is_alive(pid):
  try:
    state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
  except (FileNotFoundError, ProcessLookupError):
    return False
  return state.split()[0] != "Z"  # nobody may be there to reap it


def test_an_unfinished_build_of_other_data_is_kept(folder, killed, tmp_path):
  shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
  out = tmp_path / "rows"
  with pytest.raises(ValueError, match=r"rows.partial: an unfinished .* seed"):
    build_small(find_files(folder[0]), out, options={"seed": 4})
  records = out.with_name("rows.partial") / "records"
  assert len(list(records.glob("*.json"))) > 0


@pytest.mark.parametrize("kind", ["tokens", "offsets"])
@pytest.mark.parametrize("is_there", [True, False])
def test_damaged_shards_are_made_again(
  folder, straight, killed, tmp_path, kind, is_there
):
  shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
  damaged = tmp_path / "rows.partial" / packed.shard_name("train", 0, kind)
  data = bytearray(damaged.read_bytes())
  data[16] ^= 4
  damaged.write_bytes(data)
  if not is_there:
    damaged.unlink()
  made = build_small(find_files(folder[0]), tmp_path / "rows").rates.documents
  assert 20 <= made < 180
  assert content(tmp_path / "rows") == straight


def test_a_dead_worker_is_an_error_not_a_wait():
  started = time.monotonic()
  with pytest.raises(RuntimeError, match="a worker process died"):
    list(run_tasks(os._exit, [9], (), 1))
  assert time.monotonic() - started < 30
