"""A tiny byte-level model, and conversations with it."""

import io

from gdn2_jax.chat.repl import Repl
from gdn2_jax.chat.talk import Talk
from gdn2_jax.inference.sampling import Sampler
from tests.eval.plain import make_model

SAMPLER = Sampler(temperature=0.8, top_p=0.95)


class Chat:
  """A Repl on a tiny model, its streams, and what one call of it gives."""

  def __init__(self, model=None, *, out=None, file=None, **talk):
    model = model or make_model()
    talk = {"sampler": SAMPLER, "max_new_tokens": 12} | talk
    self.talk = Talk(model, **talk)
    self.out, self.err = out or io.StringIO(), io.StringIO()
    self.repl = Repl(self.talk, self.out, self.err, file=file)

  @property
  def session(self):
    return self.talk.session

  def say(self, *lines: str) -> str:
    """What these lines print on the output stream."""
    start = len(self.out.getvalue())
    self.repl.run(iter(lines))
    return self.out.getvalue()[start:]

  def refuse(self, line: str) -> str:
    """The error of a line that prints nothing else."""
    start, errors = len(self.err.getvalue()), self.repl.errors
    assert self.say(line) == ""
    assert self.repl.errors == errors + 1
    error = self.err.getvalue()[start:]
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error
