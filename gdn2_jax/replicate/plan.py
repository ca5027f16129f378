"""Grid of the replication: tasks, mixers, learning rates and seeds by budget.

A budget is changed here and nowhere else. Rows that exist stay valid: a row's
key is made of its own config.
"""

import dataclasses
from typing import Any

from gdn2_jax.eval.synthetic.mixers import Sizes
from gdn2_jax.eval.synthetic.tasks import Overwrite, Recall, Reset, SetAdd
from gdn2_jax.eval.synthetic.train import Cell, Training

TUNING_SEED = 100  # seeds from here on choose the learning rate
FAMILY = ("gdn2", "kda", "gdn", "deltanet", "mamba2", "no_erase")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Mixers on a task.

  Attributes:
    task: Distribution of sequences.
    mixers: Names, see `gdn2_jax.eval.synthetic.mixers`.
  """

  task: Any
  mixers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a budget runs.

  Attributes:
    purpose: One line for --help.
    experiments: Mixers by task.
    sizes: Of all models.
    training: Schedule of all runs.
    lrs: Learning rates to begin with, ascending, each twice the one before.
    extensions: Rates added at most, one at a time, while the best is at an
      edge.
    tuning_seeds: Runs per learning rate.
    seeds: Runs per mixer that are reported.
    width: Runs in one program; 0: all of a cell.
    language: Name of the plan of language models, see `language.py`.
    minutes: Nothing is started after so many minutes; 0: no limit.
  """

  purpose: str
  experiments: tuple[Experiment, ...]
  sizes: Sizes
  training: Training
  lrs: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3)
  extensions: int = 2
  tuning_seeds: int = 1
  seeds: int = 10
  width: int = 1
  language: str = ""
  minutes: float = 0.0

  def cells(self, mixers: tuple[str, ...] | None = None) -> list[Cell]:
    """The cells, of all mixers or of some.

    Raises:
      ValueError: A mixer is unknown, or the budget does not run it.
    """
    planned = {m for e in self.experiments for m in e.mixers}
    for name in mixers or ():
      if name not in planned:
        raise ValueError(
          f"mixers={name!r}: expected some of {', '.join(sorted(planned))}"
        )
    cells = [
      Cell(experiment.task, mixer, self.sizes, self.training)
      for experiment in self.experiments
      for mixer in experiment.mixers
      if not mixers or mixer in mixers
    ]
    for cell in cells:
      cell.check()
    return cells

  @property
  def report_seeds(self) -> range:
    """Seeds of the runs that are reported."""
    return range(self.seeds)

  @property
  def tuning(self) -> range:
    """Seeds of the runs that choose the learning rate."""
    return range(TUNING_SEED, TUNING_SEED + self.tuning_seeds)


# 256 numbers of state, which 32 pairs fill; K = V = 16 channels, one head.
_SMALL = Sizes(implementation="reference")
_GPU = Sizes(
  model_dim=128,
  num_layers=2,
  num_heads=2,
  key_dim=32,
  value_dim=32,
  mlp_dim=128,
)

BUDGETS = {
  "ci": Budget(
    purpose="a check that everything works, about a minute",
    experiments=(Experiment(Recall(pairs=4), ("gdn2", "deltanet")),),
    sizes=Sizes(model_dim=16, mlp_dim=16, implementation="reference"),
    training=Training(steps=20, batch_size=4, warmup=5, scored=16, points=2),
    lrs=(1e-2, 2e-2),
    extensions=0,
    seeds=2,
    width=2,
  ),
  "cpu": Budget(
    purpose="all mixers on three tasks, about 80 minutes on two cores",
    experiments=(
      Experiment(Overwrite(), FAMILY),
      Experiment(SetAdd(), FAMILY),
      Experiment(Recall(), FAMILY),
      # Last: where time is short, only the claims about ablations and the
      # second test of decay are without runs.
      Experiment(Overwrite(), ("b_only", "w_only")),
      Experiment(SetAdd(), ("b_only", "w_only")),
      Experiment(Reset(), ("kda", "gdn")),
      Experiment(Overwrite(), ("erase_0_2",)),
      Experiment(SetAdd(), ("erase_0_2",)),
    ),
    sizes=_SMALL,
    training=Training(),
  ),
  "gpu15": Budget(
    purpose="longer rows and 30M language models, 9 minutes on one H100",
    experiments=(
      Experiment(
        Overwrite(hot=32, cold=64, writes=160),
        ("gdn2", "kda", "gdn", "no_erase"),
      ),
      Experiment(
        SetAdd(keys=48, writes=208), ("gdn2", "kda", "gdn", "no_erase")
      ),
      Experiment(Recall(pairs=128), ("gdn2", "kda", "gdn", "no_erase")),
    ),
    sizes=_GPU,
    training=Training(steps=3000),
    lrs=(1e-3, 2e-3),
    extensions=0,
    seeds=8,
    width=8,
    language="gpu15",
    minutes=7.5,
  ),
  "gpuday": Budget(
    purpose="mixers at 256 to 512 steps and language models, a day on one H100",
    experiments=(
      Experiment(
        Overwrite(hot=32, cold=64, writes=160),
        (*FAMILY, "b_only", "w_only", "erase_0_2"),
      ),
      Experiment(
        SetAdd(keys=48, writes=208),
        (*FAMILY, "b_only", "w_only", "erase_0_2"),
      ),
      Experiment(Reset(keys=64, writes=191), FAMILY),
      Experiment(Recall(pairs=128), FAMILY),
      Experiment(Recall(pairs=64), FAMILY),
      Experiment(Recall(pairs=32), FAMILY),
    ),
    sizes=_GPU,
    training=Training(steps=6000),
    lrs=(7.5e-4, 1.5e-3, 3e-3),
    tuning_seeds=2,
    seeds=16,
    width=16,
    language="gpuday",
  ),
}


def rehearsal(budget: Budget) -> Budget:
  """The budget with toy sizes: all its steps, none of its results."""
  shrunk = []
  for experiment in budget.experiments:
    small = {
      Recall: Recall(pairs=4),
      Overwrite: Overwrite(hot=2, cold=2, writes=8),
      SetAdd: SetAdd(keys=3, writes=8),
      Reset: Reset(keys=4, writes=8),
    }[type(experiment.task)]
    if small not in [e.task for e in shrunk]:
      # Two mixers on the first task: a comparison. The others only have to run.
      mixers = experiment.mixers[: 1 if shrunk else 2]
      shrunk.append(Experiment(small, mixers))
  training = BUDGETS["ci"].training
  return dataclasses.replace(
    budget,
    experiments=tuple(shrunk),
    sizes=BUDGETS["ci"].sizes,
    training=training,
    lrs=budget.lrs[:2],
    extensions=0,
    tuning_seeds=1,
    seeds=2,
    width=2,
  )
