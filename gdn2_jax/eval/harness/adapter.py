"""A model of this package as a model of lm-eval."""

from collections.abc import Callable, Sequence
from typing import Any

import tqdm

from gdn2_jax.eval.harness.answers import (
  continuations,
  document_loglikelihoods,
  loglikelihoods,
)
from gdn2_jax.eval.scoring import BATCH_SIZE
from gdn2_jax.interop.folder import Model


class Requests:
  """The three methods that lm-eval calls, with its Instances or the like.

  Args:
    model: with a tokenizer.
    batch_size: rows at a time.
  """

  def __init__(self, model: Model, *, batch_size: int = BATCH_SIZE):
    self._model = model
    self._batch_size = batch_size

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """(ln p of the continuation, is it greedy) of each request."""
    return self._answer(loglikelihoods, [r.args for r in requests])

  def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
    """ln p of each document, with the state carried through it."""
    return self._answer(document_loglikelihoods, [r.args[0] for r in requests])

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """Greedy continuation of each request."""
    return self._answer(continuations, [r.args for r in requests])

  def _answer(self, function: Callable[..., list], items: list) -> list:
    with tqdm.tqdm(
      total=len(items),
      unit="request",
      desc=function.__name__,
      disable=None,  # without a terminal
    ) as bar:
      return function(
        self._model, items, batch_size=self._batch_size, on_done=bar.update
      )


def as_lm(model: Model, *, batch_size: int = BATCH_SIZE) -> Any:
  """Makes an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=...)`.

  Args:
    model: with a tokenizer.
    batch_size: rows at a time.
  """
  # Here, so that this package can be imported without the extra "eval".
  from lm_eval.api.model import LM

  class HarnessModel(Requests, LM):
    def __init__(self):
      LM.__init__(self)
      Requests.__init__(self, model, batch_size=batch_size)

  return HarnessModel()
