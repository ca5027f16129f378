r"""Prints our results in the layout of one of the paper's tables.

  python -m gdn2_jax.eval table --layout=4 --results=results/recall
  python -m gdn2_jax.eval table --layout=5 --out=tables \
    --results=results/harness,results/ruler,results/recall,eval.json

--results names folders that `eval ruler`, `recall` and `harness` wrote with
--out, files that `eval loss` and `ruler` wrote with --json, or folders of both.
The layouts are those of the paper (arXiv 2605.22791): 2 language modeling and
commonsense, 3 RULER, 4 recall, 5 ablations. The paper's rows come first, ours
below; each row names its provenance, and no mean mixes the two. A result that
is missing or not complete is blank. --out writes tableN.md and tableN.png.

Exit status: 0 done, 1 refused (reason on standard error).
"""

import pathlib

from absl import flags

from gdn2_jax import cli
from gdn2_jax.eval.table import draw
from gdn2_jax.eval.table.compare import compare
from gdn2_jax.eval.table.paper import LAYOUTS
from gdn2_jax.eval.table.results import read_results
from gdn2_jax.files import replacing, write_atomically

_RESULTS = flags.DEFINE_list(
  "results", [], "Files and folders of results, separated by commas."
)
_LAYOUT = flags.DEFINE_enum(
  "layout", None, LAYOUTS, "Table of the paper whose layout is used."
)
_OUT = flags.DEFINE_string(
  "out", None, "Folder for the table as Markdown and as PNG."
)


def main(argv: list[str]) -> None:
  """Entry point: reads the results, prints and writes the table."""
  cli.refuse_positional(argv, "--layout=4")
  with cli.one_line_errors():
    if _LAYOUT.value is None:
      raise ValueError("--layout is missing, e.g. --layout=2")
    if not _RESULTS.value:
      raise ValueError("--results is missing, e.g. --results=results/recall")
    results, unfinished = read_results(_RESULTS.value)
    table = compare(_LAYOUT.value, results, unfinished)
    text = draw.markdown(table)
    if _OUT.value:
      path = pathlib.Path(_OUT.value) / f"table{_LAYOUT.value}.md"
      write_atomically(path, text.encode())
      with replacing(path.with_suffix(".png")) as temporary:
        draw.figure(table).savefig(temporary, format="png", dpi=draw.DPI)
  print(text, end="")


if __name__ == "__main__":
  cli.run(main, __doc__)
