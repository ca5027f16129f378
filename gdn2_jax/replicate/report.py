"""Report of a replication as Markdown: claims.md and table.md."""

import pathlib
from typing import Any

import numpy as np

from gdn2_jax.files import write_atomically
from gdn2_jax.replicate.claims import Claim, Result, evaluate
from gdn2_jax.replicate.plan import Budget
from gdn2_jax.replicate.plots import plot_capacity, plot_curves
from gdn2_jax.replicate.rates import is_at_edge
from gdn2_jax.replicate.summary import (
  SOLVED,
  CellSummary,
  scores_of,
  summarize,
)

NOTE = """\
These are small models on synthetic tasks. The effects that the paper reports
are those of 1.3B parameters trained on 100B tokens: a claim that fails or stays
undecided here is no evidence against them, and one that holds is weak evidence
for them."""


def write_report(
  folder: pathlib.Path, budget: Budget, rows: list[dict[str, Any]]
) -> list[str]:
  """Writes claims.md, table.md, curves.png and capacity.png.

  Args:
    folder: Folder to write to.
    budget: Plan that the rows belong to.
    rows: Rows of results; those of other plans are not used.

  Returns:
    The verdicts, one line per claim.

  Raises:
    ValueError: No row belongs to the budget.
  """
  cells = summarize(budget, rows)
  if not any(c.curve or c.rows for c in cells):
    raise ValueError(
      f"rows: none of {len(rows)} rows belongs to this budget; run it first"
    )
  found = evaluate(scores_of(cells))
  write_atomically(folder / "claims.md", claims_text(found).encode())
  table = table_text(cells, budget) + language_text(rows)
  write_atomically(folder / "table.md", table.encode())
  plot_curves(folder / "curves.png", cells)
  plot_capacity(folder / "capacity.png", cells)
  return [f"{claim.name} {says}: {claim.text}" for claim, says, _ in found]


def claims_text(found: list[tuple[Claim, str, list[Result]]]) -> str:
  """claims.md: verdict of every claim, and the tests behind it."""
  lines = ["# Claims", "", NOTE, ""]
  lines += [
    "Differences of final accuracy, paired by seed, with 95% intervals "
    "(bootstrap over seeds; Student's t below six). p is adjusted for all "
    "tests of this page (Holm). *Smallest* is the true difference that so many "
    "seeds with this spread find in 80% of cases.",
    "",
  ]
  for claim, says, results in found:
    lines += [f"## {claim.name}: {says}", "", claim.text, ""]
    lines += _table(
      ["test", "difference [95% CI]", "n", "p", "smallest", "verdict"],
      [_result_cells(result) for result in results],
    )
  return "\n".join(lines)


def _result_cells(result: Result) -> list[str]:
  d = result.difference
  if d is None:
    return [str(result.test), "", "", "", "", result.verdict]
  p = result.adjusted_p
  return [
    str(result.test),
    f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]",
    str(d.n),
    "" if np.isnan(p) else f"{p:.2g}",
    f"{d.smallest:.3f}",
    result.verdict,
  ]


def table_text(cells: list[CellSummary], budget: Budget) -> str:
  """table.md: accuracy by mixer and task, kinds of errors, learning rates."""
  lines = ["# Results by mixer", "", NOTE, ""]
  for task in dict.fromkeys(c.cell.task for c in cells):
    own = [c for c in cells if c.cell.task == task]
    lines += [f"## {own[0].cell.task_name}", "", f"`{task}`", ""]
    lines += _accuracy(own, budget)
    lines += _rates(own)
  return "\n".join(lines)


def language_text(rows: list[dict[str, Any]]) -> str:
  """Part of table.md on language models; "" if there are none."""
  body = []
  for row in rows:
    if row.get("suite") != "language":
      continue
    loss = row["metrics"]["model"]["1x"]
    text = f"{loss['nats_per_token']:.4f}", f"{loss['bits_per_byte']:.4f}"
    body.append([row["config"], row["mixer"], str(row["seed"]), *text])
  if not body:
    return ""
  head = ["config", "mixer", "seed", "nats per token", "bits per byte"]
  lines = ["## Language models", "", "Held-out loss.", ""]
  return "\n".join(["", *lines, *_table(head, sorted(body))])


def _accuracy(cells: list[CellSummary], budget: Budget) -> list[str]:
  groups = cells[0].cell.task.groups
  groups = groups if len(groups) > 1 else ()
  head = ["mixer", "n", "mean", "sd", "median", f"share > {SOLVED}", *groups]
  head += ["stale", "neighbour", "none", "parameters", "state floats"]
  head += ["us per step", "CPU s per run"]
  body = []
  for c in cells:
    n = f"{len(c.rows)} of {budget.seeds}"
    if not c.rows:
      body.append([c.cell.mixer, n, *[""] * (len(head) - 2)])
      continue
    scores = c.scores()
    spread = f"{scores.std(ddof=1):.3f}" if len(scores) > 1 else ""
    row = [c.cell.mixer, n, f"{scores.mean():.3f}", spread]
    row += [f"{np.median(scores):.3f}", f"{(scores > SOLVED).mean():.2f}"]
    row += [f"{c.scores(group).mean():.3f}" for group in groups]
    row += [f"{c.share(kind):.3f}" for kind in ("stale", "neighbour", "none")]
    row += [str(c.rows[0]["params"]), str(c.rows[0]["state_floats"])]
    row += [f"{c.mean_of('latency_us'):.0f}", f"{c.mean_of('cpu_s'):.1f}"]
    body.append(row)
  lines = _table(head, body)
  return lines


def _rates(cells: list[CellSummary]) -> list[str]:
  """Accuracy on the tuning seeds by learning rate, the chosen one in bold."""
  rates = sorted({lr for c in cells for lr in c.curve})
  if not rates:
    return []
  body = []
  for c in cells:
    marks = []
    for lr in rates:
      text = f"{c.curve[lr]:.3f}" if lr in c.curve else ""
      marks.append(f"**{text}**" if lr == c.lr else text)
    edge = c.lr is not None and is_at_edge(c.curve, c.lr)
    body.append([c.cell.mixer, *marks, "yes" if edge else ""])
  head = ["tuning", *(f"{lr:g}" for lr in rates), "best at an edge"]
  return _table(head, body)


def _table(head: list[str], body: list[list[str]]) -> list[str]:
  """Lines of a Markdown table, and an empty line."""
  rows = [head, ["---"] * len(head), *body]
  return ["| " + " | ".join(row) + " |" for row in rows] + [""]
