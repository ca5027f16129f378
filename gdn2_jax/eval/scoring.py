"""Log-likelihoods and greedy continuations of batches of token lists.

Sequences are read as at inference: a state is carried through chunks, so that
memory does not grow with the length (but for models with full attention), and
rows of different lengths share a batch without padding that the model sees.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdn2_jax.inference.checks import (
  MAX_POSITION,
  NonFiniteError,
  find_causes,
  require_count,
  require_ids,
)
from gdn2_jax.inference.generate import generate
from gdn2_jax.inference.rows import take
from gdn2_jax.inference.sampling import Sampler
from gdn2_jax.inference.state import (
  CHUNK_SIZE,
  State,
  bucket,
  init_state,
  read,
  read_hidden,
)
from gdn2_jax.interop.folder import Model
from gdn2_jax.model.lm import LM

BATCH_SIZE = 16
_HEAD_TOKENS = 64  # tokens of a row whose logits are in memory at a time


@dataclasses.dataclass(frozen=True)
class Score:
  """Log-likelihood of one continuation after its context.

  Attributes:
    logprob: ln p(continuation | context) in nats, the sum of `token_logprobs`.
    is_greedy: every token is the most probable one after those before it.
    token_logprobs: nats of each token of the continuation.
  """

  logprob: float
  is_greedy: bool
  token_logprobs: tuple[float, ...]


def score(
  model: Model,
  contexts: Sequence[Sequence[int]],
  continuations: Sequence[Sequence[int]],
  *,
  batch_size: int = BATCH_SIZE,
  chunk_size: int = CHUNK_SIZE,
  on_done: Callable[[int], Any] | None = None,
) -> list[Score]:
  """Scores each continuation after the context of the same index.

  A context that occurs several times is read once. The result of a pair does
  not depend on the pairs beside it or on their order, beyond rounding.

  Args:
    model: its tokenizer gives the end of a document, after which a continuation
      with an empty context is scored, and the ids that can be the most
      probable; without one a context cannot be empty.
    contexts: N lists of token ids.
    continuations: N non-empty lists of token ids.
    batch_size: rows per dispatch, >= 1.
    chunk_size: tokens of a row per dispatch, >= 1.
    on_done: called with the number of pairs that were just scored.

  Returns:
    N scores, in the order of the arguments.

  Raises:
    ValueError: numbers of lists that differ, an empty continuation, or an id
      outside the vocabulary.
    NonFiniteError: a probability that is NaN; names the context.
  """
  require_count("batch_size", batch_size)
  require_count("chunk_size", chunk_size)
  contexts = _checked("contexts", contexts, model)
  continuations = _checked("continuations", continuations, model, least=1)
  if len(contexts) != len(continuations):
    raise ValueError(
      f"continuations: expected {len(contexts)}, as many as contexts, got "
      f"{len(continuations)}"
    )
  contexts = [c if c else _start(i, model) for i, c in enumerate(contexts)]
  pairs = collections.defaultdict(list)
  for index, context in enumerate(contexts):
    pairs[context].append(index)
  # Longest first: rows of a batch are alike, and memory runs out at once.
  order = sorted(pairs, key=lambda context: (-len(context), context))
  size = min(batch_size, max(1, len(contexts)))
  lengths = [
    len(a) + len(b) for a, b in zip(contexts, continuations, strict=True)
  ]
  # One capacity for all, where the model needs one: few programs.
  max_length = bucket(max(lengths, default=1), MAX_POSITION)
  scores: list[Any] = [None] * len(contexts)
  for few in _slices(order, size):
    state = init_state(model.config, size, max_length)
    tokens, lengths = _pad([context[:-1] for context in few], size)
    _, state = read(model.params, tokens, lengths, state, chunk_size)
    tails = [
      (row, index)
      for row, context in enumerate(few)
      for index in pairs[context]
    ]
    tails.sort(key=lambda tail: -len(continuations[tail[1]]))
    for some in _slices(tails, size):
      rows = [row for row, _ in some]
      found = _score_tails(
        model,
        take(state, rows + [0] * (size - len(rows))),
        [few[row][-1:] for row in rows],
        [continuations[index] for _, index in some],
        [index for _, index in some],
        chunk_size,
      )
      for (_, index), value in zip(some, found, strict=True):
        scores[index] = value
      if on_done:
        on_done(len(some))
  return scores


def greedy(
  model: Model,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  *,
  stop_strings: Sequence[str] = (),
  stop_ids: Sequence[int] | None = None,
  batch_size: int = BATCH_SIZE,
  on_done: Callable[[int], Any] | None = None,
) -> list[str]:
  """Continues each prompt with the most probable tokens; returns new text.

  Args:
    model: with a tokenizer.
    prompts: N lists of token ids; an empty one starts a document.
    max_new_tokens: tokens per prompt at most, >= 1.
    stop_strings: a text ends before the first of these that it contains.
    stop_ids: tokens that end a text; None is the end of a document.
    batch_size: rows per dispatch, >= 1.
    on_done: called with the number of prompts that were just continued.

  Returns:
    N texts, in the order of the prompts.

  Raises:
    ValueError: no tokenizer, an id outside the vocabulary, a count < 1, or an
      empty stop string.
    NonFiniteError: logits that no token can be chosen from; names the prompt.
  """
  require_count("batch_size", batch_size)
  if model.tokenizer is None:
    raise ValueError("model: has no tokenizer, which greedy text needs")
  if "" in stop_strings:
    raise ValueError("stop_strings: expected non-empty strings, got ''")
  prompts = _checked("prompts", prompts, model)
  eos = model.tokenizer.eos_id
  stop_ids = (eos,) if stop_ids is None else tuple(stop_ids)
  prompts = [prompt if prompt else (eos,) for prompt in prompts]
  order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
  size = min(batch_size, max(1, len(prompts)))
  texts = [""] * len(prompts)
  for some in _slices(order, size):
    rows = _StopStrings(model.tokenizer, stop_strings, len(some))
    try:
      tokens = generate(
        model.params,
        model.config,
        # Rows without a prompt end after their first token.
        [prompts[i] for i in some] + [(eos,)] * (size - len(some)),
        max_new_tokens,
        rng=jax.random.key(0),
        sampler=Sampler(
          temperature=0.0, top_p=1.0, vocab_size=model.tokenizer.vocab_size
        ),
        stop_ids=stop_ids,
        on_tokens=rows.add,
      )
    except NonFiniteError as error:
      row = error.rows[0]
      _, reason = str(error).split(": ", 1)
      index = some[row] if row < len(some) else some[0]
      raise NonFiniteError("prompts", {index: reason}) from error
    for index, ids in zip(some, tokens, strict=False):
      text = model.tokenizer.decode(ids)
      texts[index] = text[: first_stop(text, stop_strings)]
    if on_done:
      on_done(len(some))
  return texts


def first_stop(text: str, stop_strings: Sequence[str]) -> int | None:
  """Index of the first stop string in a text; None if there is none."""
  found = [text.find(stop) for stop in stop_strings]
  return min((at for at in found if at >= 0), default=None)


class _StopStrings:
  """Ends rows of `generate` whose text has a stop string, and unused rows."""

  def __init__(self, tokenizer, stop_strings, used: int):
    self._tokenizer = tokenizer
    self._stops = stop_strings
    self._tokens: list[list[int]] = [[] for _ in range(used)]

  def add(self, row: int, new: list[int]) -> bool:
    if row >= len(self._tokens):
      return True
    if not self._stops:
      return False
    self._tokens[row] += new
    text = self._tokenizer.decode(self._tokens[row])
    return first_stop(text, self._stops) is not None


def _score_tails(model, state, last, continuations, indices, chunk_size):
  """Scores of continuations whose rows have read all but `last` tokens."""
  inputs = [
    (*before, *continuation[:-1])
    for before, continuation in zip(last, continuations, strict=True)
  ]
  inputs_BT, lengths = _pad(inputs, state.batch_size)
  targets_BT, _ = _pad(continuations, state.batch_size)
  known = model.config.vocab_size
  if model.tokenizer is not None:
    known = model.tokenizer.vocab_size
  logprobs, best = [], []
  for start in range(0, inputs_BT.shape[1], chunk_size):
    columns = slice(start, start + chunk_size)
    width = inputs_BT[:, columns].shape[1]
    padding = ((0, 0), (0, bucket(width, chunk_size) - width))
    piece, is_best, state = _score_chunk(
      model.params,
      np.pad(inputs_BT[:, columns], padding),
      np.pad(targets_BT[:, columns], padding),
      lengths - start,
      state,
      vocab_size=known,
    )
    logprobs.append(piece)
    best.append(is_best)
  logprobs_BT = np.concatenate(jax.device_get(logprobs), axis=1)
  best_BT = np.concatenate(jax.device_get(best), axis=1)
  scores = []
  for row, continuation in enumerate(continuations):
    nats = logprobs_BT[row, : len(continuation)]
    if np.isnan(nats).any():
      cause = find_causes(model.params, state, [row])[row]
      token = int(np.isnan(nats).argmax())
      raise NonFiniteError(
        "contexts",
        {indices[row]: f"NaN at token {token} of its continuation: {cause}"},
      )
    scores.append(
      Score(
        logprob=float(nats.sum(dtype=np.float64)),
        is_greedy=bool(best_BT[row, : len(continuation)].all()),
        token_logprobs=tuple(nats.tolist()),
      )
    )
  return scores


@functools.partial(
  jax.jit, static_argnames=("vocab_size",), donate_argnames=("state",)
)
def _score_chunk(
  params, tokens, targets, lengths, state: State, *, vocab_size: int
):
  """ln p of targets [B, T], whether each is the most probable, new state."""
  x_BTD, _, state = read_hidden(params, tokens, lengths, state)

  def rate(part):
    x, targets = part
    logits = LM(state.config).apply({"params": params}, x, method="logits")
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    best = jnp.argmax(logits[..., :vocab_size], axis=-1)
    return picked - jax.nn.logsumexp(logits, axis=-1), best == targets

  # The head in pieces: all logits of a chunk would be large.
  time = tokens.shape[1]
  piece = _HEAD_TOKENS if time % _HEAD_TOKENS == 0 else time

  def split(a):
    a = a.reshape(a.shape[0], time // piece, piece, *a.shape[2:])
    return jnp.moveaxis(a, 1, 0)

  def join(a):
    return jnp.moveaxis(a, 0, 1).reshape(-1, time)

  logprobs, best = jax.lax.map(rate, (split(x_BTD), split(targets)))
  return join(logprobs), join(best), state


def _checked(name, lists, model, least=0) -> list[tuple[int, ...]]:
  size = model.config.vocab_size
  return [
    tuple(require_ids(f"{name}[{i}]", ids, size, least=least).tolist())
    for i, ids in enumerate(lists)
  ]


def _start(index, model) -> tuple[int, ...]:
  """Context of a continuation that begins a document."""
  if model.tokenizer is None:
    raise ValueError(
      f"contexts[{index}]: empty, and the model has no tokenizer that knows "
      "the end of a document, which would stand in its place"
    )
  return (model.tokenizer.eos_id,)


def _slices(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
  for start in range(0, len(items), size):
    yield items[start : start + size]


def _pad(lists, rows: int) -> tuple[np.ndarray, np.ndarray]:
  """Lists right-padded as [rows, T >= 1], rows without a list of length 0."""
  lengths = np.zeros((rows,), np.int32)
  lengths[: len(lists)] = [len(ids) for ids in lists]
  tokens = np.zeros((rows, max(1, lengths.max())), np.int32)
  for row, ids in zip(tokens, lists, strict=False):
    row[: len(ids)] = ids
  return tokens, lengths
