"""Evaluation at the end of a run, as rows of a model card."""

import math
import os
import pathlib
from typing import Any

from gdn2_jax.interop.disk import read_json


def card_facts(workdir: str | os.PathLike, step: int) -> dict[str, str]:
  """Held-out losses of the model and its baselines, from eval.json.

  Args:
    workdir: directory of a run.
    step: step of the checkpoint that is published.

  Returns:
    Rows such as {"held-out loss 1x": "2.61 nats per token, ..."}; {} if the run
    has not been evaluated at this step.

  Raises:
    ValueError: eval.json is not what a run writes.
  """
  path = pathlib.Path(workdir) / "eval.json"
  if not path.exists():
    return {}
  tree = read_json(path)
  if tree.get("step") != step:
    return {}
  rows = {}
  try:
    for name, report in tree["model"].items():
      rows[f"held-out loss {name}"] = _numbers(report) + (
        f" ({report['tokens']:,} tokens in rows of {report['seq_len']:,})"
      )
    for name, report in tree["baselines"].items():
      rows[f"for comparison: {name}"] = _numbers(report)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise ValueError(f"{path}: expected the evaluation of a run: {e!r}") from e
  return rows


def _numbers(report: dict[str, Any]) -> str:
  nats, bits = report["nats_per_token"], report["bits_per_byte"]
  if not (math.isfinite(nats) and math.isfinite(bits)):
    return "not finite"
  return f"{nats:.4f} nats per token, {bits:.4f} bits per byte"
