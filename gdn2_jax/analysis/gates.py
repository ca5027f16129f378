"""Gates of a language model over given tokens, and their half-lives."""

import copy
import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Num

from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM
from gdn2_jax.model.mixers.registry import kinds_of

# Symbols of a recurrence that a layer sows.
NAMES = ("q", "k", "v", "g", "b", "w", "o")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGates:
  """Inputs and outputs of the recurrence of one layer, float32.

  Attributes:
    layer: index of the layer in the model, from 0, attention layers counted.
    q, k: queries and keys [B, T, H, K], l2-normalised except in Mamba-2.
    v: values [B, T, HV, V].
    g: log-decay [B, T, H, K], <= 0.
    b: erase gate [B, T, H, K].
    w: write gate [B, T, HV, V].
    o: outputs of the recurrence [B, T, HV, V], before the gated norm.
  """

  layer: int
  q: Float[np.ndarray, "B T H K"]
  k: Float[np.ndarray, "B T H K"]
  v: Float[np.ndarray, "B T HV V"]
  g: Float[np.ndarray, "B T H K"]
  b: Float[np.ndarray, "B T H K"]
  w: Float[np.ndarray, "B T HV V"]
  o: Float[np.ndarray, "B T HV V"]


def collect_gates(
  config: ModelConfig,
  params: Any,
  tokens: Int[Array | np.ndarray, "B T"],
  segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
) -> list[LayerGates]:
  """Runs the model and records every layer with gates, in layer order.

  Args:
    config: model config; layers may be scanned or not.
    params: unboxed parameters of LM(config).
    tokens: ids [B, T].
    segment_ids: [B, T], as in `gdn2_jax.gdn2`; None is one document.

  Raises:
    ValueError: no layer of the pattern has these gates.
  """
  layers = layers_with(config, NAMES)
  if not layers:
    raise ValueError(
      f"config.pattern={config.pattern!r}: expected at least one layer whose "
      f"mixer shows {', '.join(NAMES)}"
    )
  # A copy: jit keeps the config as a cache key, and callers may change theirs.
  seen = _intermediates(copy.deepcopy(config), params, tokens, segment_ids)
  records = []
  for layer, group, place in layers:
    sown = sown_values(seen, config, group, place, NAMES)
    arrays = {name: np.asarray(x, np.float32) for name, x in sown.items()}
    records.append(LayerGates(layer=layer, **arrays))
  return records


def layers_with(
  config: ModelConfig, names: Collection[str]
) -> list[tuple[int, int, int]]:
  """(layer, group, place in the group) of layers that sow all these symbols."""
  kinds = kinds_of(config.pattern)
  size = len(config.pattern)
  return [
    (group * size + place, group, place)
    for group in range(config.num_groups)
    for place, letter in enumerate(config.pattern)
    if set(names) <= set(kinds[letter].gates)
  ]


def sown_values(
  seen: Any,
  config: ModelConfig,
  group: int,
  place: int,
  names: Collection[str],
) -> dict[str, Array]:
  """Arrays of these symbols that a layer has sown, by symbol."""
  name = "groups" if config.scan_layers else f"group_{group}"
  sown = seen[name][f"layer_{place}"]["mixer"]
  arrays = {}
  for symbol in names:
    (value,) = sown[symbol]  # sow appends; a mixer runs once
    arrays[symbol] = value[group] if config.scan_layers else value
  return arrays


def sow(config: ModelConfig, params: Any, tokens: Any, segment_ids: Any) -> Any:
  """Everything that the layers sow when the model reads tokens [B, T]."""
  _, seen = LM(config).apply(
    {"params": params},
    tokens,
    segment_ids,
    method="hidden",
    mutable=["intermediates"],
  )
  return seen["intermediates"]


_intermediates = jax.jit(sow, static_argnums=0)


def half_life(g: Num[Array | np.ndarray, "*any"]) -> np.ndarray:
  """Half-life in tokens of a channel that decays by exp(g), ln 2 / -g.

  Erasing is not included: a repeated key shortens the memory further.

  Args:
    g: log-decay per token, any shape, <= 0.

  Returns:
    Tokens, float64, of the same shape; inf where g is 0.

  Raises:
    ValueError: a positive or NaN entry.
  """
  g = np.asarray(g, np.float64)
  if not np.all(g <= 0):
    raise ValueError(f"g: a maximum of {g.max()}, expected log-decay <= 0")
  with np.errstate(divide="ignore", over="ignore"):
    # 0.0 - g, because -g is -0.0 where g is 0, and the quotient -inf.
    return np.asarray(math.log(2) / (0.0 - g))


def effective_memory(
  g: Float[Array | np.ndarray, "B T H K"],
  segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
) -> np.ndarray:
  """Half-life of every head and channel over a text [H, K].

  Decays multiply, so the rate over a text is the mean of g. A channel that
  clears itself on a few tokens is short-lived, whatever its median gate.

  Args:
    g: log-decay [B, T, H, K], <= 0.
    segment_ids: [B, T]; padding (0) is left out of the mean.

  Raises:
    ValueError: no token to average over, or a positive entry.
  """
  g = np.asarray(g, np.float64)
  real = np.ones(g.shape[:2], bool)
  if segment_ids is not None:
    real = np.asarray(segment_ids) != 0
  if not real.any():
    raise ValueError("segment_ids: all 0, expected at least one token")
  return half_life(g[real].mean(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoupling:
  """Distance of the gates of each value head from one shared number [HV].

  All three are 0 if b = w = beta, a scalar per token and head.

  Attributes:
    erase_spread: standard deviation of b over key channels, mean over tokens.
    write_spread: standard deviation of w over value channels, likewise.
    gap: |mean of b - mean of w|, mean over tokens.
  """

  erase_spread: Float[np.ndarray, "HV"]
  write_spread: Float[np.ndarray, "HV"]
  gap: Float[np.ndarray, "HV"]


def decoupling(
  b: Float[Array | np.ndarray, "B T H K"],
  w: Float[Array | np.ndarray, "B T HV V"],
) -> Decoupling:
  """Measures how much b and w vary over channels and differ.

  Args:
    b: erase gate [B, T, H, K].
    w: write gate [B, T, HV, V], HV a multiple of H.
  """
  b, w = np.asarray(b, np.float64), np.asarray(w, np.float64)
  repeats = w.shape[2] // b.shape[2]
  b_mean = b.mean(-1).repeat(repeats, axis=2)
  return Decoupling(
    erase_spread=b.std(-1).mean((0, 1)).repeat(repeats),
    write_spread=w.std(-1).mean((0, 1)),
    gap=np.abs(b_mean - w.mean(-1)).mean((0, 1)),
  )
