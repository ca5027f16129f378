"""Figures of edits of a state: keys read, collateral damage, costs."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gdn2_jax.analysis import style
from gdn2_jax.analysis.surgery import PrivateCost

_MARKS = ("o", "s", "^", "D")


def key_cosines(
  keys: Float[np.ndarray, "n K"], found: Mapping[str, Float[np.ndarray, "n K"]]
) -> Figure:
  """Cosines of the keys that were read with those that were written.

  Args:
    keys: Written keys, of norm 1.
    found: Name of the method -> keys that it read, in the same order.
  """
  figure = style.new_figure(
    1.2 + 3.3 * len(found), 3.6, "Keys read out of the state", style.FINE
  )
  grid = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
  for axes, (name, rows) in zip(grid, found.items(), strict=True):
    cosines = rows @ keys.T / np.linalg.norm(rows, axis=-1, keepdims=True)
    image = axes.imshow(
      cosines, cmap="PuOr_r", vmin=-1, vmax=1, interpolation="nearest"
    )
    axes.set_title(name, color=style.INK, fontsize=10, loc="left")
    axes.set_xlabel("written key", color=style.INK)
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    style.tidy(axes, "both")
    axes.grid(visible=False)
  grid[0].set_ylabel("key read", color=style.INK)
  bar = figure.colorbar(image, ax=grid, label="cosine", aspect=14)
  bar.outline.set_visible(False)
  bar.ax.tick_params(colors=style.MUTED, length=0, labelsize=8.5)
  return figure


def collateral(
  cosines: Float[np.ndarray, "n"],
  changes: Mapping[str, tuple[Float[np.ndarray, "n"], float]],
) -> Figure:
  """Change of the reading of other keys against their cosine, with the theory.

  Args:
    cosines: Cosine of each other key with the edited one.
    changes: Name of the edit -> norms of the changes of the readings [n], and
      the norm of the vector that the edit writes, the slope of its line.
  """
  figure = style.new_figure(
    7.6, 4.0, "Collateral damage of one edit, by similarity of keys", style.FINE
  )
  axes = figure.subplots()
  line = np.linspace(0, 1, 2)
  for i, (name, (found, written)) in enumerate(changes.items()):
    color = style.SERIES[i]
    axes.plot(line, written * line, color=color, linewidth=1.2)
    axes.plot(
      np.abs(cosines),
      found,
      _MARKS[i % len(_MARKS)],
      color=color,
      markersize=3.5,
      alpha=0.7,
      markeredgewidth=0,
      label=name,
    )
  axes.plot([], [], color=style.MUTED, label="|cos| times what was written")
  axes.set_xlabel("|cosine| of a key with the edited key", color=style.INK)
  axes.set_ylabel("norm of the change of its reading", color=style.INK)
  style.tidy(axes, "y")
  style.legend_below(figure, 2)
  return figure


def private_cost(cost: PrivateCost) -> Figure:
  """Size of an edit that spares all stored keys, by number of stored keys."""
  figure = style.new_figure(
    7.6, 3.7, "Size of an edit that changes no other stored key", style.FINE
  )
  axes = figure.subplots()
  load = cost.counts / cost.dim
  low, middle, high = np.quantile(cost.norms, [0.1, 0.5, 0.9], axis=0)
  axes.fill_between(
    load,
    low,
    high,
    color=style.BLUE,
    alpha=0.2,
    linewidth=0,
    label="80% of draws",
  )
  axes.plot(load, middle, color=style.BLUE, label="median of random keys")
  axes.plot(
    load,
    cost.expected,
    color=style.VERMILION,
    linestyle="--",
    label="1 / sqrt(1 - (n - 1) / K)",
  )
  axes.set_yscale("log")
  axes.set_xlabel(
    f"stored keys per key channel, n / K (K = {cost.dim})", color=style.INK
  )
  axes.set_ylabel("size of the edit, relative to\none token's", color=style.INK)
  style.tidy(axes, "y")
  style.legend_below(figure, 3)
  return figure
