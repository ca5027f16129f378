"""N steps = k steps, stop, N - k steps, in every bit; and what is skipped."""

import copy
import json

import jax
import numpy as np
import pytest

from gdn2_jax.data.pipeline import open_dataset
from gdn2_jax.train.checkpoint.meta import read_meta
from gdn2_jax.train.loop import train
from gdn2_jax.train.report.report import DivergedError, Report
from gdn2_jax.train.report.skipped import rows_of
from gdn2_jax.train.report.writer import read_rows
from tests.data.packing import pack
from tests.train.conftest import make_config
from tests.train.test_loop import Faulty, bits, interrupted, losses, poisoned

STEPS = 6


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
  """Nothing here is about the evaluation at the end of a run."""
  monkeypatch.setattr(Report, "finish", lambda *_: None)


@pytest.fixture(scope="module")
def small(cache_dir, tmp_path_factory):
  """An epoch that ends within a batch."""
  texts = [f"{n} squared is {n * n}" for n in range(36)]
  folder = pack(texts, tmp_path_factory.mktemp("rows") / "packed").path
  config = make_config(cache_dir)
  config.data.source = str(folder)
  config.checkpoint.every_steps = STEPS // 2
  config.checkpoint.keep = STEPS
  return config


def quiet(_):
  pass


def digests(workdir):
  folder = workdir / "checkpoints"
  return {s: read_meta(folder, s)["digests"] for s in (STEPS // 2, STEPS)}


@pytest.mark.slow
def test_stopped_at_the_start_in_the_middle_and_where_epochs_meet(
  small, tmp_path
):
  dataset = open_dataset(small.data)
  rows, size = len(dataset.train_rows()), small.data.batch_size
  epoch = rows // size
  assert rows % size and 1 < epoch < STEPS - 1
  straight = train(small, tmp_path / "straight", dataset=dataset, say=quiet)
  # The batch after `epoch` steps has rows of both epochs.
  stops = [1, epoch, epoch + 1]
  workdir = tmp_path / "stopped"
  for stop in stops:
    faulty = Faulty(dataset, {stop - 1: interrupted})
    result = train(small, workdir, dataset=faulty, say=quiet)
    assert (result.step, result.stopped_by) == (stop, "SIGTERM")
  result = train(small, workdir, dataset=dataset, say=quiet)
  assert bits(result.state) == bits(straight.state)
  assert losses(workdir) == losses(tmp_path / "straight")
  # Parameters, both moments, the schedule's count, and all counters.
  found = digests(workdir)
  assert found == digests(tmp_path / "straight")
  assert len(found[STEPS]) == len(jax.tree.leaves(result.state))


@pytest.fixture
def unchecked(monkeypatch):
  """Lets poisoned batches through to the device."""
  monkeypatch.setattr("gdn2_jax.train.loop.check_batch", lambda *_: None)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_skipped_batch_leaves_every_bit_and_names_its_rows(
  config, dataset, tmp_path
):
  config.checkpoint.every_steps = 1
  config.checkpoint.keep = 9
  lines = []
  faulty = Faulty(dataset, {1: poisoned, 4: poisoned, 5: poisoned})
  with pytest.raises(DivergedError, match=r"steps 5 to 6: .*rows \d+, ") as e:
    train(config, tmp_path, dataset=faulty, say=lines.append)
  steps = {
    s: read_meta(tmp_path / "checkpoints", s)["digests"] for s in range(1, 6)
  }
  counters = {"step", "skipped", "skipped_in_a_row"}
  changed = {n for n in steps[1] if steps[1][n] != steps[2][n]}
  assert changed == {f"optimizer/{name}" for name in counters}
  assert steps[3] != steps[2]
  skipped = [
    json.loads(line)
    for line in (tmp_path / "skipped.jsonl").read_text().splitlines()
  ]
  assert [line["step"] for line in skipped] == [2, 5, 6]
  rows = skipped[-1]["rows"]
  assert f"rows {rows[0][1]}, {rows[1][1]}" in str(e.value)
  # The numbers lead to the very rows.
  batch = next(dataset.train_batches(start_step=5))
  for i, (source, row) in enumerate(rows):
    expected = dataset.train_rows(source)[row]["inputs"]
    np.testing.assert_array_equal(batch["inputs"][i], expected)


def test_rows_of_a_mixture(small, cache_dir):
  config = copy.deepcopy(make_config(cache_dir).data)
  config.source = f"snapshot:0.5,{small.data.source}:0.5"
  dataset = open_dataset(config)
  batch = next(dataset.train_batches(start_step=3))
  found = rows_of(dataset, 3)
  assert {source for source, _ in found} == {0, 1}
  for i, (source, row) in enumerate(found):
    expected = dataset.train_rows(source)[row]["inputs"]
    np.testing.assert_array_equal(batch["inputs"][i], expected)


def spike(batch):
  """One target alone, and not averaged away."""
  mask = np.zeros_like(batch["loss_mask"])
  mask[0, 7] = 1
  return batch | {"loss_mask": mask}


@pytest.mark.slow
def test_loss_spike_is_left_out_and_comes_again(config, dataset, tmp_path):
  """skip_norm leaves it out; a replay from the checkpoint shows it again."""
  # Compiled twice: a model that compiles fast.
  config.model.pattern = "S"
  faulty = Faulty(dataset, {3: spike})
  train(config, tmp_path / "clipped", dataset=faulty, say=quiet)
  clipped = losses(tmp_path / "clipped")
  norms = [norm for _, _, norm, _ in clipped]
  others = max(norms[:3])
  assert norms[3] > 1.05 * others
  config.optimizer.skip_norm = 1.02 * others
  config.max_skipped = 9
  lines = []
  stop = Faulty(dataset, {2: interrupted, 3: spike})
  train(config, tmp_path / "skipped", dataset=stop, say=lines.append)
  train(config, tmp_path / "skipped", dataset=faulty, say=lines.append)
  skipped = losses(tmp_path / "skipped")
  # The same numbers up to the spike and of the spike itself, then others.
  assert skipped[:4] == clipped[:4]
  assert skipped[4] != clipped[4]
  assert any("step 4: " in line and "skipped (1" in line for line in lines)
  rows = read_rows(tmp_path / "skipped" / "metrics.jsonl")
  assert rows[3]["skipped"] == 1
