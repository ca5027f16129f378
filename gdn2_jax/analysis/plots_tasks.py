"""Figures of small trained models: accuracy by group, gates by kind of step."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from gdn2_jax.analysis import style

_MARKS = ("o", "^", "s", "D", "v", "P")


def accuracy_bars(
  panels: Mapping[str, Mapping[str, Float[np.ndarray, "groups seeds"]]],
  groups: Mapping[str, Sequence[str]],
) -> Figure:
  """Accuracy by group of queries, one panel per task; dots are seeds.

  Args:
    panels: Task -> name of the model -> accuracy [groups, seeds].
    groups: Task -> names of its groups.
  """
  figure = style.new_figure(
    1.2 + 3.7 * len(panels),
    3.9,
    "Accuracy by kind of query (bar: mean, dot: seed)",
    style.FINE,
  )
  grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  for axes, (task, models) in zip(grid, panels.items(), strict=True):
    width = 0.8 / len(models)
    for i, (name, accuracy) in enumerate(models.items()):
      x = np.arange(len(accuracy)) + (i - (len(models) - 1) / 2) * width
      axes.bar(
        x,
        accuracy.mean(-1),
        0.9 * width,
        color=style.SERIES[i],
        label=name if axes is grid[0] else None,
      )
      seeds = accuracy.shape[1]
      spread = np.linspace(-0.2, 0.2, seeds) * width if seeds > 1 else [0]
      for at, values in zip(x, accuracy, strict=True):
        axes.plot(at + spread, values, ".", color=style.INK, markersize=4)
    axes.set_xticks(range(len(groups[task])), groups[task])
    axes.set_title(task, color=style.INK, fontsize=10, loc="left")
    axes.set_xlabel("queries", color=style.INK)
    axes.set_ylim(0, 1)
    style.tidy(axes, "y")
  grid[0].set_ylabel("share of right answers", color=style.INK)
  style.legend_below(figure, len(next(iter(panels.values()))))
  return figure


def gate_plane(
  points: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
) -> Figure:
  """Mean erase and write gate of each kind of step, one point per seed.

  Args:
    points: Name of the model -> kind of step -> (mean b, mean w) over steps,
      each [seeds].
  """
  figure = style.new_figure(
    6.4, 5.0, "Gates by kind of step (mean over channels)", style.FINE
  )
  axes = figure.subplots()
  axes.plot([0, 1], [0, 1], color=style.MUTED, linestyle=style.DASHED, lw=1)
  axes.annotate(
    "tied: b = w",
    (0.52, 0.52),
    xytext=(4, -9),
    textcoords="offset points",
    fontsize=8.5,
    color=style.MUTED,
  )
  for i, (name, kinds) in enumerate(points.items()):
    for j, (kind, (b, w)) in enumerate(kinds.items()):
      axes.plot(
        b,
        w,
        _MARKS[j],
        color=style.SERIES[i],
        markersize=7,
        alpha=0.8,
        markeredgewidth=0,
        label=f"{name}: {kind}",
        clip_on=False,
        zorder=3,
      )
  axes.set_xlim(0, 1)
  axes.set_ylim(0, 1)
  axes.set_aspect("equal")
  axes.set_xlabel("erase gate b (0: keeps, 1: erases)", color=style.INK)
  axes.set_ylabel("write gate w (0: nothing, 1: all)", color=style.INK)
  style.tidy(axes, "both")
  style.legend_below(figure, len(points))
  return figure


def gate_histograms(
  gates: Mapping[str, Mapping[str, np.ndarray]], kinds: Sequence[str]
) -> Figure:
  """Distribution of gates over steps and channels, one panel per kind of step.

  Args:
    gates: Name of the gate -> kind of step -> values in [0, 1].
    kinds: Kinds to draw, in order.
  """
  figure = style.new_figure(
    8.6, 3.1, "Values of the gates over steps and channels", style.FINE
  )
  grid = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
  bins = np.linspace(0, 1, 21)
  for axes, kind in zip(grid, kinds, strict=True):
    for i, (name, values) in enumerate(gates.items()):
      counts, _ = np.histogram(values[kind], bins)
      axes.stairs(
        counts / counts.sum(),
        bins,
        color=style.SERIES[i],
        linestyle=("-", "--", ":")[i % 3],
        linewidth=1.8,
        label=name if axes is grid[0] else None,
      )
    axes.set_title(kind, color=style.INK, fontsize=10, loc="left")
    axes.set_xlabel("gate", color=style.INK)
    axes.set_xlim(0, 1)
    style.tidy(axes, "y")
  grid[0].set_ylabel("share of values", color=style.INK)
  style.legend_below(figure, len(gates))
  return figure


def differences(
  rows: Mapping[str, tuple[float, float, float]], unit: str
) -> Figure:
  """Estimates with their intervals against zero.

  Args:
    rows: Comparison -> (estimate, low, high).
    unit: Label of the axis.
  """
  figure = style.new_figure(
    7.6, 1.6 + 0.42 * len(rows), "Differences (line: 95% interval)", style.FINE
  )
  axes = figure.subplots()
  for i, (mean, low, high) in enumerate(rows.values()):
    axes.plot([low, high], [i, i], color=style.BLUE, linewidth=2)
    axes.plot(mean, i, "o", color=style.BLUE, markersize=7)
  axes.axvline(0, color=style.INK, lw=0.9, linestyle=style.DASHED)
  axes.set_yticks(range(len(rows)), rows)
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xlabel(unit, color=style.INK)
  style.tidy(axes, "x")
  axes.tick_params(axis="y", colors=style.INK)
  return figure
