"""Shared style of all figures."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

INK, MUTED, GRID = "#1f2328", "#59636e", "#e6e8eb"
GREY, BLUE, VERMILION, GREEN = "#8c959f", "#0072b2", "#d55e00", "#009e73"
# Distinguishable with all common forms of colour blindness.
SERIES = (BLUE, VERMILION, GREEN, "#cc79a7", "#56b4e9", "#e69f00")
_DPI = 80  # keeps a notebook full of figures in the hundreds of kilobytes


def new_figure(width: float, height: float, title: str) -> Figure:
  """Makes an empty figure, in inches, with its title at the top left."""
  figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
  figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12)
  return figure


def legend_below(figure: Figure, columns: int) -> None:
  """Adds a legend of all labelled lines and bars below the axes."""
  figure.legend(
    loc="outside lower center",
    ncols=columns,
    frameon=False,
    labelcolor=INK,
    fontsize=9,
    markerscale=1.8,
  )


def label(
  axes: Axes,
  title: str | None = None,
  *,
  x: str | None = None,
  y: str | None = None,
) -> None:
  """Sets the title and the labels that are given."""
  if title is not None:
    axes.set_title(title, color=INK, fontsize=10, loc="left")
  if x is not None:
    axes.set_xlabel(x, color=INK)
  if y is not None:
    axes.set_ylabel(y, color=INK)


def mark(axes: Axes, x: float) -> None:
  """Draws a dashed vertical line."""
  axes.axvline(x, color=INK, lw=0.9, linestyle=(0, (4, 3)))


def plain_numbers() -> FuncFormatter:
  """Makes a formatter of ticks like 10,000 instead of powers of ten."""
  return FuncFormatter(lambda value, _: f"{value:,g}")


def tidy(axes: Axes, grid: str) -> None:
  """Draws a grid along "x" or "y", and no frame and no tick marks."""
  axes.grid(axis=grid, color=GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(which="both", colors=MUTED, length=0, labelsize=8.5)
  for side in ("top", "right", "left"):
    axes.spines[side].set_visible(False)
  axes.spines["bottom"].set_color(GRID)
