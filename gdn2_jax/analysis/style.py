"""Colours, titles, legends and grids of all figures of the analysis."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2328", "#59636e", "#e6e8eb"
GREY, BLUE, VERMILION, GREEN = "#8c959f", "#0072b2", "#d55e00", "#009e73"
# Distinct for all common forms of colour blindness.
SERIES = (BLUE, VERMILION, GREEN, "#cc79a7", "#56b4e9", "#e69f00")
DASHED = (0, (4, 3))
_DPI = 80  # keeps a notebook full of figures in the hundreds of kilobytes
FINE = 150  # dpi of lines and bars, which compress well


def new_figure(
  width: float, height: float, title: str, dpi: int = _DPI
) -> Figure:
  """An empty figure of width x height inches, its title at the top left."""
  figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
  figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12)
  return figure


def legend_below(figure: Figure, columns: int) -> None:
  """All labelled lines and bars of the figure, outside the data."""
  figure.legend(
    loc="outside lower center",
    ncols=columns,
    frameon=False,
    labelcolor=INK,
    fontsize=9,
    markerscale=1.8,
  )


def tidy(axes: Axes, grid: str) -> None:
  """Grid along "x" or "y" behind the data, no frame, no tick marks."""
  axes.grid(axis=grid, color=GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(which="both", colors=MUTED, length=0, labelsize=8.5)
  for side in ("top", "right", "left"):
    axes.spines[side].set_visible(False)
  axes.spines["bottom"].set_color(GRID)
