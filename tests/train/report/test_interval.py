"""Rows of metrics.jsonl are means of the steps since the row before."""

import dataclasses

import pytest

from gdn2_jax.train.report.interval import Interval

STEPS = [
  {"loss": 3.0, "tokens": 100.0, "grad_norm": 1.0, "lr": 0.1},
  {"loss": 6.0, "tokens": 300.0, "grad_norm": 3.0, "lr": 0.2},
]


def test_the_loss_is_that_of_all_targets():
  interval = Interval()
  for step in STEPS:
    interval.add(step)
  row = interval.take(STEPS[-1])
  assert row == {"loss": 5.25, "tokens": 200.0, "grad_norm": 2.0, "lr": 0.2}
  assert interval == Interval()


def test_a_single_step_is_its_own_mean():
  """To the bit: a loss is a float32, and its product with a count exact."""
  step = STEPS[0] | {"loss": 5.541262626647949, "tokens": 524287.0}
  interval = Interval()
  interval.add(step)
  assert interval.take(step) == step


def test_skipped_steps_are_left_out_unless_there_are_no_others():
  skipped = STEPS[1] | {"loss": float("nan")}
  interval = Interval()
  assert interval.take(skipped) is not skipped
  assert interval.take(skipped).items() >= {"grad_norm": 3.0}.items()
  interval.add(STEPS[0])
  assert interval.take(skipped)["loss"] == 3.0


def test_steps_without_a_target():
  empty = STEPS[0] | {"loss": 0.0, "tokens": 0.0}
  interval = Interval()
  interval.add(empty)
  assert interval.take(empty) == empty


def test_a_checkpoint_keeps_the_sums():
  interval = Interval()
  interval.add(STEPS[0])
  meta = {"interval": dataclasses.asdict(interval)}
  assert Interval.of_checkpoint(meta) == interval


@pytest.mark.parametrize(
  "saved",
  [None, {}, {"steps": 1.0}, "x"]
  + [dataclasses.asdict(Interval()) | {"nats": x} for x in ("1", None)]
  + [dataclasses.asdict(Interval()) | {"nats": float("inf")}],
)
def test_other_meta_data_starts_anew(saved):
  assert Interval.of_checkpoint({"interval": saved}) == Interval()
