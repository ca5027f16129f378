r"""RULER's needle-in-a-haystack tasks: S-NIAH-1, -2, -3 and MK-NIAH-1.

  python -m gdn2_jax.eval ruler --workdir=runs/tiny
  python -m gdn2_jax.eval ruler --model=models/published \
    --lengths=1024,2048,4096,8192 --essays=PaulGrahamEssays.json \
    --out=results/ruler
  python -m gdn2_jax.eval ruler --workdir=runs/tiny --generator=lm_eval \
    --tasks=niah_single_2,niah_multikey_1 --samples=100 --json=ruler.json

A text states a random value for a random key; a question at its end asks for
the value. A length counts the tokens of the prompt and 128 for the answer, with
the model's own tokenizer. --generator=ruler makes the prompts of NVIDIA RULER,
--generator=lm_eval those of lm-eval 0.4.13, which fill less of it: figures of
the two do not compare. Essays are not part of this package: without --essays
the documentation of Python stands in their place.

Three scores, each of the same samples: the greedy answer contains the value
("generated"); each token of the value is the most probable one ("forced"); and
the nats that the value's probability gains from having the right needle in the
text instead of one with another value ("gain"). Models read prompts without
padding, with the memory of their state.

With --out=FOLDER every sample is a line of FOLDER/rows.jsonl, and the same
command continues where an interrupted one ended; more tasks, lengths or samples
may be added later, any other change is refused.

Exit status: 0 done, 1 refused (reason on standard error).
"""

import json
import pathlib

import tqdm
from absl import flags

from gdn2_jax import cli
from gdn2_jax.eval.rows import RowStore
from gdn2_jax.eval.ruler.essays import read_essays, sentence_splitter
from gdn2_jax.eval.ruler.evaluate import SCORES, Plan, evaluate, key_of
from gdn2_jax.eval.ruler.generators import ANSWER_TOKENS, GENERATORS
from gdn2_jax.eval.ruler.report import format_tables, summarize
from gdn2_jax.eval.ruler.tasks import TASKS, Haystacks
from gdn2_jax.eval.ruler.words import load_keys
from gdn2_jax.files import write_atomically
from gdn2_jax.kernels import self_check
from gdn2_jax.train.checkpoint import open_model as opening
from gdn2_jax.train.checkpoint.open_model import check_flags, open_identified

