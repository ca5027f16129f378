"""The command: listings, refusals, and --check against a record."""

import importlib.util
import json
import shutil

import pytest

from tests.tools.kernel_model.listing import BRANCH, LOAD, line, listing
from tools.kernel_model import __main__ as command
from tools.kernel_model import disassembly
from tools.kernel_model.kernel import Binary

CODE = listing(line("FADD R0, R1, R2", 8), "EXIT")
BRANCHED = listing(BRANCH, LOAD, ".L_x_1", "EXIT")
SPECS = """
[intra]
branches = []

["intra, A given"]
branches = []
"""


@pytest.fixture
def specs(tmp_path):
  path = tmp_path / "specs.toml"
  path.write_text(SPECS)
  return path


def run(*argv):
  return command.run(command.parse_arguments(list(map(str, argv))))


def test_a_listing_is_modelled(specs, tmp_path, capsys):
  path, figures = tmp_path / "new_intra_A_given.hex", tmp_path / "figures.json"
  disassembly.save(Binary(listing=CODE, registers=40, threads=256), path)
  flags = ("--details", "--json", figures)
  assert run("--hex", path, "--specs", specs, *flags) == 0
  out = capsys.readouterr().out
  assert "| new_intra_A_given |" in out
  assert "warpgroup 1, opcodes (2): FADD 1, EXIT 1" in out
  assert "modelled, not measured; +-25%" in out
  (row,) = json.loads(figures.read_text())["rows"]
  # Two warps issue at 0 and 1; the second ends at 9.
  assert row["cycles"]["mid"] == 10 and row["registers"] == 40


def test_latencies_are_replaced(specs, tmp_path, capsys):
  path, figures = tmp_path / "intra.hex", tmp_path / "figures.json"
  parts = "BAR.SYNC.DEFER_BLOCKING R2, 0x80", "EXIT"
  path.write_text(listing(*parts))
  flags = ("--hex", path, "--specs", specs, "--json", figures)
  run(*flags, "--set", "bar=100", "sync=1")
  (row,) = json.loads(figures.read_text())["rows"]
  assert row["cycles"] == dict.fromkeys(("low", "mid", "high"), 102)


def test_an_undecided_branch_fails(specs, tmp_path, capsys):
  path = tmp_path / "intra.hex"
  path.write_text(BRANCHED)
  assert run("--hex", path, "--specs", specs) == 1
  error = capsys.readouterr().err
  assert "error: intra: branch 0 has no rule" in error
  assert "skips 1 instructions, 1 UTMALDG" in error


@pytest.mark.parametrize(
  "flags, match",
  [
    (["--spec", "scan"], "--spec: 'scan', expected one of"),
    (["--set", "bar"], "--set: 'bar', expected NAME=CYCLES"),
    (["--set", "x=1"], "--set: 'x=1', expected NAME=CYCLES"),
    (["--only", "scan"], "--only: scan, excludes --hex"),
    (["--ctas", "0"], "ctas: 0, expected at least 1"),
    (["--check"], "--check: excludes --hex"),
  ],
)
def test_wrong_flags_are_refused(flags, match, specs, tmp_path):
  path = tmp_path / "intra.hex"
  path.write_text(CODE)
  with pytest.raises(ValueError, match=match):
    run("--hex", path, "--specs", specs, *flags)


def test_a_file_name_without_a_spec_is_refused(specs, tmp_path):
  path = tmp_path / "step.hex"
  path.write_text(CODE)
  with pytest.raises(ValueError, match=r"step\.hex: its name ends in none of"):
    run("--hex", path, "--specs", specs)
  with pytest.raises(ValueError, match=r"--bytes: 3\.0, needs --hex"):
    run("--bytes", "3")


@pytest.fixture
def compiled(specs, tmp_path, monkeypatch):
  """Stands in for the compiler; returns the path of the record."""
  path = tmp_path / "record.json"
  binary = Binary(listing=CODE, bytes_per_token_head=100.0, threads=256)
  monkeypatch.setattr(command, "RECORD", path)
  monkeypatch.setattr(command, "SPECS", specs)
  monkeypatch.setattr(disassembly, "find_nvdisasm", lambda given: "nvdisasm")
  monkeypatch.setattr(disassembly, "versions", lambda tool: {"jax": "1"})
  monkeypatch.setattr(
    disassembly,
    "compile_cases",
    lambda names, tool: (binary for _ in names),
  )
  return path


def test_check_passes_on_its_own_record(compiled, specs, capsys):
  assert run("--specs", specs) == 0
  assert "2 kernels modelled" in capsys.readouterr().out
  assert run("--specs", specs, "--check") == 0
  assert "note" not in capsys.readouterr().out


def test_check_fails_where_kernels_are_slower(compiled, specs, capsys):
  run("--specs", specs)
  record = json.loads(compiled.read_text())
  for row in record["rows"]:
    row["cycles"]["mid"] *= 0.9
  record["jax"] = "0"
  compiled.write_text(json.dumps(record))
  before = compiled.read_text()
  assert run("--specs", specs, "--check") == 1
  out, error = capsys.readouterr()
  assert [x.split(":")[0] for x in error.splitlines()] == [
    "FAILED intra",
    "FAILED intra, A given",
  ]
  assert "note: jax 1, recorded with 0" in out
  assert compiled.read_text() == before


def test_a_selection_is_not_recorded(compiled, specs):
  assert run("--specs", specs, "--only", "A given") == 0
  assert not compiled.exists()
  with pytest.raises(ValueError, match="--only: 'xyz', expected part of"):
    run("--specs", specs, "--only", "xyz")


def test_listings_are_kept(compiled, specs, tmp_path):
  run("--specs", specs, "--keep", tmp_path / "sass")
  kept = disassembly.load(tmp_path / "sass" / "intra_A_given.hex")
  assert kept.listing == CODE and kept.bytes_per_token_head == 100


def test_a_missing_nvdisasm_is_named_with_the_way_to_get_it(monkeypatch):
  monkeypatch.setattr(shutil, "which", lambda name: None)
  monkeypatch.setattr(disassembly.os, "access", lambda path, mode: False)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install .*nvidia-cuda-nvdisasm"):
    disassembly.find_nvdisasm()
  with pytest.raises(ValueError, match="--nvdisasm: '/x', expected"):
    disassembly.find_nvdisasm("/x")


def test_a_tool_that_fails_is_named_with_its_last_line(tmp_path):
  tool = tmp_path / "ptxas"
  tool.write_text("#!/bin/sh\necho one >&2\necho bad input >&2\nexit 3\n")
  tool.chmod(0o755)
  with pytest.raises(ValueError, match=r"^ptxas: bad input$"):
    disassembly.disassemble("", str(tool), "nvdisasm")
