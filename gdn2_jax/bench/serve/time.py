"""Measurements of `bench serve`: decoding, prompts, very long prompts.

Decoding at a length starts from a state filled with noise as if so many tokens
had been read; the prompts of the other two sections are really read. Models
take turns within every round.
"""

import os
import resource
import statistics
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from gdn2_jax.bench import timing
from gdn2_jax.bench.serve import models as serve_models
from gdn2_jax.inference.state import advance, init_state, read_chunk
from gdn2_jax.kernels.errors import relative_rms
from gdn2_jax.model.accounting import state_bytes
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM, has_growing_cache

Row = dict[str, Any]
# Relative RMS error of logits: decoding against the whole sequence at once.
BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2, "float64": 1e-4}
_CALL_SECONDS = 0.05  # of steps in a round, about


class Subject(NamedTuple):
  """A model under test."""

  name: str
  config: ModelConfig
  params: Any

  def row(self, section: str, batch: int, length: int) -> Row:
    """Row of a measurement, still without figures."""
    row = {"section": section, "model": self.name}
    return row | {"batch": batch, "length": length}


def check(subject: Subject) -> float:
  """Error of chunks and single steps against one pass over the sequence."""
  config, chunk, total = subject.config, 8, 24
  tokens = random_tokens(config, 2, total)
  want, _ = jax.jit(LM(config).apply)({"params": subject.params}, tokens)
  state = init_state(config, 2, total)
  logits = jnp.zeros((2, config.vocab_size), jnp.float32)
  got = []
  lengths = jnp.full((2,), chunk, jnp.int32)
  read = jax.jit(read_chunk)
  for start in (0, chunk):
    piece = tokens[:, start : start + chunk]
    logits, state = read(subject.params, piece, lengths, state, logits)
    got.append((start + chunk - 1, logits))
  one = jax.jit(advance)
  for t in range(2 * chunk, total):
    logits, state = one(subject.params, tokens[:, t], state)
    got.append((t, logits))
  exact = np.stack([np.asarray(want[:, t], np.float64) for t, _ in got])
  actual = np.stack([np.asarray(x, np.float64) for _, x in got])
  return relative_rms(actual, exact)


def random_tokens(config: ModelConfig, batch: int, length: int) -> Any:
  """Token ids [batch, length]."""
  rng = np.random.default_rng(0)
  return jnp.asarray(
    rng.integers(0, config.vocab_size, (batch, length)), "int32"
  )


def decode(
  subjects: list[Subject],
  lengths: list[int],
  batches: list[int],
  rounds: int,
  most_bytes: float,
) -> list[Row]:
  """Rows of a token's time and memory, at most `most_bytes`."""
  compiled: dict[Any, timing.Compiled] = {}
  result = []
  cases = [(batch, length) for batch in batches for length in lengths]
  for batch, length in tqdm.tqdm(cases, desc="decode", disable=None):
    decoders = []
    for subject in subjects:
      row = subject.row("decode", batch, length)
      result.append(row)
      needs = _memory_needed(subject, batch, length)
      if needs > most_bytes:
        row["note"] = f"not run: {needs / 1e9:.1f} GB of weights and state"
        continue
      decoders.append(_Decoder(subject, row, compiled))
    for _ in range(rounds):
      for decoder in decoders:
        decoder.one_round(rounds)
    for decoder in decoders:
      decoder.finish()
  return result


def _memory_needed(subject, batch, length):
  state = jax.eval_shape(
    lambda: init_state(subject.config, batch, serve_models.capacity(length))
  )
  weights = serve_models.bytes_of(subject.params)
  return weights + serve_models.bytes_of(state)


def _compile_step(subject, state):
  """Compiles a step from tokens [B] to the most likely next tokens [B]."""

  def step(params, token, state):
    logits, state = advance(params, token, state)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), state

  args = subject.params, _first_tokens(state), state
  return timing.compile_function(step, args, donate_argnames="state")


def _first_tokens(state):
  return jnp.zeros(state.position.shape, jnp.int32)


def _steps(step, subject, state):
  """Chain of steps of a model from a state."""
  params = subject.params
  return timing.Chain(
    lambda carry: step.call(params, *carry), (_first_tokens(state), state)
  )


class _Decoder:
  """Steps of a model after one length, and copies of equal bytes."""

  def __init__(self, subject, row, compiled):
    batch, self._length, self._row = row["batch"], row["length"], row
    state = serve_models.state_at(subject.config, batch, self._length)
    key = (subject.name, *(a.shape for a in jax.tree.leaves(state)))
    if key not in compiled:
      compiled[key] = _compile_step(subject, state)
    weights = serve_models.read_weight_bytes(subject.config, batch)
    moved = serve_models.moved_state_bytes(state, self._length)
    per_row = state_bytes(subject.config, self._length)
    row |= {
      "weight_bytes_read": weights,
      "state_bytes_moved": moved,
      "state_bytes": batch * sum(per_row.values()),
    } | _memory(compiled[key])
    self._copy, self._copies = timing.Copy(weights + moved), []
    self._steps, self._times = _steps(compiled[key], subject, state), []
    for _ in range(2):  # the first pays for memory that is mapped
      self._once = self._run(1)

  def _run(self, calls):
    seconds = self._steps.seconds(calls)
    token, state = self._steps.state
    self._steps.state = token, serve_models.rewound(state, self._length)
    return seconds

  def one_round(self, rounds):
    most = serve_models.ROOM // (rounds + 1)
    calls = max(1, min(most, 32, round(_CALL_SECONDS / max(self._once, 1e-6))))
    self._times.append(self._run(calls))
    self._copies.append(self._copy.seconds(max(1, min(calls, 8))))

  def finish(self):
    row = self._row
    floor = statistics.median(self._copies)
    row |= _rates(self._times, row["batch"])
    row["floor_ms"] = 1e3 * floor
    row["floor_share"] = 1e3 * floor / row["ms"]
    moved = row["weight_bytes_read"] + row["state_bytes_moved"]
    row["copy_gb_per_s"] = moved / floor / 1e9
    self._steps = None  # frees the state


