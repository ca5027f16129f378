"""`eval harness` through lm-eval itself, on tasks made here."""

import importlib.util
import json

import numpy as np
import pytest

from gdn2_jax.eval.harness.answers import (
  document_loglikelihoods,
  encode_pairs,
  loglikelihoods,
)
from gdn2_jax.eval.table.compare import OURS, compare
from gdn2_jax.eval.table.results import read_results
from gdn2_jax.interop.folder import Model
from gdn2_jax.train.checkpoint import load_run
from tests.tiny_run import make_run, run_many

MODULE = "gdn2_jax.eval.harness.__main__"
has_lm_eval = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(
  not has_lm_eval, reason='needs the extra "eval"'
)

CHOICE = [
  {"q": f"Pick {i}:", "choices": ["a", "bb", "ccc"], "gold": i % 3}
  for i in range(5)
]
DOCUMENTS = [{"page": "Some text. " * n} for n in (1, 4, 9)]
COPY = [{"q": f"Say {i}", "a": str(i)} for i in range(2)]
COMMON = """task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
metadata:
  version: 1.0
"""
# The first has the name of one of lm-eval's own tasks.
TASKS = {
  "piqa": """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - metric: acc
""",
  "my_documents": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - metric: word_perplexity
""",
  "my_copy": """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
""",
}
ROWS = {"piqa": CHOICE, "my_documents": DOCUMENTS, "my_copy": COPY}


@pytest.fixture
def tasks(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
  folder = tmp_path / "tasks"
  folder.mkdir()
  for name, yaml in TASKS.items():
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    common = COMMON.format(task=name, file=file)
    (folder / f"{name}.yaml").write_text(common + yaml)
  return folder


@pytest.mark.slow
def test_bad_flags_are_refused(tmp_path):
  workdir = f"--workdir={tmp_path}"
  refused = [
    (["--tasks=piqa"], "--workdir is missing"),
    ([workdir], "--tasks is missing"),
    ([workdir, "--suite=x"], "--suite"),
    ([workdir, "--tasks=a", "--limit=0"], "--limit=0: expected >= 1"),
    ([workdir, "--tasks=a", "--batch_size=0"], "--batch_size=0: expected >= 1"),
    ([workdir, "--tasks=a", f"--include_path={tmp_path}/x"], "no such folder"),
  ]
  if not has_lm_eval:
    refused.append(([workdir, "--tasks=a"], "pip install 'gdn2-jax[eval]'"))
  done = run_many(MODULE, [argv for argv, _ in refused])
  for (argv, message), got in zip(refused, done, strict=True):
    assert got["code"] == 1 and message in got["err"] + got["out"], (argv, got)


@pytest.mark.slow
@needs_lm_eval
def test_the_command_gives_the_models_answers(tasks, tmp_path):
  workdir = make_run(tmp_path)
  out = tmp_path / "out"
  run = [
    f"--workdir={workdir}",
    f"--include_path={tasks}",
    f"--out={out}",
    "--tasks=piqa,my_documents",
  ]
  more = [*run[:3], "--tasks=my_copy,piqa"]
  refused = [
    ([run[0], "--suite=paper"], "neither local nor in the Hugging Face cache:"),
    ([*run, "--limit=2"], "was begun with limit=None, now limit=2"),
  ]
  first, again, extended, *failed = run_many(
    MODULE, [run, run, more, *(argv for argv, _ in refused)]
  )
  assert first["code"] == again["code"] == extended["code"] == 0, first
  assert first["out"] == again["out"] and "step 3" in first["out"]
  for (argv, message), got in zip(refused, failed, strict=True):
    assert got["code"] == 1 and message in got["err"], (argv, got)
  # Local tasks were there; of the paper's suite, nothing was.
  assert "wikitext (" in failed[0]["err"] and "boolq (" in failed[0]["err"]

  lines = (out / "rows.jsonl").read_text().splitlines()
  rows = {row["key"]: row["results"] for row in map(json.loads, lines)}
  assert list(rows) == ["piqa", "my_documents", "my_copy"]
  found = {name: results[0] for name, results in rows.items()}
  assert {r["n"] for r in found.values()} == {5, 3, 2}
  assert all(len(r["hash"]) == 64 for r in found.values())
  assert found["my_copy"]["metric"] == "exact_match"

  loaded = load_run(workdir)
  model = Model(loaded.config.model, loaded.params, loaded.tokenizer)
  pairs = [(row["q"], f" {c}") for row in CHOICE for c in row["choices"]]
  nats = np.reshape([nats for nats, _ in loglikelihoods(model, pairs)], (5, 3))
  right = nats.argmax(1) == [row["gold"] for row in CHOICE]
  assert found["piqa"]["value"] == right.mean()
  texts = [row["page"] for row in DOCUMENTS]
  words = sum(len(text.split(" ")) for text in texts)
  perplexity = np.exp(-sum(document_loglikelihoods(model, texts)) / words)
  np.testing.assert_allclose(
    found["my_documents"]["value"], perplexity, rtol=1e-5
  )
  # `eval table` reads the folder.
  table = compare("2", *read_results([str(out)]))
  ((_, (row,)),) = (g for g in table.groups if g[0] == OURS)
  assert [c.text(2) for c in row.cells if c.value is not None] == [
    f"{100 * right.mean():.2f}"
  ]


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_texts_become_the_tokens_that_lm_eval_makes_of_them():
  from lm_eval.api.model import TemplateLM

  from gdn2_jax.data.tokenizer.api import train_bpe

  tokenizer = train_bpe(["the cat sat on the mat. where? there!"] * 20, 300)

  class Theirs:
    backend = "causal"

    def tok_encode(self, text, **_):
      return tokenizer.encode(text)

  pairs = [
    ("the cat", " sat"),
    ("the cat  ", "sat on"),
    ("where?\n", "there!"),
  ]
  ours = encode_pairs(tokenizer, pairs)
  # Theirs lacks one case of ours: a continuation that merges into its context.
  theirs = [TemplateLM._encode_pair(Theirs(), *pair) for pair in pairs]
  assert list(zip(*ours, strict=True)) == theirs
