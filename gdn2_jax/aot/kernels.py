"""Compilation of kernels for an H100, and their resources.

JAX's CUDA plugin needs no GPU to compile: the program goes through LLVM and
ptxas to machine code, and Mosaic GPU leaves its intermediate files where
MOSAIC_GPU_DUMP_TO says.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax

from gdn2_jax.aot import ptxas, turns
from gdn2_jax.aot.cases import Case
from gdn2_jax.kernels import target

_DUMP = "MOSAIC_GPU_DUMP_TO"
_MODULE = ".before_layout_inference.txt"
_LAID_OUT = ".after_layout_inference.txt"
# Mosaic GPU tries to disassemble what it dumps; toolkits often lack nvdisasm.
_NOISE = re.compile(r"nvdisasm|Source Location Trace|mosaic/gpu/dump\.cc|^\s*$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelReport:
  """One kernel of one case.

  Attributes:
    case: Name of the case.
    kernel: Name of the kernel's function.
    usage: Registers, spills, shared memory.
    limits: Budget of the case.
    bytes_per_token_head: Bytes of operands and results, each counted once.
    compile_seconds: Seconds of the whole case, lowering included.
  """

  case: str
  kernel: str
  usage: ptxas.Usage
  limits: dict[str, int]
  bytes_per_token_head: float
  compile_seconds: float

  @property
  def failures(self) -> list[str]:
    """Failed checks, one sentence each."""
    label = f"{self.case} ({self.kernel})"
    return [f"{label}: {e}" for e in ptxas.judge(self.usage, self.limits)]


@contextlib.contextmanager
def _dumping_to(folder: str) -> Iterator[None]:
  before = os.environ.get(_DUMP)
  os.environ[_DUMP] = folder
  try:
    yield
  finally:
    if before is None:
      del os.environ[_DUMP]
    else:
      os.environ[_DUMP] = before


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
  """Drops known harmless lines that compiled code writes to stderr."""
  sys.stderr.flush()
  stderr = os.dup(2)
  with tempfile.TemporaryFile() as file:
    os.dup2(file.fileno(), 2)
    try:
      yield
    finally:
      sys.stderr.flush()
      os.dup2(stderr, 2)
      os.close(stderr)
      file.seek(0)
      lines = file.read().decode(errors="replace").splitlines()
      for line in lines:
        if not _NOISE.search(line):
          print(line, file=sys.stderr)


def kernel_bytes(module: Any) -> list[int]:
  """Bytes of operands and results of every Mosaic GPU call in StableHLO."""
  found = []

  def walk(operation):
    for region in operation.regions:
      for block in region:
        for op in block:
          op = op.operation
          name = op.name == "stablehlo.custom_call" and str(
            op.attributes["call_target_name"]
          )
          if name and "mosaic_gpu" in name:
            values = [*op.operands, *op.results]
            found.append(sum(type_bytes(str(x.type)) for x in values))
          walk(op)

  walk(module.operation)
  return found


def type_bytes(text: str) -> int:
  """Bytes of an MLIR type such as tensor<2x64xbf16>."""
  *dims, element = text.removeprefix("tensor<").removesuffix(">").split("x")
  bits = re.match(r"[a-z]+(\d+)", element)
  assert bits, text
  return math.prod(int(dim) for dim in dims) * -(-int(bits.group(1)) // 8)


@contextlib.contextmanager
def dumps() -> Iterator[pathlib.Path]:
  """Folder that Mosaic GPU dumps to inside the with block."""
  with (
    tempfile.TemporaryDirectory() as folder,
    _dumping_to(folder),
    without_noise(),
  ):
    yield pathlib.Path(folder)


class Reader:
  """Reader of dumps; keeps reports, as JAX compiles an equal kernel once."""

  def __init__(self):
    self._seen: dict[str, ptxas.Usage] = {}

  def read(self, folder: pathlib.Path) -> list[tuple[str, ptxas.Usage | None]]:
    """Name, and usage if it was compiled, of every kernel lowered, in order."""

    def number(path):
      return int(path.name.removesuffix(_MODULE).rpartition("_")[2])

    kernels = []
    for path in sorted(folder.glob("*" + _MODULE), key=number):
      base, module = path.name.removesuffix(_MODULE), path.read_text()
      key = hashlib.sha256(module.replace(base, "").encode()).hexdigest()
      kernels.append((base.rpartition("_")[0], key))
      if (folder / f"{base}.ptxas").exists():
        self._seen[key] = self._parse(folder, base, module)
    # Which of several equal kernels has the report depends on threads.
    return [(name, self._seen.get(key)) for name, key in kernels]

  def _parse(self, folder, base, module) -> ptxas.Usage:
    resources = folder / f"{base}.resources.txt"
    usage = ptxas.parse(
      (folder / f"{base}.ptxas").read_text(),
      (folder / f"{base}.ptx").read_text(),
      module,
      resources.read_text() if resources.exists() else "",
    )
    found = turns.sums_out_of_turn((folder / (base + _LAID_OUT)).read_text())
    return dataclasses.replace(usage, out_of_turn=found)


class Compiler:
  """Compiler of cases for the device of a sharding."""

  def __init__(self, sharding: jax.sharding.Sharding, reader: Reader):
    self._sharding = sharding
    self._reader = reader

  def compile(self, case: Case) -> list[KernelReport]:
    """Compiles a case; reports of its kernels in the order of launch."""
    arguments = jax.tree.map(self._place, tuple(case.shapes))
    start = time.perf_counter()
    with dumps() as folder, target.use("compile"):
      # A new function: the target is no part of the key of jax.jit's cache.
      lowered = jax.jit(lambda *args: case.function(*args)).lower(*arguments)
      lowered.compile()
      seconds = time.perf_counter() - start
      usages = self._reader.read(folder)
    moved = kernel_bytes(lowered.compiler_ir("stablehlo"))
    if not usages:
      raise ValueError("no kernel was compiled")
    if len(moved) != len(usages):
      raise ValueError(
        f"{len(moved)} kernel launches, {len(usages)} kernels lowered"
      )
    reports = []
    for (kernel, usage), size in zip(usages, moved, strict=True):
      if usage is None:
        raise ValueError(f"ptxas left no report of {kernel}")
      reports.append(
        KernelReport(
          case=case.name,
          kernel=kernel,
          usage=usage,
          limits=dict(case.limits),
          bytes_per_token_head=size / case.token_heads,
          compile_seconds=seconds,
        )
      )
    return reports

  def _place(self, shape: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
      shape.shape, shape.dtype, sharding=self._sharding
    )