def _memory(program):
  return {
    "argument_bytes": program.argument_bytes,
    "temp_bytes": program.temp_bytes,
  }


class _Reader:
  """Prompts of one row, read chunk by chunk by one compiled program."""

  def __init__(self, subject, max_length, chunk):
    self._config, self._max_length = subject.config, max_length
    params, tokens = subject.params, random_tokens(subject.config, 1, chunk)
    lengths = jnp.full((1,), chunk, jnp.int32)
    logits = jnp.zeros((1, subject.config.vocab_size), jnp.float32)
    args = params, tokens, lengths, self.empty(), logits
    program = timing.compile_function(read_chunk, args, donate_argnames="state")
    self.memory = _memory(program)
    self._read = lambda state: program.call(
      params, tokens, lengths, state, logits
    )[1]
    self.read(self.empty(), 1)

  def empty(self):
    return init_state(self._config, 1, self._max_length)

  def read(self, state, chunks):
    """State after so many chunks, and the seconds they took."""
    reading = timing.Chain(self._read, state)
    seconds = chunks * reading.seconds(chunks)
    return reading.state, seconds


def prefill(
  subjects: list[Subject],
  lengths: list[int],
  rounds: int,
  chunk: int,
  most_seconds: float,
) -> list[Row]:
  """Rows of the time to read a prompt, at most `most_seconds`."""
  last: dict[str, tuple[int, float]] = {}
  kept: dict[Any, _Reader] = {}
  result = []
  for length in tqdm.tqdm(lengths, desc="prefill", disable=None):
    readers = []
    for subject in subjects:
      row = subject.row("prefill", 1, length) | {"chunk": min(chunk, length)}
      result.append(row)
      # Full attention takes up to four times as long for twice the tokens.
      power = 2 if has_growing_cache(subject.config) else 1
      before, seconds = last.get(subject.name, (length, 0.0))
      expected = seconds * (length / before) ** power
      if expected > most_seconds:
        row["note"] = f"not run: may take {expected:.0f} s"
        last[subject.name] = length, expected
        continue
      grows = has_growing_cache(subject.config)
      key = subject.name, row["chunk"], length if grows else None
      if key not in kept:
        kept[key] = _Reader(subject, length, row["chunk"])
      readers.append((subject, row, kept[key], []))
    for _ in range(rounds):
      for _, row, reader, times in readers:
        if sum(times) < most_seconds / 2:
          times.append(reader.read(reader.empty(), length // row["chunk"])[1])
    for subject, row, reader, times in readers:
      row |= _rates(times, length) | reader.memory
      last[subject.name] = length, row["ms"] / 1e3
  return result


def constancy(
  subjects: list[Subject], lengths: list[int], rounds: int, chunk: int
) -> list[Row]:
  """Rows of a token's time and memory after prompts of tokens.

  The states after all lengths are kept, so that their steps take turns.
  """
  measured = []
  for subject in subjects:
    reader, read = _Reader(subject, None, chunk), 0
    state, step = reader.empty(), None
    label = f"{subject.name}, long prompts"
    for length in tqdm.tqdm(lengths, desc=label, disable=None):
      state, seconds = reader.read(state, (length - read) // chunk)
      row = subject.row("constancy", 1, length)
      row["tokens_read"] = int(state.position[0])
      row["prefill_us_per_token"] = 1e6 * seconds / (length - read)
      row["process_bytes"] = _process_bytes()
      row["finite"] = _is_finite(state)
      step = step or _compile_step(subject, state)
      copy = jax.tree.map(jnp.copy, state)
      row["state_bytes"] = serve_models.bytes_of(copy)
      row["temp_bytes"] = step.temp_bytes
      measured.append((row, _steps(step, subject, copy), []))
      read = length
  for _ in range(rounds):
    for _, steps, times in measured:
      times.append(steps.seconds(16))
  for row, _, times in measured:
    row |= _rates(times, 1)
  return [row for row, *_ in measured]


def _rates(times, tokens):
  """Milliseconds and tokens per second of calls that read `tokens` each."""
  ms = [1e3 * t for t in times]
  return {
    "ms": statistics.median(ms),
    "ms_min": min(ms),
    "ms_max": max(ms),
    "rounds": len(ms),
    "tokens_per_s": tokens * 1e3 / statistics.median(ms),
  }


def _is_finite(state):
  leaves = jax.tree.leaves(state.cache)
  return all(bool(jnp.isfinite(a).all()) for a in leaves)


def _process_bytes():
  """Memory in use: of the device, on a CPU of the process."""
  stats = jax.devices()[0].memory_stats()
  if stats and "bytes_in_use" in stats:
    return stats["bytes_in_use"]
  try:
    with open("/proc/self/statm") as f:
      return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
  except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
