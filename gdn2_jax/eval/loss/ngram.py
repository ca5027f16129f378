"""Unigram and bigram baselines on the targets that the model is scored on.

The unigram is the loss of token frequencies alone, the bigram that of one token
of context. Both are normalised distributions over the whole vocabulary, fitted
on the training tokens. NumPy only.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Integer

from gdn2_jax.eval.loss.report import LossReport, make_report
from gdn2_jax.eval.loss.targets import validation_batches


class Unigram:
  """Add-one smoothing, p(w) = (c(w) + 1) / (N + VOCAB)."""

  def __init__(self, targets: Integer[np.ndarray, " N"], vocab_size: int):
    _check_ids("targets", targets, vocab_size)
    counts = np.bincount(targets, minlength=vocab_size)
    self.probabilities = (counts + 1.0) / (len(targets) + vocab_size)

  def nll(
    self,
    contexts: Integer[np.ndarray, " N"],
    targets: Integer[np.ndarray, " N"],
  ) -> Float[np.ndarray, " N"]:
    """Returns -ln p(target), [N] float64."""
    del contexts
    return -np.log(self.probabilities[targets])


class Bigram:
  """Interpolated Kneser-Ney with three discounts (Chen and Goodman, 1999).

  p(w | u) = (c(u, w) - D(c(u, w))) / c(u) + lambda(u) p1(w), where p1 counts
  the distinct contexts of w instead of its occurrences, is discounted in the
  same way, and falls back to 1 / VOCAB. An unseen u gives p1.
  """

  def __init__(
    self,
    contexts: Integer[np.ndarray, " N"],
    targets: Integer[np.ndarray, " M"],  # M != N is refused below
    vocab_size: int,
  ):
    _check_ids("contexts", contexts, vocab_size)
    _check_ids("targets", targets, vocab_size)
    if len(contexts) != len(targets):
      raise ValueError(
        f"contexts: expected as many as targets ({len(targets)}), got "
        f"{len(contexts)}"
      )
    self.vocab_size = vocab_size
    keys, counts = np.unique(
      _pair_keys(contexts, targets, vocab_size), return_counts=True
    )
    u, w = np.divmod(keys, vocab_size)

    distinct_contexts = np.bincount(w, minlength=vocab_size)
    self._lower = _discounted(distinct_contexts)
    # The discounted mass is spread evenly; all of it if nothing was counted.
    self._lower += (1.0 - self._lower.sum()) / vocab_size

    discounts = _discounts(counts)[np.minimum(counts, 3)]
    context_counts = np.bincount(u, weights=counts, minlength=vocab_size)
    freed = np.bincount(u, weights=discounts, minlength=vocab_size)
    seen = context_counts > 0
    self._backoff = np.ones(vocab_size)
    self._backoff[seen] = freed[seen] / context_counts[seen]
    self._keys = keys
    self._seen = (counts - discounts) / context_counts[u]

  def probability(
    self,
    contexts: Integer[np.ndarray, " N"],
    targets: Integer[np.ndarray, " N"],
  ) -> Float[np.ndarray, " N"]:
    """Returns p(target | context), [N] float64."""
    p = self._backoff[contexts] * self._lower[targets]
    if len(self._keys):
      wanted = _pair_keys(contexts, targets, self.vocab_size)
      at = np.searchsorted(self._keys, wanted)
      at = np.minimum(at, len(self._keys) - 1)
      p += np.where(self._keys[at] == wanted, self._seen[at], 0.0)
    return p

  def nll(
    self,
    contexts: Integer[np.ndarray, " N"],
    targets: Integer[np.ndarray, " N"],
  ) -> Float[np.ndarray, " N"]:
    """Returns -ln p(target | context), [N] float64."""
    return -np.log(self.probability(contexts, targets))


def training_pairs(
  tokens: Integer[np.ndarray, " N"], eos_id: int
) -> tuple[Integer[np.ndarray, " P"], Integer[np.ndarray, " P"]]:
  """Returns the (context, target) pairs that lie inside one document."""
  # A pair that starts with eos_id has loss_mask 0 for the model, too.
  contexts = np.asarray(tokens[:-1], np.int64)
  targets = np.asarray(tokens[1:], np.int64)
  inside = contexts != eos_id
  return contexts[inside], targets[inside]


def ngram_baselines(
  dataset,
  *,
  seq_len: int,
  batch_size: int = 64,
  rows: int | None = None,
  on_batch: Callable[[], object] | None = None,
) -> list[LossReport]:
  """Fits both baselines and scores the first `rows` validation rows."""
  vocab_size = dataset.tokenizer.vocab_size
  contexts, targets = training_pairs(
    dataset.train_tokens(), dataset.tokenizer.eos_id
  )
  predictors = {
    "unigram": Unigram(targets, vocab_size),
    "bigram (Kneser-Ney)": Bigram(contexts, targets, vocab_size),
  }
  nats = dict.fromkeys(predictors, 0.0)
  tokens = 0
  batches = validation_batches(
    dataset,
    seq_len=seq_len,
    batch_size=batch_size,
    tokens=None if rows is None else rows * seq_len,
  )
  for batch in batches:
    scored = batch["loss_mask"] > 0
    contexts = batch["inputs"][scored].astype(np.int64)
    targets = batch["targets"][scored].astype(np.int64)
    tokens += len(targets)
    for name, predictor in predictors.items():
      nats[name] += float(predictor.nll(contexts, targets).sum())
    if on_batch is not None:
      on_batch()
  return [
    make_report(
      name,
      nats=nats[name],
      tokens=tokens,
      seq_len=seq_len,
      bytes_per_token=dataset.validation_bytes_per_token,
    )
    for name in predictors
  ]


def _pair_keys(contexts, targets, vocab_size: int):
  """Encodes each pair as one int64; sorts by context, then by target."""
  return np.asarray(contexts, np.int64) * vocab_size + targets


def _discounted(counts):
  """Discounted frequencies (c - D(c)) / sum c; zeros if sum c is 0."""
  if not counts.sum():
    return np.zeros(len(counts))
  kept = counts - _discounts(counts[counts > 0])[np.minimum(counts, 3)]
  return kept / counts.sum()


def _discounts(counts):
  """Returns the discounts [0, D1, D2, D3+].

  D_r = r - (r + 1) Y n_{r+1} / n_r with Y = n_1 / (n_1 + 2 n_2) and n_r the
  number of counts that are r. Values outside (0, r), which very short text
  gives, become r / 2.
  """
  n = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
  y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.0
  discounts = np.zeros(4)
  for r in (1, 2, 3):
    d = r - (r + 1) * y * n[r + 1] / n[r] if n[r] else r / 2
    discounts[r] = d if 0 < d < r else r / 2
  return discounts


def _check_ids(name: str, ids: np.ndarray, vocab_size: int) -> None:
  if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
    raise ValueError(
      f"{name}: expected ids in [0, {vocab_size}), got "
      f"[{ids.min()}, {ids.max()}]"
    )
