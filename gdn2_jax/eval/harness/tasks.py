"""Tasks by name: local YAML files, and lm-eval's own where they are named."""

import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

# The paper's Table 2: names of tasks, and the folders of lm-eval that hold
# them. Reading these alone takes 0.02 s, reading all of its tasks 23 s.
PAPER = {
  "wikitext": "wikitext",
  "lambada_openai": "lambada",
  "piqa": "piqa",
  "hellaswag": "hellaswag",
  "winogrande": "winogrande",
  "arc_easy": "arc",
  "arc_challenge": "arc",
  "openbookqa": "openbookqa",
  "social_iqa": "siqa",
  "boolq": "super_glue/boolq",
}
SUITES = {"paper": tuple(PAPER)}


def work_offline() -> None:
  """Forbids the Hugging Face libraries all downloads.

  Must be called before `datasets` or `lm_eval` are imported, which read their
  environment once.
  """
  for library in ("HF_HUB", "HF_DATASETS", "TRANSFORMERS"):
    os.environ[f"{library}_OFFLINE"] = "1"


def log_errors_only() -> None:
  """Silences lm-eval's warnings about defaults, and bars of `datasets`."""
  import datasets

  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  datasets.disable_progress_bars()


def open_tasks(names: Sequence[str], folders: Sequence[str] = ()) -> Any:
  """A TaskManager of lm-eval that knows the named tasks.

  Args:
    names: names of tasks, groups or tags.
    folders: folders with YAML files of tasks; they win over lm-eval's own tasks
      of the same name. If they and the paper's tasks have all names, none of
      lm-eval's other tasks are read.

  Raises:
    ValueError: an unknown name, or a task whose data are neither in a local
      file nor in the cache.
  """
  import lm_eval.tasks

  root = pathlib.Path(lm_eval.tasks.__file__).parent
  ours = dict.fromkeys(PAPER[name] for name in names if name in PAPER)
  manager = lm_eval.tasks.TaskManager(
    include_path=[root / folder for folder in ours] + list(folders),
    include_defaults=False,
  )
  if not set(names) <= set(manager.all_tasks):
    manager = lm_eval.tasks.TaskManager(include_path=list(folders) or None)
  unknown = sorted(set(names) - set(manager.all_tasks))
  if unknown:
    raise ValueError(
      f"--tasks: {', '.join(unknown)}: expected tasks of lm-eval or of the "
      "folders in --include_path"
    )
  missing = []
  for name in names:
    try:
      manager.load([name])
    except (ConnectionError, FileNotFoundError) as error:
      missing.append(f"{name} ({str(error).splitlines()[0]})")
  if missing:
    raise ValueError(
      "--tasks: data neither local nor in the Hugging Face cache: "
      + "; ".join(missing)
    )
  return manager
