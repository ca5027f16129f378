"""`python -m gdn2_jax.bench gpu`: kernels and training step on a GPU.

Four parts: `check` (every kernel against "xla"), `time` (kernels and "xla"),
`step` (the 1.3B hybrid) and `peers` (fla's kernels). Each runs in a process of
its own, which is killed when its time is up or one of its rows hangs. Finished
rows are kept, and a part that ended early is started again after the row that
ended it.
"""

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
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags

from gdn2_jax.bench.gpu import table as gpu_table
from gdn2_jax.bench.gpu.names import NO_GPU, PARTS
from gdn2_jax.bench.gpu.part import Recorder, Row, environment
from gdn2_jax.bench.results import date, write_json
from gdn2_jax.kernels import target

# End of each part, as a share of all the time.
_ENDS = {"check": 0.34, "time": 0.52, "step": 0.88, "peers": 1.0}
# Seconds after which a row counts as hanging.
_ROW_SECONDS = {"check": 75.0, "time": 100.0, "step": 150.0, "peers": 60.0}
_GRACE = 4.0
_PACKAGES = ("jaxlib", "jax-triton", "triton", "torch", "fla-core", "flax")
_README = pathlib.Path("README.md")


def define_flags() -> None:
  """Defines the flags of this benchmark."""
  flags.DEFINE_bool(
    "rehearse",
    False,
    "gpu, serve: tiny shapes, to try the benchmark on a CPU; its times mean "
    "nothing",
  )
  flags.DEFINE_float("seconds", 510.0, "gpu: time limit of the whole benchmark")
  flags.DEFINE_list("parts", list(PARTS), "gpu: parts to run")
  flags.DEFINE_string(
    "output",
    "benchmarks",
    "gpu: folder of the README.md and results/ to update; a rehearsal writes "
    "to a temporary folder",
  )
  # The parent process starts its parts with these.
  flags.DEFINE_enum("part", None, PARTS, "internal")
  flags.DEFINE_string("rows", None, "internal")
  flags.DEFINE_float("deadline", None, "internal")


def main(values: Any) -> None:
  """Runs all parts, or in a child process one of them."""
  if values.part:
    _run_part(values)
    return
  for part in values.parts or [""]:
    if part not in PARTS:
      raise ValueError(f"--parts={part}: expected some of {', '.join(PARTS)}")
  output = pathlib.Path(values.output)
  if values.rehearse:
    output = _temporary_copy(output)
  for result in measure(values.parts, values.seconds, values.rehearse):
    # After every part: a later one must not lose what was measured.
    path = write(result, output)
  print(f"{gpu_table.tables(result)}\n\nwritten: {path}", flush=True)
  if not result["rows"] or gpu_table.failures(result["rows"]):
    sys.exit(1)


def write(result: dict[str, Any], output: pathlib.Path) -> pathlib.Path:
  """Writes results/gpu_<device>.json and the tables of README.md."""
  device = result.get("environment", {}).get("device", "unknown")
  path = output / "results" / f"gpu_{gpu_table.slug(device)}.json"
  write_json(path, result)
  readme = output / _README
  if readme.exists():
    block = gpu_table.tables(result)
    readme.write_text(gpu_table.update(readme.read_text(), block))
  return path


def measure(
  parts: list[str], seconds: float, rehearse: bool
) -> Iterator[dict[str, Any]]:
  """Yields the result so far after each part."""
  start = time.time()
  result = {
    "date": date(),
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
    yield result


def _supervise(part: str, deadline: float, rehearse: bool) -> list[Row]:
  """Rows of a part; restarts its process after a row that ended it."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "rows"
    path.touch()
    while True:
      before = set(_read(path)) | {"environment"}
      code = _watch(part, path, deadline, rehearse)
      if code == NO_GPU:
        raise ValueError(
          "JAX finds no NVIDIA GPU here; --rehearse runs on a CPU"
        )
      rows = _read(path)
      why = code if isinstance(code, str) else f"its process ended with {code}"
      failed = {"part": part, "note": f"failed: {why}", "passed": False}
      for label, row in rows.items():
        if "started" in row:
          rows[label] = failed | {"label": label}
      path.write_text("".join(json.dumps(r) + "\n" for r in rows.values()))
      if code == 0 or time.time() >= deadline:
        break
      if set(rows) <= before:  # ended before its first row: the next would too
        rows["start"] = failed | {"label": "start"}
        break
    return list(rows.values())


def _watch(part, path, deadline, rehearse):
  """Exit code of a part's process, or the reason why it was killed."""
  command = [sys.executable, "-m", "gdn2_jax.bench", "gpu", f"--part={part}"]
  command += [f"--rows={path}", f"--deadline={deadline}"]
  command += ["--rehearse"] * rehearse
  share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
  if part == "peers":  # torch is in the same process
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


def _read(path: pathlib.Path) -> dict[str, Row]:
  """Rows by label; one that has not ended has `started`."""
  rows = map(json.loads, path.read_text().splitlines())
  return {row["label"]: row for row in rows}


def _run_part(values: Any) -> None:
  """Runs a part in this process."""
  if values.rehearse:
    # The interpreter of Mosaic GPU needs a thread per device.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
  path = pathlib.Path(values.rows)
  recorder = Recorder(
    part=values.part,
    path=path,
    deadline=values.deadline,
    done=frozenset(_read(path)),
    workers=2 if values.rehearse else 5,
  )
  device = environment()
  if device["platform"] != "gpu" and not values.rehearse:
    sys.exit(NO_GPU)
  recorder.write({"label": "environment", **device})
  code = 0
  try:
    run_rows(recorder, values.rehearse)
  except SystemExit as e:
    code = e.code
  sys.stdout.flush()
  sys.stderr.flush()
  # Not sys.exit, which waits for compilers that nobody else waits for.
  os._exit(code)


def run_rows(recorder: Recorder, rehearse: bool) -> None:
  """Writes the rows of a part, or a note about a missing package."""
  try:
    part = importlib.import_module(f"gdn2_jax.bench.gpu.{recorder.part}")
  except ImportError as e:
    recorder.write({"label": recorder.part, "note": f"not run: {e}"})
    return
  with target.use("interpret" if rehearse else "device"):
    part.run(recorder, rehearse)


def _temporary_copy(output: pathlib.Path) -> pathlib.Path:
  folder = pathlib.Path(tempfile.mkdtemp(prefix="gdn2_jax_rehearsal_"))
  if (output / _README).exists():
    shutil.copy(output / _README, folder / _README)
  return folder


def _driver() -> str:
  command = ["nvidia-smi", "--query-gpu=driver_version"]
  command.append("--format=csv,noheader")
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
