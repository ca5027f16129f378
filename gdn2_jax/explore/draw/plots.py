"""Parts that the explorer's figures have in common."""

from typing import Any

from bokeh.models import (
  ColorBar,
  ColumnDataSource,
  CustomJSHover,
  FactorRange,
  HoverTool,
  NumeralTickFormatter,
  Range1d,
  Span,
)
from bokeh.plotting import figure

from gdn2_jax.analysis import style

_FONT = "12px"


def numbers() -> NumeralTickFormatter:
  """Formatter of plain numbers, also on logarithmic scales."""
  return NumeralTickFormatter(format="0,0.[0000]")


class Plots:
  """Makes figures that share ranges and a mark of the chosen token.

  Args:
    shown: model with the arrays that are shown, see `layout.Shown`.

  Attributes:
    parts: sources, ranges, mappers and glyphs by name, for scripts.
    spans: marks of the chosen token.
  """

  def __init__(self, shown: Any):
    self.spans: list[Span] = []
    self.parts: dict[str, Any] = {
      "time_range": Range1d(-0.5, 1.5),
      "key_range": Range1d(-0.5, 1.5),
      "value_range": Range1d(-0.5, 1.5),
      "word_range": FactorRange(),
    }
    self._shown = shown

  def source(self, name: str, *columns: str) -> ColumnDataSource:
    """An empty source, which scripts know as NAME_source."""
    source = ColumnDataSource({column: [] for column in columns})
    self.parts[f"{name}_source"] = source
    return source

  def figure(self, label: str, *, over_tokens: bool = True, **options: Any):
    """An empty figure; those over tokens share their range and the mark."""
    if over_tokens:
      options = {
        "x_range": self.parts["time_range"],
        "x_axis_label": "token",
      } | options
    plot = figure(
      height=260,
      sizing_mode="stretch_width",
      min_width=240,
      toolbar_location=None,
      tools="",
      html_attributes={"role": "img", "aria-label": label},
      **options,
    )
    plot.min_border_right = 12
    plot.outline_line_color = None
    plot.grid.grid_line_color = style.GRID
    for axis in plot.axis:
      axis.axis_label_text_font_size = _FONT
      axis.axis_label_text_font_style = "normal"
      axis.axis_label_text_color = style.INK
      axis.major_label_text_font_size = _FONT
      axis.major_label_text_color = style.INK
      axis.minor_tick_line_color = None
      axis.axis_line_color = style.GREY
    if over_tokens:
      span = Span(
        location=0, dimension="height", line_color=style.INK, line_width=1.5
      )
      plot.add_layout(span)
      self.spans.append(span)
    return plot

  def image(
    self, name: str, label: str, mapper: Any, unit: str, **options: Any
  ):
    """A figure with an image over tokens and its colour bar."""
    plot = self.figure(label, **options)
    plot.grid.grid_line_color = None
    self.add_image(plot, name, mapper, unit)
    return plot

  def add_image(self, plot: Any, name: str, mapper: Any, unit: str) -> None:
    """Adds an image and its colour bar to a figure."""
    source = self.source(name, "image", "x", "y", "dw", "dh")
    glyph = plot.image(
      "image", "x", "y", "dw", "dh", source=source, color_mapper=mapper
    )
    bar = ColorBar(
      color_mapper=mapper,
      width=12,
      title=unit,
      title_text_font_size=_FONT,
      title_text_font_style="normal",
      title_standoff=8,
      formatter=numbers(),
      major_label_text_font_size=_FONT,
      label_standoff=6,
      padding=4,
    )
    plot.add_layout(bar, "right")
    self.parts[f"{name}_image"], self.parts[f"{name}_bar"] = glyph, bar
    self.parts[f"{name}_mapper"] = mapper

  def hover(self, plot: Any, tooltips: Any, **options: Any) -> None:
    """Adds values that are shown under the pointer."""
    plot.add_tools(HoverTool(tooltips=tooltips, visible=False, **options))

  def piece(self, index: str = "value") -> CustomJSHover:
    """Formatter of a coordinate as the token there."""
    return CustomJSHover(
      args={"shown": self._shown},
      code=f"return shown.pieces[Math.round({index})] ?? ''",
    )

  def channel(self, order: str) -> CustomJSHover:
    """Formatter of a row as the channel there."""
    return CustomJSHover(
      args={"shown": self._shown},
      code=f"""
        const d = shown.now
        const order = d instanceof Map ? d.get("{order}") : d["{order}"]
        return String(order[Math.round(value)] ?? "")""",
    )

  def pair(
    self,
    plot: Any,
    source: ColumnDataSource,
    x: str,
    base: str,
    now: str,
    *,
    dots: bool = False,
  ) -> None:
    """As is in grey, changed in blue; the same where nothing is changed."""
    for y, name, color, width in (
      (base, "as is", style.GREY, 4),
      (now, "changed", style.BLUE, 2),
    ):
      if dots:
        plot.scatter(
          x, y, source=source, size=3 + width, color=color, legend_label=name
        )
      else:
        plot.line(
          x, y, source=source, line_width=width, color=color, legend_label=name
        )
    self.legend(plot)

  def legend(self, plot: Any) -> None:
    """Puts the legend above the figure."""
    plot.add_layout(plot.legend[0], "above")  # not over the data
    plot.legend.orientation = "horizontal"
    plot.legend.label_text_font_size = _FONT
    plot.legend.border_line_color = None
    plot.legend.padding = plot.legend.margin = 0
    plot.legend.spacing = 14
