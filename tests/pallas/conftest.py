"""Kernels in the interpreter: compiled once, cut into sections on demand."""

import functools
import threading

import jax

# JAX imports it in the first call, which changes the keys of all its caches.
import jax._src.pallas.mosaic.interpret.interpret_pallas_call
import pytest
from jax._src.pallas.mosaic.interpret import thread_map

from gdn2_jax.pallas import partition
from gdn2_jax.pallas.gdn2 import backward, forward

_LOCK = threading.Lock()


def compile_once(jaxpr, consts, *args):
  """As JAX's, whose threads all compile the program of their warpgroup."""
  with _LOCK:
    traced = jax.jit(thread_map._run, static_argnums=0).trace(
      jaxpr, consts, *args
    )
    program = traced.lower().compile()
  program(consts, *args)


@pytest.fixture(scope="session", autouse=True)
def one_compilation():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(thread_map, "_run_jaxpr", compile_once)
    yield


@functools.cache
def builds(count):
  """Programs of calls that are cut into a number of sections."""
  return functools.cache(partition._build.__wrapped__)


@pytest.fixture
def cut(monkeypatch):
  """Function that cuts all sequences into a number of sections.

  Real calls are cut only if they are long.
  """

  def cut(count):
    for module in (forward, backward):
      monkeypatch.setattr(module, "section_count", lambda *_: count)
    monkeypatch.setattr(partition, "_build", builds(count))

  return cut
