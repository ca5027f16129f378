"""metrics.jsonl across resumes, TensorBoard, W&B, writers of one's own."""

import json
import pathlib
import struct
import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from gdn2_jax.train.config import TrainConfig
from gdn2_jax.train.report.writers import (
  ReportConfig,
  check_writers,
  open_writers,
)
from gdn2_jax.train.report.writers.choose import validate
from gdn2_jax.train.report.writers.jsonl import JsonlWriter, read_rows


def test_resume_drops_later_rows_and_the_final_one(tmp_path):
  writer = JsonlWriter(tmp_path)
  for step in range(1, 6):
    writer.write(step, "train", {"loss": 1 / step})
  writer.write(3, "eval", {"loss_1x": 0.5})
  writer.write(3, "final", {"loss_1x": 0.5})
  writer.close()
  path = tmp_path / "metrics.jsonl"
  with path.open("a") as file:
    file.write('{"step": 6, "ki')  # cut by a kill
  writer = JsonlWriter(tmp_path, first_step=3)
  writer.write(4, "train", {"loss": 9.0})
  writer.close()
  rows = [(row["step"], row["kind"]) for row in read_rows(path)]
  assert rows == [
    (1, "train"),
    (2, "train"),
    (3, "train"),
    (3, "eval"),
    (4, "train"),
  ]
  assert read_rows(path)[-1]["loss"] == 9.0


def test_every_row_is_on_disk_at_once_and_strict_json(tmp_path):
  writer = JsonlWriter(tmp_path)
  writer.write(1, "train", {"loss": float("nan"), "grad_norm": float("inf")})

  def refuse(name):
    raise AssertionError(name)

  text = (tmp_path / "metrics.jsonl").read_text()
  row = json.loads(text, parse_constant=refuse)
  assert row == {"step": 1, "kind": "train", "loss": None, "grad_norm": None}
  writer.close()


def shown(folder: pathlib.Path) -> tuple[dict, dict]:
  """Scalars {tag: [(step, value)]} and texts, as TensorBoard shows a run."""
  scalars, texts = {}, {}
  for path in sorted(folder.glob("events.*")):
    data, at = path.read_bytes(), 0
    while at < len(data):
      # A record is its length, a checksum, the event, a checksum.
      (size,) = struct.unpack_from("<Q", data, at)
      event = Event.FromString(data[at + 12 : at + 12 + size])
      at += 16 + size
      if event.session_log.status == SessionLog.START:
        scalars = {
          tag: [p for p in points if p[0] < event.step]
          for tag, points in scalars.items()
        }
      for value in event.summary.value:
        if value.HasField("tensor"):
          texts[value.tag] = value.tensor.string_val[0].decode()
        else:
          point = event.step, round(value.simple_value, 6)
          scalars.setdefault(value.tag, []).append(point)
  return scalars, texts


def small(*writers: str) -> TrainConfig:
  config = TrainConfig()
  config.data.batch_size, config.data.seq_len = 4, 8
  config.report.writers = writers
  return config


def train_steps(writer, steps):
  for step in steps:
    writer.write(step, "train", {"loss": 1 / step, "lr": 0.5})


def test_tensorboard_after_a_kill_and_after_the_end(tmp_path):
  """Every point once, curves to the last step, losses over tokens."""
  config = small("tensorboard")
  writer = open_writers(config, tmp_path, 0)
  train_steps(writer, [1, 2, 3])
  writer.write(2, "eval", {"loss_1x": 0.75, "gates/erase/layer_0": 0.5})
  writer.close()  # steps beyond the checkpoint at 2 are lost
  writer = open_writers(config, tmp_path, 2)
  train_steps(writer, [3, 4])
  end = {"loss_1x": 0.25, "loss_4x": float("nan"), "gates/erase/layer_0": 0.25}
  writer.write(4, "final", end)
  writer.close()
  # The same command again, of a run that is complete.
  writer = open_writers(config, tmp_path, 4)
  writer.write(4, "final", end)
  writer.close()
  scalars, texts = shown(tmp_path / "tensorboard")
  assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3, 4]
  assert scalars["eval/loss_1x"] == [(2, 0.75), (4, 0.25)]
  assert scalars["final/loss_1x"] == [(4, 0.25)]
  assert "final/loss_4x" not in scalars
  assert scalars["gates/erase/layer_0"] == [(2, 0.5), (4, 0.25)]
  assert '"batch_size": 4' in texts["config/text_summary"]
  over_tokens, _ = shown(tmp_path / "tensorboard" / "tokens")
  steps = [step for step, _ in over_tokens["over_tokens/train_loss"]]
  assert steps == [32, 64, 96, 128]
  assert over_tokens["over_tokens/eval_loss"] == [(64, 0.75), (128, 0.25)]
  kinds = [row["kind"] for row in read_rows(tmp_path / "metrics.jsonl")]
  assert kinds == ["train", "train", "eval", "train", "train", "final"]


