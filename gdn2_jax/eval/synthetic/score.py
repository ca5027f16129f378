"""Scores of a model's answers: accuracy by group, and kinds of errors."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gdn2_jax.eval.synthetic.answers import KINDS, kinds_of_answers
from gdn2_jax.eval.synthetic.mqar import Mqar
from gdn2_jax.eval.synthetic.steps import NO_LABEL, Example
from gdn2_jax.eval.synthetic.tasks import Task


def score(
  logits: Float[Array, "B L VOCAB"], example: Example, task: Task
) -> dict[str, Any]:
  """Scores the answers to all queries.

  Args:
    logits: Predictions of the last L steps, which hold every query.
    example: Sequences, in either format.
    task: Their distribution.

  Returns:
    acc and loss (nats); acc_by_group, by the task's names of groups; kinds,
    the share of all answers of each kind (`gdn2_jax.eval.synthetic.answers`),
    for tasks of steps.
  """
  L = logits.shape[1]
  labels, groups = example.labels[:, -L:], example.groups[:, -L:]
  asked = labels != NO_LABEL
  answers = logits.argmax(-1)
  right = (answers == labels) & asked
  loss = optax.softmax_cross_entropy_with_integer_labels(
    logits, jnp.where(asked, labels, 0)
  )
  result = {
    "acc": _share(right, asked),
    "loss": jnp.where(asked, loss, 0.0).sum() / asked.sum(),
    "acc_by_group": {
      name: _share(right, asked & (groups == i))
      for i, name in enumerate(task.groups)
    },
  }
  if not isinstance(task, Mqar):
    kinds = kinds_of_answers(*_in_steps(example, answers))
    result["kinds"] = {k: kinds[k].sum() / asked.sum() for k in KINDS}
  return result


def _share(part, whole):
  """Share of `whole` that is in `part`; nan if there is none."""
  return (part & whole).sum() / whole.sum()


def _in_steps(example, answers):
  """Examples of (key, value) steps with an answer to each step."""
  missing = example.labels.shape[1] - answers.shape[1]
  answers = jnp.pad(answers, ((0, 0), (missing, 0)), constant_values=NO_LABEL)
  if example.tokens.ndim == 3:
    return example, answers
  batch, length = example.tokens.shape
  steps = Example(
    example.tokens.reshape(batch, length // 2, 2),
    example.labels[:, 1::2],
    example.groups[:, 1::2],
  )
  return steps, answers[:, 1::2]
