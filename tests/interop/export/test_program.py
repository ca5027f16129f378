"""Exported programs: the library's numbers, with JAX alone."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from gdn2_jax.data.tokenizer.api import BytesTokenizer
from gdn2_jax.inference import init_state
from gdn2_jax.inference.state import advance
from gdn2_jax.interop import folder as folder_lib
from gdn2_jax.interop import load_model, save_model
from gdn2_jax.interop.export import program
from gdn2_jax.interop.tree import leaves_by_path
from gdn2_jax.model.mixers.gdn2 import GDN2Config
from gdn2_jax.ops.gdn2 import xla
from tests.model.models import small_config
from tests.random_params import random_params

pytestmark = pytest.mark.deep

CONFIG = small_config(
  "GS",
  num_layers=2,
  vocab_size=260,
  gdn2=GDN2Config(num_heads=2, num_value_heads=4, key_dim=16, value_dim=16),
)
PROMPTS = [list(range(60, 97)), [1, 2, 3, 4, 5], list(range(200, 216))]
FAST = {"xla_backend_optimization_level": 0}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def params():
  return random_params(CONFIG)


@pytest.fixture(scope="module")
def exported():
  """The files, and the sizes of chunks that were traced on the way."""
  sizes, real = set(), xla.default_chunk_size

  def note():
    sizes.add(real())
    return real()

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(xla, "default_chunk_size", note)
    files = program.export_programs(CONFIG, chunk_size=16, eos_id=256)
  return files, sizes


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params, exported):
  folder = tmp_path_factory.mktemp("export") / "model"
  save_model(
    folder,
    params,
    CONFIG,
    BytesTokenizer(),
    extra=exported[0],
    max_shard_bytes=60_000,
  )
  return folder


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
  """What alone.py found, in a process without the library."""
  results = tmp_path_factory.mktemp("alone")
  done = subprocess.run(
    [
      sys.executable,
      "-W",
      "error",
      str(pathlib.Path(__file__).with_name("alone.py")),
      str(folder),
      json.dumps(PROMPTS),
      str(results),
    ],
    cwd=results,
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_backend_optimization_level=0",
    },
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  arrays = np.load(results / "found.npz")
  return arrays, json.loads((results / "found.json").read_text())


@pytest.fixture(scope="module")
def logits_of(params):
  """Logits after every token of sequences, token by token in the library."""
  step = jax.jit(advance, compiler_options=FAST)

  def logits_of(rows):
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
      row[: len(ids)] = ids
    state, found = init_state(CONFIG, len(rows)), []
    for token in tokens.T:
      logits, state = step(params, token, state)
      found.append(np.asarray(logits))
    rows = zip(np.stack(found, axis=1), rows, strict=True)
    return [x[: len(ids)] for x, ids in rows]

  return logits_of


def test_any_batch_size_gives_the_logits_of_the_model(alone, logits_of):
  found, _ = alone
  rows = [[*ids, i] for i, ids in enumerate(PROMPTS)]
  want = [logits[-2:] for logits in logits_of(rows)]
  for size in (1, len(PROMPTS)):
    for step, name in enumerate(("prefill", "decode")):
      np.testing.assert_allclose(
        found[f"{name}_{size}"],
        np.stack([logits[step] for logits in want[:size]]),
        **TOLERANCE,
        err_msg=f"{name} of {size}",
      )
    lengths = [len(ids) for ids in rows[:size]]
    assert found[f"position_{size}"].tolist() == lengths


def test_generation_is_greedy(alone, logits_of):
  _, found = alone
  want = found["generated"]
  assert [len(row) for row in want] == [5] * len(PROMPTS)
  # Each is the best after the prompt and the ones before it.
  rows = [[*ids, *new] for ids, new in zip(PROMPTS, want, strict=True)]
  for logits, new in zip(logits_of(rows), want, strict=True):
    assert logits[-6:-1].argmax(axis=-1).tolist() == new
  assert found["tokens"] == [0, ",".join(map(str, want[0])) + "\n"]


def test_run_needs_nothing_of_ours_and_says_what_is_wrong(alone):
  _, found = alone
  assert found["modules"] == []
  empty, outside = found["empty"], found["outside"]
  assert "prompts[0]: expected at least one token" in empty[0]
  assert "expected ids in [0, 260)" in outside[0]
  assert found["nan"] == [
    "error: prompts[0]: non-finite logits at index 0 of the chosen tokens: "
    "params with NaN or infinity: final_norm.weight",
    "",
  ]


def test_the_description_is_that_of_the_state(folder):
  spec = json.loads((folder / "program.json").read_text())
  state = leaves_by_path(init_state(CONFIG, 3), ".")
  assert [leaf["name"] for leaf in spec["state"]] == list(state)
  for leaf in spec["state"]:
    value = np.asarray(state[leaf["name"]])
    shape = [3 if size == "b" else size for size in leaf["shape"]]
    assert (shape, leaf["dtype"]) == (list(value.shape), str(value.dtype))
    assert leaf["shape"][leaf["batch_axis"]] == "b"
    assert (value == leaf["initial"]).all()
  tensors = [name for leaf in spec["params"] for name in leaf["tensors"]]
  assert sorted(tensors) == sorted(set(tensors))
  assert spec["platforms"] == ["cpu", "cuda"]
  assert (spec["chunk_size"], spec["eos_id"]) == (16, 256)


def test_the_folder_is_also_a_model(folder, params):
  model = load_model(folder)
  assert model.config == CONFIG
  equal = jax.tree.map(np.array_equal, model.params, params)
  assert all(jax.tree.leaves(equal))
  assert "run.py" in (folder / "README.md").read_text()


def test_each_platform_gets_pieces_that_suit_it(exported):
  files, sizes = exported
  assert sizes == {16, 64}
  for name in ("prefill.jax", "decode.jax"):
    found = jax.export.deserialize(bytearray(files[name]))
    assert found.platforms == ("cpu", "cuda")
    # No kernel of ours, nor anything else that only this machine knows.
    calls = found.mlir_module().split("custom_call @")[1:]
    assert {call.split("(")[0] for call in calls} <= {"shape_assertion"}


@pytest.fixture(scope="module")
def run():
  """run.py, imported as people import it."""
  path = pathlib.Path(program.__file__).with_name("run.py")
  spec = importlib.util.spec_from_file_location("run_alone", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("name", ["prefill.jax", "decode.jax", "program.json"])
def test_altered_programs_are_refused(folder, tmp_path, run, name):
  for path in folder.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  data = bytearray((tmp_path / name).read_bytes())
  data[len(data) // 2] ^= 1
  for damaged in (data, data[:-1]):
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{name}: damaged or altered"):
      run.load(tmp_path)
    with pytest.raises(ValueError, match=name):
      load_model(tmp_path)
  (tmp_path / name).unlink()
  with pytest.raises(ValueError, match=f"{name}: missing"):
    run.load(tmp_path)
  listed = json.loads((tmp_path / "manifest.json").read_text())
  del listed["files"][name]
  (tmp_path / "manifest.json").write_text(json.dumps(listed))
  with pytest.raises(ValueError, match=f"{name} is not listed"):
    run.load(tmp_path)
  assert folder_lib.is_model_folder(tmp_path)


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"chunk_size": 24}, "chunk_size=24"),
    ({"chunk_size": 8}, "chunk_size=8"),
    ({"platforms": ["metal"]}, "platforms=metal"),
    ({"platforms": []}, "platforms="),
  ],
)
def test_what_is_not_exported(options, match):
  with pytest.raises(ValueError, match=match):
    program.export_programs(CONFIG, **options)
