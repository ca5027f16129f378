r"""Trains small models on a synthetic memory task and scores their answers.

  python -m gdn2_jax.eval synthetic --task=overwrite --mixer=gdn2 --lr=3e-3
  python -m gdn2_jax.eval synthetic --task=setadd --mixer=gdn2,kda,b_only \
    --seeds=0,1,2 --steps=1800 --out=runs/synthetic.jsonl
  python -m gdn2_jax.eval synthetic --task=mqar --task_args=length=64,pairs=4 \
    --num_layers=2 --steps=4000

Prints a table: accuracy over all queries and by group, the share of answers of
each kind (stale: an old value of the key; neighbour: a value of another key),
microseconds per step and bytes of state when decoding. With --out, one row per
run is appended to a JSONL file. For comparisons with statistics see
`python -m gdn2_jax.replicate`. Exit status: 0 done, 1 refused.
"""

import dataclasses
from typing import Any

import jax
import tqdm
from absl import flags

from gdn2_jax import cli
from gdn2_jax.eval.synthetic.latency import decoding_cost
from gdn2_jax.eval.synthetic.mixers import MIXERS, Sizes
from gdn2_jax.eval.synthetic.mqar import Mqar
from gdn2_jax.eval.synthetic.rows import append_rows, row_of
from gdn2_jax.eval.synthetic.tasks import TASKS
from gdn2_jax.eval.synthetic.train import FORMATS, Cell, Program, Training
from gdn2_jax.train.report.writer import versions

_TASKS = {**TASKS, "mqar": Mqar}
_TASK = flags.DEFINE_enum("task", None, list(_TASKS), "Task.")
_TASK_ARGS = flags.DEFINE_list(
  "task_args", [], "Fields of the task, e.g. --task_args=hot=8,writes=64."
)
_FORMAT = flags.DEFINE_enum(
  "format",
  None,
  FORMATS,
  "paired: a key and a value in one step; token: one after the other. Default: "
  "paired, for mqar token.",
)
_MIXER = flags.DEFINE_list(
  "mixer",
  ["gdn2"],
  f"Mixers: {', '.join(MIXERS)}, or patterns of registered letters.",
)
_LR = flags.DEFINE_list("lr", ["3e-3"], "Peak learning rates.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds, of data and initial values.")
_WIDTH = flags.DEFINE_integer(
  "width",
  0,
  "Runs that train at once in one program; 0: one on a CPU, elsewhere all.",
)
_OUT = flags.DEFINE_string("out", None, "JSONL file to append rows to.")
_LIKE = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
_LIKE[str] = flags.DEFINE_string


def _define_fields(config: type) -> dict[str, flags.FlagHolder]:
  """A flag for each field of a config; its docstring says what they mean."""
  return {
    f.name: _LIKE[type(f.default)](
      f.name, f.default, f"{config.__name__}.{f.name}"
    )
    for f in dataclasses.fields(config)
  }


_SIZES = _define_fields(Sizes)
_TRAINING = _define_fields(Training)


def main(argv: list[str]) -> None:
  """Entry point: checks the command line, trains, prints the table."""
  cli.refuse_positional(argv, "--task=overwrite")
  with cli.one_line_errors():
    cells = _cells()
    runs = [
      (seed, lr)
      for lr in _numbers(_LR, float)
      for seed in _numbers(_SEEDS, int)
    ]
    width = _WIDTH.value or (1 if jax.default_backend() == "cpu" else len(runs))
    if width < 1:
      raise ValueError(f"--width={width}: expected >= 0")
    rows = _train(cells, runs, width)
  print(text_table(rows))


def _cells() -> list[Cell]:
  """The cells of all mixers, checked."""
  if not _TASK.value:
    raise ValueError(f"--task is missing: expected one of {', '.join(_TASKS)}")
  task = make_task(_TASK.value, _TASK_ARGS.value)
  default = "token" if _TASK.value == "mqar" else "paired"
  sizes = Sizes(**{name: flag.value for name, flag in _SIZES.items()})
  training = {name: flag.value for name, flag in _TRAINING.items()}
  cells = [
    Cell(task, mixer, sizes, Training(**training), _FORMAT.value or default)
    for mixer in _MIXER.value
  ]
  for cell in cells:
    cell.check()
  return cells


def make_task(name: str, args: list[str]) -> Any:
  """A task from "field=value" arguments; ValueError if one is wrong."""
  kind, values = _TASKS[name], {}
  known = {f.name: f.default for f in dataclasses.fields(kind)}
  for arg in args:
    field, _, value = arg.partition("=")
    try:
      values[field] = type(known[field])(value)
    except (KeyError, ValueError):
      fields = ", ".join(f"{k}={v}" for k, v in known.items())
      raise ValueError(
        f"--task_args={arg}: expected fields of {name} like {fields}"
      ) from None
  return kind(**values)


def _numbers(flag: flags.FlagHolder, kind: type) -> list:
  """The numbers of a list flag, each once."""
  try:
    return list(dict.fromkeys(kind(x) for x in flag.value))
  except ValueError:
    raise ValueError(
      f"--{flag.name}={','.join(flag.value)}: expected numbers"
    ) from None


def _train(cells, runs, width):
  rows = []
  points = cells[0].training.points
  batches = -(-len(runs) // width)
  found = versions()
  machine = {name: found.get(name) for name in ("device", "jax", "git")}
  total = len(cells) * batches * points
  with tqdm.tqdm(total=total, unit="point", disable=None) as bar:
    for cell in cells:
      bar.set_description(f"{cell.task_name} {cell.mixer}: compiling")
      program = Program(cell, width)
      facts = {"params": program.params, **decoding_cost(program), **machine}

      def on_point(step, losses, acc, cell=cell):
        bar.set_description(f"{cell.task_name} {cell.mixer} step {step}")
        bar.set_postfix(loss=f"{losses.mean():.3f}", acc=f"{acc.mean():.3f}")
        bar.update()

      for first in range(0, len(runs), width):
        seeds, lrs = zip(*runs[first : first + width], strict=True)
        outcomes = program.run(seeds, lrs, on_point)
        new = [row_of(cell, o, "report", facts) for o in outcomes]
        if _OUT.value:
          append_rows(_OUT.value, new)
        rows += new
  return rows


def text_table(rows: list[dict[str, Any]]) -> str:
  """One line per run."""
  groups = list(rows[0]["metrics"]["acc_by_group"])
  kinds = [k for k in rows[0]["metrics"].get("kinds", {}) if k != "right"]
  head = ["mixer", "lr", "seed", "acc", *groups, *kinds, "loss", "params"]
  lines = [[*head, "state B", "us/step", "CPU s"]]
  for row in rows:
    m = row["metrics"]
    shares = [m["acc"], *m["acc_by_group"].values()]
    shares += [m["kinds"][kind] for kind in kinds]
    lines.append(
      [
        row["mixer"],
        f"{row['lr']:g}",
        str(row["seed"]),
        *(f"{x:.3f}" for x in shares),
        f"{m['loss']:.3f}",
        str(row["params"]),
        str(row["state_bytes"]),
        f"{row['latency_us']:.0f}",
        f"{row['cpu_s']:.1f}",
      ]
    )
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True))
    for line in lines
  )


if __name__ == "__main__":
  cli.run(main, __doc__)
