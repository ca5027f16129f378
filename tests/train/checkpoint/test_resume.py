"""Damage is found, good checkpoints are used, and nothing is thrown away."""

import json
import os
import random
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gdn2_jax.sharding import MeshConfig, make_mesh
from gdn2_jax.train.checkpoint import load
from gdn2_jax.train.checkpoint.meta import (
  CheckpointError,
  DamagedError,
  committed_steps,
  read_meta,
  seal,
)
from tests.faults import damage
from tests.train.states import SmallRun, abstract_of, make_state, same_bits

# Orbax abandons reads in flight when one of them fails; what they then complain
# about is tidied up by `load`, but not always in time.
pytestmark = [
  pytest.mark.usefixtures("frozen_heap"),
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, cache_dir):
  """Steps 1, 2 and 3; copied, never changed."""
  from tests.train.conftest import make_config

  directory = tmp_path_factory.mktemp("saved") / "checkpoints"
  run = SmallRun(directory, make_config(cache_dir))
  run.save(1, 2, 3)
  return run


@pytest.fixture
def run(saved, tmp_path, config):
  shutil.copytree(saved.directory, tmp_path / "checkpoints")
  return SmallRun(tmp_path / "checkpoints", config)


def flip(run, step, pattern="params/ocdbt.process_0/d/*"):
  path = run.file(step, pattern)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_a_flipped_bit_is_found_and_the_step_before_is_used(run):
  flip(run, 3)
  flip(run, 2, "optimizer/ocdbt.process_0/d/*")
  assert run.resume() == 1
  warnings = [line for line in run.lines if line.startswith("WARNING")]
  assert len(warnings) == 2
  assert "step 3" in warnings[0] and "step 2" in warnings[1]
  # Set aside, not deleted; the steps can be reached and saved again.
  assert committed_steps(run.directory) == [1]
  names = {path.name for path in (run.directory / ".set_aside").iterdir()}
  assert names == {"2-0", "3-0"}
  run.save(2, 3)
  assert run.resume() == 3


def test_flipped_arrays_pass_without_digests(run, monkeypatch):
  """What the digest is for: orbax restores other numbers without a word."""
  flip(run, 3)
  monkeypatch.setattr(
    "gdn2_jax.train.checkpoint.manager.verify", lambda *_: None
  )
  with pytest.raises(AssertionError, match="silently wrong"):
    run.resume()


@pytest.mark.slow
def test_every_kind_of_file_and_damage(run, config, tmp_path):
  """Never a wrong number; at worst the step before, with a warning."""
  chance = random.Random(0)
  used = []
  kinds = sorted(damage.files_by_kind(run.directory / "3"))
  assert len(kinds) >= 15
  for number, kind in enumerate(kinds):
    harm = (damage.truncate, damage.delete, damage.zero_page)[number % 3]
    for what in (damage.flip_bit, harm):
      copy = SmallRun(tmp_path / f"{number}{what.__name__}", config)
      shutil.copytree(run.directory, copy.directory)
      path = chance.choice(damage.files_by_kind(copy.directory / "3")[kind])
      what(path, chance)
      used.append(copy.resume())
      warned = any("WARNING" in line for line in copy.lines)
      assert warned == (used[-1] == 2), (kind, what.__name__, copy.lines)
  assert set(used) == {2, 3}


@pytest.mark.parametrize("harm", ["flip", "missing", "incomplete"])
def test_an_explicit_step_never_falls_back(run, harm):
  if harm == "flip":
    flip(run, 2)
  elif harm == "missing":
    shutil.rmtree(run.directory / "2")
  else:
    (run.directory / "2" / "commit_success.txt").unlink()
  with pytest.raises(CheckpointError, match=r"step[ =]2"):
    run.resume(restore_step=2)
  assert (run.directory / "3").is_dir()
  assert run.resume(restore_step=1) == 1
  # Newer ones stay on the shelf: going back is no reason to delete.
  assert committed_steps(run.directory) == [1]
  assert (run.directory / ".set_aside" / "3-0").is_dir()


def test_only_damaged_checkpoints_refuse_a_fresh_start(run):
  for step in (1, 2):
    flip(run, step)
  shutil.rmtree(run.directory / "3" / "optimizer")
  with pytest.raises(CheckpointError, match="no checkpoint is usable") as info:
    run.resume()
  for text in ("step 1", "step 2", "step 3", "allow_fresh_start"):
    assert text in str(info.value)
  assert committed_steps(run.directory) == [1, 2, 3]
  assert run.resume(allow_fresh_start=True) == 0
  assert committed_steps(run.directory) == []
  assert sum("WARNING" in line for line in run.lines) == 4
  # The next start is an ordinary one.
  assert run.resume() == 0
  assert run.lines == []


