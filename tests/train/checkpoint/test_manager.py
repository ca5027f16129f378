"""Saving, keeping, refusing and loading checkpoints, without a training run."""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.train.checkpoint import load_run
from gdn2_jax.train.checkpoint.manager import Checkpointer
from gdn2_jax.train.checkpoint.meta import (
  FORMAT,
  CheckpointError,
  check_meta,
  committed_steps,
  make_meta,
  read_meta,
  seal,
)
from gdn2_jax.train.config import CheckpointConfig
from gdn2_jax.train.state import TrainState
from tests import tiny_run
from tests.train.states import no_file_larger_than


def make_state(step: int, size: int = 3) -> TrainState:
  return TrainState(
    step=jnp.asarray(step, jnp.int32),
    params={"x": jnp.arange(size, dtype=jnp.float32) + step},
    opt_state=({"mu": {"x": jnp.ones(size)}}, ()),
    skipped=jnp.asarray(1, jnp.int32),
    skipped_in_a_row=jnp.asarray(0, jnp.int32),
  )


def open_at(path, keep=2) -> Checkpointer:
  return Checkpointer(path, CheckpointConfig(keep=keep))


def abstract_of(state: TrainState) -> TrainState:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def test_keeps_the_newest_and_restores_every_leaf(tmp_path):
  checkpointer = open_at(tmp_path)
  assert checkpointer.latest_step() is None
  for step in (1, 2, 5):
    checkpointer.save(step, make_state(step), {"format": FORMAT})
  checkpointer.close()
  assert committed_steps(tmp_path) == [2, 5]
  # Deleted steps do not pile up anywhere else.
  assert not list((tmp_path / ".trash").iterdir())
  meta = read_meta(tmp_path, 5)
  assert meta.pop("digests").keys() >= {"params/x", "optimizer/step"}
  assert meta == {"format": FORMAT, "step": 5}
  checkpointer = open_at(tmp_path)
  restored = checkpointer.restore(5, abstract_of(make_state(0)))
  checkpointer.close()
  expected = make_state(5)
  assert jax.tree.structure(restored) == jax.tree.structure(expected)
  for x, y in zip(
    jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True
  ):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def test_a_save_is_a_snapshot_of_its_moment(tmp_path):
  """The step that follows a save overwrites the buffers that were saved."""
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  checkpointer = open_at(tmp_path)
  state = make_state(0, size=1 << 20)
  expected = np.asarray(state.params["x"]).copy()
  checkpointer.save(1, state, {})
  params = step(state.params["x"])
  for _ in range(20):
    params = step(params)
  checkpointer.wait()
  restored = checkpointer.restore(1, abstract_of(make_state(0, size=1 << 20)))
  checkpointer.close()
  np.testing.assert_array_equal(restored.params["x"], expected)


def test_uncommitted_directories_do_not_count(tmp_path):
  checkpointer = open_at(tmp_path)
  checkpointer.save(3, make_state(3), {})
  checkpointer.close()
  # Half a deletion, a dead save, and names that are no steps.
  shutil.copytree(tmp_path / "3", tmp_path / "9")
  (tmp_path / "9" / "commit_success.txt").unlink()
  (tmp_path / "7").mkdir()
  for name in ("x", "-1", "1.5"):
    (tmp_path / name).mkdir()
  assert committed_steps(tmp_path) == [3]
  checkpointer = open_at(tmp_path)
  assert checkpointer.latest_step() == 3
  # Orbax would take 9 for the newest and drop this save silently.
  checkpointer.save(4, make_state(4), {})
  checkpointer.close()
  assert committed_steps(tmp_path) == [3, 4]
  assert not (tmp_path / "9").exists()


def test_a_step_is_not_saved_twice(tmp_path):
  checkpointer = open_at(tmp_path)
  checkpointer.save(3, make_state(3), {})
  with pytest.raises(Exception, match="3"):
    checkpointer.save(3, make_state(3), {})
  checkpointer.close()


def test_failed_save_surfaces_and_never_becomes_the_latest(tmp_path):
  state = make_state(1, size=1 << 18)
  noise = jax.random.normal(jax.random.key(0), (1 << 18,))
  checkpointer = open_at(tmp_path)
  checkpointer.save(1, state, {})
  checkpointer.wait()
  with no_file_larger_than(1 << 16):
    with pytest.raises(Exception, match=r"(?i)too large|errno.*27"):
      checkpointer.save(2, state.replace(params={"x": noise}), {})
      checkpointer.close()
  assert committed_steps(tmp_path) == [1]
  checkpointer = open_at(tmp_path)
  assert checkpointer.latest_step() == 1
  restored = checkpointer.restore(1, abstract_of(state))
  checkpointer.close()
  np.testing.assert_array_equal(restored.params["x"], state.params["x"])


