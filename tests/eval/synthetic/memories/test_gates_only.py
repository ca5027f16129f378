"""Memories of which only gates and readout are learned."""

import io

import numpy as np
import pytest

from gdn2_jax.analysis import plots_tasks
from gdn2_jax.eval.synthetic.memories import gates_only
from gdn2_jax.eval.synthetic.steps import FIRST_VALUE, QUERY, VALUES
from gdn2_jax.eval.synthetic.tasks import Overwrite, Recall, SetAdd

TASKS = (SetAdd(keys=2, writes=4), Overwrite(hot=1, cold=1, writes=4))
SHORT = gates_only.Schedule(steps=3, batch_size=4, scored=8)


@pytest.fixture(scope="module")
def trained():
  return gates_only.train_together(TASKS, (0, 1), SHORT)


def test_results_have_an_axis_for_tasks_variants_and_seeds(trained):
  assert trained.losses.shape == (2, 3, 2, 3)
  assert np.isfinite(trained.losses).all()
  assert trained.accuracy.shape == (2, 3, 2, 2)
  assert trained.erase.shape == trained.write.shape == (2, 3, 2, 8, 6, 16)
  first = trained.losses[..., 0]
  # At the start all gates are 1/2, in the tied variant too.
  np.testing.assert_allclose(first[:, 0], first[:, 1], rtol=1e-5)
  assert (first[:, 0] != first[:, 2]).all()
  assert (trained.losses[:, :, 0] != trained.losses[:, :, 1]).all()


def test_variants_restrict_the_gates(trained):
  tied, none = trained.erase[:, 1], trained.erase[:, 2]
  np.testing.assert_array_equal(tied, trained.write[:, 1])
  assert (tied == tied[..., :1]).all()
  assert not none.any() and trained.write[:, 2].all()


def test_models_are_scored_on_other_tasks(trained):
  same = gates_only.accuracy_on(trained, TASKS[0], scored=8)
  np.testing.assert_allclose(same[0], trained.accuracy[0], atol=1e-6)
  longer = gates_only.accuracy_on(trained, SetAdd(keys=3, writes=8), scored=4)
  assert longer.shape == (2, 3, 2, 2)


def test_kinds_of_steps():
  tokens = np.array(
    [[0, FIRST_VALUE], [0, FIRST_VALUE + VALUES // 2], [0, QUERY]]
  )
  masks = gates_only.kinds_of_steps(tokens)
  assert list(masks) == ["SET", "ADD", "query"]
  np.testing.assert_array_equal(
    np.stack([*masks.values()]), np.eye(3, dtype=bool)
  )


@pytest.mark.slow
def test_learning_reduces_the_loss():
  schedule = gates_only.Schedule(steps=60, batch_size=16, scored=32)
  found = gates_only.train_together(TASKS, (0,), schedule, ("decoupled",))
  assert (found.losses[..., -1] < 0.8 * found.losses[..., 0]).all()


def test_wrong_arguments_are_refused():
  with pytest.raises(ValueError, match="variants='free': expected some of"):
    gates_only.train_together(TASKS, (0,), SHORT, ("free",))
  with pytest.raises(
    ValueError, match=r"sequences of \[6, 8\] steps, expected"
  ):
    gates_only.train_together((TASKS[0], Recall(4)), (0,), SHORT)


def test_figures_show_accuracy_and_gates():
  accuracy = np.array([[0.5, 0.7], [1.0, 0.8]])
  figure = plots_tasks.accuracy_bars(
    {"set/add": {"a": accuracy, "b": accuracy / 2}}, {"set/add": ("x", "y")}
  )
  figure.savefig(io.BytesIO())
  heights = [bar.get_height() for bar in figure.axes[0].patches]
  np.testing.assert_allclose(heights, [0.6, 0.9, 0.3, 0.45])
  half = np.full(2, 0.5)
  figure = plots_tasks.gate_plane({"a": {"SET": (half, 2 * half)}})
  figure.savefig(io.BytesIO())
  assert figure.axes[0].lines[1].get_ydata().tolist() == [1, 1]
  figure = plots_tasks.gate_histograms({"b": {"SET": half}}, ["SET"])
  figure.savefig(io.BytesIO())
  figure = plots_tasks.differences({"a - b": (0.1, -0.2, 0.4)}, "accuracy")
  figure.savefig(io.BytesIO())
  interval, estimate = figure.axes[0].lines[:2]
  assert list(interval.get_xdata()) == [-0.2, 0.4]
  assert estimate.get_xdata()[0] == 0.1
