"""Figures of capacity: recall against pairs, pairs against state size."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from gdn2_jax.analysis import style

_MARKS = ("o", "s", "^", "D")


def recall_by_pairs(
  panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]],
  chance: float,
) -> Figure:
  """Measured recall with its theory line, one panel per rule.

  Args:
    panels: Rule -> state -> (pairs [n], recall [draws, n], theory [n]).
    chance: Share of right answers by guessing.
  """
  figure = style.new_figure(
    8.8, 4.0, "Recall of random associations (line: theory)", style.FINE
  )
  grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  for axes, (rule, states) in zip(grid, panels.items(), strict=True):
    for i, (name, (pairs, recall, theory)) in enumerate(states.items()):
      color = style.SERIES[i]
      axes.plot(pairs, theory, color=color, linewidth=1.3)
      axes.plot(
        pairs,
        recall.mean(0),
        _MARKS[i % len(_MARKS)],
        color=color,
        markersize=4.5,
        label=name if axes is grid[0] else None,
      )
    axes.axhline(chance, color=style.INK, lw=0.9, linestyle=style.DASHED)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_title(rule, color=style.INK, fontsize=10, loc="left")
    axes.set_xlabel("associations in the state", color=style.INK)
    axes.set_ylim(0, 1.02)
    style.tidy(axes, "y")
  grid[0].annotate(
    "guessing",
    (0, chance),
    xycoords=("axes fraction", "data"),
    xytext=(2, 3),
    textcoords="offset points",
    fontsize=8,
    color=style.INK,
  )
  grid[0].set_ylabel("share of right answers", color=style.INK)
  style.legend_below(figure, len(next(iter(panels.values()))))
  return figure


def pairs_by_state(
  floats: Float[np.ndarray, "n"],
  found: Mapping[str, tuple[np.ndarray, np.ndarray]],
  level: float,
) -> Figure:
  """Pairs that are recalled at a level against the size of the state.

  Args:
    floats: Numbers in the state, K V, ascending.
    found: Rule -> (measured pairs, pairs by the theory), each [n].
    level: Recall at which pairs are counted.
  """
  figure = style.new_figure(
    7.2,
    4.0,
    f"Associations at {level:.0%} recall, by size of state",
    style.FINE,
  )
  axes = figure.subplots()
  for i, (rule, (measured, theory)) in enumerate(found.items()):
    color = style.SERIES[i]
    axes.plot(floats, theory, color=color, linewidth=1.3)
    axes.plot(
      floats,
      measured,
      _MARKS[i],
      color=color,
      markersize=6,
      label=f"{rule} (line: theory)",
    )
  axes.plot(
    floats,
    np.sqrt(floats),
    color=style.MUTED,
    linestyle=style.DASHED,
    linewidth=1,
    label="one per key channel, K",
  )
  for scale in (axes.set_xscale, axes.set_yscale):
    scale("log", base=2)
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axis.set_minor_formatter(NullFormatter())
  axes.set_xlabel("numbers in the state, K V", color=style.INK)
  axes.set_ylabel("associations", color=style.INK)
  style.tidy(axes, "both")
  style.legend_below(figure, 2)
  return figure


def trained_recall(
  pairs: Int[np.ndarray, "n"],
  lines: Mapping[str, Float[np.ndarray, "n"]],
  models: Mapping[str, Float[np.ndarray, "seeds n"]],
  mark: int,
) -> Figure:
  """Recall of trained models beside untrained rules of the same state.

  Args:
    pairs: Numbers of associations.
    lines: Name -> recall of a rule.
    models: Name -> recall of the seeds.
    mark: Number of associations that the models were trained with.
  """
  figure = style.new_figure(
    7.2, 4.0, "Recall with learned gates (dot: seed)", style.FINE
  )
  axes = figure.subplots()
  styles = ("--", ":", "-.")
  for i, (name, line) in enumerate(lines.items()):
    axes.plot(
      pairs, line, styles[i % 3], color=style.MUTED, linewidth=1.4, label=name
    )
  for i, (name, recall) in enumerate(models.items()):
    color = style.SERIES[i]
    axes.plot(pairs, recall.mean(0), color=color, linewidth=1.8, label=name)
    for seed in recall:
      axes.plot(pairs, seed, _MARKS[i], color=color, markersize=4)
  axes.axvline(mark, color=style.INK, lw=0.9, linestyle=style.DASHED)
  axes.annotate(
    f"trained with {mark}",
    (mark, 1),
    xycoords=("data", "axes fraction"),
    xytext=(3, -9),
    textcoords="offset points",
    fontsize=8,
    color=style.INK,
  )
  axes.set_xscale("log", base=2)
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
  axes.set_ylim(0, 1.02)
  axes.set_xlabel("associations in the state", color=style.INK)
  axes.set_ylabel("share of right answers", color=style.INK)
  style.tidy(axes, "y")
  style.legend_below(figure, 2)
  return figure
