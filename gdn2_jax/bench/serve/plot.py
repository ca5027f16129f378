"""Figure of `bench serve`."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import (
  FuncFormatter,
  LogLocator,
  NullFormatter,
  NullLocator,
)

from gdn2_jax.analysis import style

_COLORS = {
  "GDN-2": style.BLUE,
  "hybrid": style.GREEN,
  "softmax": style.VERMILION,
}
_MARKERS = {"GDN-2": "o", "hybrid": "s", "softmax": "^"}


def draw(result: dict[str, Any]) -> Figure:
  """Draws the result of `serve.run` against the length of the context."""
  sizes = result["models"].get(result["options"]["preset"], {})
  most = max((m["parameters"] for m in sizes.values()), default=0)
  where = result["cpu"] if result["device"] == "cpu" else result["device"]
  title = f"Serving {most / 1e6:.1f}M parameters: {where}, {result['clock']}"
  if result["options"]["rehearse"]:
    title = "REHEARSAL: the times mean nothing"
  figure = style.new_figure(14.0, 7.6, title)
  panels = figure.subplots(2, 3)
  batches = result["options"]["batches"]
  low, high = batches[0], batches[-1]
  decode, prefill, constancy = (
    [row for row in result["rows"] if row["section"] == section]
    for section in ("decode", "prefill", "constancy")
  )
  axes = panels[0, 0]
  _lines(axes, _batch(decode, low), "ms")
  _lines(axes, _batch(decode, low), "floor_ms", linestyle=":", marker=False)
  _label(axes, f"One token, batch {low}\n(dotted: memory floor)", "ms")
  _lines(panels[0, 1], _batch(decode, high), "tokens_per_s")
  _label(panels[0, 1], f"Decoding, batch {high}", "tokens per second")
  _lines(panels[0, 2], _batch(decode, low), "state_bytes", scale=1e-6)
  _label(panels[0, 2], f"State, batch {low}", "MB")
  _lines(panels[1, 0], prefill, "tokens_per_s")
  _label(panels[1, 0], "Reading a prompt", "tokens per second")
  name = result["options"]["constancy_preset"]
  _lines(panels[1, 1], constancy, "ms", scale=1e3)
  _lines(panels[1, 1], constancy, "prefill_us_per_token", linestyle="--")
  title = f'One token after prompts really read, size "{name}"'
  _label(panels[1, 1], title + "\n(dashed: reading the prompt)", "us")
  _lines(panels[1, 2], constancy, "state_bytes", scale=1e-6)
  _label(panels[1, 2], "State after these prompts", "MB")
  for name, color in _COLORS.items():
    if any(row["model"] == name for row in result["rows"]):
      axes.plot([], [], color=color, marker=_MARKERS[name], label=name)
  style.legend_below(figure, 3)
  return figure


def _batch(rows, batch):
  return [row for row in rows if row["batch"] == batch]


def _lines(axes, rows, key, scale=1.0, linestyle="-", marker=True):
  for name, color in _COLORS.items():
    points = [r for r in rows if r["model"] == name and key in r]
    axes.plot(
      [r["length"] for r in points],
      [scale * r[key] for r in points],
      color=color,
      marker=_MARKERS[name] if marker else None,
      markersize=4.5,
      linewidth=1.6,
      linestyle=linestyle,
    )


def _label(axes, title, unit):
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  axes.set_title(title, color=style.INK, fontsize=10, loc="left")
  axes.set_xlabel("tokens of context", color=style.INK)
  axes.set_ylabel(unit, color=style.INK)
  style.tidy(axes, "both")
  axes.xaxis.set_major_formatter(FuncFormatter(_tokens))
  axes.xaxis.set_minor_locator(NullLocator())
  axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
  axes.yaxis.set_minor_formatter(NullFormatter())


def _tokens(x, _):
  return f"{x / 1024:g}K" if x >= 1024 else f"{x:g}"