flags.adopt_module_key_flags(opening)  # so that --help lists them
_TASKS = flags.DEFINE_list("tasks", list(TASKS), f"Some of {', '.join(TASKS)}.")
_LENGTHS = flags.DEFINE_list(
  "lengths",
  ["1024", "2048", "4096"],
  "Tokens of a prompt and its answer, for which 128 are reserved.",
)
_SAMPLES = flags.DEFINE_integer("samples", 500, "Samples of a task and length.")
_GENERATOR = flags.DEFINE_enum(
  "generator", "ruler", GENERATORS, "Maker of the prompts."
)
_ESSAYS = flags.DEFINE_string(
  "essays",
  None,
  'Prose for haystacks: plain text, or a .json file with an object {"text": '
  "...} as RULER's PaulGrahamEssays.json; by default Python's documentation.",
)
_SCORES = flags.DEFINE_list(
  "scores", list(SCORES), f"Some of {', '.join(SCORES)}; each reads the prompt."
)
_SEED = flags.DEFINE_integer(
  "seed", 42, "Seed of the samples of each task and length."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Prompts read at a time.")
_OUT = flags.DEFINE_string(
  "out", None, "Folder for a row per sample, which a second run continues."
)
_JSON = flags.DEFINE_string("json", None, "JSON file to write the summary to.")
_SELF_CHECK = cli.define_self_check()


def main(argv: list[str]) -> None:
  """Entry point: checks the command line, scores samples, prints tables."""
  cli.refuse_positional(argv, "--lengths=1024,2048")
  self_check.enable(_SELF_CHECK.value)
  with cli.one_line_errors():
    plan = _plan()
    essays = read_essays(_ESSAYS.value)
    keys = load_keys()
    splitter, split = sentence_splitter()
    origin, model = open_identified()
    settings = {
      "evaluation": "ruler",
      "generator": plan.generator,
      "essays": essays.label,
      "essays_sha256": essays.sha256,
      "keys": keys.label,
      "keys_sha256": keys.sha256,
      "sentences": splitter,
      "seed": plan.seed,
      "scores": list(plan.scores),
      "model": origin,
    }
    facts = {
      name: settings[name]
      for name in ("generator", "essays", "keys", "sentences", "seed")
    } | {name: origin[name] for name in ("tokenizer", "weights")}
    step = "" if origin["step"] is None else f", step {origin['step']}"
    print(
      f"{origin['name']}{step}; generator={plan.generator}, "
      f"essays={essays.label}, keys={keys.label}, sentences={splitter}, "
      f"seed={plan.seed}"
    )
    if keys.label.startswith("short"):
      print(
        "wonderwords is not installed: keys are of short lists, not the "
        "paper's; pip install 'gdn2-jax[eval]' has it"
      )
    haystacks = Haystacks(
      keys, essays.words, split, repeats=plan.generator == "ruler"
    )
    with RowStore(_OUT.value, settings) as store:
      _evaluate(model, haystacks, plan, store, facts)
      results = summarize(store.rows(), plan)
    if _JSON.value:
      content = settings | {"results": results}
      data = json.dumps(content, indent=2) + "\n"
      write_atomically(pathlib.Path(_JSON.value), data.encode())
  print(f"\n{format_tables(results, plan)}")
  few = [r for r in results if r["samples"] < plan.samples]
  for result in few:
    print(
      f"{result['task']} at {result['length']}: {result['samples']} samples "
      f"fit the length, of {plan.samples}"
    )


def _evaluate(model, haystacks, plan: Plan, store: RowStore, facts) -> None:
  """Computes the missing rows under a progress bar in tokens."""
  cells = list(plan.cells())
  done = sum(
    length
    for task, length in cells
    for index in range(plan.samples)
    if key_of(task, length, index) in store
  )
  # Tokens, because samples of a greater length take longer.
  with tqdm.tqdm(
    total=plan.samples * sum(length for _, length in cells),
    initial=done,
    unit="tok",
    unit_scale=True,
    disable=None,  # without a terminal
  ) as bar:

    def on_rows(task: str, length: int, rows: int) -> None:
      bar.set_postfix_str(f"{task} at {length}", refresh=False)
      bar.update(rows * length)

    evaluate(model, haystacks, plan, store, facts=facts, on_rows=on_rows)


def _plan() -> Plan:
  """The plan of the flags; refuses bad ones before anything is loaded."""
  check_flags()
  _check_names(_TASKS, TASKS)
  _check_names(_SCORES, SCORES)
  for flag in (_SAMPLES, _BATCH_SIZE):
    if flag.value < 1:
      raise ValueError(f"--{flag.name}={flag.value}: expected >= 1")
  lengths = _LENGTHS.value
  if not lengths or not all(
    n.isascii() and n.isdecimal() and int(n) > ANSWER_TOKENS for n in lengths
  ):
    raise ValueError(
      f"--lengths={','.join(lengths)}: expected whole numbers above "
      f"{ANSWER_TOKENS}, as in --lengths=1024,2048"
    )
  # Checked before the evaluation, which takes long.
  if _JSON.value and not pathlib.Path(_JSON.value).absolute().parent.is_dir():
    raise ValueError(f"--json={_JSON.value}: its folder does not exist")
  if _OUT.value and pathlib.Path(_OUT.value).is_file():
    raise ValueError(f"--out={_OUT.value}: a file, expected a folder")
  return Plan(
    generator=_GENERATOR.value,
    tasks=tuple(dict.fromkeys(_TASKS.value)),
    lengths=tuple(sorted({int(n) for n in lengths})),
    samples=_SAMPLES.value,
    seed=_SEED.value,
    scores=tuple(s for s in SCORES if s in _SCORES.value),
    batch_size=_BATCH_SIZE.value,
  )


def _check_names(flag, names) -> None:
  if not flag.value or set(flag.value) - set(names):
    raise ValueError(
      f"--{flag.name}={','.join(flag.value)}: expected some of "
      f"{', '.join(names)}"
    )


if __name__ == "__main__":
  cli.run(main, __doc__)
