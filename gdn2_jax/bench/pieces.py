"""`python -m gdn2_jax.bench pieces`: waits of others while a prompt is read.

Answers are decoded in all rows but one. In turns, nothing else happens, or a
long prompt is read in pieces into the last row. The time of a token is that of
its step, divided by the tokens that each answer got in it.
"""

import os
import pathlib
import statistics
import time
from typing import Any

import jax
from absl import flags

from gdn2_jax.bench.results import environment, write_json
from gdn2_jax.inference.batching import Batcher
from gdn2_jax.inference.sampling import GREEDY

_ANSWER = 1 << 20  # tokens: the answers never end
_KEY = 0


def define_flags() -> None:
  """Defines the flags that no other benchmark has."""
  flags.DEFINE_integer("prompt_tokens", 8192, "pieces: tokens of the prompt")
  flags.DEFINE_integer("slots", 8, "pieces: rows of the batch, >= 2")
  flags.DEFINE_list("pieces", ["64", "128", "512"], "pieces: tokens of a piece")


def main(values: Any) -> None:
  """Runs the benchmark, prints its table, writes JSON."""
  pieces = []
  for text in values.pieces:
    if not (text.isascii() and text.isdigit() and int(text)):
      raise ValueError(f"--pieces={text}: expected numbers such as 64")
    pieces.append(int(text))
  for name, least in (("prompt_tokens", 2), ("slots", 2), ("rounds", 1)):
    value = getattr(values, name)
    if value < least:
      raise ValueError(f"--{name}={value}: expected >= {least}")
  result = run(values.prompt_tokens, values.slots, pieces, values.rounds)
  print(f"{result['device']} ({result['cpu']}), {result['cores']} cores")
  for row in result["results"]:
    print(
      f"piece {row['piece']:4d}: p99 of a token {1e3 * row['idle_p99_s']:.3f} "
      f"ms idle, {1e3 * row['reading_p99_s']:.3f} ms while {row['prompt']} "
      f"tokens are read: {row['ratio']:.2f} times"
    )
  if values.json:
    write_json(pathlib.Path(values.json), result)


def run(
  prompt: int, rows: int, pieces: list[int], rounds: int
) -> dict[str, Any]:
  """Measures every size of a piece; JSON values, wall time."""
  from gdn2_jax.bench.serve import models

  config = models.make_configs(models.PRESETS["tiny"], "float32", ("GDN-2",))[
    "GDN-2"
  ]
  params = models.random_params(config)
  results = []
  for piece in pieces:
    batcher = Batcher(params, config, rows, prefill_piece=piece)
    _measure(batcher, prompt, rows, 1)  # compiles
    idle, reading = _measure(batcher, prompt, rows, rounds)
    p99 = [statistics.quantiles(x, n=100)[98] for x in (idle, reading)]
    results.append(
      {
        "piece": piece,
        "prompt": prompt,
        "idle_p99_s": p99[0],
        "reading_p99_s": p99[1],
        "ratio": p99[1] / p99[0],
        "idle_median_s": statistics.median(idle),
        "reading_median_s": statistics.median(reading),
        "tokens": [len(idle), len(reading)],
      }
    )
  cores = len(os.sched_getaffinity(0))
  return environment() | {
    "clock": "wall time",
    "cores": cores,
    "preset": "tiny",
    "rows": rows,
    "rounds": rounds,
    "results": results,
  }


def _measure(batcher, prompt, rows, rounds):
  """Seconds of every token of the first answer, idle and while reading."""
  rng = jax.random.key(_KEY)
  others = [
    batcher.submit([i + 1], _ANSWER, rng=rng, sampler=GREEDY)
    for i in range(rows - 1)
  ]
  batcher.step()
  watched, idle, reading = others[0], [], []

  def step(times):
    before, start = len(watched.tokens), time.perf_counter()
    batcher.step()
    count = len(watched.tokens) - before
    times += [(time.perf_counter() - start) / count] * count

  for _ in range(rounds):
    long = batcher.submit([1] * prompt, 1, rng=rng, sampler=GREEDY)
    steps = 0
    while not long.done:
      step(reading)
      steps += 1
    for _ in range(steps):
      step(idle)
  for other in others:
    other.cancel()
  batcher.run()
  return idle, reading
