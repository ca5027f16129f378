"""Training of small models on a synthetic task, seeds and rates at once.

The data of a seed is the same for every mixer and learning rate, and so are the
initial values of parameters of one name and shape: runs of one seed are pairs.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdn2_jax.config_class import config_class
from gdn2_jax.eval.synthetic.mixers import Sizes
from gdn2_jax.eval.synthetic.model import (
  SuiteModel,
  build,
  count_parameters,
  init_params,
)
from gdn2_jax.eval.synthetic.mqar import Mqar
from gdn2_jax.eval.synthetic.score import score
from gdn2_jax.eval.synthetic.steps import (
  KEYS,
  NO_LABEL,
  VOCAB_SIZE,
  Example,
  as_tokens,
)
from gdn2_jax.eval.synthetic.tasks import TASKS, Recall, Task, examples

# Stream of the sequences that score a model: no training seed may have it.
SCORED_STREAM = 1_000_000
FORMATS = ("paired", "token")
# For programs that run once: optimizing them takes longer than running them.
_ONCE = {"xla_backend_optimization_level": 0}


@config_class
class Training:
  """Schedule of a run.

  Attributes:
    steps: Optimizer steps.
    batch_size: Sequences of a step, never drawn twice.
    warmup: Steps of linear warm-up, of every run; a learning rate that is
      reached too early looks like a bad one.
    final_lr: Learning rate at the end of the cosine, as a share of the peak.
    weight_decay: AdamW's.
    clip: Largest gradient norm.
    scored: Sequences that score a model.
    points: Points of the curve, at equal distances.
  """

  steps: int = 1800
  batch_size: int = 32
  warmup: int = 100
  final_lr: float = 0.05
  weight_decay: float = 0.0
  clip: float = 1.0
  scored: int = 256
  points: int = 12


@dataclasses.dataclass(frozen=True)
class Cell:
  """A mixer on a task: what runs of different seeds and rates share.

  Attributes:
    task: Distribution of sequences.
    mixer: Name or pattern, see `gdn2_jax.eval.synthetic.mixers`.
    sizes: Of the model.
    training: Schedule.
    format: "paired", a key and a value per step, or "token".
  """

  task: Task
  mixer: str
  sizes: Sizes
  training: Training
  format: str = "paired"

  @property
  def is_paired(self) -> bool:
    """True if a step has two tokens."""
    return self.format == "paired"

  @property
  def vocab_size(self) -> int:
    """Tokens of the task's vocabulary."""
    return getattr(self.task, "vocab_size", VOCAB_SIZE)

  @property
  def task_name(self) -> str:
    """Name of the task in TASKS, or "mqar"."""
    names = {kind: name for name, kind in TASKS.items()} | {Mqar: "mqar"}
    return names[type(self.task)]

  def check(self) -> None:
    """Raises ValueError naming the first setting that is wrong."""
    if self.format not in FORMATS:
      raise ValueError(f"format={self.format!r}: expected one of {FORMATS}")
    if isinstance(self.task, Mqar) and self.is_paired:
      raise ValueError("format='paired': expected 'token' for task mqar")
    t = self.training
    for name in ("steps", "batch_size", "scored", "points"):
      if getattr(t, name) < 1:
        raise ValueError(f"{name}={getattr(t, name)}: expected >= 1")
    if t.steps % t.points:
      raise ValueError(
        f"points={t.points}: expected a divisor of steps={t.steps}"
      )
    if t.warmup < 0:
      raise ValueError(f"warmup={t.warmup}: expected >= 0")
    self.model()

  def model(self) -> SuiteModel:
    """The model of the cell; ValueError if its settings are wrong."""
    return build(self.mixer, self.sizes, self.vocab_size, self.is_paired)

  def draw(self, seed: Any, first: Any, size: int) -> Example:
    """Examples of a stream in the cell's format."""
    drawn = examples(self.task, seed, first, size)
    if self.is_paired or isinstance(self.task, Mqar):
      return drawn
    return as_tokens(drawn)

  def queries(self) -> int | None:
    """Steps at the end that hold all queries; None if they are not there."""
    draw = jax.jit(lambda: self.draw(0, 0, 1)).lower()
    labels = np.asarray(draw.compile(_ONCE)().labels[0])
    asked = int((labels != NO_LABEL).sum())
    return asked if (labels[-asked:] != NO_LABEL).all() else None


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Results of one run.

  Attributes:
    seed: Of the initial values and of the data.
    lr: Peak learning rate.
    metrics: At the end: acc, loss, acc_by_group, and kinds of answers (see
      `score`); for recall acc_by_pairs, with fewer and more pairs than trained.
    curve: (step, training loss, accuracy) at the points.
    cpu_s, wall_s: Its share of its program's time, compiling aside.
    compile_s: Its share of the CPU time to compile.
  """

  seed: int
  lr: float
  metrics: dict[str, Any]
  curve: list[list[Any]]
  cpu_s: float
  wall_s: float
  compile_s: float


Point = Callable[[int, np.ndarray, np.ndarray], None]


class Program:
  """Compiled training of a cell, `width` runs at a time."""

  def __init__(self, cell: Cell, width: int):
    cell.check()
    began = time.process_time()
    self.cell, self.width = cell, width
    model, self._last = cell.model(), cell.queries()
    self.params = count_parameters(model, cell.is_paired)
    self.model = model
    t = cell.training
    self._optimizer = optax.chain(
      optax.clip_by_global_norm(t.clip),
      optax.scale_by_adam(0.9, 0.95),
      optax.add_decayed_weights(t.weight_decay),
    )
    seeds = jnp.zeros(width, jnp.int32)
    lrs = jnp.zeros(width)
    start = jax.jit(jax.vmap(self._init))
    self._start = start.lower(seeds).compile(_ONCE)
    state = jax.eval_shape(jax.vmap(self._init), seeds)
    # An argument, not a constant: XLA would compute with it when it compiles.
    draw = jax.jit(lambda seed: cell.draw(seed, 0, t.scored))
    seed = jnp.int32(SCORED_STREAM)
    self.scored = draw.lower(seed).compile(_ONCE)(seed)
    advance = jax.jit(self._advance, donate_argnums=0)
    self._advance_to = advance.lower(
      state, seeds, lrs, jnp.int32(0), self.scored
    ).compile()
    self._capacity = self._compile_capacity(state[0])
    self.compile_s = time.process_time() - began

  def init(self, seed: int) -> Any:
    """Initial parameters of a seed."""
    params, _ = self._start(jnp.full(self.width, seed, jnp.int32))
    return jax.tree.map(lambda x: x[0], params)

  def _init(self, seed):
    params = init_params(self.model, jax.random.key(seed), self.cell.is_paired)
    return params, self._optimizer.init(params)

  def _logits(self, params, tokens, last):
    logits, _ = self.model.apply({"params": params}, tokens, last=last)
    return logits

  def _loss(self, params, example):
    logits = self._logits(params, example.tokens, self._last)
    labels = example.labels[:, -logits.shape[1] :]
    asked = labels != NO_LABEL
    each = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.where(asked, labels, 0)
    )
    return jnp.where(asked, each, 0.0).sum() / asked.sum()

  def _step(self, state, seed, lr, step):
    t = self.cell.training
    params, moments = state
    example = self.cell.draw(seed, step * t.batch_size, t.batch_size)
    loss, grads = jax.value_and_grad(self._loss)(params, example)
    updates, moments = self._optimizer.update(grads, moments, params)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * step / t.steps))
    rate = lr * (t.final_lr + (1 - t.final_lr) * cosine)
    rate = rate * jnp.minimum(1.0, (step + 1) / max(1, t.warmup))
    params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return (params, moments), loss

  def _advance(self, state, seeds, lrs, first, scored):
    """Trains to the next point of the curve and scores the models there."""
    t = self.cell.training

    def body(state, step):
      return jax.vmap(self._step, (0, 0, 0, None))(state, seeds, lrs, step)

    steps = first + jnp.arange(t.steps // t.points)
    state, losses = jax.lax.scan(body, state, steps)

    def metrics(params):
      logits = self._logits(params, scored.tokens, self._last)
      return score(logits, scored, self.cell.task)

    return state, losses.mean(0), jax.vmap(metrics)(state[0])

  def _compile_capacity(self, params):
    """Programs that score trained models with other numbers of pairs."""
    task, programs = self.cell.task, {}
    if not isinstance(task, Recall):
      return programs
    for pairs in (task.pairs // 4, task.pairs // 2, 2 * task.pairs):
      if not 1 <= pairs <= KEYS:
        continue
      cell = dataclasses.replace(self.cell, task=Recall(pairs))
      last = cell.queries()

      def accuracy(params, example, last=last):
        logits = self._logits(params, example.tokens, last)
        return score(logits, example, self.cell.task)["acc"]

      draw = jax.jit(
        lambda seed, cell=cell: cell.draw(seed, 0, cell.training.scored)
      )
      seed = jnp.int32(SCORED_STREAM)
      example = draw.lower(seed).compile(_ONCE)(seed)
      lowered = jax.jit(jax.vmap(accuracy, (0, None))).lower(params, example)
      programs[pairs] = lowered.compile(), example
    return programs

  def run(
    self,
    seeds: Sequence[int],
    lrs: Sequence[float],
    on_point: Point | None = None,
  ) -> list[Outcome]:
    """Trains one model per (seed, lr), at most `width` of them.

    Args:
      seeds: Numbers below 1,000,000.
      lrs: Peak learning rates.
      on_point: Called with the step, losses and accuracies at every point.

    Raises:
      ValueError: A seed or rate is out of range.
    """
    self._check(seeds, lrs)
    wall, cpu = time.perf_counter(), time.process_time()
    # A program has one width: fewer runs are filled up, and these not kept.
    fill = self.width - len(seeds)
    seed = jnp.asarray([*seeds, *[seeds[-1]] * fill], jnp.int32)
    lr = jnp.asarray([*lrs, *[lrs[-1]] * fill], jnp.float32)
    t = self.cell.training
    state, curve, every = self._start(seed), [], t.steps // t.points
    for first in range(0, t.steps, every):
      state, losses, metrics = self._advance_to(
        state, seed, lr, jnp.int32(first), self.scored
      )
      losses, metrics = jax.device_get((losses, metrics))
      curve.append((first + every, losses, metrics["acc"]))
      if on_point is not None:
        n = len(seeds)
        on_point(first + every, losses[:n], metrics["acc"][:n])
    if self._capacity:
      metrics["acc_by_pairs"] = {
        str(pairs): np.asarray(program(state[0], example))
        for pairs, (program, example) in self._capacity.items()
      } | {str(self.cell.task.pairs): metrics["acc"]}
    n = len(seeds)
    wall = (time.perf_counter() - wall) / n
    cpu = (time.process_time() - cpu) / n
    return [
      Outcome(
        seed=int(seeds[i]),
        lr=float(lrs[i]),
        metrics=jax.tree.map(lambda x, i=i: _short(x[i]), metrics),
        curve=[[s, _short(loss[i]), _short(acc[i])] for s, loss, acc in curve],
        cpu_s=round(cpu, 2),
        wall_s=round(wall, 2),
        compile_s=round(self.compile_s / n, 2),
      )
      for i in range(n)
    ]

  def _check(self, seeds, lrs):
    if not 1 <= len(seeds) <= self.width or len(lrs) != len(seeds):
      raise ValueError(
        f"seeds: got {len(seeds)} and {len(lrs)} rates, expected as many of"
        f" both, 1 to {self.width}"
      )
    for seed in seeds:
      if not 0 <= seed < SCORED_STREAM:
        raise ValueError(f"seed={seed}: expected 0 to {SCORED_STREAM - 1}")
    for lr in lrs:
      if not 0 < lr < 1:
        raise ValueError(f"lr={lr}: expected a number between 0 and 1")


def _short(x: Any) -> float:
  """A number with six digits, of which rows do not need more."""
  return float(f"{float(x):.6g}")
