"""Hook of MkDocs: tables from benchmarks/results, made when the site is built.

A line `<!-- table: NAME -->` of a page is replaced by the table of that name: a
page cannot show other figures than the records.
"""

import functools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"
MARKER = re.compile(r"^<!-- table: (\S+) -->$", re.MULTILINE)
LENGTHS = (256, 1024, 4096, 16384, 131072)


def read(name: str) -> dict[str, Any]:
  """One record of benchmarks/results."""
  return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Markdown table; columns after the first are aligned to the right."""
  lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(value: float | None) -> str:
  """Three digits, or a dash where nothing was timed."""
  if value is None:
    return "-"
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(tokens: int) -> str:
  """Length in tokens, in units of 1,024 from there on."""
  return f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)


def op() -> str:
  """Times and memory of the op on one CPU core."""
  rows = read("op_cpu_epyc")["rows"]
  return table(
    (
      "shape",
      "implementation",
      "forward, ms",
      "and backward, ms",
      "temporaries, bytes per token-head",
      "error",
    ),
    [
      (
        row["spec"],
        f'`"{row["implementation"]}"`',
        number(row["forward_ms"]),
        number(row.get("both_ms")),
        number(row.get("both_temp_bytes_per_token_head")),
        f"{row['error']:.0e}",
      )
      for row in rows
    ],
  )


def step() -> str:
  """One token of the op beside a copy of its states; every run is a column."""
  runs = read("decode_cpu_epyc")["runs"]
  rows = [
    (str(batch), *(f"{100 * run['fraction_of_copy'][i]:.0f}%" for run in runs))
    for i, batch in enumerate(runs[0]["B"])
  ]
  return table(("rows", *(f"run {i + 1}" for i in range(len(runs)))), rows)


def serve(section: str, batch: int, key: str) -> str:
  """One number of `make bench-serve`, models against lengths."""
  found: dict[str, dict[int, float | None]] = {}
  for row in read("serve_cpu_epyc")["rows"]:
    if (row["section"], row["batch"]) == (section, batch):
      found.setdefault(row["model"], {})[row["length"]] = row.get(key)
  lengths = [n for n in LENGTHS if any(found[model].get(n) for model in found)]
  rows = [
    (model, *(number(values.get(n)) for n in lengths))
    for model, values in found.items()
  ]
  return table(("tokens", *map(size, lengths)), rows)


def kernels(*names: str) -> str:
  """Modelled times of kernels, all if no names are given, in ms."""
  rows = read("kernels_modelled")["rows"]
  return table(
    ("modelled, not measured", "low", "mid", "high", "floor"),
    [
      (row["name"], *(f"{row[k]:.2f}" for k in _TIMES))
      for row in rows
      if not names or row["name"] in names
    ],
  )


_TIMES = ("ms_low", "ms_mid", "ms_high", "floor_ms")
TABLES = {
  "op": op,
  "step": step,
  "decode_1": functools.partial(serve, "decode", 1, "ms"),
  "decode_8": functools.partial(serve, "decode", 8, "ms"),
  "prefill": functools.partial(serve, "prefill", 1, "tokens_per_s"),
  "kernels": kernels,
  "passes": functools.partial(
    kernels,
    "forward",
    "forward and backward",
    "forward, gates",
    "forward and backward, gates",
    "forward, 1 x 16384",
  ),
}


def fill(markdown: str) -> str:
  """Replaces every marker; KeyError if there is no table of that name."""
  return MARKER.sub(lambda match: TABLES[match[1]](), markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
  """Fills in the tables of a page."""
  return fill(markdown)
