"""Runs of a model in which one head of one layer has changed gates."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from gdn2_jax.analysis.gates import NAMES, sown_values
from gdn2_jax.explore.changes import Change, change_gates
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM, without_stacks
from gdn2_jax.model.mixers.gate_hook import changed_gates, has_gate_hook


@dataclasses.dataclass(frozen=True)
class Place:
  """A value head of a layer.

  Attributes:
    layer: index of the layer in the model, from 0.
    head: index of the value head, from 0. A change of its gates is one of its
      key head, which further value heads may share.
  """

  layer: int
  head: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
  """Arrays of one head in one run, float32, as the recurrence got them.

  Attributes:
    q, k: queries and keys [T, K].
    v: values [T, V].
    g: log-decay [T, K].
    b: erase gate [T, K].
    w: write gate [T, V].
    o: outputs [T, V].
  """

  q: Float[np.ndarray, "T K"]
  k: Float[np.ndarray, "T K"]
  v: Float[np.ndarray, "T V"]
  g: Float[np.ndarray, "T K"]
  b: Float[np.ndarray, "T K"]
  w: Float[np.ndarray, "T V"]
  o: Float[np.ndarray, "T V"]

  def first(self, tokens: int) -> "Head":
    """The same arrays of the first tokens."""
    return Head(**{name: getattr(self, name)[:tokens] for name in NAMES})


def layers_to_explore(config: ModelConfig) -> list[int]:
  """Layers whose gates can be changed: Gated DeltaNet-2 and its relatives.

  Raises:
    ValueError: there is none.
  """
  hooked = {x for x in config.pattern if has_gate_hook(x, config)}
  size = len(config.pattern)
  layers = [
    i for i in range(config.num_layers) if config.pattern[i % size] in hooked
  ]
  if not layers:
    raise ValueError(
      f"config.pattern={config.pattern!r}: expected at least one layer with "
      "the gates g, b and w, such as 'G'"
    )
  return layers


@dataclasses.dataclass(frozen=True)
class Runner:
  """A model whose layers can be changed one by one; `make_runner` makes it.

  Attributes:
    config: config with a layer's parameters by themselves.
    params: parameters that fit it.
    layers: layers that can be changed.
  """

  config: ModelConfig
  params: Any
  layers: tuple[int, ...]

  @property
  def heads(self) -> int:
    """Value heads of each of these layers."""
    return self.config.gdn2.value_heads

  def run(
    self,
    tokens: Int[np.ndarray, " T"],
    places: Sequence[Place],
    changes: Sequence[Change],
  ) -> tuple[Float[np.ndarray, "B T VOCAB"], list[Head]]:
    """Runs the model on the same tokens once for every place and change.

    The layers after the changed one see its changed outputs. A number of rows
    and tokens that is new compiles a program.

    Args:
      tokens: ids [T].
      places: B heads.
      changes: B changes of their gates.

    Returns:
      Logits [B, T, VOCAB], and the arrays of the head of each row.

    Raises:
      ValueError: a layer or head that there is not, or a wrong factor.
    """
    for place, change in zip(places, changes, strict=True):
      self.check(place)
      change.check()
    logits, seen = _forward(
      self.params,
      jnp.broadcast_to(jnp.asarray(tokens), (len(places), len(tokens))),
      np.array([[p.layer, p.head] for p in places], np.int32),
      np.array([change.knobs for change in changes], np.float32),
      config=self.config,
    )
    seen = {name: np.asarray(x, np.float32) for name, x in seen.items()}
    rows = [
      Head(**{name: x[row] for name, x in seen.items()})
      for row in range(len(places))
    ]
    return np.asarray(logits, np.float32), rows

  def check(self, place: Place) -> None:
    """Raises ValueError unless the layer and the head can be changed."""
    if place.layer not in self.layers:
      known = ", ".join(map(str, self.layers))
      raise ValueError(f"layer={place.layer}: expected one of {known}")
    if not 0 <= place.head < self.heads:
      raise ValueError(f"head={place.head}: expected 0 to {self.heads - 1}")


def make_runner(config: ModelConfig, params: Any) -> Runner:
  """Prepares a model for runs with changed gates.

  Args:
    config: model config; layers may be scanned or not.
    params: unboxed parameters of LM(config).

  Raises:
    ValueError: no layer has gates that can be changed.
  """
  layers = layers_to_explore(config)
  # No loop over layers: a scan's body is one for all groups.
  config = dataclasses.replace(config, scan_unroll=0, remat="none")
  params, config = without_stacks(params, config)
  return Runner(config, params, tuple(layers))


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, tokens, places, knobs, *, config):
  """Logits, and the arrays of the head of each row."""
  size = len(config.pattern)
  repeats = config.gdn2.value_heads // config.gdn2.num_heads
  rows, layer, head = jnp.arange(len(tokens)), places[:, 0], places[:, 1]
  neutral = jnp.asarray(Change().knobs)

  def change(path, g, b, w):
    index = size * _number(path[0]) + _number(path[1])
    key_heads = jnp.arange(b.shape[2])[None]
    here = (layer == index)[:, None] & (key_heads == (head // repeats)[:, None])
    return change_gates(
      g,
      b,
      w,
      jnp.where(here[..., None], knobs[:, None], neutral[None, None]),
    )

  with changed_gates(change):
    (logits, _), seen = LM(config).apply(
      {"params": params}, tokens, mutable=["intermediates"]
    )
  chosen = {}
  for index in layers_to_explore(config):
    group, place = divmod(index, size)
    sown = sown_values(seen["intermediates"], config, group, place, NAMES)
    for name, x in sown.items():
      heads = head if name in "vwo" else head // repeats
      x = x[rows, :, heads].astype(jnp.float32)
      here = (layer == index)[:, None, None]
      chosen[name] = jnp.where(here, x, chosen.get(name, jnp.zeros_like(x)))
  return logits, chosen


def _number(name: str) -> int:
  return int(name.rsplit("_", 1)[1])
