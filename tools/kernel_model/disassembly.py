"""Compilation of cases for an H100 without one, and their disassembly."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from tools.kernel_model.kernel import Binary

INSTALL = "python -m pip install --no-deps 'nvidia-cuda-nvdisasm>=13,<14'"


def find_nvdisasm(given: str = "") -> str:
  """Path of nvdisasm: as given, on the PATH, of a CUDA toolkit or of a wheel.

  Raises:
    ValueError: there is none.
  """
  if given:
    if not os.access(given, os.X_OK):
      raise ValueError(f"--nvdisasm: {given!r}, expected an executable file")
    return given
  places = [shutil.which("nvdisasm"), "/usr/local/cuda/bin/nvdisasm"]
  places.insert(1, f"{os.environ.get('CUDA_HOME')}/bin/nvdisasm")
  # Triton's is older than the assembler that jax takes, so the last choice.
  for package, folder in ("nvidia", "cu13"), ("triton", "backends/nvidia"):
    if spec := importlib.util.find_spec(package):
      roots = spec.submodule_search_locations
      places += [f"{root}/{folder}/bin/nvdisasm" for root in roots]
  for place in places:
    if place and os.access(place, os.X_OK):
      return place
  raise ValueError(
    "nvdisasm was found neither on the PATH nor in $CUDA_HOME, "
    f"/usr/local/cuda or a wheel; give --nvdisasm=PATH, or {INSTALL}"
  )


def versions(nvdisasm: str) -> dict[str, str]:
  """Versions of jax and of the two programs.

  Raises:
    ValueError: JAX's CUDA plugin or ptxas is missing.
  """
  import jax

  from gdn2_jax.aot import topology

  if missing := topology.missing_tool():
    raise ValueError(missing)
  return {
    "jax": jax.__version__,
    "ptxas": _version(str(topology.find_ptxas())),
    "nvdisasm": _version(nvdisasm),
  }


def _version(tool):
  command = [tool, "--version"]
  text = subprocess.run(command, check=True, capture_output=True, text=True)
  found = re.search(r"\bV(\d[\d.]*)", text.stdout)
  return found[1] if found else "unknown"


def compile_cases(names: list[str], nvdisasm: str):
  """Compiles cases of gdn2_jax.aot.cases; yields a Binary for each name.

  Args:
    names: full names of cases with one kernel each.
    nvdisasm: path of the disassembler.

  Raises:
    ValueError: a name is unknown, or a case has not one kernel.
  """
  import jax

  from gdn2_jax.aot import topology
  from gdn2_jax.aot.cases import find_cases

  jax.config.update("jax_platforms", "cpu")
  found, _, failures = find_cases()
  for failure in failures:
    print(f"FAILED {failure}", file=sys.stderr)
  cases = {case.name: case for case in found}
  if unknown := sorted(set(names) - set(cases)):
    raise ValueError(f"cases: {unknown}, expected some of {sorted(cases)}")
  sharding = topology.h100_sharding()
  for name in names:
    print(f"{name} ...", file=sys.stderr, flush=True)
    yield _compile(cases[name], sharding, str(topology.find_ptxas()), nvdisasm)


def _compile(case, sharding, ptxas, nvdisasm) -> Binary:
  import jax

  from gdn2_jax.aot.kernels import Reader, compile_case

  class KeepsPtx(Reader):
    """Reader of dumps that keeps the PTX, which are gone afterwards."""

    def read(self, folder):
      self.ptx = [path.read_text() for path in sorted(folder.glob("*.ptx"))]
      return super().read(folder)

  reader = KeepsPtx()
  jax.clear_caches()  # an equal kernel of another case would leave no dump
  reports = compile_case(case, sharding, reader)
  if len(reports) != 1 or len(reader.ptx) != 1:
    raise ValueError(
      f"{case.name}: {len(reports)} kernels, {len(reader.ptx)} files of PTX, "
      "expected one of each"
    )
  usage = reports[0].usage
  return Binary(
    listing=disassemble(reader.ptx[0], ptxas, nvdisasm),
    bytes_per_token_head=reports[0].bytes_per_token_head,
    threads=usage.threads,
    registers=usage.registers,
    spills=usage.spill_stores + usage.spill_loads,
    shared_bytes=usage.shared_bytes,
  )


def disassemble(ptx: str, ptxas: str, nvdisasm: str) -> str:
  """Listing of a kernel with its encoding.

  Raises:
    ValueError: a tool fails; with its last line.
  """
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder) / "kernel.ptx"
    cubin = source.with_suffix(".cubin")
    source.write_text(ptx)
    _run([ptxas, "-arch=sm_90a", str(source), "-o", str(cubin)])
    return _run([nvdisasm, "-hex", "-c", str(cubin)])


def _run(command):
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ["no message"]
    raise ValueError(f"{pathlib.Path(command[0]).name}: {lines[-1]}")
  return done.stdout


def stem_of(name: str) -> str:
  """File name of a case, without its ending."""
  return name.replace(",", "").replace(" ", "_")


def save(binary: Binary, path: pathlib.Path) -> None:
  """Writes the listing to `path` and the resources to a JSON file beside."""
  path.parent.mkdir(parents=True, exist_ok=True)
  resources = dataclasses.asdict(binary)
  path.write_text(resources.pop("listing"))
  path.with_suffix(".json").write_text(json.dumps(resources, indent=2) + "\n")


def load(path: pathlib.Path) -> Binary:
  """Reads what `save` has written; resources may be missing."""
  resources = path.with_suffix(".json")
  more = json.loads(resources.read_text()) if resources.exists() else {}
  return Binary(listing=path.read_text(), **more)
