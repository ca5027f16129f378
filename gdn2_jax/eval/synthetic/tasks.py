"""Synthetic tasks that ask what a memory of fixed size keeps and gives up.

Examples are functions of (seed, index) alone: any process draws any part of a
stream, in any order. Every task asks for all its keys at the end.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from gdn2_jax.eval.synthetic.steps import (
  FIRST_NOISE,
  FIRST_VALUE,
  KEYS,
  NOISE,
  NONE,
  QUERY,
  QUERY_SECOND,
  RESET,
  RESET_GROUP,
  VALUES,
  Example,
  ask,
  assemble,
  integers,
  last_write,
  order,
  uniforms,
  write_order,
)


@runtime_checkable
class Task(Protocol):
  """A distribution of examples of one shape."""

  groups: ClassVar[tuple[str, ...]]

  def example(self, key: jax.Array) -> Example:
    """Draws one example."""
    ...


@dataclasses.dataclass(frozen=True)
class Recall:
  """Associative recall: each key is bound once.

  Attributes:
    pairs: Bindings, all of which are asked for.
  """

  pairs: int = 32
  groups: ClassVar[tuple[str, ...]] = ("bound",)

  def __post_init__(self):
    _check(self, "pairs", 1, KEYS)

  def example(self, key: jax.Array) -> Example:
    """Draws one example, of 2 * pairs steps."""
    u = uniforms(key, KEYS, self.pairs, self.pairs)
    ids = order(u[0])[: self.pairs]
    values = FIRST_VALUE + integers(u[1], 0, VALUES)
    asked = order(u[2])
    context = jnp.stack([ids, values], axis=-1)
    return assemble(
      context, ask(ids[asked]), values[asked], jnp.zeros_like(asked)
    )


@dataclasses.dataclass(frozen=True)
class Overwrite:
  """Keys that are bound again: the newest value counts.

  Attributes:
    hot: Keys that share all writes but those of the cold keys.
    cold: Keys bound once, at random steps; overwriting others must not touch
      them.
    writes: Writes in all.
  """

  hot: int = 8
  cold: int = 16
  writes: int = 48
  groups: ClassVar[tuple[str, ...]] = ("hot", "cold")

  def __post_init__(self):
    _check(self, "hot", 1, KEYS)
    _check(self, "cold", 0, KEYS - self.hot)
    _check(self, "writes", self.hot + self.cold)

  def example(self, key: jax.Array) -> Example:
    """Draws one example, of writes + hot + cold steps."""
    n, M = self.hot + self.cold, self.writes
    u = uniforms(key, KEYS, M - n, M, M, n)
    ids = order(u[0])[:n]
    again = integers(u[1], 0, self.hot)
    which = jnp.concatenate([jnp.arange(n), again])[order(u[2])]
    values = FIRST_VALUE + integers(u[3], 0, VALUES)
    last = last_write(which, n)
    asked = order(u[4])
    context = jnp.stack([ids[which], values], axis=-1)
    return assemble(
      context, ask(ids[asked]), values[last][asked], asked >= self.hot
    )


@dataclasses.dataclass(frozen=True)
class SetAdd:
  """Writes that replace and writes that keep: erasing is a choice per token.

  A value of the lower half is a SET: the key holds it as its first attribute
  and nothing else. A value of the upper half is an ADD: it becomes the second
  attribute and leaves the first. Queries ask for one of both; the second may be
  NONE.

  Attributes:
    keys: Keys, each written at least once.
    writes: Writes in all.
    add: Probability that a write is an ADD where one is possible, to a key that
      has a first and no second attribute.
  """

  keys: int = 12
  writes: int = 48
  add: float = 0.6
  groups: ClassVar[tuple[str, ...]] = ("first", "second")

  def __post_init__(self):
    _check(self, "keys", 1, KEYS)
    _check(self, "writes", self.keys)
    if not 0 <= self.add <= 1:
      raise ValueError(f"SetAdd: add={self.add}: expected 0 to 1")

  def example(self, key: jax.Array) -> Example:
    """Draws one example, of writes + keys steps."""
    n, M, half = self.keys, self.writes, VALUES // 2
    u = uniforms(key, KEYS, n, M - n, M, M, M, M, n, n)
    ids = order(u[0])[:n]
    which = write_order(*u[1:4])
    sets = FIRST_VALUE + integers(u[4], 0, half)
    adds = FIRST_VALUE + integers(u[5], half, VALUES)
    wants = u[6] < self.add

    def write(held, step):
      first, second = held
      at, set_value, add_value, wants_add = step
      adds_here = wants_add & (first[at] != NONE) & (second[at] == NONE)
      value = jnp.where(adds_here, add_value, set_value)
      first = first.at[at].set(jnp.where(adds_here, first[at], value))
      second = second.at[at].set(jnp.where(adds_here, value, NONE))
      return (first, second), value

    nothing = jnp.full(n, NONE)
    (first, second), values = jax.lax.scan(
      write, (nothing, nothing), (which, sets, adds, wants)
    )
    asked, is_second = order(u[7]), u[8] < 0.5
    queries = ask(ids[asked], jnp.where(is_second, QUERY_SECOND, QUERY))
    answers = jnp.where(is_second, second[asked], first[asked])
    context = jnp.stack([ids[which], values], axis=-1)
    return assemble(context, queries, answers, is_second)


@dataclasses.dataclass(frozen=True)
class Reset:
  """One step that clears half of the keys and leaves the other half.

  The lower half of the key vocabulary is group 0, the upper half group 1. A
  reset in the third quarter of the context clears one group; a key that was not
  bound since then holds NONE.

  Attributes:
    keys: Keys in all, an even number, half of each group.
    writes: Writes; the reset is one more step.
  """

  keys: int = 16
  writes: int = 48
  groups: ClassVar[tuple[str, ...]] = ("kept", "cleared")

  def __post_init__(self):
    _check(self, "keys", 2, KEYS)
    _check(self, "writes", self.keys)
    if self.keys % 2:
      raise ValueError(f"Reset: keys={self.keys}: expected an even number")

  def example(self, key: jax.Array) -> Example:
    """Draws one example, of writes + 1 + keys steps."""
    n, M, half = self.keys, self.writes, KEYS // 2
    u = uniforms(key, half, half, n, M - n, M, M, 1, 1, n)
    ids = [order(u[0])[: n // 2], half + order(u[1])[: n // 2]]
    ids = jnp.concatenate(ids)
    which = write_order(*u[2:5])
    values = FIRST_VALUE + integers(u[5], 0, VALUES)
    group, at = integers(u[6], 0, 2)[0], integers(u[7], M // 2, 3 * M // 4)[0]
    last = last_write(which, n)
    is_cleared = (jnp.arange(n) >= n // 2) == group
    answers = jnp.where(is_cleared & (last < at), NONE, values[last])
    written = jnp.stack([ids[which], values], axis=-1)
    reset = jnp.stack([RESET_GROUP + group, jnp.int32(RESET)])
    context = jnp.insert(written, at, reset, axis=0)
    asked = order(u[8])
    return assemble(context, ask(ids[asked]), answers[asked], is_cleared[asked])


@dataclasses.dataclass(frozen=True)
class Noise:
  """Recall among steps to ignore: any key with a value of the noise vocabulary.

  Attributes:
    pairs: Bindings, all of which are asked for.
    steps: Steps of the context, bindings and noise together.
  """

  pairs: int = 16
  steps: int = 64
  groups: ClassVar[tuple[str, ...]] = ("bound",)

  def __post_init__(self):
    _check(self, "pairs", 1, KEYS)
    _check(self, "steps", self.pairs)

  def example(self, key: jax.Array) -> Example:
    """Draws one example, of steps + pairs steps."""
    n, M = self.pairs, self.steps
    u = uniforms(key, KEYS, n, M, M, M, n)
    ids, at = order(u[0])[:n], order(u[2])[:n]
    values = FIRST_VALUE + integers(u[1], 0, VALUES)
    others, noise = integers(u[3], 0, KEYS), integers(u[4], 0, NOISE)
    context = jnp.stack(
      [others.at[at].set(ids), (FIRST_NOISE + noise).at[at].set(values)],
      axis=-1,
    )
    asked = order(u[5])
    return assemble(
      context, ask(ids[asked]), values[asked], jnp.zeros_like(asked)
    )


TASKS: dict[str, type] = {
  "recall": Recall,
  "overwrite": Overwrite,
  "setadd": SetAdd,
  "reset": Reset,
  "noise": Noise,
}


def examples(
  task: Task, seed: int | jax.Array, first: int | jax.Array, size: int
) -> Example:
  """Draws examples first, first + 1, ... of the stream of a seed.

  Args:
    task: Distribution of examples.
    seed: Number of the stream, which may be traced.
    first: Index of the first example, which may be traced.
    size: Number of examples B.

  Returns:
    Arrays with a leading axis B.
  """
  stream = jax.random.key(seed)
  indices = first + jnp.arange(size)
  keys = jax.vmap(lambda index: jax.random.fold_in(stream, index))(indices)
  return jax.vmap(task.example)(keys)


def _check(task: Task, name: str, low: int, high: int | None = None) -> None:
  """Raises unless a field is a whole number in a range."""
  value = getattr(task, name)
  if not isinstance(value, int) or value < low or (high and value > high):
    upper = "" if high is None else f" to {high}"
    raise ValueError(
      f"{type(task).__name__}: {name}={value}: expected a whole number >= {low}"
      if not upper
      else f"{type(task).__name__}: {name}={value}: expected {low}{upper}"
    )
