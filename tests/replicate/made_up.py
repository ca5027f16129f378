"""Rows as runs write them, with scores that a test decides."""

from gdn2_jax.eval.synthetic.rows import row_of
from gdn2_jax.eval.synthetic.train import Outcome

FACTS = {
  "params": 1000,
  "mlp_dim": 16,
  "state_floats": 400,
  "state_bytes": 1600,
  "latency_us": 20.0,
  "length": 8,
  "device": "1 x cpu",
  "jax": "0",
  "git": None,
}


def made_up_row(cell, seed, lr, acc, role="report"):
  """A row of a cell with accuracy `acc` in every group."""
  metrics = {
    "acc": acc,
    "loss": 1.0,
    "acc_by_group": dict.fromkeys(cell.task.groups, acc),
    "kinds": {
      "right": acc,
      "stale": 1 - acc,
      "neighbour": 0.0,
      "none": 0.0,
      "other": 0.0,
    },
  }
  if cell.task_name == "recall":
    metrics["acc_by_pairs"] = {str(cell.task.pairs): acc}
  curve = [[4, 2.0, acc / 2], [8, 1.0, acc]]
  outcome = Outcome(seed, lr, metrics, curve, 1.0, 2.0, 0.5)
  return row_of(cell, outcome, role, FACTS)
