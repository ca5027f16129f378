"""Compilation of a decoding step for an H100, of a model cut to a few layers.

Nothing is allocated and nothing runs. Counted are launches, which bound the
time of a step with few rows, and bytes: a step should move the weights once and
the states of all layers once each way, and that in their kernel.
"""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Sharding

from gdn2_jax.aot.hlo_costs import Launch, launches, loop_bodies
from gdn2_jax.aot.hlo_text import Program, arrays, read_program
from gdn2_jax.inference.decode import (
  TOKENS_PER_DISPATCH,
  Rows,
  decode_block,
  for_loop,
)
from gdn2_jax.inference.sampling import Sampler
from gdn2_jax.inference.state import init_state
from gdn2_jax.kernels import target
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM

LAYERS = 3
BATCHES = (1, 64)
# Launches of a layer, and bytes that launches other than the recurrence's move,
# divided by those of the weights. Counted are 19.3 and 16.7 launches, of which
# 4.3 and 3.7 are a third of those around the layers; and 1.00 and 1.27 times
# the weights. With many rows, activations count.
_LAUNCHES = {1: 20, 64: 17}
_WEIGHTS = {1: 1.02, 64: 1.3}
_KERNEL = "gdn2_layer_step"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeReport:
  """One compiled decoding step.

  Attributes:
    rows: Rows B.
    layers: Layers of the model.
    launches: Launches of a step.
    weights: Bytes of the parameters that a step reads.
    moved: Bytes that launches other than the recurrence's read and write.
    copies: Launches other than the recurrence's that touch a layer's states.
    seconds: Time to lower and compile.
  """

  rows: int
  layers: int
  launches: int
  weights: int
  moved: int
  copies: tuple[str, ...]
  seconds: float

  @property
  def failures(self) -> list[str]:
    """Failed checks, one sentence each."""
    label = f"decoding step of {self.rows} rows"
    found = [f"{label}: {name} copies states" for name in self.copies]
    a_layer = self.launches / self.layers
    if a_layer > _LAUNCHES[self.rows]:
      found.append(
        f"{label}: {a_layer:.1f} launches a layer, budget "
        f"{_LAUNCHES[self.rows]}"
      )
    share = self.moved / self.weights
    if share > _WEIGHTS[self.rows]:
      found.append(
        f"{label}: moves {share:.2f} times the bytes of the weights, budget "
        f"{_WEIGHTS[self.rows]:.2f}"
      )
    return found


def compile_decode_step(
  config: ModelConfig, rows: int, sharding: Sharding
) -> DecodeReport:
  """Compiles the loop over tokens and reads one turn of it.

  Args:
    config: Of a model of GDN-2 layers; its kernels run, of LAYERS layers.
    rows: Rows B, one of BATCHES.
    sharding: Places an array on one compile-only device.
  """
  config = dataclasses.replace(
    config, num_layers=LAYERS, param_dtype=config.dtype
  )
  start = time.perf_counter()
  with target.use("compile"):
    shapes = jax.eval_shape(lambda: for_loop(_params(config), config))
  state = jax.eval_shape(lambda: init_state(config, rows))
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    (shapes, state, jax.eval_shape(lambda: _rows(rows)), *_scalars()),
  )
  with target.use("compile"):
    block = jax.jit(
      decode_block.__wrapped__,
      static_argnames=("size",),
      donate_argnames=("state",),
    )
    lowered = block.lower(*arguments, size=TOKENS_PER_DISPATCH)
    program = read_program(lowered.compile().as_text())
  weights = sum(math.prod(x.shape) * x.dtype.itemsize for x in _read(shapes))
  seconds = time.perf_counter() - start
  return read_step(program, config, rows, weights=weights, seconds=seconds)


def _params(config):
  tokens = jnp.zeros((1, 1), jnp.int32)
  return nn.unbox(LM(config).init(jax.random.key(0), tokens))["params"]


def _rows(rows):
  """Inputs of `decode_block` for greedy decoding."""
  return Rows(
    token=jnp.zeros((rows,), jnp.int32),
    index=jnp.zeros((rows,), jnp.int32),
    limit=jnp.ones((rows,), jnp.int32),
    done=jnp.zeros((rows,), bool),
    key=jax.random.split(jax.random.key(0), rows),
    stops=jnp.full((rows, 8), -1, jnp.int32),
    sampler=Sampler(temperature=0.0),
  )


def _scalars():
  """Number of tokens and `pause`, as shapes."""
  return jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), bool)


def _read(params):
  """Parameters of which a step reads every number: all but the embedding."""
  return jax.tree.leaves({k: v for k, v in params.items() if k != "embedding"})


def read_step(
  program: Program,
  config: ModelConfig,
  rows: int,
  *,
  weights: int,
  seconds: float,
) -> DecodeReport:
  """Counts the launches of one turn of a program's only loop."""
  (body,) = loop_bodies(program)
  found = list(launches(program, body))
  others = [x for x in found if _KERNEL not in x.path]
  state = (config.gdn2.key_dim, config.gdn2.value_dim)
  return DecodeReport(
    rows=rows,
    layers=config.num_layers,
    launches=sum(x.times for x in found),
    weights=weights,
    moved=sum(x.times * (x.read + x.written) for x in others),
    copies=tuple(x.name for x in others if _has_states(x, state)),
    seconds=seconds,
  )


def _has_states(launch: Launch, state: tuple[int, int]) -> bool:
  """True if a result is states, [..., K, V] in float32."""
  return any(
    element == "f32" and len(shape) > 2 and shape[-2:] == state
    for element, shape in arrays(launch.type)
  )


def decode_lines(report: DecodeReport) -> str:
  """A compiled decoding step as a line; GB are 1e9 bytes."""
  return (
    f"decoding step, {report.rows} rows, {report.layers} layers of 1.3B: "
    f"{report.launches} launches ({report.launches / report.layers:.1f} a "
    f"layer), {report.moved / 1e9:.2f} GB moved beside the recurrence, "
    f"{report.moved / report.weights:.2f} times the weights; compiled in "
    f"{report.seconds:.0f} s"
  )
