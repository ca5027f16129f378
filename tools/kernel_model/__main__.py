r"""Models the time of the kernels on an H100, from their machine code.

  make model
  make model ARGS=--check
  make model ARGS='--only=intra --keep=build/sass'
  python -m tools.kernel_model --hex=build/sass/intra.hex --set bar=1 gmma=0

Compiles the kernels of specs.toml for an H100 without one, follows every
warpgroup through the machine code, simulates one scheduler, and prints a table;
without a selection it is also written to benchmarks/results/. These are times
of a model, within about 25%, and nothing was measured: see README.md here.

Exit code 1: bad input, a branch without a rule in specs.toml, or with --check a
kernel that is slower than recorded.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time

from tools.kernel_model import assumptions, disassembly, table
from tools.kernel_model.branches import UndecidedBranch
from tools.kernel_model.kernel import SPECS, Figures, Spec, load_specs, model

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "results" / "kernels_modelled.json"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
  """Flags of the command."""
  parser = argparse.ArgumentParser(
    prog="python -m tools.kernel_model",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--only", help="part of a name, of the kernels to model")
  add(
    "--hex",
    nargs="+",
    type=pathlib.Path,
    help="listings of --keep or of nvdisasm -hex -c: nothing is compiled",
  )
  add("--spec", help="table of specs.toml for --hex; default: by file name")
  add("--specs", type=pathlib.Path, default=SPECS, help="another specs.toml")
  add("--bytes", type=float, help="bytes per token-head of --hex")
  add("--keep", type=pathlib.Path, help="folder for listings")
  add("--nvdisasm", default="", help="path of nvdisasm")
  add("--ctas", type=int, default=1, help="CTAs on an SM at a time")
  add(
    "--set",
    nargs="+",
    default=[],
    metavar="NAME=CYCLES",
    help=f"latencies: {', '.join(assumptions.LATENCY_NAMES)}",
  )
  add(
    "--details",
    action="store_true",
    help="executed instructions and reasons for waits of every warpgroup",
  )
  add(
    "--check",
    action="store_true",
    help=f"compare with the file in benchmarks/results: fail if a kernel takes "
    f"{table.MAX_SLOWER * 100:.0f} percent more cycles",
  )
  add("--json", type=pathlib.Path, help="file for all figures")
  return parser.parse_args(argv)


def latencies_with(changes: list[str]) -> dict[str, assumptions.Latencies]:
  """Levels of assumptions with NAME=CYCLES replaced in each."""
  values = {}
  for change in changes:
    name, _, cycles = change.partition("=")
    try:
      values[name] = float(cycles)
    except ValueError:
      name = None
    if name not in assumptions.LATENCY_NAMES:
      raise ValueError(
        f"--set: {change!r}, expected NAME=CYCLES with one of "
        f"{assumptions.LATENCY_NAMES}"
      )
  return {
    level: dataclasses.replace(x, **values)
    for level, x in assumptions.LEVELS.items()
  }


def spec_of(
  path: pathlib.Path, name: str | None, specs: dict[str, Spec]
) -> Spec:
  """Specification for a listing: by name, or by what its file name ends in."""
  if name is not None:
    if name not in specs:
      raise ValueError(f"--spec: {name!r}, expected one of {sorted(specs)}")
    return specs[name]
  fits = {
    disassembly.stem_of(s): spec
    for s, spec in specs.items()
    if path.stem == disassembly.stem_of(s)
    or path.stem.endswith("_" + disassembly.stem_of(s))
  }
  if not fits:
    raise ValueError(
      f"--hex: {path}: its name ends in none of {sorted(specs)}; give --spec"
    )
  return fits[max(fits, key=len)]


def print_details(figures: Figures) -> None:
  """Prints instructions and waits of every warpgroup, per chunk-head."""
  print(f"{figures.name}:")
  busy = ", ".join(f"{pipe} {x:,.0f}" for pipe, x in figures.busy.items())
  print(f"  issue slots {figures.issue:,.0f}; busy: {busy}")
  for n, (opcodes, waits) in enumerate(
    zip(figures.opcodes, figures.waits, strict=True)
  ):
    for what, counts, most in ("opcodes", opcodes, 12), ("waits", waits, 6):
      top = sorted(counts.items(), key=lambda item: -item[1])[:most]
      text = ", ".join(f"{key} {x:,.0f}" for key, x in top if x >= 1)
      print(f"  warpgroup {n}, {what} ({sum(counts.values()):,.0f}): {text}")


def select(specs: dict[str, Spec], only: str | None) -> dict[str, Spec]:
  """Specifications with `only` in their names."""
  chosen = {name: spec for name, spec in specs.items() if (only or "") in name}
  if not chosen:
    raise ValueError(f"--only: {only!r}, expected part of {sorted(specs)}")
  return chosen


def read_listing(path: pathlib.Path, a: argparse.Namespace, specs):
  """Specification and kernel of a listing; variants keep their file names."""
  spec, binary = spec_of(path, a.spec, specs), disassembly.load(path)
  if path.stem != disassembly.stem_of(spec.name):
    spec = dataclasses.replace(spec, name=path.stem)
  if a.bytes is not None:
    binary = dataclasses.replace(binary, bytes_per_token_head=a.bytes)
  return spec, binary


def binaries(a: argparse.Namespace, specs: dict[str, Spec]):
  """Specification and kernel of everything selected, and versions of tools."""
  if a.hex:
    return [read_listing(path, a, specs) for path in a.hex], {}
  chosen = select(specs, a.only)
  nvdisasm = disassembly.find_nvdisasm(a.nvdisasm)
  versions = disassembly.versions(nvdisasm)
  compiled = disassembly.compile_cases(list(chosen), nvdisasm)
  return zip(chosen.values(), compiled, strict=True), versions


def is_changed(a: argparse.Namespace) -> bool:
  """True if other figures are asked for than those that are recorded."""
  return bool(a.hex or a.set or a.ctas != 1 or a.specs != SPECS)


def refuse_contradictions(a: argparse.Namespace) -> None:
  """Raises ValueError for flags that exclude each other."""
  for name in ("only", "keep") if a.hex else ("spec", "bytes"):
    if getattr(a, name) is not None:
      what = "excludes" if a.hex else "needs"
      raise ValueError(f"--{name}: {getattr(a, name)}, {what} --hex")
  if a.check and is_changed(a):
    raise ValueError("--check: excludes --hex, --set, --ctas and --specs")


def model_all(a: argparse.Namespace):
  """Rows of the kernels selected, undecided branches, versions of programs."""
  levels, specs = latencies_with(a.set), load_specs(a.specs)
  selected, versions = binaries(a, specs)
  rows, undecided = [], []
  for spec, binary in selected:
    if a.keep:
      stem = disassembly.stem_of(spec.name)
      disassembly.save(binary, a.keep / f"{stem}.hex")
    try:
      figures = model(spec, binary, levels=levels, ctas=a.ctas)
    except UndecidedBranch as e:
      undecided.append(str(e))
      continue
    if a.details:
      print_details(figures)
    rows.append(table.row_of(figures))
  return rows, undecided, versions


def run(a: argparse.Namespace) -> int:
  """Models what the flags select; the exit code."""
  start = time.perf_counter()
  refuse_contradictions(a)
  record = table.load_record(RECORD) if a.check else None
  rows, undecided, versions = model_all(a)
  failures = []
  if rows:
    print(table.markdown(rows))
    print(f"modelled, not measured; +-{assumptions.BAND:.0%}")
  if record:
    failures = table.slower(rows, record, complete=not (a.only or undecided))
    for note in table.notes_on(rows, versions, record):
      print(f"note: {note}")
  elif a.json or not (is_changed(a) or a.only or undecided):
    path = a.json or RECORD
    text = json.dumps(table.record_of(rows, versions), indent=2)
    path.write_text(text + "\n")
    print(f"written: {path}")
  for message in undecided:
    print(f"error: {message}", file=sys.stderr)
  for failure in failures:
    print(f"FAILED {failure}", file=sys.stderr)
  seconds = time.perf_counter() - start
  count = len(undecided) + len(failures)
  print(f"{len(rows)} kernels modelled in {seconds:.0f} s, {count} failures")
  return 1 if count else 0


def main() -> None:
  """Entry point."""
  a = parse_arguments()
  try:
    sys.exit(run(a))
  except (ValueError, OSError) as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  main()
