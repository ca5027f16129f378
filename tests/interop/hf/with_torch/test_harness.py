"""lm-eval's model "hf" gives the answers of gdn2_jax's own."""

import json
import subprocess
import sys

import pytest

from tests.eval.harness.test_command import COMMON, ROWS, TASKS, needs_lm_eval
from tests.faults.child import environment
from tests.interop.hf.with_torch.models import make_pair
from tests.tiny_run import ROOT

_RUN = """
import json
import sys

from gdn2_jax.eval.harness.tasks import open_tasks, work_offline

work_offline()

import lm_eval

from gdn2_jax.eval.harness.adapter import as_lm
from gdn2_jax.interop import load_model

ours, theirs, tasks = sys.argv[1:]
names = ["piqa", "my_documents", "my_copy"]
found = []
for model, options in (
  (as_lm(load_model(ours)), {}),
  ("hf", {"pretrained": theirs, "trust_remote_code": True, "device": "cpu"}),
):
  done = lm_eval.simple_evaluate(
    model=model,
    model_args=options,
    tasks=names,
    task_manager=open_tasks(names, [tasks]),
    bootstrap_iters=0,
    batch_size=4,
  )
  answers = {
    name: [sample["filtered_resps"] for sample in samples]
    for name, samples in done["samples"].items()
  }
  found.append((done["results"], answers))
print(json.dumps(found))
"""


@pytest.mark.slow
@needs_lm_eval
def test_lm_eval_opens_the_folder(tmp_path):
  pair = make_pair("DS")
  tasks = tmp_path / "tasks"
  tasks.mkdir()
  for name, yaml in TASKS.items():
    file = tasks / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    common = COMMON.format(task=name, file=file)
    (tasks / f"{name}.yaml").write_text(common + yaml)
  done = subprocess.run(
    [
      *(sys.executable, "-c", _RUN),
      *map(str, (pair.folder.parent / "ours", pair.folder, tasks)),
    ],
    cwd=ROOT,
    env=environment() | {"HF_HOME": str(tmp_path / "home")},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  (ours, our_answers), (theirs, their_answers) = json.loads(
    done.stdout.splitlines()[-1]
  )
  assert ours["piqa"]["acc,none"] == theirs["piqa"]["acc,none"]
  key = "word_perplexity,none"
  found, expected = theirs["my_documents"][key], ours["my_documents"][key]
  assert found == pytest.approx(expected, rel=1e-4)
  assert their_answers["my_copy"] == our_answers["my_copy"]
  for mine, other in zip(
    our_answers["piqa"], their_answers["piqa"], strict=True
  ):
    for (nats, is_greedy), (nats2, is_greedy2) in zip(mine, other, strict=True):
      assert float(nats2) == pytest.approx(float(nats), abs=1e-3)
      assert is_greedy2 == is_greedy
