"""`python -m gdn2_jax.export`: the folder it writes, and how it refuses."""

import jax
import numpy as np
import pytest

from gdn2_jax.config_json import from_dict
from gdn2_jax.data.tokenizer.api import BytesTokenizer
from gdn2_jax.interop import load_model
from gdn2_jax.train.checkpoint.meta import read_meta
from gdn2_jax.train.config import TrainConfig
from tests.random_params import random_params
from tests.tiny_run import make_run, run_many

pytestmark = pytest.mark.slow

MODULE = "gdn2_jax.interop.export.__main__"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def done(workdir):
  """Every command line of this file, in one process."""
  folder = workdir.parent
  (folder / "notes").mkdir()
  (folder / "notes" / "diary.txt").write_text("x")
  run, out = f"--workdir={workdir}", f"--out={folder / 'model'}"
  half = [f"--model={folder / 'model'}", f"--out={folder / 'half'}"]
  programs = ["--program", "--platforms=cpu", "--chunk_size=16"]
  commands = {
    "run": [run, out, "--license=mit", "--name=Tiny"],
    "again": [run, out],
    "half": [*half, "--param_dtype=bfloat16", *programs],
    "overwrite": [*half, "--overwrite"],
    "no model": [out],
    "two models": [run, "--model=x", out],
    "no out": [run],
    "step of a folder": ["--model=x", "--step=3", out],
    "no step": [run, "--step=4", f"--out={folder / 'new'}"],
    "no folder": [f"--model={folder / 'x'}", f"--out={folder / 'new'}"],
    "not a model": [f"--model={folder / 'notes'}", f"--out={folder / 'new'}"],
    "occupied": [run, f"--out={folder / 'notes'}", "--overwrite"],
    "chunk": [run, f"--out={folder / 'new'}", "--program", "--chunk_size=20"],
    "platform": [run, f"--out={folder / 'new'}", "--platforms=cpu,gpu"],
  }
  results = run_many(MODULE, list(commands.values()))
  return folder, dict(zip(commands, results, strict=True))


def test_a_run_becomes_a_folder(workdir, done):
  folder, results = done
  assert results["run"]["code"] == 0, results["run"]["err"]
  model = load_model(folder / "model")
  meta = read_meta(workdir / "checkpoints", 3)
  config = from_dict(TrainConfig, meta["config"], "config")
  assert model.config == config.model
  params = random_params(config.model)  # what the run holds
  equal = jax.tree.map(np.array_equal, model.params, params)
  assert all(jax.tree.leaves(equal))
  assert model.tokenizer.sha256 == BytesTokenizer().sha256
  card = (folder / "model" / "README.md").read_text()
  assert 'license: "mit"' in card and "# Tiny" in card
  assert "| training steps | 3 |" in card
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert f"{count:,} parameters" in results["run"]["out"]
  assert "-m gdn2_jax.generate --model=" in results["run"]["out"]


def test_half_the_size_and_programs(done):
  folder, results = done
  assert results["half"]["code"] == 0, results["half"]["err"]
  assert "run.py" in results["half"]["out"]
  # What `overwrite` wrote: the same folder, but not of --param_dtype.
  assert results["overwrite"]["code"] == 0, results["overwrite"]["err"]
  names = {path.name for path in (folder / "half").iterdir()}
  assert "prefill.jax" not in names
  assert load_model(folder / "half").config.param_dtype == "float32"


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("again", "holds a model; overwrite=True"),
    ("no model", "expected one of --workdir=RUN and --model=FOLDER"),
    ("two models", "expected one of"),
    ("no out", "--out is missing"),
    ("step of a folder", "--step picks a checkpoint"),
    ("no step", "--step=4: no such checkpoint"),
    ("no folder", "no such folder"),
    ("not a model", "no manifest.json"),
    ("occupied", "not empty, and not a folder with a model"),
    ("chunk", "chunk_size=20"),
    ("platform", "platforms=cpu,gpu"),
  ],
)
def test_refusals_are_one_line_and_write_nothing(done, name, message):
  folder, results = done
  result = results[name]
  assert result["code"] == 1
  assert message in result["err"] and "Traceback" not in result["err"]
  assert not (folder / "new").exists()
  notes = [path.name for path in (folder / "notes").iterdir()]
  assert notes == ["diary.txt"]
