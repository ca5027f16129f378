"""`eval table`: our rows beside the paper's, from files of results."""

import json

import matplotlib.image
import pytest

from gdn2_jax.eval.table import draw
from gdn2_jax.eval.table.compare import OURS, compare
from gdn2_jax.eval.table.paper import paper_table
from gdn2_jax.eval.table.results import Result, read_results
from tests.tiny_run import run_many

MODEL = {"name": "runs/a", "step": 5, "weights": "ab" * 32}
TASKS = ("swde", "squad", "fda", "triviaqa", "nq", "drop")


def write_rows(folder, settings, rows):
  folder.mkdir(parents=True)
  (folder / "settings.json").write_text(json.dumps(settings))
  lines = [
    json.dumps({"key": str(i)} | row) + "\n" for i, row in enumerate(rows)
  ]
  (folder / "rows.jsonl").write_text("".join(lines))
  return folder


def recall(folder, tasks=TASKS, hits=1, expected=2, **changes):
  """Two examples per task, the first `hits` of them right."""
  settings = {
    "evaluation": "recall",
    "model": MODEL,
    "limit": None,
    "length": 2048,
    "examples": dict.fromkeys(tasks, expected),
  }
  rows = [
    {"task": task, "contains": i < hits} for task in tasks for i in range(2)
  ]
  return write_rows(folder, settings | changes, rows)


def ours(table):
  """Model -> column -> text of the cell, and the provenance."""
  rows = dict(table.groups).get(OURS, ())
  names = [column.name for column in table.columns]
  found = {}
  for row in rows:
    texts = [
      c.text(k.digits) for c, k in zip(row.cells, table.columns, strict=True)
    ]
    key = row.model
    while key in found:
      key += "'"
    found[key] = dict(zip(names, texts, strict=True)) | {"from": row.provenance}
  return found


def test_ours_stand_below_the_papers_rows_and_change_none(tmp_path):
  table = compare("4", *read_results([str(recall(tmp_path / "r"))]))
  assert table.groups[:-1] == paper_table("4").groups
  ((name, row),) = ours(table).items()
  assert name == "runs/a, step 5"
  assert {row[c] for c in ("SWDE", "DROP", "Avg")} == {"50.00"}
  assert row["from"] == "gdn2_jax; weights abababab"


def test_what_is_missing_is_blank_and_has_no_average(tmp_path):
  folder = recall(tmp_path / "r", tasks=TASKS[:5], hits=0)
  row = ours(compare("4", *read_results([str(folder)])))["runs/a, step 5"]
  assert row["SWDE"] == "0.00" and row["DROP"] == "" and row["Avg"] == ""


def test_an_incomplete_task_is_blank_and_named(tmp_path):
  folder = recall(tmp_path / "r", expected=3)
  results, unfinished = read_results([str(folder)])
  assert not results and len(unfinished) == 6
  table = compare("4", results, unfinished)
  assert not ours(table)
  assert "recall swde: 2 of 3 examples in" in table.notes[0]
  assert not any(
    "recall" in note for note in compare("3", [], unfinished).notes
  )


def ruler(generator):
  return {
    "evaluation": "ruler",
    "generator": generator,
    "essays": "a.json",
    "keys": "words",
    "model": MODEL,
  }


def test_generators_and_essays_have_rows_of_their_own(tmp_path):
  for i, generator in enumerate(("ruler", "lm_eval")):
    rows = [
      {"task": "niah_single_2", "length": 4096, "generated": n <= i}
      for n in range(4)
    ]
    write_rows(tmp_path / generator, ruler(generator), rows)
  recall(tmp_path / "recall")
  table = compare("5", *read_results([str(tmp_path)]))
  rows = ours(table)
  assert list(rows) == ["runs/a, step 5", "runs/a, step 5'"]
  assert [row["S-NIAH-2 4K"] for row in rows.values()] == ["50.0", "25.0"]
  # What does not depend on the generator is in both.
  assert [row["recall avg"] for row in rows.values()] == ["50.00", "50.00"]
  assert [row["from"].split("; ")[2:] for row in rows.values()] == [
    ["generator lm_eval, essays a.json, keys words", "RULER: 4 samples"],
    ["generator ruler, essays a.json, keys words", "RULER: 4 samples"],
  ]
  assert all(row["Wiki ppl"] == "" for row in rows.values())


def test_summaries_of_ruler_are_read_as_well(tmp_path):
  cells = [
    {"length": length, "samples": 500, "generated": {"mean": mean}}
    for length, mean in ((1024, 1.0), (2048, 0.5))
  ]
  content = ruler("ruler") | {
    "results": [{"task": "niah_single_1"} | cell for cell in cells]
    + [{"task": "niah_single_3", "length": 1024, "generated": None}]
  }
  (tmp_path / "ruler.json").write_text(json.dumps(content))
  (row,) = ours(compare("3", *read_results([str(tmp_path)]))).values()
  assert row["S-NIAH-1 1K"] == "100.0" and row["S-NIAH-1 2K"] == "50.0"
  assert row["S-NIAH-1 4K"] == row["S-NIAH-3 1K"] == ""
  assert row["from"].endswith("generator ruler, essays a.json, keys words")


