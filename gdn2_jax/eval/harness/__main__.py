r"""Runs tasks of lm-evaluation-harness: pip install 'gdn2-jax[eval]'.

  python -m gdn2_jax.eval harness --workdir=runs/tiny --suite=paper \
    --out=results/harness
  python -m gdn2_jax.eval harness --model=models/published \
    --tasks=my_task,piqa --include_path=my_tasks --limit=100

--suite=paper is the commonsense suite of the paper's Table 2: WikiText,
LAMBADA, PIQA, HellaSwag, WinoGrande, ARC-e, ARC-c, OpenBookQA, SIQA and BoolQ.
--include_path names folders with YAML files of tasks; if --tasks names only
those, lm-eval's own tasks are not read. Nothing is downloaded unless --download
is given: data come from local files that a task names (`dataset_path: json`,
`data_files`) or from the Hugging Face cache (HF_HOME).

Documents (WikiText) are scored with the state carried from their first to their
last token; other programs score them in windows of 2048 tokens or so. --out
keeps settings.json and one row per task in rows.jsonl; the same command
continues an interrupted run with the next task, and `eval table --layout=2`
prints it beside the paper's numbers.

Exit status: 0 done, 1 refused (reason on standard error).
"""

import importlib.util
import pathlib

from absl import flags

from gdn2_jax import cli
from gdn2_jax.eval.harness.rows import format_rows
from gdn2_jax.eval.harness.run import run, versions
from gdn2_jax.eval.harness.tasks import (
  SUITES,
  log_errors_only,
  open_tasks,
  work_offline,
)
from gdn2_jax.eval.rows import RowStore
from gdn2_jax.eval.scoring import BATCH_SIZE
from gdn2_jax.inference import NonFiniteError
from gdn2_jax.kernels import self_check
from gdn2_jax.train.checkpoint import open_model as opening
from gdn2_jax.train.checkpoint.open_model import check_flags, open_identified

flags.adopt_module_key_flags(opening)  # so that --help lists them
_SUITE = flags.DEFINE_enum("suite", None, list(SUITES), "A list of tasks.")
_TASKS = flags.DEFINE_list(
  "tasks", [], "Tasks, groups or tags of lm-eval, separated by commas."
)
_INCLUDE_PATH = flags.DEFINE_list(
  "include_path", [], "Folders with YAML files of tasks."
)
_OUT = flags.DEFINE_string(
  "out", None, "Folder for the rows; continued if it has some already."
)
_LIMIT = flags.DEFINE_integer(
  "limit", None, "Examples per task to use; by default all."
)
_SHOTS = flags.DEFINE_integer(
  "num_fewshot", None, "Examples in each prompt; by default those of the task."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", BATCH_SIZE, "Rows at a time.")
_DOWNLOAD = flags.DEFINE_bool(
  "download", False, "Let the datasets library download missing data."
)
_SELF_CHECK = cli.define_self_check()


def main(argv: list[str]) -> None:
  """Entry point: finds the tasks, runs them, prints the table."""
  cli.refuse_positional(argv, "--suite=paper")
  self_check.enable(_SELF_CHECK.value)
  with cli.one_line_errors(NonFiniteError):
    names = _check_flags()
    if not _DOWNLOAD.value:
      work_offline()
    log_errors_only()
    manager = open_tasks(names, _INCLUDE_PATH.value)
    origin, model = open_identified()
    settings = {
      "evaluation": "harness",
      "limit": _LIMIT.value,
      "num_fewshot": _SHOTS.value,
      "versions": versions(),
      "model": origin,
    }
    with RowStore(_OUT.value, settings) as store:
      run(
        model,
        names,
        manager,
        store,
        limit=_LIMIT.value,
        shots=_SHOTS.value,
        batch_size=_BATCH_SIZE.value,
      )
      rows = [row for row in store.rows() if row["key"] in names]
  step = "" if origin["step"] is None else f", step {origin['step']}"
  print(f"{origin['name']}{step}\n\n{format_rows(rows)}")


def _check_flags() -> list[str]:
  """Refuses bad flags before anything is loaded; returns names of tasks."""
  check_flags()
  names = [*SUITES.get(_SUITE.value, ()), *_TASKS.value]
  if not names:
    raise ValueError("--tasks is missing, e.g. --tasks=piqa; or --suite=paper")
  for flag, low in ((_LIMIT, 1), (_BATCH_SIZE, 1), (_SHOTS, 0)):
    if flag.value is not None and flag.value < low:
      raise ValueError(f"--{flag.name}={flag.value}: expected >= {low}")
  for folder in _INCLUDE_PATH.value:
    if not pathlib.Path(folder).is_dir():
      raise ValueError(f"--include_path={folder}: no such folder")
  if importlib.util.find_spec("lm_eval") is None:
    raise ValueError("lm-eval is not installed: pip install 'gdn2-jax[eval]'")
  return list(dict.fromkeys(names))


if __name__ == "__main__":
  cli.run(main, __doc__)
