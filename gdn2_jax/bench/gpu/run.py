"""`python -m gdn2_jax.bench gpu`: kernels and training step on a GPU.

Three parts: `check` (every kernel against "xla"), `time` (against "xla" and
fla) and `step` (the 1.3B hybrid). Each runs in a process of its own that is
ended when its time is up or one of its rows hangs; what it had measured by
then counts, and it is started again behind the row that it died of.
"""

import datetime
import importlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from gdn2_jax.bench.gpu import table as gpu_table
from gdn2_jax.bench.gpu.names import NO_GPU, PARTS

# By when a part must be over, as a share of all the time.
_ENDS = {"check": 0.34, "time": 0.64, "step": 1.0}
# Seconds after which a row counts as hanging.
_ROW_SECONDS = {"check": 75.0, "time": 100.0, "step": 150.0}
_GRACE = 4.0
_PACKAGES = ("jaxlib", "jax-triton", "triton", "torch", "fla-core", "flax")
_README = pathlib.Path("README.md")

Row = dict[str, Any]


def define_flags() -> None:
  """Defines the flags of this benchmark."""
  flags.DEFINE_bool(
    "rehearse",
    False,
    "run all of it on CPU, tiny and in the interpreter; the times mean nothing",
  )
  flags.DEFINE_float("seconds", 510.0, "all the time it may take")
  flags.DEFINE_list("parts", list(PARTS), "which parts to run")
  flags.DEFINE_string(
    "output",
    "benchmarks",
    "folder whose README.md and results/ are written; a rehearsal writes to a "
    "temporary one",
  )
  # How this program starts its parts.
  flags.DEFINE_enum("part", None, PARTS, "internal")
  flags.DEFINE_string("rows", None, "internal")
  flags.DEFINE_float("deadline", None, "internal")


def main(values: Any) -> None:
  """Runs the parts, or in their processes one of them."""
  if values.part:
    _run_part(values)
    return
  unknown = set(values.parts) - set(PARTS)
  if unknown:
    raise ValueError(f"--parts={sorted(unknown)[0]}: expected some of {PARTS}")
  output = pathlib.Path(values.output)
  if values.rehearse:
    output = _temporary_copy(output)
  result = measure(values.parts, values.seconds, values.rehearse)
  block = gpu_table.tables(result)
  path = write(result, output)
  print(f"{block}\n\nwritten: {path}", flush=True)
  readme = output / _README
  if readme.exists():
    readme.write_text(gpu_table.update(readme.read_text(), block))
  rows = result["rows"]
  if not rows or any(row.get("passed") is False for row in rows):
    sys.exit(1)


def measure(parts: list[str], seconds: float, rehearse: bool) -> dict[str, Any]:
  """Runs parts, one process after the other.

  Args:
    parts: names, in any order.
    seconds: that all of them have together.
    rehearse: whether to run on CPU instead.

  Returns:
    date, driver, packages, environment and rows.

  Raises:
    ValueError: there is no GPU, and this is no rehearsal.
  """
  start = time.time()
  result = {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "rehearsal": rehearse,
    "driver": _driver(),
    "packages": _versions(),
    "rows": [],
  }
  for part in PARTS:
    if part not in parts:
      continue
    print(f"{part}...", file=sys.stderr, flush=True)
    for row in _supervise(part, start + seconds * _ENDS[part], rehearse):
      if row["label"] == "environment":
        result["environment"] = row
      else:
        result["rows"].append(row)
  result["seconds"] = round(time.time() - start, 1)
  return result


def write(result: dict[str, Any], output: pathlib.Path) -> pathlib.Path:
  """Writes results/gpu_<device>.json under `output`; returns its path."""
  device = result.get("environment", {}).get("device", "unknown")
  path = output / "results" / f"gpu_{gpu_table.slug(device)}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=1) + "\n")
  return path


