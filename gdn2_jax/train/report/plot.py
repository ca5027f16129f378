"""The loss curve of a run as a PNG."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_INK, _MUTED, _GRID = "#1f2328", "#6e7781", "#e6e8eb"
_TRAIN, _VALIDATION = "#0969da", "#cf222e"
_BASELINES = ("#8250df", "#1a7f37", "#9a6700")


def smooth(values: np.ndarray, span: float) -> np.ndarray:
  """Exponential moving average over about `span` values, without start bias."""
  keep = 1.0 - 1.0 / max(span, 1.0)
  total = weight = 0.0
  out = np.empty(len(values))
  for i, value in enumerate(values):
    total = keep * total + (1 - keep) * value
    weight = keep * weight + (1 - keep)
    out[i] = total / weight
  return out


def plot_loss(
  path: str | os.PathLike,
  rows: Sequence[Mapping[str, Any]],
  baselines: Mapping[str, float] | None = None,
) -> None:
  """Draws losses of metrics.jsonl, and baselines {name: nats per token}."""
  # Imported late: a fit of fonts takes seconds and most steps draw nothing.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  train = _points(rows, ("train",), "loss")
  validation = _points(rows, ("eval", "final"), "loss_1x")
  figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  if len(train):
    steps, losses = train.T
    axes.plot(steps, losses, color=_TRAIN, alpha=0.2, linewidth=0.8)
    smoothed = smooth(losses, len(losses) / 50)
    axes.plot(
      steps,
      smoothed,
      color=_TRAIN,
      linewidth=1.8,
      label=f"training, smoothed ({smoothed[-1]:.3f} at the end)",
    )
  if len(validation):
    axes.plot(
      *validation.T,
      color=_VALIDATION,
      marker="o",
      markersize=4.5,
      linewidth=1.2,
      label=f"validation ({validation[-1, 1]:.3f} at the end)",
      zorder=3,
    )
  _draw_baselines(axes, baselines or {})
  _style(axes)
  figure.savefig(path)


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


def _style(axes) -> None:
  from matplotlib.ticker import MaxNLocator

  axes.set_xlabel("step", color=_INK)
  axes.set_ylabel("loss (nats per token)", color=_INK)
  axes.set_title(
    "Loss over training", loc="left", color=_INK, fontsize=12, pad=10
  )
  axes.grid(axis="y", color=_GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.margins(x=0.01)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
  axes.tick_params(colors=_MUTED, length=0)
  for side in ("top", "right", "left"):
    axes.spines[side].set_visible(False)
  axes.spines["bottom"].set_color(_GRID)
  if axes.get_legend_handles_labels()[0]:
    # Above the axes: inside, it would cover a curve or a baseline sooner or
    # later.
    axes.legend(
      frameon=False,
      labelcolor=_INK,
      fontsize=9,
      ncols=2,
      loc="lower right",
      bbox_to_anchor=(1, 1),
      borderaxespad=0.2,
    )
