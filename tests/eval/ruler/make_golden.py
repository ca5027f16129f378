"""Makes golden.json with the generators of lm-eval and NVIDIA RULER.

  python -m tests.eval.ruler.make_golden RULER_CHECKOUT

Needs lm-eval 0.4.13, transformers, nltk and wonderwords. RULER's niah.py is a
script that reads its arguments and files while it is imported: it runs here
with the modules and names below in place of its own.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import platform
import random
import subprocess
import sys
import types

import nltk

nltk.download = lambda *_, **__: False  # lm-eval wants punkt_tab on import

from lm_eval.tasks.ruler import niah_utils, prepare_niah  # noqa: E402

from gdn2_jax.eval.ruler.essays import split_sentences  # noqa: E402
from gdn2_jax.eval.ruler.tasks import TASKS  # noqa: E402
from gdn2_jax.eval.ruler.words import short_keys  # noqa: E402
from tests.eval.ruler.prompts import TOKEN, snapshot  # noqa: E402

SAMPLES = 25
SEED, WONDERWORDS_SEED = 42, 7
CELLS = [
  ("niah_single_1", 512),
  ("niah_single_1", 4096),
  ("niah_single_2", 1024),
  ("niah_single_2", 4096),
  ("niah_single_3", 1024),
  ("niah_single_3", 2048),
  ("niah_multikey_1", 1024),
  ("niah_multikey_1", 2048),
]
HOW = (
  "SHA-256 of 'PROMPT\\nANSWER', 25 samples of each GENERATOR/TASK/LENGTH, "
  "made by make_golden.py with the original code: generate_samples of "
  "lm_eval.tasks.ruler.prepare_niah (input, a space, gen_prefix) and of "
  "RULER's scripts/data/synthetic/niah.py (input, answer_prefix). Replaced "
  "in both: tokenizer, sentence splitter and prose, by those of prompts.py; "
  "the keys, by short_keys(), or left as they are ('wonderwords'). "
  "random.seed(seed) stands before each call."
)


class Tokenizer:
  """The word tokenizer, with the methods that the originals call."""

  def __call__(self, text):
    return types.SimpleNamespace(input_ids=TOKEN.findall(text))

  def text_to_tokens(self, text):
    return TOKEN.findall(text)


def lm_eval(task, length, keys, seed):
  prepare_niah.WORDS = keys
  prepare_niah.cached_sent_tokenize = split_sentences
  haystack = list(snapshot().words)
  if not task.is_essay:
    haystack = prepare_niah.get_haystack("repeat")
  random.seed(seed)
  rows = prepare_niah.generate_samples(
    haystack,
    Tokenizer(),
    max_seq_length=length,
    type_haystack="essay" if task.is_essay else "repeat",
    type_needle_k="words",
    type_needle_v=f"{task.kind}s",
    num_needle_k=task.keys,
    template=niah_utils.TEMPLATE,
    num_samples=SAMPLES,
  )
  return [
    (f"{row['input']} {row['gen_prefix']}", row["outputs"][0]) for row in rows
  ]


def ruler(checkout):
  """The same for RULER, whose files are read once."""
  scripts = checkout / "scripts" / "data" / "synthetic"
  code = (scripts / "niah.py").read_text()
  for old, new in (
    ("json.load(open(essay))['text']", "ESSAY"),
    ('[f"{adj}-{noun}" for adj in adjs for noun in nouns]', "KEYS"),
    ("from nltk.tokenize import sent_tokenize", "sent_tokenize = SPLIT"),
    ("from tqdm import tqdm", "tqdm = lambda x: x"),
  ):
    assert code.count(old) == 1, old
    code = code.replace(old, new)
  constants = types.ModuleType("constants")
  exec((scripts / "constants.py").read_text(), constants.__dict__)
  sys.modules["constants"] = constants
  sys.modules["tokenizer"] = types.SimpleNamespace(
    select_tokenizer=lambda *_: Tokenizer()
  )
  sys.modules["manifest_utils"] = types.SimpleNamespace(write_manifest=None)
  texts = constants.TASKS["niah"]

  def make(task, length, keys, seed):
    sys.argv = [
      "niah.py",
      "--save_dir=.",
      "--save_name=none",
      "--tokenizer_path=none",
      f"--max_seq_length={length}",
      "--tokens_to_generate=128",
      f"--num_samples={SAMPLES}",
      f"--random_seed={seed}",
      f"--template={texts['template']}{texts['answer_prefix']}",
      f"--type_haystack={'essay' if task.is_essay else 'noise'}",
      f"--type_needle_v={task.kind}s",
      f"--num_needle_k={task.keys}",
    ]
    names = {
      "__name__": "niah",
      "__file__": str(scripts / "niah.py"),
      "ESSAY": " ".join(snapshot().words),
      "KEYS": keys,
      "SPLIT": split_sentences,
    }
    exec(code, names)
    rows = names["generate_samples"](SAMPLES, length, None)
    return [
      (row["input"] + row["answer_prefix"], row["outputs"][0]) for row in rows
    ]

  return make


def sha256(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def main(checkout: str) -> None:
  folder = pathlib.Path(checkout)
  commit = subprocess.run(
    ["git", "-C", checkout, "rev-parse", "HEAD"],
    check=True,
    capture_output=True,
    text=True,
  ).stdout.strip()
  makers = {"lm_eval": lm_eval, "ruler": ruler(folder)}
  keys = list(short_keys())
  wonderwords = list(prepare_niah.WORDS)

  def cell(maker, name, length, keys, seed):
    rows = maker(TASKS[name], length, keys, seed)
    return [sha256(f"{prompt}\n{answer}") for prompt, answer in rows]

  content = {
    "how": HOW,
    "lm_eval": importlib.metadata.version("lm_eval"),
    "RULER": f"github.com/NVIDIA/RULER, commit {commit}",
    "wonderwords version": importlib.metadata.version("wonderwords"),
    "python": platform.python_version(),
    "seed": SEED,
    "short lists": {
      f"{name}/{task}/{length}": cell(maker, task, length, keys, SEED)
      for name, maker in makers.items()
      for task, length in CELLS
    },
    "wonderwords": {
      f"{name}/niah_single_2/2048": cell(
        maker, "niah_single_2", 2048, wonderwords, WONDERWORDS_SEED
      )
      for name, maker in makers.items()
    },
    "wonderwords seed": WONDERWORDS_SEED,
    "all keys of wonderwords": sha256("\n".join(wonderwords)),
  }
  file = pathlib.Path(__file__).parent / "golden.json"
  file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
  main(sys.argv[1])