def _supervise(part: str, deadline: float, rehearse: bool) -> list[Row]:
  """The rows of a part, whatever becomes of its processes."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "rows"
    path.touch()
    while True:
      known = len(path.read_text().splitlines())
      code = _watch(part, path, deadline, rehearse)
      if code == NO_GPU:
        raise ValueError(
          "JAX finds no NVIDIA GPU here; --rehearse runs on a CPU"
        )
      rows = _read(path)
      unfinished = [r for r in rows.values() if "started" in r]
      for row in unfinished:
        row["note"] = f"failed: {_end(code)}"
        row["passed"] = False
        del row["started"]
        with path.open("a") as file:
          file.write(json.dumps(row) + "\n")
      if code == 0 or time.time() >= deadline:
        break
      if len(path.read_text().splitlines()) <= known + 1 and not unfinished:
        # It did not get as far as its first row: nothing to go on behind.
        rows["start"] = {"part": part, "label": "start"} | {
          "note": f"failed: {_end(code)}",
          "passed": False,
        }
        break
    return list(rows.values())


def _watch(part, path, deadline, rehearse):
  """Runs a part's process; its exit code, or why it was ended."""
  command = [sys.executable, "-m", "gdn2_jax.bench", "gpu", f"--part={part}"]
  command += [f"--rows={path}", f"--deadline={deadline}"]
  command += ["--rehearse"] * rehearse
  share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
  if part == "time":  # torch is in the same process
    share = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  with subprocess.Popen(
    command, env={**os.environ, **share}, stdout=sys.stderr
  ) as process:
    size, since = -1, time.time()
    while process.poll() is None:
      time.sleep(0.1)
      now = time.time()
      if path.stat().st_size != size:
        size, since = path.stat().st_size, now
      if now > deadline + _GRACE:
        process.kill()
        return "time was up"
      if now > since + _ROW_SECONDS[part]:
        process.kill()
        return f"no result after {_ROW_SECONDS[part]:.0f} s"
    return process.returncode


def _end(code):
  return code if isinstance(code, str) else f"its process ended with {code}"


def _read(path: pathlib.Path) -> dict[str, Row]:
  """Rows by label; one that was started and never ended has `started`."""
  rows = {}
  for line in path.read_text().splitlines():
    row = json.loads(line)
    rows[row["label"]] = row
  return rows


def _run_part(values: Any) -> None:
  """A part's process."""
  import jax

  if values.rehearse:
    # The interpreter of Mosaic GPU needs a thread per device.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
  from gdn2_jax.bench.gpu.part import Recorder, environment
  from gdn2_jax.kernels import target

  path = pathlib.Path(values.rows)
  recorder = Recorder(
    part=values.part,
    path=path,
    deadline=values.deadline,
    done=frozenset(_read(path)),
  )
  device = environment()
  if device["platform"] != "gpu" and not values.rehearse:
    sys.exit(NO_GPU)
  recorder.write({"label": "environment", **device})
  part = importlib.import_module(f"gdn2_jax.bench.gpu.{values.part}")
  code = 0
  try:
    with target.use("interpret" if values.rehearse else "device"):
      part.run(recorder, values.rehearse)
  except SystemExit as e:
    code = e.code
  sys.stdout.flush()
  sys.stderr.flush()
  # Not sys.exit, which waits for compilers that nobody else waits for.
  os._exit(code)


def _temporary_copy(output: pathlib.Path) -> pathlib.Path:
  folder = pathlib.Path(tempfile.mkdtemp(prefix="gdn2_jax_rehearsal_"))
  if (output / _README).exists():
    shutil.copy(output / _README, folder / _README)
  return folder


def _driver() -> str:
  command = [
    "nvidia-smi",
    "--query-gpu=driver_version",
    "--format=csv,noheader",
  ]
  try:
    out = subprocess.run(
      command, capture_output=True, text=True, timeout=20, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return "unknown"
  return (out.stdout.splitlines() or ["unknown"])[0]


def _versions() -> dict[str, str]:
  versions = {}
  for package in _PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return versions
