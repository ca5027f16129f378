"""Backend that a function is being traced for.

Where a CPU and a GPU want the same sums in different pieces, ops ask here. The
answer is that of the process, unless programs are made for other machines.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_traced_for: contextvars.ContextVar[str | None] = contextvars.ContextVar(
  "gdn2_jax_traced_for", default=None
)


@contextlib.contextmanager
def traced_for(name: str) -> Iterator[None]:
  """Traces ops for another backend inside the with block.

  The name is read while a function is traced and is no part of the key of
  jax.jit's cache: wrap a new function under each.

  Args:
    name: as `jax.default_backend` has it: "cpu", "gpu" or "tpu".
  """
  token = _traced_for.set(name)
  try:
    yield
  finally:
    _traced_for.reset(token)


def backend() -> str:
  """The backend that ops traced now will run on."""
  return _traced_for.get() or jax.default_backend()
