"""Table of recall results."""

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any


def format_report(
  rows: Iterable[Mapping[str, Any]], skipped: Mapping[str, int]
) -> str:
  """Formats shares of right answers by task, in percent.

  Args:
    rows: rows of `run`.
    skipped: examples left out, by task; its order is that of the table.

  Returns:
    Lines with the score, the examples, those left out, and the share of
    prompts that hold an answer, above which no score comes by recall alone.
    The mean over tasks is given if all tasks of the paper's table are there.
  """
  by_task = {name: [] for name in skipped}
  for row in rows:
    by_task[row["task"]].append(row)
  columns = ("contains", "examples", "left out", "answer in prompt")
  lines = [" " * 10 + "".join(f"{name:>18}" for name in columns)]
  scores = []
  for name, found in by_task.items():
    if not found:
      continue
    scores.append(100 * fmean(row["contains"] for row in found))
    in_prompt = 100 * fmean(row["has_answer"] for row in found)
    cells = (
      f"{scores[-1]:.2f}",
      f"{len(found):,}",
      f"{skipped[name]:,}",
      f"{in_prompt:.1f}%",
    )
    lines.append(f"{name:10}" + "".join(f"{cell:>18}" for cell in cells))
  if len(scores) == 6:
    lines.append(f"{'mean':10}{fmean(scores):>18.2f}")
  return "\n".join(lines)
