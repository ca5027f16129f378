"""Conversations as files: state files with a few fields more.

A conversation continues days later as if it had never stopped.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

from gdn2_jax.inference.files.state import (
  read_state,
  remove_leftovers_of,
  write_state,
)
from gdn2_jax.inference.identity import Identity
from gdn2_jax.inference.state import State
from gdn2_jax.interop.disk import parse_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
  """A conversation between two calls, with all that its continuation needs.

  Attributes:
    state: state of one sequence; None before its first token, as for
      `generate`.
    pending: the token chosen last, which the state has not read yet; None
      if the text has ended or nothing was chosen, so that only more text can
      follow.
    draws: tokens chosen so far; the next one is drawn with this index.
    seed: seed of the draws.
    tail: the last tokens of the text, `pending` included, which the decoder of
      the next ones needs, since a character may take several tokens.
  """

  state: State | None
  pending: int | None
  draws: int
  seed: int
  tail: tuple[int, ...] = ()


def save_session(
  path: str | os.PathLike, session: Session, identity: Identity
) -> None:
  """Writes a conversation; `load_state` reads its state alone.

  Raises:
    ValueError: as `save_state`; or a field outside its range, no state, or one
      of several sequences.
    OSError: as `save_state`.
  """
  fields = {
    "pending": session.pending,
    "draws": session.draws,
    "seed": session.seed,
    "tail": list(session.tail),
  }
  _check_session("session", fields, session.state)
  text = json.dumps(fields, separators=(",", ":"))
  write_state(path, session.state, identity, session=text)
  remove_leftovers_of(path)


def load_session(
  path: str | os.PathLike, identity: Identity, *, room: int = 0
) -> Session:
  """Reads what `save_session` wrote; arguments as `load_state`.

  Raises:
    FileNotFoundError, ValueError: as `load_state`; or a file without a session.
  """
  state, text = read_state(path, identity, room)
  if not text:
    raise ValueError(
      f"{path}: session: the file has none, only a state; expected what "
      "save_session wrote"
    )
  fields = parse_json(text.encode(), pathlib.Path(path))
  _check_session(f"{path}: session", fields, state)
  fields["tail"] = tuple(fields["tail"])
  return Session(state=state, **fields)


def _check_session(
  where: str, fields: dict[str, Any], state: State | None
) -> None:
  if set(fields) != {"pending", "draws", "seed", "tail"}:
    raise ValueError(f"{where}: unexpected fields: {sorted(fields)}")
  if not isinstance(fields["tail"], list):
    raise ValueError(f"{where}: tail={fields['tail']!r}: expected a list")
  if state is None or state.position.shape != (1,):
    found = None if state is None else state.batch_size
    raise ValueError(
      f"{where}: expected the state of one sequence, got {found}"
    )

  def require(name, value, end):
    # type(): True is an int to isinstance.
    if type(value) is not int or not 0 <= value < end:
      raise ValueError(
        f"{where}: {name}={value!r}: expected an integer in [0, {end})"
      )

  vocab_size = state.config.vocab_size
  require("draws", fields["draws"], 1 << 31)
  require("seed", fields["seed"], 1 << 32)
  if fields["pending"] is not None:
    require("pending", fields["pending"], vocab_size)
  for token in fields["tail"]:
    require("tail", token, vocab_size)
