"""Training step of the 1.3B hybrid on one GPU, on 16K tokens.

Needs flax, optax and what configs need: a GPU's own JAX may come without them.
"""

import copy
import functools
import importlib
import time
from typing import Any

import jax
import jax.numpy as jnp

from gdn2_jax.bench.gpu.part import Job, Program, Recorder, Row
from gdn2_jax.model.accounting import train_flops_per_token
from gdn2_jax.model.lm import LM
from gdn2_jax.ops.gdn2.api import select_implementation
from gdn2_jax.sharding import MeshConfig, batch_sharding, make_mesh, use_mesh
from gdn2_jax.train.config import validate
from gdn2_jax.train.lower import lower_step
from gdn2_jax.train.report.throughput import Throughput
from gdn2_jax.train.state import init_state, plan_state

SHAPES = ((2048, 8), (4096, 4), (8192, 2), (16384, 1))  # tokens x rows
TINY_SHAPES = ((32, 2), (64, 1))
_SECONDS = 8.0  # of steps, per shape


def run(recorder: Recorder, rehearse: bool) -> None:
  """Writes a row per shape."""
  bench = _Bench(recorder, rehearse)
  recorder.run(
    {
      f"step {T}x{B}": Job(
        functools.partial(bench.measure, T, B),
        [functools.partial(bench.lower, T, B)],
      )
      for T, B in (TINY_SHAPES if rehearse else SHAPES)
    }
  )


class _Bench:
  """Model, and the state that the steps of all shapes update."""

  def __init__(self, recorder: Recorder, rehearse: bool):
    self._recorder = recorder
    self._seconds = 0.0 if rehearse else _SECONDS
    self._config = _tiny() if rehearse else _hybrid()
    self._state = None
    self._config.mesh, self._config.grad_accum = MeshConfig(), 1
    validate(self._config)
    self._mesh = make_mesh(self._config.mesh, jax.devices()[:1])
    gdn2 = self._config.model.gdn2
    head = (1, 1, gdn2.num_heads, gdn2.key_dim)
    inputs = 6 * (jax.ShapeDtypeStruct(head, self._config.model.dtype),)
    # Before tracing: the first use of a kernel runs its self-check.
    self._implementation = gdn2.implementation or select_implementation(*inputs)
    with use_mesh(self._mesh):
      self._model = LM(self._config.model)
      self._blueprint = plan_state(
        self._model, self._config.optimizer, self._config.num_steps, self._mesh
      )

  def lower(self, T: int, B: int) -> Any:
    """Lowered step on B rows of T tokens."""
    config = copy.deepcopy(self._config)
    config.data.seq_len, config.data.batch_size = T, B
    with use_mesh(self._mesh):
      return lower_step(config, self._model, self._blueprint, self._mesh)

  def measure(self, T: int, B: int, program: Program) -> Row:
    """Trains for some seconds; out of memory is a result."""
    row = {"T": T, "B": B, "implementation": self._implementation}
    try:
      step = program()
      stats = step.memory_analysis()
      row["memory_bytes"] = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
      )
      with use_mesh(self._mesh):
        return row | self._train(step, T, B)
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      return row | {"note": "out of memory"}

  def _train(self, step, T, B):
    if self._state is None:
      self._state = init_state(self._model, self._blueprint, 0)
    batch = jax.device_put(self._batch(T, B), batch_sharding(self._mesh))
    state, self._state = self._state, None  # donated: gone if it fails
    for _ in range(2):
      state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    flops = train_flops_per_token(self._config.model, T)
    meter = Throughput(B * T, flops, jax.devices()[:1])
    meter.restart(0)
    seconds = min(self._seconds, self._recorder.remaining())
    steps, end = 0, time.time() + seconds
    while steps < 3 or time.time() < end:
      state, metrics = step(state, batch)
      jax.block_until_ready(metrics["loss"])
      steps += 1
    rates = meter.read(steps)
    self._state = state
    loss, skipped = float(metrics["loss"]), int(metrics["skipped"])
    memory = jax.devices()[0].memory_stats() or {}
    return rates | {
      "steps": steps,
      "loss": loss,
      "process_peak_bytes": memory.get("peak_bytes_in_use"),
      "passed": bool(jnp.isfinite(loss)) and skipped == 0,
    }

  def _batch(self, T, B):
    vocabulary = self._config.model.vocab_size
    tokens = jax.random.randint(jax.random.key(7), (B, T + 1), 0, vocabulary)
    return {
      "inputs": tokens[:, :-1],
      "targets": tokens[:, 1:],
      "segment_ids": jnp.ones((B, T), jnp.int32),
      "loss_mask": jnp.ones((B, T), jnp.float32),
    }


def _hybrid():
  return importlib.import_module("gdn2_jax.configs.gdn2_swa_1p3b").get_config()


def _tiny():
  config = importlib.import_module("gdn2_jax.configs.tiny_cpu").get_config()
  model = config.model
  model.vocab_size, model.model_dim, model.mlp_dim = 128, 64, 64
  model.num_layers = 2
  model.gdn2.num_heads, model.attention.window = 1, 32
  return config
