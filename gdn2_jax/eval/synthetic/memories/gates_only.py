"""Tiny memories in which only gates and readout are learned, many at once.

One head of Gated DeltaNet-2 reads steps (key, value). Keys and values are fixed
random directions, so what a memory can hold is the same for all; learned are
the gates of a token, as functions of its value, and a linear readout per kind
of query. A variant restricts the gates, everything else is equal.

All models of a call train in one program, vmapped over tasks, variants, seeds.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from gdn2_jax.eval.synthetic.steps import (
  FIRST_VALUE,
  KEYS,
  NO_LABEL,
  QUERY,
  QUERY_SECOND,
  VALUES,
  VOCAB_SIZE,
  Example,
)
from gdn2_jax.eval.synthetic.tasks import Task, examples
from gdn2_jax.eval.synthetic.train import SCORED_STREAM
from gdn2_jax.ops.gdn2.api import MIN_HEAD_DIM, gdn2

VARIANTS = ("decoupled", "tied", "no erase")
STEP_KINDS = ("SET", "ADD", "query")
DIM = MIN_HEAD_DIM  # K = V
_FEATURES = 16


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Training of all models.

  Attributes:
    steps: Optimizer steps.
    batch_size: Sequences of a step, never drawn twice.
    lr: Peak learning rate of Adam, with a cosine to 0.
    scored: Sequences that score a model.
  """

  steps: int = 250
  batch_size: int = 32
  lr: float = 3e-2
  scored: int = 256


@dataclasses.dataclass(frozen=True)
class Trained:
  """Models of one call; leading axes are tasks, variants and seeds.

  Attributes:
    tasks: In the order of the first axis.
    variants: In the order of the second.
    losses: Training loss, [tasks, variants, seeds, steps].
    accuracy: By group of query, [tasks, variants, seeds, 2].
    example: Scored sequences of each task, arrays [tasks, scored, T, ...].
    erase: b at every step of them, [tasks, variants, seeds, scored, T, K].
    write: w likewise, [..., V].
    params: Of the models, leading axes [tasks, variants, seeds].
  """

  tasks: tuple[Task, ...]
  variants: tuple[str, ...]
  losses: np.ndarray
  accuracy: np.ndarray
  example: Example
  erase: np.ndarray
  write: np.ndarray
  params: dict[str, np.ndarray]


def train_together(
  tasks: Sequence[Task],
  seeds: Sequence[int],
  schedule: Schedule | None = None,
  variants: Sequence[str] = VARIANTS,
) -> Trained:
  """Trains one model per task, variant and seed, in one program.

  Models of one seed see the same sequences and start from the same values.

  Args:
    tasks: With sequences of one length and two groups of queries.
    seeds: Of the initial values and of the data.
    schedule: None: the default.
    variants: Some of VARIANTS. "tied" uses w for b, the mean over its channels;
      "no erase" sets b = 0.

  Raises:
    ValueError: a variant is unknown, or the tasks differ in length.
  """
  schedule = schedule or Schedule()
  for name in variants:
    if name not in VARIANTS:
      raise ValueError(f"variants={name!r}: expected some of {VARIANTS}")
  shapes = {_shape(task) for task in tasks}
  if len(shapes) != 1:
    raise ValueError(
      f"tasks: sequences of {sorted(shapes)} steps, expected one length"
    )
  names = [VARIANTS.index(name) for name in variants]
  run = jax.jit(
    functools.partial(_train_all, tuple(tasks), schedule),
  )
  found = run(jnp.asarray(names), jnp.asarray(seeds))
  return Trained(
    tuple(tasks), tuple(variants), *jax.tree.map(np.asarray, found)
  )


def accuracy_on(
  trained: Trained, task: Task, scored: int = 256
) -> Float[np.ndarray, "tasks variants seeds 2"]:
  """Accuracy of all models on another task, by its groups of queries."""
  example = jax.jit(lambda: examples(task, SCORED_STREAM, 0, scored))()
  names = jnp.asarray([VARIANTS.index(name) for name in trained.variants])

  def share(params, variant, example):
    return _score(params, variant, example)[0]

  over_seeds = jax.vmap(share, (0, None, None))
  over_variants = jax.vmap(over_seeds, (0, 0, None))
  over_tasks = jax.jit(jax.vmap(over_variants, (0, None, None)))
  return np.asarray(over_tasks(trained.params, names, example))