class Own:
  """A writer that keeps what it is told."""

  def __init__(self):
    self.rows, self.texts, self.closed = [], {}, 0

  def write(self, step, kind, values):
    self.rows.append((step, kind, dict(values)))

  def text(self, name, text):
    self.texts[name] = text

  def close(self):
    self.closed += 1


def test_a_writer_of_ones_own_and_no_other(tmp_path):
  own = Own()
  writer = open_writers(small(), tmp_path, 0, [own])
  writer.write(3, "train", {"loss": 2.0})
  writer.close()
  assert own.rows == [(3, "train", {"loss": 2.0})]
  assert json.loads(own.texts["config"])["data"]["batch_size"] == 4
  assert own.closed == 1
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_only_process_0_writes(tmp_path, monkeypatch):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  own = Own()
  writer = open_writers(small("tensorboard"), tmp_path, 0, [own])
  writer.write(3, "train", {"loss": 2.0})
  writer.close()
  assert own.rows == [] and not list(tmp_path.iterdir())


class _Run:
  def __init__(self, settings):
    self.settings = settings
    self.id = settings["id"] or "a1b2c3"
    self.logged, self.summary, self.is_finished = [], {}, False

  def log(self, values, step):
    self.logged.append((step, values))

  def finish(self):
    self.is_finished = True


@pytest.fixture
def wandb(monkeypatch):
  """A stand-in for the package: the runs that were started."""
  module = types.ModuleType("wandb")
  module.__spec__ = types.SimpleNamespace(name="wandb")
  module.runs = []

  def init(**settings):
    module.runs.append(_Run(settings))
    return module.runs[-1]

  module.init = init
  monkeypatch.setitem(sys.modules, "wandb", module)
  return module.runs


def test_wandb_goes_on_in_the_same_run(tmp_path, wandb):
  config = small("wandb")
  (tmp_path / "seed0").mkdir()
  check_writers(config.report)
  writer = open_writers(config, tmp_path / "seed0", 0)
  train_steps(writer, [1, 2, 3])
  writer.close()
  writer = open_writers(config, tmp_path / "seed0", 2)
  train_steps(writer, [3, 4])
  writer.write(4, "final", {"loss_1x": 0.25})
  writer.close()
  first, second = wandb
  assert (first.settings["project"], first.settings["name"]) == (
    "gdn2_jax",
    "seed0",
  )
  assert first.settings["config"]["data"]["seq_len"] == 8
  assert first.settings["id"] is None and second.settings["id"] == "a1b2c3"
  assert [step for step, _ in first.logged] == [1, 2, 3]
  # Step 3 is there already.
  assert second.logged == [
    (4, {"train/loss": 0.25, "train/lr": 0.5}),
    (4, {"final/loss_1x": 0.25, "eval/loss_1x": 0.25}),
  ]
  assert first.is_finished and second.is_finished


def test_writers_that_are_not_there_are_refused_in_one_line(monkeypatch):
  config = ReportConfig(writers=("wandb",))
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install 'gdn2-jax\[wandb\]'"):
    check_writers(config)
  with pytest.raises(ValueError, match="did you mean 'tensorboard'"):
    validate(ReportConfig(writers=("tensorbord",)))
