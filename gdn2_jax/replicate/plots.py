"""Figures of a replication: curves of training, and capacity."""

import os

import numpy as np

from gdn2_jax.replicate.summary import CellSummary

_COLOURS = (
  *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"),
  *("#8c959f", "#1f2328", "#7b3294"),
)
_DPI = 110


def _colours(cells: list[CellSummary]) -> dict[str, str]:
  """A colour for each mixer, the same in every panel."""
  names = list(dict.fromkeys(c.cell.mixer for c in cells))
  return {n: _COLOURS[i % len(_COLOURS)] for i, n in enumerate(names)}


def _figure(panels: int, title: str):
  # Imported late: loading fonts takes seconds, and runs draw nothing.
  from matplotlib.figure import Figure

  figure = Figure(
    figsize=(max(6.0, 4.2 * panels), 4.2), dpi=_DPI, layout="constrained"
  )
  figure.suptitle(title, x=0.01, ha="left", fontsize=11)
  axes = figure.subplots(1, panels, squeeze=False)[0]
  for ax in axes:
    ax.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_ylim(0, 1.02)
    for side in ("top", "right"):
      ax.spines[side].set_visible(False)
  return figure, axes


def _legend(figure, axes):
  entries = {}
  for ax in axes:
    handles, labels = ax.get_legend_handles_labels()
    entries |= dict(zip(labels, handles, strict=True))
  if entries:
    figure.legend(
      entries.values(),
      entries.keys(),
      loc="outside lower center",
      ncols=min(int(figure.get_figwidth() / 1.4), len(entries)),
      frameon=False,
    )


def plot_curves(path: str | os.PathLike[str], cells: list[CellSummary]) -> None:
  """Draws accuracy against steps: mean of the seeds, band from min to max."""
  tasks = list(dict.fromkeys(c.cell.task for c in cells))
  figure, axes = _figure(
    len(tasks), "Accuracy in training, mean of the seeds (band: all seeds)"
  )
  colours = _colours(cells)
  for ax, task in zip(axes, tasks, strict=True):
    own = [c for c in cells if c.cell.task == task]
    ax.set_title(own[0].cell.task_name, loc="left")
    ax.set_xlabel("step")
    ax.set_ylabel("accuracy")
    for c in own:
      if not c.rows:
        continue
      steps = [point[0] for point in c.rows[0]["curve"]]
      acc = np.array([[point[2] for point in r["curve"]] for r in c.rows])
      colour = colours[c.cell.mixer]
      ax.plot(steps, acc.mean(0), color=colour, label=c.cell.mixer)
      ax.fill_between(
        steps, acc.min(0), acc.max(0), color=colour, alpha=0.08, linewidth=0
      )
  _legend(figure, axes)
  figure.savefig(path)


def plot_capacity(
  path: str | os.PathLike[str], cells: list[CellSummary]
) -> None:
  """Draws recall against pairs, and accuracy of all tasks against state."""
  figure, axes = _figure(2, "Capacity: mean of the seeds, bars of one sd")
  colours = _colours(cells)
  recall, state = axes
  recall.set_title(
    "recall, trained with the ringed number of pairs", loc="left"
  )
  recall.set_xlabel("pairs")
  recall.set_xscale("log", base=2)
  recall.set_ylabel("accuracy")
  state.set_xlabel("numbers of state, tails of convolutions included")
  markers = dict(
    zip(dict.fromkeys(c.cell.task for c in cells), "osD^vPX*", strict=False)
  )
  # Mixers with equal states would hide each other.
  names = list(colours)
  for c in cells:
    if not c.rows:
      continue
    name, colour = c.cell.mixer, colours[c.cell.mixer]
    scores = c.scores()
    shift = 1 + 0.02 * (names.index(name) - len(names) / 2)
    state.errorbar(
      c.rows[0]["state_floats"] * shift,
      scores.mean(),
      scores.std(),
      color=colour,
      marker=markers[c.cell.task],
      markersize=5,
      linewidth=1,
      label=f"{name}" if c.cell.task_name != "recall" else None,
    )
    by_pairs = [row["metrics"].get("acc_by_pairs") for row in c.rows]
    if not all(by_pairs):
      continue
    pairs = sorted(map(int, by_pairs[0]))
    acc = np.array([[b[str(n)] for n in pairs] for b in by_pairs])
    recall.errorbar(
      pairs, acc.mean(0), acc.std(0), color=colour, marker=".", label=name
    )
    trained = pairs.index(c.cell.task.pairs)
    recall.plot(
      pairs[trained], acc.mean(0)[trained], "o", mfc="none", color=colour
    )
  if recall.has_data():
    ticks = sorted(
      {
        int(x)
        for c in cells
        for r in c.rows
        for x in r["metrics"].get("acc_by_pairs", {})
      }
    )
    recall.set_xticks(ticks, [str(x) for x in ticks])
  # Above the axes, where no point can be.
  state.set_title(
    "  ".join(f"{_SHAPES[m]} {_name(task)}" for task, m in markers.items()),
    loc="left",
    fontsize=9,
  )
  state.set_xlim(0, 1.2 * max(state.get_xlim()[1], 1))
  _legend(figure, axes)
  figure.savefig(path)


_SHAPES = {
  "o": "circle",
  "s": "square",
  "D": "diamond",
  "^": "up",
  "v": "down",
  "P": "plus",
  "X": "cross",
  "*": "star",
}


def _name(task) -> str:
  return type(task).__name__.lower()
