"""Answers to the three kinds of requests that lm-eval makes of a model.

Texts become tokens as in lm-eval's own models; nothing here imports it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gdn2_jax.data.tokenizer.base import Tokenizer
from gdn2_jax.eval.scoring import BATCH_SIZE, greedy, score
from gdn2_jax.interop.folder import Model

MAX_NEW_TOKENS = 256  # lm-eval's own default
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")


def loglikelihoods(
  model: Model,
  pairs: Sequence[tuple[str, str]],
  *,
  batch_size: int = BATCH_SIZE,
  on_done: Callable[[int], Any] | None = None,
) -> list[tuple[float, bool]]:
  """Scores continuations of contexts.

  Args:
    model: with a tokenizer.
    pairs: N pairs (context, continuation). An empty context is the start of a
      document.
    batch_size: rows at a time.
    on_done: called with the number of pairs that were just scored.

  Returns:
    For each pair ln p(continuation | context) in nats, and whether greedy
    decoding gives the continuation. An empty continuation has (0, True).
  """
  contexts, continuations = encode_pairs(model.tokenizer, pairs)
  return _scores(model, contexts, continuations, batch_size, on_done)


def document_loglikelihoods(
  model: Model,
  texts: Sequence[str],
  *,
  batch_size: int = BATCH_SIZE,
  on_done: Callable[[int], Any] | None = None,
) -> list[float]:
  """Scores whole documents.

  The state is carried through a document of any length: each token is
  predicted from all tokens before it, not from those of a window.

  Args:
    model: with a tokenizer.
    texts: N documents.
    batch_size: documents at a time.
    on_done: called with the number of documents that were just scored.

  Returns:
    ln p(document) in nats, its first token included; 0 for an empty one.
  """
  tokens = model.tokenizer.encode_batch(texts)
  contexts = [[] for _ in tokens]
  found = _scores(model, contexts, tokens, batch_size, on_done)
  return [nats for nats, _ in found]


def continuations(
  model: Model,
  requests: Sequence[tuple[str, Mapping[str, Any]]],
  *,
  batch_size: int = BATCH_SIZE,
  on_done: Callable[[int], Any] | None = None,
) -> list[str]:
  """Continues contexts greedily.

  Args:
    model: with a tokenizer.
    requests: N pairs of a context and lm-eval's options: "until" (a string or
      a list of strings that end the text) and "max_gen_toks" (256 without).
    batch_size: contexts at a time.
    on_done: called with the number of contexts that were just continued.

  Returns:
    N texts, each up to the first of its stop strings or the end of the
    document.

  Raises:
    ValueError: a request wants samples, or no tokens at all.
  """
  groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
  for index, (_, options) in enumerate(requests):
    groups.setdefault(_options(options), []).append(index)
  prompts = model.tokenizer.encode_batch([context for context, _ in requests])
  texts = [""] * len(requests)
  for (stops, count), indices in groups.items():
    found = greedy(
      model,
      [prompts[index] for index in indices],
      count,
      stop_strings=stops,
      batch_size=batch_size,
      on_done=on_done,
    )
    for index, text in zip(indices, found, strict=True):
      texts[index] = text
  return texts


def encode_pairs(
  tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]
) -> tuple[list[list[int]], list[list[int]]]:
  """Tokens of contexts and of continuations.

  Spaces that end a context go to its continuation. Both are encoded as one
  text, of which the tokens of the context alone are taken off: a word that
  begins the continuation is encoded as inside a text.
  """
  moved = []
  for context, continuation in pairs:
    kept = context.rstrip()
    moved.append((kept, context[len(kept) :] + continuation))
  alone = list(dict.fromkeys(context for context, _ in moved))
  encoded = tokenizer.encode_batch(alone)
  by_context = dict(zip(alone, encoded, strict=True))
  whole = tokenizer.encode_batch([a + b for a, b in moved])
  contexts, continuations = [], []
  for (context, continuation), tokens in zip(moved, whole, strict=True):
    before = by_context[context]
    after = tokens[len(before) :]
    if continuation and not after:
      # Merged into the last token of the context, which is then scored.
      before, after = tokens[:-1], tokens[-1:]
    contexts.append(before)
    continuations.append(after)
  return contexts, continuations


def _scores(model, contexts, continuations, batch_size, on_done):
  """(nats, is_greedy) of each pair of token lists, (0, True) for empty ones."""
  scored = [index for index, tokens in enumerate(continuations) if tokens]
  found = score(
    model,
    [contexts[index] for index in scored],
    [continuations[index] for index in scored],
    batch_size=batch_size,
    on_done=on_done,
  )
  results = [(0.0, True)] * len(continuations)
  for index, result in zip(scored, found, strict=True):
    results[index] = (result.logprob, result.is_greedy)
  return results


def _options(options: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
  """Stop strings and number of tokens of a request."""
  temperature = float(options.get("temperature") or 0)
  if options.get("do_sample") or temperature > 0:
    raise ValueError(
      f"generation_kwargs: do_sample={options.get('do_sample')}, temperature="
      f"{temperature}: expected greedy decoding, the only one supported"
    )
  stops = options.get("until") or []
  stops = [stops] if isinstance(stops, str) else stops
  count = next(
    (options[name] for name in _LENGTHS if options.get(name) is not None),
    MAX_NEW_TOKENS,
  )
  if int(count) < 1:
    raise ValueError(f"generation_kwargs: max_gen_toks={count}: expected >= 1")
  return tuple(stop for stop in stops if stop), int(count)
