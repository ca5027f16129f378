"""`eval harness --suite=paper`: lm-eval's own ten tasks on made-up examples."""

import json
import os
import subprocess
import sys

import pytest

from gdn2_jax.eval.harness.tasks import PAPER
from gdn2_jax.eval.table.compare import OURS, compare
from gdn2_jax.eval.table.paper import components
from gdn2_jax.eval.table.results import read_results
from tests.eval.harness.test_command import needs_lm_eval
from tests.faults.child import environment
from tests.tiny_run import ROOT, make_run

COLORS = {"text": ["red", "green", "blue"], "label": ["A", "B", "C"]}
ENDINGS = ["eats.", "[step] runs.", "swims.", "flies."]
# Data set, configuration, an example with the fields of the real ones.
DATA = [
  (
    "baber/piqa",
    "default",
    {"goal": "Open a jar", "sol1": "Turn it.", "sol2": "Eat it.", "label": 0},
  ),
  (
    "Rowan/hellaswag",
    "default",
    {
      "activity_label": "Cooking",
      "ctx_a": "A man cooks.",
      "ctx_b": "he",
      "endings": ENDINGS,
      "label": "0",
    },
  ),
  (
    "allenai/winogrande",
    "winogrande_xl",
    {
      "sentence": "Ann thanked Bea because _ had helped.",
      "option1": "Ann",
      "option2": "Bea",
      "answer": "2",
    },
  ),
  (
    "allenai/ai2_arc",
    "ARC-Easy",
    {"question": "Color of the sky?", "choices": COLORS, "answerKey": "C"},
  ),
  (
    "allenai/ai2_arc",
    "ARC-Challenge",
    {"question": "Color of grass?", "choices": COLORS, "answerKey": "B"},
  ),
  (
    "allenai/openbookqa",
    "main",
    {"question_stem": "The sky is", "choices": COLORS, "answerKey": "C"},
  ),
  (
    "lighteval/siqa",
    "default",
    {
      "context": "Ann fell.",
      "question": "How is Ann?",
      "answerA": "hurt",
      "answerB": "glad",
      "answerC": "tall",
      "label": "1",
    },
  ),
  (
    "aps/super_glue",
    "boolq",
    {"passage": "Water is wet.", "question": "is water wet", "label": 1},
  ),
  (
    "EleutherAI/lambada_openai",
    "default",
    {"text": "She gave him the book and he read the book"},
  ),
  (
    "EleutherAI/wikitext_document_level",
    "wikitext-2-raw-v1",
    {"page": "= Title =\n\nSome text , with 3 @.@ 5 words .\n"},
  ),
]
EXAMPLES = 2
SPLITS = ("train", "validation", "test")


def write_data(folder):
  """Data sets in folders of their names, which `datasets` finds first."""
  for name, config, row in DATA:
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{config}.jsonl").write_text(EXAMPLES * (json.dumps(row) + "\n"))
    card = path / "README.md"
    lines = (
      card.read_text().splitlines()[:-1]
      if card.exists()
      else [
        "---",
        "configs:",
      ]
    )
    lines += [f"- config_name: {config}", "  data_files:"]
    for split in SPLITS:
      lines += [f"  - split: {split}", f"    path: {config}.jsonl"]
    card.write_text("\n".join([*lines, "---"]) + "\n")


@pytest.mark.slow
@needs_lm_eval
def test_the_papers_suite_fills_its_table(tmp_path):
  write_data(tmp_path)
  command = [
    *(sys.executable, "-m", "gdn2_jax.eval", "harness", "--suite=paper"),
    f"--workdir={make_run(tmp_path)}",
    f"--out={tmp_path}/out",
  ]
  paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
  done = subprocess.run(
    command,
    cwd=tmp_path,
    env=environment()
    | {
      "HF_HOME": str(tmp_path / "hf"),
      "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    },
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  lines = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row["key"] for row in rows] == list(PAPER)
  assert {r["n"] for row in rows for r in row["results"]} == {EXAMPLES}
  table = compare("2", *read_results([str(tmp_path / "out")]))
  ((_, (row,)),) = (g for g in table.groups if g[0] == OURS)
  cells = dict(zip((c.name for c in table.columns), row.cells, strict=True))
  assert all(cell.value is not None for cell in cells.values())
  parts = [cells[column.name].value for column in components("2", "Avg")]
  assert cells["Avg"].value == pytest.approx(sum(parts) / 9)
  assert cells["LMB ppl"].value > 1 and cells["Wiki ppl"].value > 1
