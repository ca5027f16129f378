"""The loss curve of a run as a PNG."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_INK, _MUTED, _GRID = "#1f2328", "#6e7781", "#e6e8eb"
_TRAIN, _VALIDATION = "#0969da", "#cf222e"
_BASELINES = ("#8250df", "#1a7f37", "#9a6700")
_STYLE = {
  "axes.axisbelow": True,
  "axes.edgecolor": _GRID,
  "axes.grid": True,
  "axes.grid.axis": "y",
  "axes.labelcolor": _INK,
  "axes.spines.left": False,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlecolor": _INK,
  "axes.titlelocation": "left",
  "axes.titlepad": 10,
  "axes.xmargin": 0.01,
  "grid.color": _GRID,
  "legend.fontsize": 9,
  "legend.frameon": False,
  "legend.labelcolor": _INK,
  "xtick.color": _MUTED,
  "xtick.major.size": 0,
  "ytick.color": _MUTED,
  "ytick.major.size": 0,
}


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
  """Mean of the last `window` values at each, of fewer at the start."""
  ends = np.arange(1, len(values) + 1)
  starts = np.maximum(ends - window, 0)
  sums = np.cumsum(np.insert(values, 0, 0.0))
  return (sums[ends] - sums[starts]) / (ends - starts)


def plot_loss(
  path: str | os.PathLike,
  rows: Sequence[Mapping[str, Any]],
  baselines: Mapping[str, float] | None = None,
) -> None:
  """Draws losses of metrics.jsonl, and baselines {name: nats per token}."""
  # Imported late: loading fonts takes seconds and most steps draw nothing.
  import matplotlib
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot(
      title="Loss over training", xlabel="step", ylabel="loss (nats per token)"
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    _draw_losses(axes, rows)
    _draw_baselines(axes, baselines or {})
    if axes.get_legend_handles_labels()[0]:
      # Above the axes: inside, it would cover a curve or a baseline.
      axes.legend(
        ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2
      )
    figure.savefig(path)


def _draw_losses(axes, rows: Sequence[Mapping[str, Any]]) -> None:
  train = _points(rows, ("train",), "loss")
  if len(train):
    steps, losses = train.T
    # A row may be the loss of one batch: several of them average the noise out.
    window = max(5, len(train) // 50)
    mean = trailing_mean(losses, window)
    style = {"color": _TRAIN, "linewidth": 0.8, "alpha": 0.3}
    axes.plot(steps, losses, label="training, logged means", **style)
    label = f"mean of the last {window} of them ({mean[-1]:.3f} at the end)"
    axes.plot(steps, mean, color=_TRAIN, linewidth=1.8, label=label)
  validation = _points(rows, ("eval", "final"), "loss_1x")
  if len(validation):
    label = f"validation ({validation[-1, 1]:.3f} at the end)"
    style = {"color": _VALIDATION, "linewidth": 1.2, "zorder": 3}
    axes.plot(*validation.T, marker="o", markersize=4.5, label=label, **style)


def _points(rows, kinds: tuple[str, ...], name: str) -> np.ndarray:
  points = [
    (row["step"], row[name])
    for row in rows
    if row["kind"] in kinds and row.get(name) is not None
  ]
  return np.asarray(points, float).reshape(-1, 2)


def _draw_baselines(axes, baselines: Mapping[str, float]) -> None:
  for (name, nats), color in zip(
    baselines.items(), _BASELINES * len(baselines), strict=False
  ):
    axes.axhline(nats, color=color, linewidth=1.1, linestyle=(0, (5, 3)))
    axes.annotate(
      f"{name}  {nats:.2f}",
      (1, nats),
      xycoords=("axes fraction", "data"),
      xytext=(-4, 3),
      textcoords="offset points",
      ha="right",
      color=color,
      fontsize=9,
    )