def _shape(task: Task) -> int:
  """Steps of a sequence."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(task.example, key).labels.shape[0]


def kinds_of_steps(
  tokens: Int[np.ndarray, "*B T 2"],
) -> dict[str, np.ndarray]:
  """Masks of the steps of SetAdd by kind, each [*B, T]."""
  values = np.asarray(tokens)[..., 1]
  is_value = (values >= FIRST_VALUE) & (values < FIRST_VALUE + VALUES)
  upper = values >= FIRST_VALUE + VALUES // 2
  query = (values == QUERY) | (values == QUERY_SECOND)
  masks = (is_value & ~upper, is_value & upper, query)
  return dict(zip(STEP_KINDS, masks, strict=True))


def _codes() -> tuple[Float[Array, "KEYS K"], Float[Array, "VOCAB V"]]:
  """Fixed unit keys, and value codes of norm 1; markers have none."""
  rng = np.random.default_rng(0)
  keys, values = rng.normal(size=(KEYS, DIM)), rng.normal(size=(VALUES, DIM))
  codes = np.zeros((VOCAB_SIZE, DIM))
  codes[FIRST_VALUE : FIRST_VALUE + VALUES] = values
  keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
  codes /= np.maximum(np.linalg.norm(codes, axis=-1, keepdims=True), 1e-6)
  return jnp.asarray(keys, jnp.float32), jnp.asarray(codes, jnp.float32)


def _init(seed: Int[Array, ""]) -> dict[str, Array]:
  """Initial values: gates at 1/2, hardly any decay."""
  a, b = jax.random.split(jax.random.key(seed))
  return {
    "features": jax.random.normal(a, (VOCAB_SIZE, _FEATURES)),
    "erase": jnp.zeros((_FEATURES, DIM)),
    "write": jnp.zeros((_FEATURES, DIM)),
    "rate": jnp.full(DIM, -5.0),
    "readout": 0.1 * jax.random.normal(b, (2, DIM, VOCAB_SIZE)),
    "bias": jnp.zeros((2, VOCAB_SIZE)),
  }


def _run(
  params: dict[str, Array], variant: Int[Array, ""], tokens: Int[Array, "B T 2"]
) -> tuple[Float[Array, "B T VOCAB"], Float[Array, "B T K"], Array]:
  """Logits, and the gates b and w after the variant's restriction."""
  keys, codes = _codes()
  key, value = tokens[..., 0], tokens[..., 1]
  k, v = keys[jnp.minimum(key, KEYS - 1)], codes[value]
  f = params["features"][value]
  b = jax.nn.sigmoid(f @ params["erase"])
  w = jax.nn.sigmoid(f @ params["write"])
  tied = jnp.broadcast_to(w.mean(-1, keepdims=True), w.shape)
  b = jnp.stack([b, tied, jnp.zeros_like(b)])[variant]
  w = jnp.stack([w, tied, w])[variant]
  g = jnp.broadcast_to(-jax.nn.softplus(params["rate"]), k.shape)
  heads = [x[:, :, None] for x in (k, k, v, g, b, w)]
  o, _ = gdn2(*heads, scale=1.0, implementation="reference")
  second = (value == QUERY_SECOND).astype(jnp.int32)
  by_kind = jnp.einsum("btv,mvn->mbtn", o[:, :, 0], params["readout"])
  by_kind = by_kind + params["bias"][:, None, None, :]
  logits = jnp.where((second == 1)[..., None], by_kind[1], by_kind[0])
  return logits, b, w


def _loss(params, variant, example):
  logits, _, _ = _run(params, variant, example.tokens)
  asked = example.labels != NO_LABEL
  each = optax.softmax_cross_entropy_with_integer_labels(
    logits, jnp.where(asked, example.labels, 0)
  )
  return jnp.where(asked, each, 0.0).sum() / asked.sum()


def _draw(tasks, seed, first, size) -> Example:
  """The same part of the stream of each task, stacked."""
  drawn = [examples(task, seed, first, size) for task in tasks]
  return jax.tree.map(lambda *x: jnp.stack(x), *drawn)


def _over_models(function):
  """Maps over tasks, variants and seeds: (state, variant, data of a task)."""
  over_seeds = jax.vmap(function, (0, None, 0))
  over_variants = jax.vmap(over_seeds, (0, 0, None))
  return jax.vmap(over_variants, (0, None, 1))


def _train_all(tasks, schedule, variants, seeds) -> tuple[Any, ...]:
  optimizer = optax.adam(
    optax.cosine_decay_schedule(schedule.lr, schedule.steps)
  )

  def start(seed):
    params = _init(seed)
    return params, optimizer.init(params)

  def step(state, variant, example):
    params, moments = state
    loss, grads = jax.value_and_grad(_loss)(params, variant, example)
    updates, moments = optimizer.update(grads, moments, params)
    return (optax.apply_updates(params, updates), moments), loss

  def body(state, n):
    draw = functools.partial(
      _draw, tasks, first=n * schedule.batch_size, size=schedule.batch_size
    )
    data = jax.vmap(lambda seed: draw(seed=seed))(seeds)
    return _over_models(step)(state, variants, data)

  grid = (len(tasks), len(variants), len(seeds))
  state = jax.tree.map(
    lambda x: jnp.broadcast_to(x, grid + x.shape[1:]), jax.vmap(start)(seeds)
  )
  (params, _), losses = jax.lax.scan(body, state, jnp.arange(schedule.steps))
  scored = _draw(tasks, SCORED_STREAM, 0, schedule.scored)
  over_seeds = jax.vmap(_score, (0, None, None))
  over_variants = jax.vmap(over_seeds, (0, 0, None))
  found = jax.vmap(over_variants, (0, None, 0))(params, variants, scored)
  accuracy, b, w = found
  return jnp.moveaxis(losses, 0, -1), accuracy, scored, b, w, params


def _score(params, variant, example):
  """Accuracy of both groups, and the gates."""
  logits, b, w = _run(params, variant, example.tokens)
  right = logits.argmax(-1) == example.labels
  asked = example.labels != NO_LABEL
  groups = [asked & (example.groups == i) for i in (0, 1)]
  accuracy = jnp.stack([(right & m).sum() / m.sum() for m in groups])
  return accuracy, b, w
