"""`eval recall`: rows, resuming, the table, the command."""

import json

import pytest

from gdn2_jax.data.tokenizer.api import BytesTokenizer
from gdn2_jax.eval.recall import run as recall
from gdn2_jax.eval.recall.report import format_report
from gdn2_jax.eval.rows import RowStore
from gdn2_jax.eval.table.results import read_results
from gdn2_jax.inference.identity import identify
from gdn2_jax.interop.folder import Model
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.train.checkpoint import load_run
from tests.tiny_run import make_run, run_many

FILES = {
  "swde": {"text": "A page. Year: 1983. End", "key": "year", "value": "1983"},
  "squad": {"text": "Ann is here. Here is", "value": "Ann"},
  "fda": {"text": "A page. Year: 1983. End", "key": "year", "value": "1983"},
  "triviaqa": {"context": "Paris.", "question": "It is", "answers": ["Paris"]},
  "nq": {"context": "100 degrees.", "question": "At", "answers": ["100"]},
  "drop": {"context": "33 goals.", "question": "Goals", "answers": ["33"]},
}
LINES = 2  # of each file


@pytest.fixture
def data(tmp_path):
  folder = tmp_path / "data"
  folder.mkdir()
  for name, row in FILES.items():
    (folder / f"{name}.jsonl").write_text(LINES * (json.dumps(row) + "\n"))
  return folder


class Writer:
  """Stands in for the model: writes the same text after every prompt."""

  model = Model(ModelConfig(vocab_size=259), None, BytesTokenizer())

  def __init__(self, monkeypatch, text):
    self.text, self.prompts = text, []
    monkeypatch.setattr(recall, "greedy", self)

  def __call__(self, model, prompts, max_new_tokens, *, stop_strings, **_):
    assert max_new_tokens == 48 and stop_strings == ("\n",)
    self.prompts += [model.tokenizer.decode(tokens) for tokens in prompts]
    return [self.text] * len(prompts)


def test_rows_say_what_was_written_and_are_continued(
  data, tmp_path, monkeypatch
):
  settings, examples = recall.make_settings(data, list(FILES), None, 2048)
  assert settings["examples"] == dict.fromkeys(FILES, LINES)
  writer = Writer(monkeypatch, " paris and 33")
  done = []
  with RowStore(tmp_path / "out", settings) as store:
    recall.run(
      writer.model, examples[:5], store, batch_size=2, on_done=done.append
    )
  assert len(writer.prompts) == 5 and done == [2, 2, 1]
  with RowStore(tmp_path / "out", settings) as store:
    recall.run(writer.model, examples, store, batch_size=4)
    rows = {row["key"]: row for row in store.rows()}
  assert len(rows) == len(writer.prompts) == 12
  assert {key for key, row in rows.items() if row["contains"]} == {
    "triviaqa/0",
    "triviaqa/1",
    "drop/0",
    "drop/1",
  }
  assert rows["nq/1"] == {
    "key": "nq/1",
    "task": "nq",
    "index": 1,
    "contains": False,
    "has_answer": True,
    "prompt_tokens": len("100 degrees. At"),
    "text": " paris and 33",
  }
  # Changed data are other settings.
  with (data / "nq.jsonl").open("a") as file:
    file.write(json.dumps(FILES["nq"]) + "\n")
  settings, _ = recall.make_settings(data, list(FILES), None, 2048)
  with pytest.raises(ValueError, match="was begun with data="):
    RowStore(tmp_path / "out", settings)


def test_the_table_has_a_mean_only_over_all_six_tasks():
  rows = [
    {"task": task, "contains": right, "has_answer": True}
    for task in FILES
    for right in (True, False, False, task == "swde")
  ]
  lines = format_report(rows, dict.fromkeys(FILES, 1)).splitlines()
  assert lines[1].split() == ["swde", "50.00", "4", "1", "100.0%"]
  assert lines[2].split() == ["squad", "25.00", "4", "1", "100.0%"]
  assert lines[-1].split() == ["mean", "29.17"]
  lines = format_report(rows[:4], {"swde": 0, "squad": 0}).splitlines()
  assert len(lines) == 2  # nothing is known of the other


@pytest.mark.slow
def test_the_command_runs_a_model_and_refuses_bad_flags(data, tmp_path):
  workdir = f"--workdir={make_run(tmp_path)}"
  source = f"--data={data}"
  (tmp_path / "some").mkdir()
  refused = [
    ([source], "--workdir is missing"),
    ([workdir], "--data is missing"),
    ([workdir, f"--data={tmp_path}/some"], "missing swde.jsonl, squad.jsonl"),
    ([workdir, source, "--tasks=swde,x"], "--tasks=swde,x: expected different"),
    ([workdir, source, "--tasks=nq,nq"], "--tasks=nq,nq: expected different"),
    ([workdir, source, "--limit=0"], "--limit=0: expected >= 1"),
    ([workdir, source, "--length=51"], "--length=51: expected >= 52"),
    ([workdir, source, "--batch_size=0"], "--batch_size=0: expected >= 1"),
  ]
  out = tmp_path / "out"
  run = [workdir, source, "--length=100", f"--out={out}", "--batch_size=12"]
  other = [*run, "--limit=1"]
  *done, first, again, different = run_many(
    "gdn2_jax.eval.recall.__main__",
    [*(argv for argv, _ in refused), run, run, other],
  )
  for (argv, message), got in zip(refused, done, strict=True):
    assert got["code"] == 1 and message in got["err"], (argv, got)
    assert got["err"].count("\n") == 1 and got["out"] == "", got
  assert first["code"] == again["code"] == 0, first
  assert first["out"] == again["out"]
  assert "step 3: % of answers contained" in first["out"]
  assert different["code"] == 1 and "was begun with" in different["err"]
  rows = [json.loads(x) for x in (out / "rows.jsonl").read_text().splitlines()]
  assert len(rows) == 12 and all(len(row["text"]) for row in rows)
  loaded = load_run(tmp_path / "run")
  hashes = identify(loaded.params, loaded.config.model, loaded.tokenizer)
  settings = json.loads((out / "settings.json").read_text())
  assert settings["model"] == {
    "name": str(tmp_path / "run"),
    "step": 3,
    "weights": hashes.weights,
    "function": hashes.model,
    "tokenizer": hashes.tokenizer,
  }
  results, unfinished = read_results([str(out)])
  assert len(results) == 6 and not unfinished
  assert results[0].note == "recall: contexts of 100 tokens"
