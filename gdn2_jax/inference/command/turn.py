"""One more piece of text in a conversation: session in, session out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from gdn2_jax.inference.files.session import Session
from gdn2_jax.inference.generate import generate
from gdn2_jax.inference.sampling import Sampler
from gdn2_jax.interop.folder import Model

TOKENS_PER_DISPATCH = 8
TAIL = 16  # tokens that may share a character with the next one, and more


@dataclasses.dataclass(frozen=True)
class Turn:
  """A piece of generated text.

  Attributes:
    tokens: its ids.
    ended: True if the document ended there.
    session: the conversation after it.
  """

  tokens: list[int]
  ended: bool
  session: Session


def continue_session(
  model: Model,
  session: Session,
  ids: list[int],
  sampler: Sampler,
  max_new_tokens: int,
  on_tokens: Callable[[list[int]], bool],
) -> Turn:
  """Generates text after a conversation and the ids of more text.

  Args:
    model: model with a tokenizer.
    session: conversation; its state is donated.
    ids: tokens of new text; not empty if the session has no pending token.
    sampler: distribution of the draws.
    max_new_tokens: tokens to generate at most.
    on_tokens: gets new tokens; ends the text there by returning True.

  Raises:
    ValueError, NonFiniteError: as `generate`.
  """
  pending = [] if session.pending is None else [session.pending]
  generated: Any = generate(
    model.params,
    model.config,
    [pending + ids],
    max_new_tokens,
    rng=jax.random.key(session.seed),
    sampler=sampler,
    stop_ids=(model.tokenizer.eos_id,),
    state=session.state,
    index=session.draws,
    on_tokens=lambda _, tokens: on_tokens(tokens),
    return_state=True,
    tokens_per_dispatch=TOKENS_PER_DISPATCH,
  )
  (tokens,) = generated.tokens
  ended = generated.pending[0] == model.tokenizer.eos_id
  after = Session(
    state=generated.state,
    # The end of a document is not part of a continued text.
    pending=None if ended else generated.pending[0],
    draws=generated.index[0],
    seed=session.seed,
    tail=(*session.tail, *ids, *tokens)[-TAIL:],
  )
  return Turn(tokens, ended, after)
