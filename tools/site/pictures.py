"""Pictures of README.md: gates over text and the loss curve of a run.

python -m tools.site.pictures --workdir=runs/tiny_cpu
"""

import pathlib
import shutil

import numpy as np
from absl import app, flags

from gdn2_jax.analysis import plots_gates
from gdn2_jax.analysis.gates import collect_gates
from gdn2_jax.explore.documents import DEFAULT, held_out
from gdn2_jax.train.checkpoint import load_run

_WORKDIR = flags.DEFINE_string("workdir", "runs/tiny_cpu", "Finished run.")
_OUT = pathlib.Path(__file__).parents[2] / "docs" / "pictures"
_TOKENS = 48


def main(argv: list[str]) -> None:
  """Entry point: writes gates.png and loss.png."""
  del argv
  run = load_run(_WORKDIR.value)
  tokens = run.tokenizer.encode(held_out()[DEFAULT])[:_TOKENS]
  records = collect_gates(run.config.model, run.params, np.array([tokens]))
  words = [run.tokenizer.decode([token]) for token in tokens]
  figure = plots_gates.heads_over_tokens(records, words)
  figure.savefig(_OUT / "gates.png", dpi=150)
  shutil.copyfile(pathlib.Path(_WORKDIR.value) / "loss.png", _OUT / "loss.png")


if __name__ == "__main__":
  app.run(main)