def test_half_deleted_empty_and_junk_directories(run):
  (run.directory / "9").mkdir()
  (run.directory / "3" / "commit_success.txt").unlink()
  for name in ("x", "-1", "1.5", "9.orbax-checkpoint-tmp"):
    (run.directory / name).mkdir()
  assert run.resume() == 2
  assert (run.directory / "x").is_dir()
  run.save(9)
  assert run.resume() == 9
  assert not (run.directory / "9.orbax-checkpoint-tmp").exists()


def test_a_step_under_another_number(run):
  shutil.copytree(run.directory / "1", run.directory / "7")
  assert run.resume() == 3
  assert "the meta data is of step 1" in run.lines[0]


def test_another_experiment_is_refused_not_passed_over(run):
  """Damage falls back; a mismatch is a mistake of whoever started the run."""
  run.meta["tree"]["params/x"] = [[65], "float32"]
  with pytest.raises(CheckpointError, match="another model") as info:
    run.resume()
  assert not isinstance(info.value, DamagedError)


def rewrite_meta(run, number, **changes):
  """As somebody would who knows how the hash is made."""
  path = run.directory / str(number) / "meta" / "metadata"
  meta = json.loads(path.read_text())
  del meta["sha256"]
  meta = {k: v for k, v in (meta | changes).items() if v is not None}
  path.write_text(json.dumps(seal(meta)))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"digests": None}, "the digests are missing"),
    ({"digests": {}}, "6 of 6 arrays"),
    ({"config": None}, "lacks fields"),
    ({"tree": {"params/x": [[-1], "float32"]}}, "lacks fields"),
    ({"tree": {"params/x": "everything"}}, "lacks fields"),
    ({"step": 12}, "of step 12"),
  ],
)
def test_meta_data_that_makes_no_sense(run, changes, message):
  rewrite_meta(run, 3, **changes)
  assert run.resume() == 2
  assert message in run.lines[0]


@pytest.mark.parametrize("number", [1, 99])
def test_another_format_is_refused_not_passed_over(run, number):
  rewrite_meta(run, 3, format=number)
  with pytest.raises(CheckpointError, match=f"format {number}, .* reads 2"):
    run.resume()


SHARDINGS = {
  "x": PartitionSpec("fsdp"),
  "y": PartitionSpec(None, None),
}


def on_mesh(state, mesh):
  def place(path, leaf):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    spec = SHARDINGS.get(name, PartitionSpec())
    return jax.device_put(leaf, NamedSharding(mesh, spec))

  return jax.tree_util.tree_map_with_path(place, state)


def test_restored_and_saved_again_on_other_meshes(tmp_path, config):
  """8 -> 2 x 4 -> 1 -> 2 x 2 x 2: the same digests, the same bits."""
  meshes = [
    make_mesh(MeshConfig(fsdp=8)),
    make_mesh(MeshConfig(fsdp=2, tensor=4)),
    make_mesh(MeshConfig(), jax.devices()[:1]),
    make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)),
  ]
  run = SmallRun(tmp_path, config)
  checkpointer = run.checkpointer(keep=9)
  state = on_mesh(make_state(0), meshes[0])
  checkpointer.save(1, state, run.meta)
  for number, mesh in enumerate(meshes[1:], 1):
    checkpointer.wait()
    wanted = abstract_of(on_mesh(make_state(0), mesh))
    state = checkpointer.restore(number, wanted)
    assert state.params["x"].sharding == wanted.params["x"].sharding
    assert same_bits(state, make_state(0))
    checkpointer.save(number + 1, state, run.meta)
  checkpointer.close()
  digests = [read_meta(tmp_path, step)["digests"] for step in (1, 2, 3, 4)]
  assert all(found == digests[0] for found in digests)
  assert len(digests[0]) == len(jax.tree.leaves(state))


def test_digest_of_restored_arrays_is_checked_not_of_files(run, monkeypatch):
  """Damage between the disk and the device is found as well."""
  read = load.read_arrays

  def altered(path, abstract):
    tree = read(path, abstract)
    if path.name == "params" and path.parent.name == "3":
      x = np.asarray(tree["x"]).copy()
      x.view(np.uint32)[5] ^= 1
      tree["x"] = jax.device_put(x, tree["x"].sharding)
    return tree

  monkeypatch.setattr("gdn2_jax.train.checkpoint.manager.read_arrays", altered)
  assert run.resume() == 2
  assert "1 of 6 arrays" in run.lines[0] and "params/x" in run.lines[0]


def test_shelf_holds_several_of_one_step(run):
  for _ in range(2):
    flip(run, 3)
    assert run.resume() == 2
    run.save(3)
  names = sorted(os.listdir(run.directory / ".set_aside"))
  assert names == ["3-0", "3-1"]