def test_harness_rows_fill_the_columns_of_their_metrics(tmp_path):
  rows = [
    {"task": "wikitext", "metric": "word_perplexity", "value": 15.904},
    {"task": "hellaswag", "metric": "acc", "value": 0.4},
    {"task": "hellaswag", "metric": "acc_norm", "value": 0.5684},
  ]
  write_rows(
    tmp_path / "h",
    {"evaluation": "harness", "model": MODEL, "limit": 100},
    [{"results": [row | {"filter": "none"}]} for row in rows],
  )
  loss = {
    "workdir": "runs/a",
    "step": 5,
    "results": [
      {
        "name": name,
        "nats_per_token": 1.0,
        "bits_per_byte": bits,
        "perplexity": 2.72,
      }
      for name, bits in (("model 1x (32)", 0.9), ("unigram", 4.0))
    ],
  }
  (tmp_path / "eval.json").write_text(json.dumps(loss))
  table = compare("2", *read_results([str(tmp_path)]))
  (row,) = ours(table).values()
  assert row["Wiki ppl"] == "15.90" and row["Hella"] == "56.84"
  assert row["held-out bits/byte"] == "0.9000" and row["LMB"] == ""
  assert row["from"] == (
    "gdn2_jax; weights abababab; harness: first 100 examples per task; "
    "WikiText: state carried through documents"
  )
  # The paper has no such column: it is there for our sake alone.
  assert "held-out bits/byte" not in draw.markdown(compare("2", []))


def test_results_that_contradict_each_other_are_refused(tmp_path):
  recall(tmp_path / "one")
  recall(tmp_path / "two", hits=2)
  results, _ = read_results([str(tmp_path)])
  with pytest.raises(ValueError, match="two results for recall swde contains"):
    compare("4", results)
  recall(tmp_path / "three", model=MODEL | {"weights": "cd" * 32})
  results, _ = read_results([f"{tmp_path}/one", f"{tmp_path}/three"])
  with pytest.raises(ValueError, match="computed with other weights"):
    compare("4", results)
  # The same number from two files is one number.
  assert ours(compare("4", [*results[:6], *results[:6]]))


def test_a_model_without_steps_is_named_by_its_folder():
  source = ("recall", "swde", "contains")
  result = Result("models/x", None, "", source, 0.25)
  assert list(ours(compare("4", [result]))) == ["models/x"]


def test_the_command_writes_markdown_and_a_figure(tmp_path):
  folder = recall(tmp_path / "results" / "r")
  damaged = recall(tmp_path / "damaged")
  (damaged / "rows.jsonl").write_text("{}\n{\n")
  write_rows(tmp_path / "other", {"evaluation": "x"}, [])
  (tmp_path / "empty").mkdir()
  (tmp_path / "loss.json").write_text("{}")
  refused = [
    ([], "--layout is missing"),
    (["--layout=4"], "--results is missing"),
    (["--layout=6"], "--layout"),
    (["--layout=4", f"--results={tmp_path}/none"], "no such file or folder"),
    (["--layout=4", f"--results={tmp_path}/empty"], "expected JSON files of"),
    (["--layout=4", f"--results={tmp_path}/other"], "evaluation='x'"),
    (["--layout=4", f"--results={damaged}"], "line 2 is damaged"),
    (
      ["--layout=4", f"--results={tmp_path}/loss.json"],
      "expected what `eval loss --json` or `eval ruler",
    ),
  ]
  out = tmp_path / "tables"
  fine = ["--layout=4", f"--results={folder.parent}", f"--out={out}"]
  *done, last = run_many(
    "gdn2_jax.eval.table.__main__", [argv for argv, _ in refused] + [fine]
  )
  for (argv, message), got in zip(refused, done, strict=True):
    assert got["code"] == 1 and message in got["err"] + got["out"], (argv, got)
  assert last["code"] == 0, last
  assert (out / "table4.md").read_text() == last["out"]
  line = "| runs/a, step 5 |" + 7 * " 50.00 |" + " gdn2_jax; weights abababab |"
  assert line in last["out"].splitlines()
  assert sorted(path.name for path in out.iterdir()) == [
    "table4.md",
    "table4.png",
  ]
  height, width, _ = matplotlib.image.imread(out / "table4.png").shape
  assert width > 1000 and height > 500


@pytest.mark.parametrize("layout", ["4", "5"])
def test_texts_of_a_figure_do_not_overlap(layout, tmp_path):
  folder = recall(tmp_path / "r")
  figure = draw.figure(compare(layout, *read_results([str(folder)])))
  figure.draw_without_rendering()
  boxes = [text.get_window_extent() for text in figure.axes[0].texts]
  for box in boxes:
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
  full = [box for box in boxes if box.width]  # blank cells have none
  for i, box in enumerate(full):
    assert not any(box.overlaps(other) for other in full[:i])
