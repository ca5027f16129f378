"""Session files: a conversation that continues exactly in another process.

A state file (see `state.py`) with JSON in its metadata field `session`.
"""

import dataclasses
import json
import os

from gdn2_jax.inference.files.state import read_state, write_state
from gdn2_jax.inference.identity import Identity
from gdn2_jax.inference.state import State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
  """Snapshot of a conversation, enough to continue it exactly.

  Attributes:
    state: state of one sequence.
    pending: last chosen token, not yet read by the state; None if the text has
      ended or nothing was chosen, so that only a new prompt can follow.
    draws: tokens chosen so far, the `index` of the next one.
    seed: seed of the draws, below 2**32.
    tail: last tokens of the text, `pending` included, for decoding the next
      ones: a character may take several tokens.

  Raises:
    ValueError: a state of several sequences, or an integer out of range.
  """

  state: State
  pending: int | None
  draws: int
  seed: int
  tail: tuple[int, ...] = ()

  def __post_init__(self):
    if self.state.batch_size != 1:
      raise ValueError(
        "session: state: expected the state of one sequence, got "
        f"{self.state.batch_size}"
      )
    vocab_size = self.state.config.vocab_size
    numbers = [("draws", self.draws, 1 << 31), ("seed", self.seed, 1 << 32)]
    numbers += [("tail", token, vocab_size) for token in self.tail]
    if self.pending is not None:
      numbers.append(("pending", self.pending, vocab_size))
    for name, value, end in numbers:
      # type(): isinstance takes True for an int.
      if type(value) is not int or not 0 <= value < end:
        raise ValueError(
          f"session: {name}={value!r}: expected an integer in [0, {end})"
        )


def save_session(
  path: str | os.PathLike, session: Session, identity: Identity
) -> None:
  """Writes a conversation; arguments and errors as `save_state`.

  `load_state` reads the state of such a file alone.
  """
  fields = {
    "pending": session.pending,
    "draws": session.draws,
    "seed": session.seed,
    "tail": list(session.tail),
  }
  text = json.dumps(fields, separators=(",", ":"))
  write_state(path, session.state, identity, session=text)


def load_session(
  path: str | os.PathLike, identity: Identity, *, room: int = 0
) -> Session:
  """Reads a file of `save_session`; arguments as `load_state`.

  Raises:
    FileNotFoundError, ValueError: as `load_state`, or a bare state.
  """
  state, text = read_state(path, identity, room)
  if not text:
    raise ValueError(
      f"{path}: session: the file has none, only a state; expected a file of "
      "save_session"
    )
  fields = json.loads(text)
  fields["tail"] = tuple(fields["tail"])
  return Session(state=state, **fields)
