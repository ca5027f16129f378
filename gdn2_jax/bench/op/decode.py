"""Time of gdn2_step against copying its state."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from gdn2_jax.bench import timing
from gdn2_jax.ops.gdn2.api import gdn2_step

H, K, V = 16, 128, 128


def run(rounds: int, batch_sizes: tuple[int, ...] = (1, 4, 16, 32, 64)) -> dict:
  """Times a step with a donated state, and a copy of the state."""
  result: dict[str, Any] = {"H": H, "K": K, "V": V, "rows": []}
  for B in tqdm.tqdm(batch_sizes, desc="decode", disable=None):
    token = _token(B)
    state = jnp.ones((B, H, K, V))
    moved = 2 * state.nbytes
    step = timing.compile_function(
      lambda state, *token: gdn2_step(*token, state),
      (state, *token),
      donate_argnums=0,
    )
    calls = max(8, 256 // B)
    steps = timing.Chain(functools.partial(_advance, step, token), state)
    steps.seconds(1)
    measured = {"step": steps, "copy": timing.Copy(moved)}
    step_s, copy_s = timing.race(
      {n: functools.partial(x.seconds, calls) for n, x in measured.items()},
      rounds,
    ).values()
    result["rows"].append(
      {
        "B": B,
        "state_bytes": moved // 2,
        "step_us": step_s * 1e6,
        "copy_us": copy_s * 1e6,
        "step_gb_per_s": moved / step_s / 1e9,
        "copy_gb_per_s": moved / copy_s / 1e9,
        "fraction_of_copy": copy_s / step_s,
      }
    )
  return result


def _advance(step, token, state):
  return step.call(state, *token)[1]


def table(result: dict) -> list[str]:
  """Lines for the terminal."""
  return [
    f"decode B={row['B']:<3} {row['step_us']:9.0f} us/token,"
    f" {row['step_gb_per_s']:5.1f} GB/s,"
    f" {100 * row['fraction_of_copy']:3.0f}% of copying the state"
    for row in result["rows"]
  ]


def _token(B):
  keys = jax.random.split(jax.random.key(0), 6)
  normal = jax.random.normal
  q, k = (normal(key, (B, H, K)) * K**-0.5 for key in keys[:2])
  v = normal(keys[2], (B, H, V))
  g = -jax.random.uniform(keys[3], (B, H, K))
  b, w = (jax.nn.sigmoid(normal(key, (B, H, K))) for key in keys[4:])
  return q, k, v, g, b, w
