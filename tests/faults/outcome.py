"""What a fault did, try by try, and the table of all of them."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass
class Outcome:
  """Counts over the tries of one fault.

  Attributes:
    fault: its name.
    tries: how often it was done.
    survived: tries that ended as they should.
    lost: committed steps that were gone afterwards.
    silent: tries after which training went on, or could, with wrong numbers.
    seconds: wall clock of all tries.
    notes: measurements, such as the longest time to exit.
    problems: one line for each try that did not survive.
  """

  fault: str
  tries: int = 0
  survived: int = 0
  lost: int = 0
  silent: int = 0
  seconds: float = 0.0
  notes: dict[str, Any] = dataclasses.field(default_factory=dict)
  problems: list[str] = dataclasses.field(default_factory=list)

  @property
  def passed(self) -> bool:
    """Whether every try survived, with nothing lost and nothing wrong."""
    return self.survived == self.tries > 0 and not (self.lost or self.silent)

  def to_json(self) -> dict[str, Any]:
    """The fields as JSON; seconds to a tenth."""
    return dataclasses.asdict(self) | {"seconds": round(self.seconds, 1)}

  def largest(self, name: str, value: float) -> None:
    """Keeps the largest of a measurement over all tries."""
    self.notes[name] = round(max(value, self.notes.get(name, value)), 2)


class Try:
  """One try: `expect` what must hold; the first failure is kept."""

  def __init__(self, outcome: Outcome):
    self._outcome = outcome
    self._problem = ""

  def expect(self, ok: bool, what: str) -> bool:
    """Notes that something did not hold."""
    if not ok and not self._problem:
      self._problem = what
    return ok

  def lost(self, steps: int) -> None:
    """Committed steps that are gone."""
    self._outcome.lost += steps
    self.expect(not steps, f"{steps} committed steps lost")

  def silent(self, wrong: list[int]) -> None:
    """Steps whose numbers are not what they should be."""
    self._outcome.silent += bool(wrong)
    self.expect(not wrong, f"other numbers at steps {wrong[:5]}")

  def close(self) -> None:
    """Counts the try."""
    self._outcome.tries += 1
    self._outcome.survived += not self._problem
    if self._problem:
      number = self._outcome.tries
      self._outcome.problems.append(f"try {number}: {self._problem}"[:2000])


def tries(
  outcome: Outcome, count: int, tick: Callable[[], object]
) -> Iterator[Try]:
  """`count` tries, timed and counted; calls `tick` after each."""
  start = time.monotonic()
  for _ in range(count):
    one = Try(outcome)
    try:
      yield one
    finally:
      one.close()
      outcome.seconds = time.monotonic() - start
      tick()


_HEAD = ("fault", "tries", "survived", "lost", "silent", "seconds")


def format_table(outcomes: list[Outcome]) -> str:
  """One line per fault, its notes and problems below it."""
  width = max(len(o.fault) for o in outcomes)
  lines = [f"{_HEAD[0]:<{width}}" + "".join(f"{h:>10}" for h in _HEAD[1:])]
  lines.append("-" * len(lines[0]))
  for o in outcomes:
    numbers = (o.tries, o.survived, o.lost, o.silent, round(o.seconds))
    lines.append(f"{o.fault:<{width}}" + "".join(f"{n:>10}" for n in numbers))
    if o.notes:
      notes = ", ".join(f"{k} {v}" for k, v in o.notes.items())
      lines.append(f"{'':<{width}}  {notes}")
    lines += [f"{'':<{width}}  {problem}" for problem in o.problems]
  return "\n".join(lines)
