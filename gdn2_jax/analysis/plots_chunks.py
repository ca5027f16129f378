"""Figures of the chunkwise form: errors against decay, levels of the tree."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gdn2_jax.analysis import style

_OVERFLOW = np.log(np.finfo(np.float32).max)  # largest argument of exp
_MARKS = ("o", "s", "^", "D", "v", "P")


def errors_by_decay(
  decays: Float[np.ndarray, "N"],
  errors: Mapping[str, Float[np.ndarray, "N"]],
  tokens: int,
) -> Figure:
  """Error of each form of the scores against the decay per token.

  Args:
    decays: Mean log-decay per token, without its sign [N].
    errors: Name of the form -> relative error [N]; inf is drawn as a cross at
      the top.
    tokens: C; the line of overflow is where C tokens reach exp's limit.
  """
  figure = style.new_figure(
    7.6, 3.9, f"Scores of a chunk of {tokens} tokens in float32", style.FINE
  )
  axes = figure.subplots()
  finite = np.concatenate([e[np.isfinite(e)] for e in errors.values()])
  top = 10.0 ** np.ceil(np.log10(finite.max()) + 1)
  for i, (name, error) in enumerate(errors.items()):
    color, good = style.SERIES[i], np.isfinite(error)
    axes.plot(
      decays[good],
      error[good],
      color=color,
      marker=_MARKS[i],
      markersize=4,
      label=name,
    )
    if not good.all():
      axes.plot(
        decays[~good],
        np.full((~good).sum(), top),
        "x",
        color=color,
        label=f"{name}: inf or NaN",
      )
  # A cumulative sum over C tokens of mean decay d reaches the limit at d.
  limit = _OVERFLOW / tokens
  axes.axvline(limit, color=style.INK, lw=0.9, linestyle=style.DASHED)
  axes.annotate(
    f"exp({int(_OVERFLOW)}) within {tokens} tokens",
    (limit, 0.5),
    xycoords=("data", "axes fraction"),
    xytext=(-4, 0),
    textcoords="offset points",
    ha="right",
    fontsize=8,
    color=style.INK,
  )
  axes.set_xscale("log")
  axes.set_yscale("log")
  axes.set_xlabel("mean log-decay per token, -g (nats)", color=style.INK)
  axes.set_ylabel("relative error of the scores", color=style.INK)
  style.tidy(axes, "y")
  style.legend_below(figure, 3)
  return figure


def levels_of_tree(levels: Int[np.ndarray, "C C"]) -> Figure:
  """Level at which each pair of tokens meets, as a lower triangle.

  Args:
    levels: Result of `chunks.level_of_pairs`.
  """
  figure = style.new_figure(
    5.4, 4.4, "Level of each pair of tokens", style.FINE
  )
  axes = figure.subplots()
  count = int(levels.max()) + 1
  image = axes.imshow(
    np.ma.masked_less(levels, 0),
    cmap=colormaps["viridis"].resampled(count),
    norm=BoundaryNorm(np.arange(count + 1) - 0.5, count),
    interpolation="nearest",
  )
  bar = figure.colorbar(image, ax=axes, ticks=range(count))
  bar.set_ticklabels([f"{n}: blocks of {2**n}" for n in range(count)])
  bar.ax.tick_params(colors=style.MUTED, length=0, labelsize=8.5)
  bar.outline.set_visible(False)
  axes.set_xlabel("earlier token s", color=style.INK)
  axes.set_ylabel("later token r", color=style.INK)
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(MaxNLocator(integer=True))
  style.tidy(axes, "both")
  axes.grid(visible=False)
  return figure
