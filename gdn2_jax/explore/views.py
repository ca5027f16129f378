"""Arrays that the explorer draws for one head, place and change."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from gdn2_jax.analysis.gates import effective_memory, half_life
from gdn2_jax.analysis.memory import effective_rank, state_norm, states
from gdn2_jax.explore.changes import Change
from gdn2_jax.explore.reads import contributions, read_coefficients
from gdn2_jax.explore.runs import Head, Place, Runner
from gdn2_jax.explore.text import Text

CANDIDATES = 10
# Texts of similar lengths share a program; later tokens change nothing.
_LENGTH_STEP = 32

View = dict[str, np.ndarray]


@dataclasses.dataclass
class Study:
  """A model that reads a text, head by head, with changed gates or not.

  Attributes:
    runner: the model.
    text: the text.
    rows: runs of the model at a time.
  """

  runner: Runner
  text: Text
  rows: int = 8

  def __post_init__(self):
    self._before: dict[Place, Head] = {}
    self._log_p: Float[np.ndarray, "T VOCAB"] | None = None

  def views(
    self, wanted: Iterable[tuple[Place, Change]]
  ) -> Iterator[tuple[Place, Change, View]]:
    """The arrays of every place and change, in order, as they are ready.

    Returns:
      Triples with a dict of float32 arrays, rounded to three digits, for T
      tokens:

        half_life   [K, T] tokens, ln 2 / -g; inf where g is 0
        erase       [K, T] b
        write       [V, T] w
        span        [K] half-life over the text, of the mean of g
        norm, rank  [T] Frobenius norm and effective rank of S
        reads       [T, T] signed a_ts |w_s * v_s|, see `contributions`
        kl          [T] KL(before || after) of the next token, nats
        words       [T, 10] the likeliest ids, before or after (int32)
        before, after  [T, 10] their probabilities
        key_channels, value_channels  [K], [V] indices of the rows (int32)

      Key channels are sorted by half-life over the text without change, value
      channels by their mean write gate; the last row is the largest.
    """
    for batch in _batches(wanted, self.rows):
      new = [p for p, _ in batch if p not in self._before]
      for part in _batches(dict.fromkeys(new), self.rows):
        for place, log_p, head in self._run([(p, Change()) for p in part]):
          self._before[place] = head
          if self._log_p is None:  # without change, all places give the same
            self._log_p = log_p
      heads, views = [], []
      for (place, change), (_, log_q, head) in zip(
        batch, self._run(batch), strict=True
      ):
        if change == Change():
          log_q = self._log_p  # rounding may differ between rows
        gates = _gates(head, self._before[place])
        views.append(gates | _next(self._log_p, log_q))
        heads.append(head)
      traces = _states(heads, self.rows)
      for (place, change), view, trace in zip(
        batch, views, traces, strict=True
      ):
        view |= {"norm": state_norm(trace), "rank": effective_rank(trace)}
        yield place, change, {name: _short(x) for name, x in view.items()}

  def _run(self, batch):
    """(place, log-probabilities [T, VOCAB], head) of each row."""
    # Repeated rows fill the batch up: one program for all batches.
    fill = [batch[-1]] * (self.rows - len(batch))
    T = len(self.text.ids)
    tokens = np.pad(self.text.ids, (0, -T % _LENGTH_STEP))
    places, changes = zip(*batch, *fill, strict=True)
    logits, heads = self.runner.run(tokens, places, changes)
    for (place, _), row, head in zip(batch, logits, heads, strict=False):
      row = np.asarray(row[:T], np.float64)
      row -= row.max(-1, keepdims=True)
      row -= np.log(np.exp(row).sum(-1, keepdims=True))
      yield place, row, head.first(T)


def _gates(head: Head, before: Head) -> View:
  """Gates by sorted channel, and what each token reads."""
  keys = np.argsort(_span(before.g), kind="stable")
  values = np.argsort(before.w.mean(0), kind="stable")
  a = read_coefficients(head.q, head.k, head.g, head.b)
  return {
    "half_life": half_life(head.g).T[keys],
    "erase": head.b.T[keys],
    "write": head.w.T[values],
    "span": _span(head.g)[keys],
    "reads": contributions(a, head.v, head.w),
    "key_channels": keys,
    "value_channels": values,
  }


def _span(g):
  return effective_memory(g[None, :, None])[0]


def _next(log_p, log_q) -> View:
  """Next-token distributions before and after, of the likeliest tokens."""
  p = np.exp(log_p)
  # 0 (log 0 - x) = 0, which rounding down to p = 0 may give.
  kl = np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
  most = np.maximum(log_p, log_q)
  n = min(CANDIDATES, most.shape[-1])
  words = np.argpartition(-most, n - 1, axis=-1)[:, :n]
  rank = np.argsort(-np.take_along_axis(most, words, -1), kind="stable")
  words = np.take_along_axis(words, rank, -1)
  chosen = [np.exp(np.take_along_axis(x, words, -1)) for x in (log_p, log_q)]
  # Rounding may give a negative zero.
  kl = np.maximum(kl, 0.0)
  return {"kl": kl, "words": words, "before": chosen[0], "after": chosen[1]}


def _states(heads: Sequence[Head], rows: int):
  """States [T, K, V] of each head after every token."""
  filled = [*heads, *[heads[-1]] * (rows - len(heads))]
  arrays = (
    np.stack([getattr(h, n) for h in filled])[:, :, None] for n in "qkvgbw"
  )
  trace = states(*arrays)[:, :, 0]
  return np.moveaxis(trace, 1, 0)[: len(heads)]


def _short(x) -> np.ndarray:
  """Integers as int32; others as float32 of 9 significant bits.

  The low bits are 0, which a page's compression removes.
  """
  x = np.asarray(x)
  if np.issubdtype(x.dtype, np.integer):
    return np.ascontiguousarray(x, np.int32)
  bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
  return ((bits + np.uint32(0x4000)) & np.uint32(0xFFFF8000)).view(np.float32)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
  items = list(items)
  for i in range(math.ceil(len(items) / size)):
    yield items[i * size : (i + 1) * size]
