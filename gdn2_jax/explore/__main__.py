r"""Writes a page that shows gates and states of a model over a text.

  gdn2 explore --workdir=runs/tiny --out=explorer.html
  gdn2 explore --workdir=runs/tiny --text="def add(a, b):" --out=add.html
  gdn2 explore --model=models/published --file=story.txt --max_tokens=64 \
    --layers=0,8 --heads=0,1 --out=story.html

The page is one HTML file that works in any browser, from a disk and without a
network. Choose a layer and a head, and move through the tokens with a slider:

  decay, erase and write gate of every channel as images over the tokens
  half-lives of the channels; norm and effective rank of the state
  what the output at a token reads from each earlier token, exactly
  the likeliest next tokens, before and after a change of this head's gates:
  tied, halved, doubled, or erase, write or decay switched off

Every change is computed here, by the model itself: for L layers with gates
and H heads 11 L H runs over the text. --layers and --heads take some of them; a
page of more than 5 MB is refused. Without --text and --file the text is a
held-out document of the package's corpus. In Jupyter,
gdn2_jax.explore.explore shows the same for any text and any factor.

--workdir is that of `gdn2 train`; --step picks one of its checkpoints, by
default the newest. --model takes a folder with a published model instead.

Exit status: 0 done; 1 refused, the reason is on standard error.
"""

import os
import pathlib

from absl import flags

from gdn2_jax import cli
from gdn2_jax.explore.documents import DEFAULT, held_out
from gdn2_jax.explore.extra import check_installed
from gdn2_jax.explore.model import Opened
from gdn2_jax.explore.page import MAX_TOKENS, save_page
from gdn2_jax.train.checkpoint import open_model as opening
from gdn2_jax.train.checkpoint.open_model import check_flags, open_model

flags.adopt_module_key_flags(opening)  # so that --help lists them
_TEXT = flags.DEFINE_string("text", None, "Text that the model reads.")
_FILE = flags.DEFINE_string("file", None, "File with the text, in UTF-8.")
_OUT = flags.DEFINE_string("out", None, "HTML file to write.")
_MAX_TOKENS = flags.DEFINE_integer(
  "max_tokens", MAX_TOKENS, "Tokens of the text; later ones are left out."
)
_LAYERS = flags.DEFINE_list(
  "layers", None, "Layers of the page, from 0; by default all with gates."
)
_HEADS = flags.DEFINE_list(
  "heads", None, "Value heads of the page, from 0; by default all."
)
_NOTE = flags.DEFINE_string("note", "", "Sentence for the top of the page.")


def main(argv: list[str]) -> None:
  """Entry point: checks the command line, loads the model, writes the page."""
  cli.refuse_positional(argv, "--workdir=runs/tiny")
  with cli.one_line_errors(ModuleNotFoundError):
    check_installed("bokeh")
    check_flags()
    layers = _numbers("layers", _LAYERS.value)
    heads = _numbers("heads", _HEADS.value)
    text = _text()
    _check_out()
    name, model = open_model()
    folder = flags.FLAGS.workdir or flags.FLAGS.model
    base = pathlib.Path(folder).absolute().name
    opened = Opened(base if base == name else f"{base}, {name}", model)
    line = save_page(
      opened,
      text,
      _OUT.value,
      max_tokens=_MAX_TOKENS.value,
      layers=layers,
      heads=heads,
      note=_NOTE.value,
    )
    print(line)


def _text() -> str:
  """The text that the flags name."""
  if _TEXT.value is not None and _FILE.value is not None:
    raise ValueError("--text and --file: expected one of them, got both")
  if _FILE.value is not None:
    try:
      return pathlib.Path(_FILE.value).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(f"--file={_FILE.value}: not UTF-8: {error}") from None
    except OSError as error:
      raise ValueError(f"--file={_FILE.value}: {error.strerror}") from None
  if _TEXT.value is not None:
    if not _TEXT.value:
      raise ValueError('--text is empty, e.g. --text="def add(a, b):"')
    return _TEXT.value
  return held_out()[DEFAULT]


def _check_out() -> None:
  """Refuses a file that cannot be written, before anything is computed."""
  if not _OUT.value:
    raise ValueError("--out is missing, e.g. --out=explorer.html")
  folder = os.path.dirname(os.path.abspath(_OUT.value))
  if not os.path.isdir(folder):
    raise ValueError(f"--out={_OUT.value}: no folder {folder}")
  if os.path.isdir(_OUT.value):
    raise ValueError(f"--out={_OUT.value}: a folder, expected a file")


def _numbers(name: str, values: list[str] | None) -> list[int] | None:
  """Integers of a flag's list."""
  if values is None:
    return None
  try:
    return [int(value) for value in values]
  except ValueError:
    raise ValueError(
      f"--{name}={','.join(values)}: expected numbers, as in --{name}=0,2"
    ) from None


if __name__ == "__main__":
  cli.run(main, __doc__)
