"""Conversation with a model: turns, undo and branches.

Every point of a conversation is a `Session`, which never changes: a turn makes
a new one from a copy of the state. So going back, and keeping several
branches, needs no computation.
"""

import collections
import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from gdn2_jax.inference.command.turn import TAIL, Turn, continue_session
from gdn2_jax.inference.files.session import Session
from gdn2_jax.inference.rows import fork
from gdn2_jax.inference.sampling import Sampler
from gdn2_jax.inference.state import State, init_state, prefill
from gdn2_jax.interop.folder import Model

MAX_UNDO = 64  # earlier states that a branch keeps
CHUNK, LONG_CHUNK = 16, 512  # tokens per dispatch: two programs for all lines
FIRST_BRANCH = "main"


@dataclasses.dataclass
class Branch:
  """A line of a conversation.

  Attributes:
    now: the conversation as it stands.
    past: what it was before each of the last turns, the oldest first.
  """

  now: Session
  past: collections.deque[Session] = dataclasses.field(
    default_factory=lambda: collections.deque(maxlen=MAX_UNDO)
  )


class Talk:
  """Branches of a conversation, of which one is current.

  Args:
    model: model with a tokenizer.
    sampler: distribution of the draws.
    max_new_tokens: tokens of one answer at most, >= 1.
    room: tokens that a conversation may have, for models with full attention;
      others ignore it.
    session: conversation to continue; None begins an empty one.
    seed: seed of the draws; None keeps that of the session, or 0.

  Raises:
    ValueError: a sampler that does not fit the model's vocabulary.
  """

  def __init__(
    self,
    model: Model,
    *,
    sampler: Sampler,
    max_new_tokens: int = 128,
    room: int = 4096,
    session: Session | None = None,
    seed: int | None = None,
  ):
    self.model, self.room = model, room
    self.max_new_tokens = max_new_tokens
    self.use_sampler(sampler)
    if session is None:
      session = Session(state=self.empty(), pending=None, draws=0, seed=0)
    if seed is not None:
      session = dataclasses.replace(session, seed=seed)
    self.current = FIRST_BRANCH
    self.branches = {FIRST_BRANCH: Branch(session)}

  @property
  def branch(self) -> Branch:
    """The current branch."""
    return self.branches[self.current]

  @property
  def session(self) -> Session:
    """The conversation as it stands."""
    return self.branch.now

  @property
  def tokens_read(self) -> int:
    """Tokens of the text so far that the state has read."""
    return tokens_read(self.session)

  @property
  def state_bytes(self) -> int:
    """Bytes of the state."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self.session.state))

  @property
  def max_length(self) -> int | None:
    """Tokens that the state has slots for; None: it needs no slots."""
    return _state(self.session).max_length

  def empty(self) -> State:
    """A state that has read nothing."""
    return init_state(self.model.config, 1, self.room)

  def use_sampler(self, sampler: Sampler) -> None:
    """Replaces the sampler; only ids of the tokenizer are drawn.

    Raises:
      ValueError: top_k is larger than the vocabulary.
    """
    vocab_size = self.model.tokenizer.vocab_size
    sampler = dataclasses.replace(sampler, vocab_size=vocab_size)
    sampler.check(self.model.config.vocab_size)
    self.sampler = sampler

  def use_seed(self, seed: int) -> None:
    """Replaces the seed of the draws that follow."""
    self.branch.now = dataclasses.replace(self.session, seed=seed)

  def encode(self, text: str) -> list[int]:
    """Ids of the user's text.

    Raises:
      ValueError: no text, and none that could go on.
    """
    if not text and self.session.pending is None:
      what = "has ended" if self.tokens_read else "is empty"
      raise ValueError(f"the text so far {what}; write something to continue")
    return self.model.tokenizer.encode(text)

  def answer(
    self, ids: list[int], on_tokens: Callable[[list[int]], bool]
  ) -> Turn:
    """Continues the text so far and `ids`; then the turn is the newest one.

    The tokens are those that `generate` draws for the same session. A text is
    read LONG_CHUNK and CHUNK tokens at a time; above CHUNK tokens that equals
    the reading of `generate` up to rounding.

    Args:
      ids: tokens of the user's text.
      on_tokens: gets new tokens; ends the answer there by returning True.

    Raises:
      ValueError: more tokens than the state has room for.
      NonFiniteError: logits that are not finite. After any error the
        conversation is as it was.
    """
    turn = continue_session(
      self.model,
      self._read(ids),
      [],
      self.sampler,
      self.max_new_tokens,
      on_tokens,
    )
    self._advance(turn.session)
    return turn

  def _read(self, ids: list[int]) -> Session:
    """The session after all tokens but the last, which is then pending."""
    session = self.session
    pending = [] if session.pending is None else [session.pending]
    *tokens, last = pending + ids
    # A copy: reading donates the state, and /undo needs it.
    state = fork(_state(session), 1)
    whole = len(tokens) - len(tokens) % LONG_CHUNK
    for part, chunk in (
      (tokens[:whole], LONG_CHUNK),
      (tokens[whole:], CHUNK),
    ):
      if part:
        _, state = prefill(
          self.model.params,
          np.array([part], np.int32),
          np.array([len(part)], np.int32),
          state,
          chunk_size=chunk,
        )
    tail = (*session.tail, *ids)[-TAIL:]
    return dataclasses.replace(session, state=state, pending=last, tail=tail)

  def _advance(self, session: Session) -> None:
    self.branch.past.append(self.session)
    self.branch.now = session

  def replace(self, session: Session) -> None:
    """Continues another conversation in this branch; `undo` returns."""
    self._advance(session)

  def undo(self) -> None:
    """Goes back to before the last turn.

    Raises:
      ValueError: no turn is left; a branch keeps `MAX_UNDO` of them.
    """
    if not self.branch.past:
      raise ValueError(
        f"no turn left to undo; the last {MAX_UNDO} of a branch are kept, from "
        "the start of this program on"
      )
    self.branch.now = self.branch.past.pop()

  def fork(self, name: str) -> None:
    """Keeps a copy of the current branch under a new name.

    Raises:
      ValueError: a name that exists.
    """
    if name in self.branches:
      raise ValueError(f"{name}: exists already")
    self.branches[name] = Branch(self.session, self.branch.past.copy())

  def switch(self, name: str) -> None:
    """Makes another branch the current one; this one stays as it is."""
    if name not in self.branches:
      raise ValueError(f"{name}: no such branch")
    self.current = name


def tokens_read(session: Session) -> int:
  """Tokens that the state of a session has read."""
  (position,) = _state(session).position.tolist()
  return position


def _state(session: Session) -> State:
  assert session.state is not None  # no session of a Talk is without one
  return session.state
