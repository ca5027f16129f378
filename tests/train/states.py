"""A small TrainState and checkpoints of it, without any model."""

import contextlib
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np

from gdn2_jax.train.checkpoint.manager import Checkpointer
from gdn2_jax.train.checkpoint.meta import make_meta
from gdn2_jax.train.checkpoint.resume import resume
from gdn2_jax.train.config import CheckpointConfig
from gdn2_jax.train.state import TrainState


def make_state(step: int, size: int = 4096) -> TrainState:
  noise = np.random.default_rng(step).normal(size=size)
  return TrainState(
    step=jnp.asarray(step, jnp.int32),
    params={
      "x": jnp.asarray(noise, jnp.float32),
      "y": jnp.asarray(noise[:6].reshape(2, 3), jnp.bfloat16),
    },
    opt_state=({"mu": {"x": jnp.asarray(noise[::-1], jnp.float32)}}, ()),
    skipped=jnp.asarray(0, jnp.int32),
    skipped_in_a_row=jnp.asarray(0, jnp.int32),
  )


def abstract_of(state: TrainState) -> TrainState:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def same_bits(a: TrainState, b: TrainState) -> bool:
  return all(
    x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


@contextlib.contextmanager
def no_file_larger_than(size: int):
  """As a full disk: writes beyond `size` fail, with an error not a signal."""
  old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, old_handler)


class SmallRun:
  """Checkpoints under a directory, saved and resumed as a run does it."""

  def __init__(self, directory, config):
    self.directory = directory
    self.meta = make_meta(config, "aaaa", {}, make_state(0))
    self.lines: list[str] = []

  def save(self, *steps: int) -> None:
    checkpointer = self.checkpointer()
    for step in steps:
      checkpointer.save(step, make_state(step), self.meta)
    checkpointer.close()

  def checkpointer(self, **fields) -> Checkpointer:
    config = CheckpointConfig(**fields)
    return Checkpointer(self.directory, config, self.lines.append)

  def resume(self, **fields) -> int:
    """The step a run would go on from, after comparing the whole state."""
    checkpointer = self.checkpointer(**fields)
    self.lines.clear()
    found = resume(checkpointer, abstract_of(make_state(0)), self.meta)
    checkpointer.close()
    if found is None:
      return 0
    state, saved = found
    assert same_bits(state, make_state(saved["step"])), "silently wrong"
    return saved["step"]

  def file(self, step: int, pattern: str):
    """The largest file of a checkpoint that matches."""
    found = (self.directory / str(step)).glob(pattern)
    return max(found, key=lambda path: path.stat().st_size)