@pytest.fixture
def meta(config):
  saved = make_meta(config, "aaaa", {"jax": "1"}, make_state(0))
  return json.loads(json.dumps(saved))


def edited(config, state=None, fingerprint="aaaa", **model):
  """The meta data of a run whose model differs in some fields."""
  config = copy.deepcopy(config)
  for name, value in model.items():
    setattr(config.model, name, value)
  return make_meta(config, fingerprint, {"jax": "2"}, state or make_state(0))


def check(saved, wanted, allow=False):
  check_meta(saved, wanted, allow_data_change=allow)


def test_what_may_change_on_a_resume(config, meta):
  config.optimizer.lr = 1.0
  config.num_steps = 9
  config.grad_accum = 4
  check(meta, edited(config, remat="full", dtype="bfloat16", loss_chunk=8))
  check(meta, edited(config, scan_unroll=0))
  del meta["config"]["model"]["scan_unroll"]  # as older versions wrote it
  check(meta, edited(config, scan_unroll=0))


@pytest.mark.parametrize(
  ("field", "value", "shown"),
  [
    ("num_layers", 4, "--config.model.num_layers: 1 -> 4"),
    ("pattern", "GS", "--config.model.pattern: 'G' -> 'GS'"),
    ("norm_eps", 1e-6, "--config.model.norm_eps: 1e-05 -> 1e-06"),
  ],
)
def test_another_architecture_is_refused(config, meta, field, value, shown):
  with pytest.raises(CheckpointError, match="another model") as info:
    check(meta, edited(config, **{field: value}), allow=True)
  assert shown in str(info.value)


def test_another_shape_or_dtype_is_refused(config, meta):
  with pytest.raises(CheckpointError, match=r"params/x.*\[3\].*\[4\]"):
    check(meta, edited(config, make_state(0, size=4)))
  half = make_state(0)
  half = half.replace(params={"x": half.params["x"].astype(jnp.bfloat16)})
  # Orbax would have cast it without a word.
  with pytest.raises(CheckpointError, match=r"params/x.*float32.*bfloat16"):
    check(meta, edited(config, half))


def test_other_data_is_refused_unless_allowed(config, meta):
  config.data.seed = 5
  wanted = edited(config, fingerprint="bbbb")
  with pytest.raises(
    CheckpointError, match="aaaa in the checkpoint, bbbb"
  ) as e:
    check(meta, wanted)
  assert "--config.data.seed: 0 -> 5" in str(e.value)
  assert "--config.checkpoint.allow_data_change" in str(e.value)
  check(meta, wanted, allow=True)


def test_damaged_meta_data_is_named(tmp_path):
  with pytest.raises(CheckpointError, match=r"unreadable.*3/meta/metadata"):
    read_meta(tmp_path, 3)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return tiny_run.make_run(tmp_path_factory.mktemp("tiny"))


def test_load_run(workdir):
  run = load_run(workdir)
  assert run.step == 3
  assert run.config.model.model_dim == 16
  assert run.tokenizer.decode(run.tokenizer.encode("abc")) == "abc"
  assert load_run(workdir, step=3).config == run.config
  shapes = {str(x.sharding.device_set) for x in jax.tree.leaves(run.params)}
  assert shapes == {str({jax.devices()[0]})}


def test_load_run_says_what_is_missing(workdir, tmp_path):
  with pytest.raises(CheckpointError, match="nowhere: no such directory"):
    load_run(tmp_path / "nowhere")
  with pytest.raises(CheckpointError, match="no complete checkpoint"):
    load_run(tmp_path)
  with pytest.raises(
    CheckpointError, match="--step=9: no such checkpoint; have"
  ):
    load_run(workdir, step=9)


def test_load_run_refuses_a_config_of_another_shape(workdir, tmp_path):
  other = tmp_path / "copy"
  shutil.copytree(workdir, other)
  path = other / "checkpoints" / "3" / "meta" / "metadata"
  meta = json.loads(path.read_text())
  del meta["sha256"]
  meta["config"]["model"]["mlp_dim"] = 1 << 20
  path.write_text(json.dumps(seal(meta)))
  # Before anything of that size is allocated.
  with pytest.raises(CheckpointError, match="does not fit its own config"):
    load_run(other)
