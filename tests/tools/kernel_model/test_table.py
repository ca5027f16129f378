"""Sums, the printed table, and the comparison with a record."""

import copy
import json

import pytest

from tools.kernel_model import table
from tools.kernel_model.__main__ import RECORD
from tools.kernel_model.kernel import Binary, Figures, load_specs

LEVELS = ("low", "mid", "high")


def row(name, cycles=1000.0, ms=0.5, floor=0.25):
  figures = Figures(
    name=name,
    ms=dict(zip(LEVELS, (ms, 2 * ms, 4 * ms), strict=True)),
    floor_ms=floor,
    cycles=dict(zip(LEVELS, (cycles - 1, cycles, cycles + 1), strict=True)),
    issue=500,
    busy={"ALU": 400, "FMA": 0, "XU": 8, "MIO": 4, "tensor": 32},
    code_bytes=16,
    opcodes=[],
    waits=[],
    binary=Binary(listing="", registers=128, spills=0, shared_bytes=1024),
  )
  return table.row_of(figures)


FORWARD = [row("intra"), row("scan", ms=0.125, floor=None)]
ALL = [
  row(name, ms=2.0**-n)
  for n, name in enumerate(
    (
      *("intra", "intra, A given", "scan", "scan, states saved"),
      *("scan_grad", "intra_grad", "section transitions", "section ends"),
      *("section chain", "scan T=16384, sections"),
    )
  )
]


def test_sums_add_the_kernels_of_a_pass():
  forward, both, long = table.sums_of(ALL)
  assert forward["name"] == "forward"
  assert forward["ms_low"] == 1 + 1 / 4
  assert forward["ms_high"] == 4 * forward["ms_low"]
  assert forward["floor_ms"] == 0.5
  assert both["ms_mid"] == 2 * (1 + 1 / 8 + 1 / 2 + 1 / 16 + 1 / 32)
  assert both["floor_ms"] == 5 * 0.25
  assert long["name"] == "forward, 1 x 16384"
  parts = 1 + 2.0**-6 + 2.0**-7 + 2.0**-8 + 2.0**-9
  assert long["ms_low"] == pytest.approx(parts, abs=3e-4)  # four digits each


def test_passes_with_gates_add_kernels_with_gates():
  for name in ("forward", "forward and backward"):
    plain, gates = (table.SUMS[name + more] for more in ("", ", gates"))
    assert plain == tuple(x.replace(", gates", "") for x in gates)
    # The gradient of the output does not pass through a gate.
    assert [x for x in gates if "gates" not in x] in ([], ["scan_grad"])


def test_a_sum_needs_all_its_kernels_and_floors():
  assert table.sums_of(ALL[:2]) == []
  assert table.sums_of(FORWARD) == []


def test_the_table_shows_kernels_and_sums():
  lines = table.markdown(ALL).splitlines()
  assert len({len(x) for x in lines}) == 1
  assert len(lines) == 2 + len(ALL) + 3
  cells = [x.strip() for x in lines[2].split("|")[1:-1]]
  assert cells[:3] == ["intra", "0.5k", "0.4k"]
  assert cells[-3:] == ["1.0/1.0/1.0", "1.00/2.00/4.00", "0.250"]
  assert lines[2 + len(ALL)].split("|")[1].strip() == "forward"
  unknown = table.markdown([row("scan", floor=None)]).splitlines()[2]
  assert unknown.rstrip(" |").endswith("?")


def record(rows=ALL):
  return table.record_of(rows, {"jax": "1"})


def test_a_record_says_that_it_is_modelled():
  made = json.loads(json.dumps(record()))
  assert made["what"].startswith("modelled, not measured")
  assert "25%" in made["band"] and made["jax"] == "1" and made["date"]
  assert set(made["assumptions"]["latencies"]) == set(LEVELS)
  sums = [name for name in table.SUMS if "gates" not in name]
  assert [x["name"] for x in made["rows"]][-3:] == sums


def test_equal_kernels_pass_and_slower_ones_are_listed():
  assert table.slower(ALL, record()) == []
  doctored = copy.deepcopy(record())
  doctored["rows"][0]["cycles"]["mid"] = 940.0
  doctored["rows"][1]["cycles"]["mid"] = 960.0  # 4.2%
  doctored["rows"][2]["cycles"]["mid"] = 500.0
  assert table.slower(ALL, doctored) == [
    "intra: 1,000 cycles per chunk-head, recorded 940 (+6.4%, at most +5%)",
    "scan: 1,000 cycles per chunk-head, recorded 500 (+100.0%, at most +5%)",
  ]


def test_missing_and_new_kernels_fail():
  few, many = ALL[1:], [*ALL, row("step")]
  assert table.slower(few, record()) == [
    "intra: recorded, but not modelled now"
  ]
  assert table.slower(few, record(), complete=False) == []
  assert table.slower(many, record()) == ["step: not recorded"]


def test_a_record_of_other_assumptions_fails():
  doctored = copy.deepcopy(record())
  doctored["assumptions"]["latencies"]["mid"]["lds"] = 1
  (failure,) = table.slower(ALL, doctored)
  assert "other assumptions" in failure


def test_faster_kernels_and_other_versions_are_noted():
  doctored = copy.deepcopy(record())
  doctored["rows"][3]["cycles"]["mid"] = 2000.0
  notes = table.notes_on(ALL, {"jax": "2"}, doctored)
  assert notes[0] == "jax 2, recorded with 1"
  assert notes[1].startswith("scan, states saved: -50.0%")
  assert len(notes) == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": 3}'])
def test_what_is_no_record_is_refused(text, tmp_path):
  path = tmp_path / "record.json"
  path.write_text(text)
  with pytest.raises(ValueError, match=r"record\.json: .* `make model`"):
    table.load_record(path)


def test_the_committed_record_is_of_all_specs_and_of_these_assumptions():
  committed = table.load_record(RECORD)
  rows = [x for x in committed["rows"] if "cycles" in x]
  assert [x["name"] for x in rows] == list(load_specs())
  assert committed["what"] == table.WHAT
  assert table.slower(rows, committed) == []
  assert committed["rows"][len(rows) :] == table.sums_of(rows)


def test_sums_of_fla_follow_from_its_rows():
  fla = table.record_of(ALL, {})["fla"]
  parts = {x["name"]: x["ms"] for x in fla["rows"]}
  names = list(parts)
  backward = names[names.index("fwd_o") + 1 :]
  forward = [name for name in names if name not in backward]
  sums = {x["name"]: x for x in fla["sums"]}
  for name, of in ("forward", forward), ("backward", backward):
    low = sum(parts[x][0] for x in of)
    assert sums[name]["ms_low"] - 0.05 < low < sums[name]["ms_high"], name
