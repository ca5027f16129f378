"""Sessions: states that are kept between requests, the newest used ones."""

import collections
import dataclasses
import secrets

from gdn2_jax.inference.state import State

NEW = "new"  # in place of an id: begins a session
TAIL = 16  # tokens that may share a character with the next one, and more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
  """A text between two requests, with all that its continuation needs.

  Attributes:
    state: state of one sequence; None before its first token. Never donated.
    pending: tokens of the text that the state has not read yet.
    draws: tokens chosen so far; the next one is drawn with this index.
    seed: seed of the draws; None before the first.
    tokens: tokens of the text.
    tail: the last of them.
  """

  state: State | None = dataclasses.field(default=None, repr=False)
  pending: tuple[int, ...] = ()
  draws: int = 0
  seed: int | None = None
  tokens: int = 0
  tail: tuple[int, ...] = ()

  def followed_by(self, ids: list[int], **changes) -> "Conversation":
    """The conversation with these tokens at its end, and other `changes`."""
    return dataclasses.replace(
      self,
      tokens=self.tokens + len(ids),
      tail=(*self.tail, *ids)[-TAIL:],
      **changes,
    )


class Sessions:
  """Conversations by id; the least recently used ones are dropped.

  Used by one thread. Ids cannot be guessed: a client that does not know one
  cannot continue its conversation.

  Args:
    most: conversations that are kept, >= 0.
  """

  def __init__(self, most: int):
    self._most = most
    self._kept: collections.OrderedDict[str, Conversation] = (
      collections.OrderedDict()
    )
    self._busy: set[str] = set()

  def __len__(self) -> int:
    return len(self._kept)

  def begin(self, name: str) -> tuple[str, Conversation]:
    """Id and conversation; `release` it afterwards.

    Args:
      name: an id, or `NEW`.

    Raises:
      KeyError: no such session, or not any more.
      BlockingIOError: another request of this session is not done.
    """
    if name == NEW:
      name, conversation = secrets.token_urlsafe(16), Conversation()
    else:
      conversation = self._kept[name]
      if name in self._busy:
        raise BlockingIOError(name)
      self._kept.move_to_end(name)
    self._busy.add(name)
    return name, conversation

  def keep(self, name: str, conversation: Conversation) -> None:
    """Replaces the conversation of a session that was begun."""
    self._kept[name] = conversation
    self._kept.move_to_end(name)
    while len(self._kept) > self._most:
      self._kept.popitem(last=False)

  def release(self, name: str) -> None:
    """Ends a request; without `keep` the session is as it was."""
    self._busy.discard(name)

  def drop(self, name: str) -> None:
    """Forgets a session; KeyError without it."""
    del self._kept[name]
