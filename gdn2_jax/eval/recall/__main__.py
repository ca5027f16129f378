r"""Measures recall: SWDE, SQuAD, FDA, TriviaQA, NQ and DROP from local files.

  python -m gdn2_jax.eval recall --workdir=runs/tiny --data=data/recall \
    --out=results/recall
  python -m gdn2_jax.eval recall --model=models/published --data=data/recall \
    --tasks=swde,fda --limit=100

The prompt is `context. question` with a window of 2048 - 50 tokens of the
context, cut around the answer; the model continues it greedily up to the end of
the line or 48 tokens, and the answer is right if it is contained, in upper or
lower case. This is the protocol of the paper's Table 4 (arXiv 2407.05483).

--data is a folder of JSON Lines files, which are never downloaded:

  swde.jsonl, fda.jsonl                 text, key, value
  squad.jsonl                           text, value
  triviaqa.jsonl, nq.jsonl, drop.jsonl  context, question, answers (a list)

These are the fields of the public data sets; a missing file is refused with the
line of Python that makes it. --out keeps settings.json and one row per example
in rows.jsonl; the same command continues an interrupted run, and `eval table
--layout=4` prints it beside the paper's numbers.

Exit status: 0 done, 1 refused (reason on standard error).
"""

import pathlib

import tqdm
from absl import flags

from gdn2_jax import cli
from gdn2_jax.eval.recall.report import format_report
from gdn2_jax.eval.recall.run import make_settings, run
from gdn2_jax.eval.recall.tasks import LENGTH, RESERVE, TASKS, check_files
from gdn2_jax.eval.rows import RowStore
from gdn2_jax.eval.scoring import BATCH_SIZE
from gdn2_jax.inference import NonFiniteError
from gdn2_jax.kernels import self_check
from gdn2_jax.train.checkpoint import open_model as opening
from gdn2_jax.train.checkpoint.open_model import check_flags, open_identified

flags.adopt_module_key_flags(opening)  # so that --help lists them
_DATA = flags.DEFINE_string("data", None, "Folder of the tasks' files.")
_TASKS = flags.DEFINE_list(
  "tasks", list(TASKS), "Tasks to run, separated by commas."
)
_OUT = flags.DEFINE_string(
  "out", None, "Folder for the rows; continued if it has some already."
)
_LIMIT = flags.DEFINE_integer(
  "limit", None, "Lines of each file to use; by default all."
)
_LENGTH = flags.DEFINE_integer(
  "length", LENGTH, f"Tokens of a context and its answer, above {RESERVE + 1}."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", BATCH_SIZE, "Prompts at a time."
)
_SELF_CHECK = cli.define_self_check()


def main(argv: list[str]) -> None:
  """Entry point: reads the files, runs the tasks, prints the table."""
  cli.refuse_positional(argv, "--data=data/recall")
  self_check.enable(_SELF_CHECK.value)
  with cli.one_line_errors(NonFiniteError):
    folder = _check_flags()
    settings, examples = make_settings(
      folder, _TASKS.value, _LIMIT.value, _LENGTH.value
    )
    origin, model = open_identified()
    with RowStore(_OUT.value, settings | {"model": origin}) as store:
      done = len(store)
      with tqdm.tqdm(
        total=len(examples),
        initial=done,
        unit="example",
        desc="recall",
        disable=None,  # without a terminal
      ) as bar:
        run(
          model,
          examples,
          store,
          length=_LENGTH.value,
          batch_size=_BATCH_SIZE.value,
          on_done=bar.update,
        )
      step = "" if origin["step"] is None else f", step {origin['step']}"
      print(f"{origin['name']}{step}: % of answers contained\n")
      print(format_report(store.rows(), settings["skipped"]))


def _check_flags() -> pathlib.Path:
  """Refuses bad flags before anything is loaded; returns the data folder."""
  check_flags()
  if not _DATA.value:
    raise ValueError("--data is missing, e.g. --data=data/recall")
  for name in _TASKS.value:
    if name not in TASKS or _TASKS.value.count(name) > 1:
      raise ValueError(
        f"--tasks={','.join(_TASKS.value)}: expected different ones of "
        f"{','.join(TASKS)}"
      )
  if not _TASKS.value:
    raise ValueError(f"--tasks is empty: expected some of {','.join(TASKS)}")
  for flag, low in ((_LIMIT, 1), (_BATCH_SIZE, 1), (_LENGTH, RESERVE + 2)):
    if flag.value is not None and flag.value < low:
      raise ValueError(f"--{flag.name}={flag.value}: expected >= {low}")
  folder = pathlib.Path(_DATA.value)
  check_files(folder, _TASKS.value)
  return folder


if __name__ == "__main__":
  cli.run(main, __doc__)
