"""Figures of the state over time and of the effects of an overwrite."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from gdn2_jax.analysis import style
from gdn2_jax.analysis.memory import Overwrite, effective_rank, state_norm

_LINES = ("-", "--", "-.", ":")


def states_over_time(
  states: Mapping[str, Float[np.ndarray, "N HV K V"]],
  carried: Mapping[str, Float[np.ndarray, "N HV K V"]],
  *,
  every: int,
  borders: Sequence[int],
) -> Figure:
  """Norm and effective rank of every head's state along a packed row.

  Args:
    states: name of the layer -> S [N, HV, K, V] after every `every` tokens.
    carried: the same without resets of the state at the borders.
    every: tokens between two states.
    borders: index of the first token of every document but the first.
  """
  figure = style.new_figure(
    1.6 + 3.7 * len(states),
    5.2,
    "The state along a row of packed documents (dashed line: border)",
  )
  grid = figure.subplots(
    2, len(states), sharex=True, sharey="row", squeeze=False
  )
  for column, (name, trace) in enumerate(states.items()):
    x = every * np.arange(1, len(trace) + 1)
    without = state_norm(carried[name])
    apart = x > min(borders, default=np.inf)  # the same line until then
    panels = (state_norm(trace), effective_rank(trace))
    for axes, values in zip(grid[:, column], panels, strict=True):
      for head, y in enumerate(values.T):
        color = style.SERIES[head % len(style.SERIES)]
        label = f"head {head}" if column == 0 and values is panels[0] else None
        axes.plot(x, y, color=color, linewidth=1.5, label=label)
        if values is panels[0]:
          axes.plot(
            x[apart], without[apart, head], ":", color=color, linewidth=1.2
          )
      for border in borders:
        axes.axvline(border, color=style.INK, lw=0.9, linestyle=style.DASHED)
      style.tidy(axes, "y")
    grid[0, column].set_title(name, color=style.INK, fontsize=10, loc="left")
    grid[1, column].set_xlabel("tokens read", color=style.INK)
  largest = min(trace.shape[-2:])
  labels = ("Frobenius norm of S", f"effective rank of S\n(of {largest})")
  for axes, label in zip(grid[:, 0], labels, strict=True):
    axes.set_ylabel(label, color=style.INK)
    # After all lines are in: a shared axis stops growing once it is set.
    axes.set_ylim(bottom=0)
  grid[0, 0].plot([], [], ":", color=style.MUTED, label="without the reset")
  style.legend_below(figure, 6)
  return figure


def overwrite_bars(settings: Mapping[str, Overwrite]) -> Figure:
  """Readings with both keys after each way to overwrite.

  Args:
    settings: name -> result for one pair of keys, arrays [2, 3].
  """
  rows = {"before": next(iter(settings.values())).before}
  rows |= {name: result.after for name, result in settings.items()}
  figure = style.new_figure(
    9.0, 1.7 + 0.66 * len(rows), "What each key reads back"
  )
  titles = ("read with k1: should be v1", "read with k2: should be new v2")
  parts = (
    ("v1", style.BLUE),
    ("old v2", style.GREY),
    ("new v2", style.VERMILION),
  )
  grid = figure.subplots(1, 2, sharey=True)
  for side, (axes, title) in enumerate(zip(grid, titles, strict=True)):
    for i, (part, color) in enumerate(parts):
      x = np.array([read[side, i] for read in rows.values()])
      y = np.arange(len(rows)) + 0.25 * (i - 1)
      label = part if side == 0 else None
      axes.barh(y, x, height=0.22, color=color, label=label)
      for at, value in zip(y, x, strict=True):
        # + 0.0 takes the sign off a zero that was rounded from below.
        text = f"{round(float(value), 2) + 0.0:g}"
        axes.text(
          max(value, 0) + 0.02,
          at,
          text,
          va="center",
          fontsize=7.5,
          color=style.INK,
        )
    axes.set_xlim(0, 1.12)
    axes.set_title(title, color=style.INK, fontsize=10, loc="left")
    axes.set_xlabel("coefficient in the reading", color=style.INK)
    style.tidy(axes, "x")
    axes.tick_params(axis="y", colors=style.INK)
  grid[0].set_yticks(range(len(rows)), rows)
  grid[0].invert_yaxis()
  style.legend_below(figure, 3)
  return figure


def overwrite_sweep(
  cosines: Float[np.ndarray, "N"], settings: Mapping[str, Overwrite]
) -> Figure:
  """Gain and cost of each way to overwrite against the keys' similarity.

  Args:
    cosines: k1 . k2, [N].
    settings: name -> result, arrays [N, 2, 3].
  """
  panels = (
    ("k1 still reads v1 (want 1)", (0, 0)),
    ("k2 still reads old v2 (want 0)", (1, 1)),
    ("k2 also reads v1 (want 0)", (1, 0)),
  )
  figure = style.new_figure(
    9.0, 3.9, "After the overwrite, against the similarity of the keys"
  )
  grid = figure.subplots(1, 3, sharey=True)
  for axes, (title, entry) in zip(grid, panels, strict=True):
    for i, (name, result) in enumerate(settings.items()):
      axes.plot(
        cosines,
        result.after[:, *entry],
        color=style.SERIES[i % len(style.SERIES)],
        linewidth=2,
        linestyle=_LINES[i % len(_LINES)],
        label=name if axes is grid[0] else None,
      )
    axes.set_title(title, color=style.INK, fontsize=10, loc="left")
    axes.set_xlabel("cosine of k1 and k2", color=style.INK)
    style.tidy(axes, "y")
  grid[0].set_ylabel("coefficient in the reading", color=style.INK)
  style.legend_below(figure, 2)
  return figure
