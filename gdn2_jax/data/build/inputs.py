"""Inputs of a build: the files behind the name of a source of text.

embedded, snapshot   text that comes with Python, or a frozen excerpt of it
text:PATH            .parquet, .jsonl and .txt files, at any depth
tfds:FOLDER          a TFDS dataset in ArrayRecord files, with a feature "text"
"""

import contextlib
import dataclasses
import pathlib
import platform
import tempfile
from collections.abc import Iterator
from typing import Any

from gdn2_jax.data.packed.folder import SPLITS
from gdn2_jax.data.text import corpus, readers

TEXT_PREFIXES = ("text:", "tfds:")


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Arguments of `build_rows` that the source decides.

  Attributes:
    paths: name -> file.
    source: origin of the text, for the manifest.
    options: fields of `Options`.
  """

  paths: dict[str, pathlib.Path]
  source: dict[str, Any]
  options: dict[str, Any] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def open_inputs(name: str) -> Iterator[Inputs]:
  """The inputs of a source; files made for it exist within the context.

  Raises:
    ValueError: if there are no such files.
    ModuleNotFoundError: for TFDS without its package, with what to install.
  """
  kind, _, place = name.partition(":")
  if kind == "text":
    source = {"kind": "text", "name": pathlib.Path(place).name}
    yield Inputs(find_inputs(place), source)
  elif kind == "tfds":
    yield _tfds_inputs(place)
  else:
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / f"{name}.jsonl"
      corpus.write_json_lines(corpus.read_corpus(name), path)
      source = {"kind": name, "python": platform.python_version()}
      yield Inputs({path.name: path}, source, {"order": "text"})


def find_inputs(place: str | pathlib.Path) -> dict[str, pathlib.Path]:
  """Name -> path of a file, or of the files of a folder by their place in it.

  Raises:
    ValueError: if there is none.
  """
  root = pathlib.Path(place)
  base = root if root.is_dir() else root.parent
  found = readers.find_files(root)
  return {path.relative_to(base).as_posix(): path for path in found}


def _tfds_inputs(place: str) -> Inputs:
  try:
    import tensorflow_datasets as tfds
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "tfds: sources need tensorflow-datasets: pip install 'gdn2-jax[data]'"
    ) from error
  try:
    info = tfds.builder_from_directory(place).info
  except Exception as error:  # of several libraries below it
    raise ValueError(f"tfds:{place}: {error}") from error
  if {*SPLITS} - set(info.splits) or "text" not in info.features:
    raise ValueError(
      f"tfds:{place}: expected splits train and validation and a feature"
      f" 'text', found {sorted(info.splits)} and {sorted(info.features)}"
    )
  paths = {
    split: [pathlib.Path(path) for path in info.splits[split].filepaths]
    for split in SPLITS
  }
  return Inputs(
    {path.name: path for split in SPLITS for path in paths[split]},
    {"kind": "tfds", "name": info.full_name},
    {"validation_files": tuple(path.name for path in paths["validation"])},
  )
