"""Time of a step and bytes of state when a model of the suite decodes."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from gdn2_jax.eval.synthetic.model import init_caches
from gdn2_jax.eval.synthetic.train import Program

_ROUNDS = 9


def decoding_cost(program: Program) -> dict[str, Any]:
  """Measures the model of a program on one sequence, read step by step.

  Returns:
    latency_us: Microseconds of a step of the whole model, in a compiled loop
      over a sequence; the median of 9 rounds. Of the models of the suite, whose
      cost is mostly that of starting operations: no speed of a mixer.
    state_bytes: Of all layers, tails of convolutions included.
    state_floats: Numbers in it.
    length: Steps of a sequence.
  """
  model = program.model
  tokens = program.scored.tokens[:1]
  length = tokens.shape[1]
  caches = init_caches(model.config, 1, length)
  leaves = [
    x for x in jax.tree.leaves(caches) if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  params = program.init(0)

  @jax.jit
  def decode(params, caches, tokens):
    def step(caches, token):
      logits, caches = model.apply({"params": params}, token[:, None], caches)
      return caches, logits.argmax(-1)

    return jax.lax.scan(step, caches, jnp.moveaxis(tokens, 1, 0))[1]

  jax.block_until_ready(decode(params, caches, tokens))
  times = []
  for _ in range(_ROUNDS):
    start = time.perf_counter()
    jax.block_until_ready(decode(params, caches, tokens))
    times.append(time.perf_counter() - start)
  return {
    "latency_us": round(statistics.median(times) / length * 1e6, 1),
    "state_bytes": sum(x.nbytes for x in leaves),
    "state_floats": sum(x.size for x in leaves),
    "length": length,
  }
