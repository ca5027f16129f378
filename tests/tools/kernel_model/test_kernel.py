"""Specifications, and figures of a kernel per chunk-head."""

import dataclasses
import tomllib

import pytest

from tests.tools.kernel_model.listing import ARRIVE, WAIT, line, listing
from tools.kernel_model import assumptions
from tools.kernel_model.branches import UndecidedBranch
from tools.kernel_model.kernel import Binary, Spec, load_specs, model

# Ten cycles before the loop, 8 + 10 in each turn.
WALK = listing(
  line("NOP", 10),
  ".L_x_0",
  line("FADD R0, R1, R2", 8),
  "@P0 BRA `(.L_x_0)",
  "EXIT",
)
SPEC = Spec(
  name="walk",
  branches=("loop chunks",),
  warpgroups=1,
  chunks=(2, 5),
  rounds=32,
)


def test_a_walk_counts_one_chunk_without_start_and_end():
  figures = model(SPEC, Binary(listing=WALK))
  assert figures.cycles == {"low": 18, "mid": 18, "high": 18}
  assert figures.issue == 2 and figures.busy["FMA"] == 1
  assert figures.opcodes == [{"NOP": 0, "FADD": 1, "BRA": 1, "EXIT": 0}]
  assert figures.code_bytes == 4 * 16
  assert figures.floor_ms is None
  assert figures.ms["mid"] == pytest.approx(32 * 18 / 1.755e9 * 1e3)


def test_a_kernel_of_one_chunk_runs_in_waves():
  one = dataclasses.replace(
    SPEC, branches=("loop 3",), chunks=None, rounds=None
  )
  figures = model(one, Binary(listing=WALK))
  assert figures.cycles["mid"] == 10 + 3 * 18 + 1
  # 4,096 chunk-heads on 132 SMs are 32 waves, two at a time 16.
  assert figures.ms["mid"] == pytest.approx(32 * 65 / 1.755e9 * 1e3)
  two = model(one, Binary(listing=WALK), ctas=2)
  assert two.ms["mid"] == pytest.approx(16 * two.cycles["mid"] / 1.755e9 * 1e3)
  assert two.issue == figures.issue


def test_a_time_is_at_least_the_floor():
  binary = Binary(listing=WALK, bytes_per_token_head=3000)
  figures = model(SPEC, binary)
  floor = 3000 * 8 * 2048 * 16 / 3.0e12 * 1e3
  assert figures.floor_ms == pytest.approx(floor)
  assert set(figures.ms.values()) == {figures.floor_ms}


def test_the_threads_of_the_kernel_have_to_fit():
  with pytest.raises(ValueError, match=r"walk: warpgroups = 1.* 512 threads"):
    model(SPEC, Binary(listing=WALK, threads=512))
  model(SPEC, Binary(listing=WALK, threads=128))


def test_ctas_that_walk_are_alone():
  with pytest.raises(ValueError, match="ctas: 2, expected"):
    model(SPEC, Binary(listing=WALK), ctas=2)


def test_an_undecided_branch_names_the_kernel():
  spec = dataclasses.replace(SPEC, branches=())
  with pytest.raises(UndecidedBranch, match="walk: branch 0 has no rule"):
    model(spec, Binary(listing=WALK))


def test_eight_warpgroups_meet_or_are_said_not_to():
  binary = Binary(listing=listing(ARRIVE, WAIT, "EXIT"), threads=1024)
  spec = Spec(name="met", branches=(), warpgroups=8)
  apart = dataclasses.replace(spec, meetings=False)
  mid = assumptions.LEVELS["mid"]
  # The last arrives at 7; eight waits and eight ends are issued.
  assert model(spec, binary).cycles["mid"] == 7 + mid.sync + 16
  assert model(apart, binary).cycles["mid"] == 24


def write_specs(path, **table):
  lines = [f"{key} = {value}" for key, value in table.items()]
  path.write_text("\n".join(["[scan]", *lines]))
  return path


def test_specs_are_read_with_their_defaults(tmp_path):
  path = write_specs(tmp_path / "specs.toml", branches='["loop chunks"]')
  (spec,) = load_specs(path).values()
  assert spec == Spec(name="scan", branches=("loop chunks",))
  assert spec.warpgroups == 2 and spec.waits_for_loads and spec.meetings


@pytest.mark.parametrize(
  "table, match",
  [
    ({"warpgroups": 2}, "'scan': no branches"),
    ({"branches": [], "waits": "true"}, r"unknown keys \['waits'\]"),
    ({"branches": [], "warpgroups": 9}, "warpgroups = 9, expected 1 to 8"),
    ({"branches": [], "chunks": [4]}, r"chunks = \[4\], expected two"),
    ({"branches": [], "chunks": [4, 4]}, r"chunks = \[4, 4\], expected two"),
  ],
)
def test_wrong_specs_are_refused(table, match, tmp_path):
  with pytest.raises(ValueError, match=match):
    load_specs(write_specs(tmp_path / "specs.toml", **table))


def test_every_spec_is_a_case_that_is_compiled():
  from gdn2_jax.aot.cases import find_cases

  cases, _, failures = find_cases()
  assert not failures
  assert set(load_specs()) <= {case.name for case in cases}


def test_tables_are_toml_with_rules_only():
  from tools.kernel_model import branches, kernel

  for name, table in tomllib.loads(kernel.SPECS.read_text()).items():
    for rule in table["branches"]:
      assert branches.is_taken(rule, 0, 0, 8) in (True, False), (name, rule)
