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
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
from jax.experimental.mosaic.gpu import constraints
from jax.extend.mlir import ir

from gdn2_jax.aot import ptxas, turns
from gdn2_jax.aot.cases import Case
from gdn2_jax.kernels import target

_DUMP = "MOSAIC_GPU_DUMP_TO"
_MODULE = ".before_layout_inference.txt"
_LAID_OUT = ".after_layout_inference.txt"
_HEAD = (
  *("case", "kernel", "jax", "registers", "spills", "threads"),
  *("shared KB", "CTAs/SM", "B/token-head", "seconds"),
)
# Mosaic GPU tries to disassemble what it dumps; toolkits often lack nvdisasm.
_NOISE = re.compile(r"nvdisasm|Source Location Trace|mosaic/gpu/dump\.cc|^\s*$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelReport:
  """One kernel of one case."""

  case: str
  kernel: str
  usage: ptxas.Usage
  limits: dict[str, int]
  bytes_per_token_head: float  # of operands and results, each counted once
  compile_seconds: float  # of the whole case, lowering included

  @property
  def failures(self) -> list[str]:
    """Failed checks, one sentence each."""
    label = f"{self.case} ({self.kernel})"
    return [f"{label}: {e}" for e in ptxas.judge(self.usage, self.limits)]


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


def kernel_bytes(module: ir.Module) -> list[int]:
  """Bytes of operands and results of each Mosaic GPU call."""
  found = []

  def visit(op):
    if op.name == "stablehlo.custom_call" and "mosaic_gpu" in str(
      op.attributes["call_target_name"]
    ):
      values = [*op.operands, *op.results]
      found.append(sum(_type_bytes(x.type) for x in values))
    return ir.WalkResult.ADVANCE

  module.operation.walk(visit, ir.WalkOrder.PRE_ORDER)
  return found


def _type_bytes(type_):
  tensor = ir.RankedTensorType(type_)
  return math.prod(tensor.shape) * -(-tensor.element_type.width // 8)


@contextlib.contextmanager
def dumps() -> Iterator[pathlib.Path]:
  """Folder that Mosaic GPU dumps to inside the with block."""
  # Of a kernel with many lines, JAX takes minutes to print the constraints of
  # layout inference, which nobody reads here and no option leaves out.
  brief = mock.patch.object(
    constraints.ConstraintSystem, "__str__", lambda _: "not printed\n"
  )
  with tempfile.TemporaryDirectory() as folder, without_noise(), brief:
    os.environ[_DUMP] = folder
    try:
      yield pathlib.Path(folder)
    finally:
      del os.environ[_DUMP]


class Reader:
  """Reader of dumps; keeps reports, because JAX compiles equal kernels once."""

  def __init__(self):
    self._seen: dict[str, ptxas.Usage] = {}

  def read(self, folder: pathlib.Path) -> list[tuple[str, ptxas.Usage | None]]:
    """Name and usage of every lowered kernel, None if it was not compiled."""

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


def compile_case(
  case: Case, sharding: jax.sharding.Sharding, reader: Reader
) -> list[KernelReport]:
  """Compiles a case; reports of its kernels in the order of launch."""
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    tuple(case.shapes),
  )
  start = time.perf_counter()
  with dumps() as folder, target.use("compile"):
    # A new function: the target is no part of the key of jax.jit's cache.
    lowered = jax.jit(lambda *args: case.function(*args)).lower(*arguments)
    lowered.compile()
    seconds = time.perf_counter() - start
    usages = reader.read(folder)
  moved = kernel_bytes(lowered.compiler_ir("stablehlo"))
  if not usages:
    raise ValueError("no kernel was compiled")
  if len(moved) != len(usages):
    raise ValueError(
      f"{len(moved)} kernel launches, {len(usages)} kernels lowered"
    )
  missing = [kernel for kernel, usage in usages if usage is None]
  if missing:
    raise ValueError(f"ptxas left no report of {', '.join(missing)}")
  return [
    KernelReport(
      case=case.name,
      kernel=kernel,
      usage=usage,
      limits=dict(case.limits),
      bytes_per_token_head=size / case.token_heads,
      compile_seconds=seconds,
    )
    for (kernel, usage), size in zip(usages, moved, strict=True)
  ]


def kernel_figures(report: KernelReport) -> dict[str, Any]:
  """A report as one flat dict of JSON values."""
  figures = {
    "case": report.case,
    "kernel": report.kernel,
    "ctas_per_sm": report.usage.ctas_per_sm,
    "bytes_per_token_head": report.bytes_per_token_head,
    "compile_seconds": round(report.compile_seconds, 2),
  }
  return {**figures, **dataclasses.asdict(report.usage)}


def kernel_table(reports: Sequence[KernelReport], version: str) -> str:
  """One row per kernel, as a Markdown table; KB are 1024 bytes."""
  rows = [_HEAD]
  for report in reports:
    usage = report.usage
    rows.append(
      (
        report.case,
        report.kernel,
        version,
        str(usage.registers),
        str(usage.spill_stores + usage.spill_loads),
        str(usage.threads),
        f"{usage.shared_bytes / 1024:.1f}",
        str(usage.ctas_per_sm),
        f"{report.bytes_per_token_head:,.0f}",
        f"{report.compile_seconds:.1f}",
      )
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  rows.insert(1, tuple("-" * width for width in widths))
  # Names to the left, figures to the right.
  forms = [f"{'<' if i < 3 else '>'}{width}" for i, width in enumerate(widths)]
  return "\n".join(f"| {' | '.join(map(format, row, forms))} |" for row in rows)
