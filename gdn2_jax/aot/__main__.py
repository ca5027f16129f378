r"""Compiles kernels and the training step for an H100, without a GPU.

  make aot
  make aot ARGS='--only=scan --notrain_step'
  make aot ARGS=--nokernels
  make aot ARGS='--implementation=xla --json=aot.json'

Prints the resources of every kernel, launches and bytes of a decoding step, and
memory and communication of the 1.3B hybrid's training step on one and on eight
H100s. Exits with code 1 if a kernel
spills registers, if ptxas serialises its wgmma, if it needs more shared memory
than a CTA has, if it exceeds its own budget, if a decoding step copies states
or exceeds its own, or if the training step exceeds 80 GB. On one H100 that step
also has limits for products, bytes moved, launches and memory
(`step_budget.ONE_DEVICE`), and a table of costs by part of the model.

Bytes per token-head count every operand and result of a kernel once; operands
that several CTAs read from HBM cost more.
"""

import dataclasses
import importlib
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from gdn2_jax import cli
from gdn2_jax.aot import cases as cases_lib
from gdn2_jax.aot import topology, triton
from gdn2_jax.aot.kernels import (
  KernelReport,
  Reader,
  compile_case,
  kernel_figures,
  kernel_table,
)

_CONFIG = "gdn2_jax.configs.gdn2_swa_1p3b"
_DECODED = "gdn2_jax.configs.gdn2_1p3b"
_TRITON_TARGETS = (80, 89, 120)


def define_flags() -> None:
  """Defines the flags; not on import, where they would clash with others."""
  flags.DEFINE_string(
    "only", "", "Compile only the kernels whose case name contains this."
  )
  flags.DEFINE_bool("kernels", True, "Compile the kernels one by one.")
  flags.DEFINE_string("json", None, "JSON file to write all figures to.")
  flags.DEFINE_bool(
    "decode_step", True, "Compile the decoding step; about two minutes."
  )
  flags.DEFINE_bool(
    "train_step", True, "Compile the training step; about 20 minutes."
  )
  flags.DEFINE_enum(
    "implementation",
    "mosaic_gpu",
    ["mosaic_gpu", "xla"],
    "Implementation of the GDN-2 op in the training step.",
  )


def compile_kernels(
  only: str, reader: Reader
) -> tuple[list[KernelReport], list[str]]:
  """Compiles and prints the cases; returns reports and failures."""
  found, absent, failures = cases_lib.find_cases(only)
  if absent:
    print(f"not compiled, not there: {', '.join(absent)}")
  if not found:
    what = f"has {only!r} in its name" if only else "is there"
    print(f"no kernel {what}")
    return [], failures
  sharding, reports = topology.h100_sharding(), []
  for case in found:
    try:
      done = compile_case(case, sharding, reader)
    except Exception as e:  # one broken kernel must not hide the others
      failures.append(f"{case.name}: {type(e).__name__}: {_first_line(e)}")
      continue
    reports += done
    failures += [failure for report in done for failure in report.failures]
  print(kernel_table(reports, jax.__version__))
  for report in reports:
    for note in report.usage.notes:
      print(f"note: {report.case} ({report.kernel}): {note}")
  return reports, failures


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [""]
  return lines[0][:300]


def compile_triton(only: str) -> tuple[list[dict[str, Any]], list[str]]:
  """Compiles and prints the Triton kernels where triton is installed."""
  if importlib.util.find_spec("triton") is None:
    print("triton kernels: not compiled: triton is not installed")
    return [], []
  rows = triton.compile_all(_TRITON_TARGETS)
  rows = [row for row in rows if only in str(row.get("kernel", ""))]
  failures = []
  for row in rows:
    print("triton: " + ", ".join(f"{k} {x}" for k, x in row.items() if x != []))
    failures += row.get("failures", [])
  return rows, failures


def compile_steps(
  implementation: str, reader: Reader
) -> tuple[list[Any], list[str]]:
  """Compiles and prints the training step on every mesh."""
  from gdn2_jax.aot.programs import train_step

  reports, failures = [], []
  for name in train_step.MESHES:
    config = importlib.import_module(_CONFIG).get_config()
    config.model.gdn2.implementation = implementation
    report = train_step.compile_train_step(config, name, reader)
    print(train_step.step_lines(report, implementation), flush=True)
    reports.append(report)
    failures += report.failures
  return reports, failures


def compile_decoding() -> tuple[list[Any], list[str]]:
  """Compiles and prints the decoding step for few and for many rows."""
  from gdn2_jax.aot.programs import decode_step

  reports, failures = [], []
  for rows in decode_step.BATCHES:
    config = importlib.import_module(_DECODED).get_config().model
    config.gdn2.implementation = "mosaic_gpu"
    sharding = topology.h100_sharding()
    report = decode_step.compile_decode_step(config, rows, sharding)
    print(decode_step.decode_lines(report), flush=True)
    reports.append(report)
    failures += report.failures
  return reports, failures


def main(argv: Sequence[str]) -> None:
  """Compiles what the flags select, prints it, and judges it."""
  cli.refuse_positional(argv, "--only=scan")
  missing = topology.missing_tool()
  if missing:
    cli.fail(missing)
  jax.config.update("jax_platforms", "cpu")
  start, reader = time.perf_counter(), Reader()
  with cli.one_line_errors(NotImplementedError):
    kernels, triton_rows, decoding, steps, failures = [], [], [], [], []
    if flags.FLAGS.kernels:
      kernels, failures = compile_kernels(flags.FLAGS.only, reader)
      triton_rows, more = compile_triton(flags.FLAGS.only)
      failures += more
    if flags.FLAGS.decode_step and not flags.FLAGS.only:
      decoding, more = compile_decoding()
      failures += more
    if flags.FLAGS.train_step and not flags.FLAGS.only:
      steps, more = compile_steps(flags.FLAGS.implementation, reader)
      failures += more
    if flags.FLAGS.json:
      figures = {
        "jax": jax.__version__,
        "kernels": [kernel_figures(report) for report in kernels],
        "triton": triton_rows,
        "decode_step": [dataclasses.asdict(report) for report in decoding],
        "train_step": [
          {
            "implementation": flags.FLAGS.implementation,
            "total": report.total,
            **dataclasses.asdict(report),
          }
          for report in steps
        ],
        "failures": failures,
      }
      pathlib.Path(flags.FLAGS.json).write_text(
        json.dumps(figures, indent=2, default=str) + "\n"
      )
  for failure in failures:
    print(f"FAILED {failure}", file=sys.stderr)
  seconds = time.perf_counter() - start
  print(
    f"{len(kernels)} kernels, {len(steps)} training steps compiled for an "
    f"H100 by jax {jax.__version__} in {seconds:.0f} s, "
    f"{len(failures)} failures"
  )
  if failures:
    sys.exit(1)


if __name__ == "__main__":
  define_flags()
  cli.run(main, __doc__)
