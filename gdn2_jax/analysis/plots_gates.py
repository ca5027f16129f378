"""Figures of the gates over text and of the half-lives of channels.

One colour per gate throughout: decay blue, erase orange, write green; within a
panel only lightness varies.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from gdn2_jax.analysis import style
from gdn2_jax.analysis.gates import LayerGates, effective_memory, half_life

_LABEL_CHARS = 12


@dataclasses.dataclass(frozen=True)
class _Panel:
  """One heat map: values [rows, tokens]."""

  title: str
  colors: str
  norm: Normalize
  values: np.ndarray


def heads_over_tokens(
  records: Sequence[LayerGates], tokens: Sequence[str]
) -> Figure:
  """Decay, erase and write of every head, mean over its channels.

  Args:
    records: gates of the layers; row 0 of the batch is drawn.
    tokens: labels of the first tokens; only these tokens are drawn.
  """
  n = len(tokens)
  # The mean of g, not of the half-lives: decays multiply.
  g, b, w = (
    np.concatenate([getattr(r, name)[0, :n].mean(-1) for r in records], 1).T
    for name in "gbw"
  )
  key_heads = _head_names(records, "k")
  value_heads = _head_names(records, "v")
  figure = style.new_figure(
    _width_for(n),
    1.9 + 0.2 * (2 * len(key_heads) + len(value_heads)),
    "Gates of every head, mean over its channels",
  )
  panels = _panels(g, b, w)
  grid = figure.subplots(
    3, 1, sharex=True, height_ratios=[len(panel.values) for panel in panels]
  )
  for axes, panel in zip(grid, panels, strict=True):
    _draw(figure, axes, panel)
    names = value_heads if panel is panels[2] else key_heads
    axes.set_yticks(range(len(names)), names)
  _label_tokens(grid[-1], tokens)
  return figure


def channels_over_tokens(
  record: LayerGates, head: int, tokens: Sequence[str]
) -> Figure:
  """Decay, erase and write of every channel of one key head.

  In each panel the channels are sorted by their mean over the tokens drawn,
  the largest on top. Of the value heads that share the key head the first is
  drawn.

  Args:
    record: gates of one layer; row 0 of the batch is drawn.
    head: index of the key head.
    tokens: labels of the first tokens; only these tokens are drawn.
  """
  n = len(tokens)
  value_head = head * (record.v.shape[2] // record.k.shape[2])
  heads = {"g": head, "b": head, "w": value_head}
  figure = style.new_figure(
    _width_for(n),
    6.6,
    f"Gates of every channel, layer {record.layer} head {head}",
  )
  panels = _panels(
    *(_sorted(getattr(record, s)[0, :n, h]).T for s, h in heads.items())
  )
  grid = figure.subplots(3, 1, sharex=True)
  for axes, panel in zip(grid, panels, strict=True):
    _draw(figure, axes, panel)
    kind = "value" if panel is panels[2] else "key"
    axes.set_ylabel(f"{kind} channel\n(sorted)", color=style.MUTED, fontsize=8)
    axes.set_yticks([0, len(panel.values) - 1], [1, len(panel.values)])
  _label_tokens(grid[-1], tokens)
  return figure


def memory_spans(
  models: Mapping[str, Sequence[LayerGates]],
  marks: Mapping[str, int],
  segment_ids: Int[np.ndarray, "B T"] | None = None,
) -> Figure:
  """Half-life of every key channel, by head, one row of dots per model.

  Args:
    models: name -> records of the same layers over the same tokens; at most
      three.
    marks: name -> tokens, drawn as vertical lines.
    segment_ids: [B, T]; padding (0) is left out.
  """
  heads = _head_names(next(iter(models.values())), "k")
  height = 1.7 + 0.3 * len(heads) * (len(models) + 0.5)
  figure = style.new_figure(
    8.6, height, "How long each key channel remembers (bar: median)"
  )
  axes = figure.subplots()
  spread = np.random.default_rng(0)
  colors = (style.GREY, style.BLUE, style.VERMILION)
  for m, (name, records) in enumerate(models.items()):
    spans = np.concatenate(
      [effective_memory(r.g, segment_ids) for r in records]
    )
    for i, span in enumerate(spans):
      y = i * (len(models) + 0.5) + m
      axes.plot(
        span,
        y + spread.uniform(-0.25, 0.25, len(span)),
        ".",
        color=colors[m],
        alpha=0.6,
        markersize=6,
        markeredgewidth=0,
        label=name if i == 0 else None,
      )
      axes.plot(2 * [np.median(span)], [y - 0.36, y + 0.36], "k", lw=1.8)
  axes.set_xscale("log")
  axes.invert_yaxis()
  centres = (len(models) + 0.5) * np.arange(len(heads)) + (len(models) - 1) / 2
  axes.set_yticks(centres, heads)
  axes.set_xlabel("half-life over the text (tokens)", color=style.INK)
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
  style.tidy(axes, "x")
  _draw_marks(axes, marks)
  style.legend_below(figure, len(models))
  return figure


def _draw_marks(axes: Axes, marks: Mapping[str, int]) -> None:
  ordered = sorted(marks.items(), key=lambda mark: mark[1])
  for i, (name, tokens) in enumerate(ordered):
    axes.axvline(tokens, color=style.INK, lw=0.9, linestyle=style.DASHED)
    # Neighbouring lines may be close: their labels point away from each other.
    side = -1 if i < len(ordered) - 1 else 1
    axes.annotate(
      f"{name}\n{tokens:,} tokens",
      (tokens, 1),
      xycoords=("data", "axes fraction"),
      xytext=(3 * side, 2),
      textcoords="offset points",
      ha="left" if side > 0 else "right",
      va="bottom",
      fontsize=8,
      color=style.INK,
    )
  if ordered:
    low, high = axes.get_xlim()
    axes.set_xlim(low, max(high, 3 * ordered[-1][1]))


def _head_names(records: Sequence[LayerGates], symbol: str) -> list[str]:
  return [
    f"layer {r.layer} head {h}"
    for r in records
    for h in range(getattr(r, symbol).shape[2])
  ]


def _panels(g: np.ndarray, b: np.ndarray, w: np.ndarray) -> tuple[_Panel, ...]:
  """Panels of arrays [rows, tokens]; erase and write have one range."""
  spans = half_life(g)
  finite = spans[np.isfinite(spans)]
  if not len(finite):
    finite = np.ones(1)
  # Whole steps around all but the outermost values.
  low, high = np.percentile(np.log10(finite), [1, 99])
  low, high = math.floor(2 * low) / 2, math.floor(2 * high) / 2 + 0.5
  log = LogNorm(10**low, 10**high)
  bottom, top = np.percentile(np.concatenate([b.ravel(), w.ravel()]), [1, 99])
  unit = Normalize(math.floor(10 * bottom) / 10, math.floor(10 * top + 1) / 10)
  title = "decay: half-life ln 2 / -g (tokens)"
  # A channel without any decay never forgets: the darkest colour.
  spans = np.where(np.isfinite(spans), spans, 10 * log.vmax)
  return (
    _Panel(title, "Blues", log, spans),
    _Panel("erase gate b (0: keeps, 1: erases)", "Oranges", unit, b),
    _Panel("write gate w (0: nothing, 1: all of v)", "Greens", unit, w),
  )


def _draw(figure: Figure, axes: Axes, panel: _Panel) -> None:
  image = axes.imshow(
    panel.values,
    cmap=colormaps[panel.colors],
    norm=panel.norm,
    aspect="auto",
    interpolation="nearest",
  )
  axes.set_title(panel.title, color=style.INK, fontsize=10, loc="left")
  below = panel.values.min() < panel.norm.vmin
  above = panel.values.max() > panel.norm.vmax
  bar = figure.colorbar(
    image,
    ax=axes,
    pad=0.01,
    aspect=10,
    extend=("neither", "min", "max", "both")[below + 2 * above],
  )
  if isinstance(panel.norm, LogNorm):
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
  bar.outline.set_visible(False)
  for part in (axes, bar.ax):
    part.tick_params(colors=style.MUTED, length=0, labelsize=8)
  for spine in axes.spines.values():
    spine.set_visible(False)


def _width_for(tokens: int) -> float:
  return max(7.0, 2.0 + 0.17 * tokens)


def _label_tokens(axes: Axes, tokens: Sequence[str]) -> None:
  axes.set_xticks(range(len(tokens)))
  # Dollar signs in the text do not begin a formula.
  axes.set_xticklabels(
    [_visible(token) for token in tokens],
    rotation=90,
    fontsize=8,
    family="monospace",
    color=style.INK,
    parse_math=False,
  )


def _visible(token: str) -> str:
  text = token.replace("\n", "\\n").replace("\t", "\\t")
  # The gap between labels already shows a space that begins a word.
  text = text.strip(" ") or "\u2423" * len(text)
  if len(text) <= _LABEL_CHARS:
    return text
  return text[: _LABEL_CHARS - 2] + ".."


def _sorted(values: np.ndarray) -> np.ndarray:
  return values[:, np.argsort(-values.mean(0))]
