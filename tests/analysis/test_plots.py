"""Figures: edge cases, and the numbers that they show."""

import io

import numpy as np
import pytest

from gdn2_jax.analysis import plots_gates, plots_memory
from gdn2_jax.analysis.gates import LayerGates, effective_memory
from gdn2_jax.analysis.memory import overwrite, state_norm

T, H, HV, K, V = 6, 2, 4, 16, 24
WORDS = ["$x$", "\n", "  ", "a" * 40, "\u0394", "_"]


def record(rng, layer=0):
  keys, values = (2, T, H, K), (2, T, HV, V)
  unit = {
    name: rng.uniform(size=shape).astype(np.float32)
    for name, shape in {
      **dict.fromkeys("qkgb", keys),
      **dict.fromkeys("vwo", values),
    }.items()
  }
  unit["g"] = -unit["g"]
  return LayerGates(layer=layer, **unit)


def images(figure):
  return [axes.images[0] for axes in figure.axes if axes.images]


def render(figure):
  figure.savefig(io.BytesIO(), format="png")


def test_heads_are_rows_and_tokens_are_labels(rng):
  layers = [record(rng), record(rng, 2)]
  figure = plots_gates.heads_over_tokens(layers, WORDS)
  render(figure)
  decay, erase, write = images(figure)
  assert decay.get_array().shape == erase.get_array().shape == (2 * H, T)
  assert write.get_array().shape == (2 * HV, T)
  np.testing.assert_allclose(
    erase.get_array()[H], layers[1].b[0, :, 0].mean(-1), rtol=1e-6
  )
  rows = [label.get_text() for label in write.axes.get_yticklabels()]
  assert rows[0] == "layer 0 head 0" and rows[-1] == "layer 2 head 3"
  words = [label.get_text() for label in write.axes.get_xticklabels()]
  assert words == ["$x$", "\\n", "\u2423\u2423", "a" * 10 + "..", "\u0394", "_"]


def test_channels_are_sorted_and_of_the_first_value_head(rng):
  layer = record(rng)
  figure = plots_gates.channels_over_tokens(layer, 1, WORDS)
  render(figure)
  decay, _, write = (image.get_array() for image in images(figure))
  assert decay.shape == (K, T) and write.shape == (V, T)
  means = write.mean(1)
  assert np.all(np.diff(means) <= 0)
  np.testing.assert_allclose(
    np.sort(means), np.sort(layer.w[0, :, 2].mean(0)), rtol=1e-5
  )


def test_channels_without_decay_are_drawn_as_the_longest(rng):
  layer = record(rng)
  for g in (np.zeros_like(layer.g), np.where(layer.g < -0.5, 0, layer.g)):
    figure = plots_gates.channels_over_tokens(
      LayerGates(**(vars(layer) | {"g": g.astype(np.float32)})), 0, WORDS
    )
    render(figure)
    image = images(figure)[0]
    assert np.isfinite(image.get_array()).all()
    assert image.get_array().max() > image.norm.vmax


def test_spans_show_the_median_of_every_head_and_model(rng):
  models = {"one": [record(rng)], "two": [record(rng)]}
  figure = plots_gates.memory_spans(models, {"window": 8, "row": 16})
  render(figure)
  (axes,) = figure.axes
  bars = [line for line in axes.lines if line.get_linewidth() == 1.8]
  expected = [
    np.median(span)
    for (r,) in models.values()
    for span in effective_memory(r.g)
  ]
  found = [bar.get_xdata()[0] for bar in bars]
  np.testing.assert_allclose(found, expected)
  assert len({bar.get_ydata()[0] for bar in bars}) == 2 * H
  render(plots_gates.memory_spans(models, {}))


@pytest.mark.parametrize("borders", [[], [24]])
def test_states_are_drawn_at_the_tokens_read(rng, borders):
  trace = rng.normal(size=(6, HV, K, V)).astype(np.float32)
  figure = plots_memory.states_over_time(
    {"layer 0": trace}, {"layer 0": 2 * trace}, every=8, borders=borders
  )
  render(figure)
  norm = figure.axes[0]
  solid = norm.lines[0]
  np.testing.assert_array_equal(solid.get_xdata(), 8 * np.arange(1, 7))
  np.testing.assert_allclose(solid.get_ydata(), state_norm(trace)[:, 0])
  assert norm.get_ylim()[0] == 0
  assert norm.get_ylim()[1] > state_norm(trace).max()


def test_bars_and_sweep_show_the_experiment():
  gates = {"erase_own": 1.0, "erase_shared": 1.0, "write": 1.0}
  figure = plots_memory.overwrite_bars({"tied": overwrite(0.5, **gates)})
  render(figure)
  left, right = figure.axes
  shown = [[bar.get_width() for bar in axes.patches] for axes in (left, right)]
  # Bars of a part lie together: before and after of v1, old v2, new v2.
  np.testing.assert_allclose(shown[0], [1, 0.75, 0.5, 0, 0, 0.5], atol=1e-6)
  np.testing.assert_allclose(shown[1], [0.5, 0, 1, 0, 0, 1], atol=1e-6)
  cosines = np.linspace(0, 0.9, 4)
  figure = plots_memory.overwrite_sweep(
    cosines, {"tied": overwrite(cosines, **gates)}
  )
  render(figure)
  kept = figure.axes[0].lines[0].get_ydata()
  np.testing.assert_allclose(kept, 1 - cosines**2, atol=1e-6)
