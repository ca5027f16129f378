"""Results of lm-eval as rows of JSON values."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any


def make_row(evaluated: Mapping[str, Any]) -> dict[str, Any]:
  """One row from the result of `lm_eval.simple_evaluate`, samples included.

  Returns:
    {"results": [...]} with an entry per task (or group), metric and filter:
    "task", "metric", "filter", "value", "stderr" (None if lm-eval has none),
    "n" (examples), "shots", "version" and "hash" (of the documents, prompts
    and targets, as lm-eval computes its task_hashes). A value that is not
    finite is None: JSON has no word for it.
  """
  results = []
  found = evaluated["results"] | evaluated.get("groups", {})
  for task, metrics in found.items():
    for name, value in metrics.items():
      metric, comma, filtered = name.partition(",")
      if not comma or metric.endswith("_stderr"):
        continue
      count = evaluated["n-samples"].get(task)
      results.append(
        {
          "task": task,
          "metric": metric,
          "filter": filtered,
          "value": _finite(value),
          "stderr": _finite(metrics.get(f"{metric}_stderr,{filtered}")),
          "n": count and count["effective"],
          "shots": evaluated["n-shot"].get(task),
          "version": evaluated["versions"].get(task),
          "hash": _task_hash(evaluated["samples"].get(task, ())),
        }
      )
  return {"results": results}


def _finite(value: Any) -> float | None:
  if not isinstance(value, int | float) or not math.isfinite(value):
    return None
  return float(value)


def _task_hash(samples: Sequence[Mapping[str, str]]) -> str:
  """SHA-256 over the examples of a task; "" for a group."""
  if not samples:
    return ""
  text = "".join(
    s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples
  )
  return hashlib.sha256(text.encode()).hexdigest()


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
  """Formats rows as a table: value and standard error by task and metric."""
  lines = [
    f"{'task':24}{'metric':18}{'filter':12}{'value':>12}{'stderr':>9}{'n':>9}"
  ]
  for row in rows:
    for r in row["results"]:
      value = "not finite" if r["value"] is None else f"{r['value']:#.6g}"
      stderr = "" if r["stderr"] is None else f"{r['stderr']:.4f}"
      count = "" if r["n"] is None else f"{r['n']:,}"
      lines.append(
        f"{r['task']:24}{r['metric']:18}{r['filter']:12}{value:>12}"
        f"{stderr:>9}{count:>9}"
      )
  return "\n".join(lines)
