"""Mean scores of tasks and lengths, as JSON values and as tables."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from scipy import stats

from gdn2_jax.eval.ruler.evaluate import SCORES, Plan, key_of
from gdn2_jax.eval.ruler.tasks import TASKS

_TITLES = {
  "generated": "generated: answers that contain the value, %",
  "forced": "forced: values that are the most probable, token by token, %",
  "gain": "gain: nats that the value gains from its needle",
}


def summarize(rows: Iterable[dict[str, Any]], plan: Plan) -> list[dict]:
  """Means and 95% intervals of each cell of a plan, in its order.

  Intervals of shares are Wilson's, those of gains Student's t.
  """
  wanted = {
    key_of(task, length, index): (task, length)
    for task, length in plan.cells()
    for index in range(plan.samples)
  }
  values: dict[tuple[str, int], dict[str, list[float]]] = {
    cell: {name: [] for name in ("fill", *plan.scores)} for cell in plan.cells()
  }
  for row in rows:
    if cell := wanted.get(row["key"]):
      for name, found in values[cell].items():
        found.append(float(row[name]))
  return [
    {
      "task": task,
      "length": length,
      "samples": len(found["fill"]),
      "fill": _mean(found["fill"]),
      **{name: _interval(name, found[name]) for name in plan.scores},
    }
    for (task, length), found in values.items()
  ]


def _mean(x: list[float]) -> float | None:
  return sum(x) / len(x) if x else None


def _interval(name: str, x: list[float]) -> dict[str, float] | None:
  if not x:
    return None
  mean = sum(x) / len(x)
  if name != "gain":
    ends = stats.binomtest(round(sum(x)), len(x)).proportion_ci(method="wilson")
    return {"mean": mean, "low": float(ends.low), "high": float(ends.high)}
  if len(x) == 1:
    return {"mean": mean}
  spread = math.sqrt(sum((v - mean) ** 2 for v in x) / (len(x) - 1))
  half = float(stats.t.ppf(0.975, len(x) - 1)) * spread / math.sqrt(len(x))
  return {"mean": mean, "low": mean - half, "high": mean + half}


def format_tables(results: Sequence[dict], plan: Plan) -> str:
  """One table of tasks and lengths for each score, with 95% intervals."""
  tables = []
  for name in SCORES:
    if name in plan.scores:
      tables.append(_table(_TITLES[name], results, plan, _cell_of(name)))
  tables.append(
    _table(
      "fill: prompt and 128 tokens of answer, % of the length",
      results,
      plan,
      lambda r: "-" if r["fill"] is None else f"{100 * r['fill']:.0f}",
    )
  )
  return "\n\n".join(tables)


def _cell_of(name):
  factor, digits = (1, 2) if name == "gain" else (100, 1)

  def cell(result):
    found = result[name]
    if found is None:
      return "-"
    text = f"{factor * found['mean']:z.{digits}f}"
    if "low" in found:
      low, high = factor * found["low"], factor * found["high"]
      text += f" [{low:z.{digits}f}, {high:z.{digits}f}]"
    return text

  return cell


def _table(title: str, results, plan: Plan, cell) -> str:
  cells = {(r["task"], r["length"]): cell(r) for r in results}
  lines = [["", *(str(length) for length in plan.lengths)]]
  for task in plan.tasks:
    lines.append(
      [TASKS[task].label, *(cells[task, length] for length in plan.lengths)]
    )
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    [title]
    + [
      "  ".join(
        text.ljust(width) if i == 0 else text.rjust(width)
        for i, (text, width) in enumerate(zip(line, widths, strict=True))
      ).rstrip()
      for line in lines
    ]
  )
