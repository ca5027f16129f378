"""Figures of the explorer, empty until scripts fill their sources."""

import dataclasses
from typing import Any

from bokeh.models import LinearColorMapper, LogColorMapper, Span
from bokeh.palettes import RdBu11, all_palettes, interp_palette
from bokeh.transform import dodge

from gdn2_jax.analysis import style
from gdn2_jax.explore.draw.plots import Plots, numbers

_LONGEST = 1000  # tokens, the end of the colours of half-lives
_SHORTEST = 0.3


@dataclasses.dataclass(frozen=True)
class Panel:
  """One figure with its words.

  Attributes:
    title: heading.
    text: paragraph that explains it, HTML.
    figure: Bokeh figure.
    is_wide: it takes the whole width.
  """

  title: str
  text: str
  figure: Any
  is_wide: bool = False


class Panels(Plots):
  """All figures of an explorer, and the parts that scripts change.

  Args:
    shown: as for `Plots`.
    most: upper end of the colours of erase and write.

  Attributes:
    panels: in the order of the page.
  """

  def __init__(self, shown: Any, most: float):
    super().__init__(shown)
    self.panels: list[Panel] = []
    self._images(most)
    self._memory()
    self._reads()
    self._prediction()

  def _images(self, most: float) -> None:
    def colors(name):
      return all_palettes[name][256][::-1]

    rate = LinearColorMapper(colors("Blues"), low=0, high=1)
    span = LogColorMapper(colors("Blues"), low=_SHORTEST, high=_LONGEST)
    texts = {
      "decay": (
        "Decay",
        "Half-life ln 2 / -g of every key channel at every token, in tokens; "
        "or e<sup>g</sup>, the part kept per token. Dark: kept long.",
        span,
        "half-life (tokens)",
        "key",
      ),
      "erase": (
        "Erase gate b",
        "Part of what the key reads that is removed, by key channel. 0 keeps, "
        "1 erases. Black: above the range of the gate.",
        LinearColorMapper(
          colors("Oranges"), low=0, high=most, high_color="black"
        ),
        "b",
        "key",
      ),
      "write": (
        "Write gate w",
        "Part of the value that is written, by value channel. With tied gates "
        "each column of b and w has one colour. Black: above the range.",
        LinearColorMapper(
          colors("Greens"), low=0, high=most, high_color="black"
        ),
        "w",
        "value",
      ),
    }
    for name, (title, text, mapper, unit, kind) in texts.items():
      plot = self.image(
        name,
        f"{title}: image of {kind} channels by tokens",
        mapper,
        unit,
        y_range=self.parts[f"{kind}_range"],
        y_axis_label=f"{kind} channel, sorted",
      )
      if name == "decay":
        # Two images, of which a script shows one: an image does not notice
        # that its mapper is replaced.
        self.add_image(plot, "rate", rate, "e^g (kept per token)")
      tips = [("token", "$x{custom}"), ("channel", "$y{custom}")]
      self.hover(
        plot,
        [*tips, ("value", "@image{0.000}")],
        formatters={
          "$x": self.piece(),
          "$y": self.channel(f"{kind}_channels"),
        },
      )
      self.panels.append(Panel(title, text, plot))

  def _memory(self) -> None:
    source = self.source("span", "channel", "index", "base", "now")
    plot = self.figure(
      "Half-life of every key channel over the text",
      over_tokens=False,
      x_range=self.parts["key_range"],
      y_axis_type="log",
      x_axis_label="key channel, sorted",
      y_axis_label="half-life (tokens)",
    )
    plot.yaxis.formatter = numbers()
    self.pair(plot, source, "channel", "base", "now", dots=True)
    self.hover(
      plot,
      [
        ("channel", "@index"),
        ("as is", "@base{0.00}"),
        ("changed", "@now{0.00}"),
      ],
    )
    text = (
      "ln 2 / -(mean of g over the text), in tokens: how long a channel "
      "remembers if nothing erases it. Channels without decay have no dot."
    )
    self.panels.append(Panel("Half-life by channel", text, plot))
    source = self.source(
      "line",
      "t",
      "token",
      "kl",
      "norm_base",
      "norm_now",
      "rank_base",
      "rank_now",
    )
    for name, title, label, text in (
      (
        "norm",
        "Norm of the state",
        "Frobenius norm of S",
        "How much the head stores after each token. It stays level where decay "
        "and erasing balance writing.",
      ),
      (
        "rank",
        "Effective rank of the state",
        "effective rank of S",
        "In how many independent directions it is stored: the exponential of "
        "the entropy of the normalised singular values.",
      ),
    ):
      plot = self.figure(f"{title} over tokens", y_axis_label=label)
      plot.y_range.start = 0
      self.pair(plot, source, "t", f"{name}_base", f"{name}_now")
      self.hover(
        plot,
        [
          ("token", "@token"),
          ("as is", f"@{name}_base{{0.00}}"),
          ("changed", f"@{name}_now{{0.00}}"),
        ],
        mode="vline",
      )
      self.panels.append(Panel(title, text, plot))

  def _reads(self) -> None:
    source = self.source("read", "s", "size", "token", "color")
    plot = self.figure(
      "Signed size of what the output at the chosen token reads",
      x_axis_label="earlier token s",
      y_axis_label="a_ts |w_s * v_s|",
    )
    plot.vbar(
      "s",
      top="size",
      width=0.8,
      fill_color="color",
      line_color=None,
      source=source,
    )
    self.hover(
      plot, [("token", "@token"), ("read", "@size{0.0000}")], mode="vline"
    )
    text = (
      "The output at the marked token t is exactly the sum of a<sub>ts</sub> "
      "(w<sub>s</sub> * v<sub>s</sub>) over s &le; t. The bars are its terms' "
      "sizes, with the sign of a<sub>ts</sub>: blue positive, orange negative."
    )
    self.panels.append(Panel("What this token reads", text, plot))
    mapper = LinearColorMapper(
      interp_palette(RdBu11[::-1], 255), low=-1, high=1
    )
    plot = self.image(
      "reads",
      "Signed size of what every token reads from every earlier token",
      mapper,
      "a_ts |w_s * v_s|",
      x_axis_label="earlier token s",
      y_axis_label="reading token t",
      y_range=self.parts["time_range"],
    )
    span = Span(location=0, dimension="width", line_color=style.INK)
    plot.add_layout(span)
    self.spans.append(span)
    self.hover(
      plot,
      [("t", "$y{custom}"), ("s", "$x{custom}"), ("read", "@image{0.0000}")],
      formatters={"$x": self.piece(), "$y": self.piece()},
    )
    text = (
      "The same for all tokens: row t reads from column s. The lines cross at "
      "the marked token. The colours are scaled to the largest term."
    )
    self.panels.append(Panel("What every token reads", text, plot))

  def _prediction(self) -> None:
    source = self.source("next", "name", "before", "after")
    plot = self.figure(
      "Probabilities of the likeliest next tokens before and after the change",
      over_tokens=False,
      y_range=self.parts["word_range"],
      x_axis_label="probability",
    )
    plot.height = 320
    plot.x_range.start = 0
    plot.ygrid.grid_line_color = None
    for name, color, place in (
      ("before", style.GREY, 0.2),
      ("after", style.BLUE, -0.2),
    ):
      plot.hbar(
        dodge("name", place, range=plot.y_range),
        right=name,
        height=0.36,
        color=color,
        source=source,
        legend_label=name,
      )
    self.legend(plot)
    self.hover(
      plot,
      [
        ("token", "@name"),
        ("before", "@before{0.000}"),
        ("after", "@after{0.000}"),
      ],
    )
    text = (
      "The ten next tokens that are likeliest before or after the change, and "
      "their probabilities; all layers after the changed one run again."
    )
    self.panels.append(Panel("Next token", text, plot))
    plot = self.figure(
      "Divergence of the next-token distributions over tokens",
      y_axis_label="KL (nats)",
    )
    plot.height = 200
    plot.y_range.start = 0
    plot.vbar(
      "t",
      top="kl",
      width=0.8,
      fill_color=style.BLUE,
      line_color=None,
      source=self.parts["line_source"],
    )
    self.hover(plot, [("token", "@token"), ("KL", "@kl{0.0000}")], mode="vline")
    text = (
      "KL(before || after) of the next-token distribution at every token: the "
      "tokens at which the change matters."
    )
    self.panels.append(Panel("Effect of the change", text, plot, is_wide=True))
