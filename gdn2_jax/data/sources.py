"""Sources of text and rows: the values of `data.source`.

embedded, snapshot       built-in text
text:PATH                parquet, jsonl and txt files
tfds:FOLDER              a TFDS dataset with a feature "text"
FOLDER                   packed rows made by `python -m gdn2_jax.data`
NAME:0.7,NAME:0.3        a mixture of the above, with weights

All but a FOLDER are packed into the cache on first use.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import platform
import tempfile
from collections.abc import Iterator

import tokenizers
import tqdm

from gdn2_jax import files
from gdn2_jax.data.build import build, recipe
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.text import corpus, readers
from gdn2_jax.data.tokenizer import api as tokenization

_TEXT_PREFIXES = ("text:", "tfds:")
# Documents keep one order for all runs; the run's seed shuffles rows.
_DOCUMENT_SEED = 0


@dataclasses.dataclass(frozen=True)
class Weighted:
  """One source of a mixture and its weight."""

  name: str
  weight: float

  @property
  def is_text(self) -> bool:
    """True if the source is packed into the cache on first use."""
    return self.name in corpus.SOURCES or self.name.startswith(_TEXT_PREFIXES)


def parse(source: str) -> tuple[Weighted, ...]:
  """The sources of a `data.source` string, with positive weights."""
  items = [item.strip() for item in source.split(",")]
  if len(items) == 1 and _weight_of(items[0]) is None:
    return (Weighted(source, 1.0),)
  found = []
  for item in items:
    name, weight = item.rpartition(":")[0], _weight_of(item)
    if weight is None or not (weight > 0 and math.isfinite(weight)) or not name:
      raise ValueError(
        f"data.source={source!r}: {item!r} in a mixture, expected NAME:WEIGHT"
        " with a positive weight, as in data/a:0.7,data/b:0.3"
      )
    found.append(Weighted(name, weight))
  names = [entry.name for entry in found]
  if len(set(names)) < len(names):
    raise ValueError(f"data.source={source!r}: a source is named twice")
  return tuple(found)


def check(source: str, tokenizer: str) -> None:
  """Refuses a source that cannot be opened, without reading its text."""
  for entry in parse(source):
    if entry.is_text:
      path = pathlib.Path(entry.name.partition(":")[2])
      if not path.exists():  # "." for the built-in text
        raise ValueError(f"data.source={source!r}: {path} does not exist")
      tokenization.check_spec(tokenizer)
    elif not (pathlib.Path(entry.name) / "manifest.json").is_file():
      raise ValueError(f"data.source={entry.name!r}: {_expected(entry.name)}")


def open_rows(
  entry: Weighted, tokenizer: str, *, cache_dir: str, verify_hashes: bool
) -> packed.Packed:
  """Opens one source of packed rows, packing its text on first use."""
  name = entry.name
  path = _cached(name, tokenizer, cache_dir) if entry.is_text else name
  found = packed.open_packed(path, verify_hashes=verify_hashes)
  recorded = found.manifest["tokenizer"]
  # What is in the cache lies under the tokenizer it was asked for with.
  if entry.is_text or tokenizer == recorded["spec"]:
    return found
  if pathlib.Path(tokenizer).is_file():
    given = tokenization.load_tokenizer(tokenizer)
    if given.sha256 == recorded["sha256"]:
      return found
  raise ValueError(
    f"data.tokenizer={tokenizer!r}: {name!r} was packed with"
    f" {recorded['spec']!r} (sha256 {recorded['sha256'][:16]})"
  )


@contextlib.contextmanager
def open_inputs(name: str) -> Iterator[recipe.Inputs]:
  """The inputs of a source; files made for it exist within the context.

  Raises:
    ValueError: if there are no such files.
    ModuleNotFoundError: for TFDS without its package, with what to install.
  """
  kind, _, place = name.partition(":")
  if kind == "text":
    source = {"kind": "text", "name": pathlib.Path(place).name}
    yield recipe.Inputs(readers.find_files(place), source)
  elif kind == "tfds":
    yield _tfds_inputs(place)
  else:
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / f"{name}.jsonl"
      corpus.write_json_lines(corpus.read_corpus(name), path)
      source = {"kind": name, "python": platform.python_version()}
      yield recipe.Inputs({path.name: path}, source, {"order": "text"})


def _weight_of(item: str) -> float | None:
  try:
    return float(item.rpartition(":")[2]) if ":" in item else None
  except ValueError:
    return None


def _expected(name: str) -> str:
  if pathlib.Path(f"{name.rstrip('/')}.partial").is_dir():
    return "packing is unfinished; run the same command again to resume it"
  return (
    f"expected one of {', '.join(corpus.SOURCES)}, text:PATH, tfds:FOLDER, or a"
    " folder with a manifest.json made by python -m gdn2_jax.data"
  )


def _cached(name: str, spec: str, cache_dir: str) -> pathlib.Path:
  """The packed folder of a source of text, made if it is not there."""
  is_named = spec == "bytes" or spec.startswith("bpe-")
  key = {
    "source": _source_key(name),
    "tokenizer": spec if is_named else files.sha256_file(spec),
    "tokenizers": tokenizers.__version__,
    "version": packed.VERSION,
    "seed": _DOCUMENT_SEED,
  }
  digest = files.sha256_bytes(json.dumps(key).encode())[:16]
  label = name.partition(":")[0], spec if is_named else "file", digest
  path = pathlib.Path(cache_dir) / "packed" / "-".join(label)
  if not path.is_dir():
    with open_inputs(name) as inputs:
      build.build_rows(
        inputs,
        path,
        recipe.Options(tokenizer=spec, seed=_DOCUMENT_SEED, **inputs.options),
        wait=True,  # all processes of a run come here at once
        bar=functools.partial(tqdm.tqdm, disable=None, leave=False),
      )
  return path


def _source_key(name: str) -> object:
  """A value that changes when the text of a source might; reads no text."""
  if name in corpus.SOURCES:
    return corpus.source_key(name)
  kind, _, place = name.partition(":")
  if kind == "tfds":
    paths = sorted(pathlib.Path(place).iterdir())
  else:
    paths = readers.find_files(place).values()
  return [
    [str(path.resolve()), status.st_size, status.st_mtime_ns]
    for path in paths
    for status in [path.stat()]
  ]


def _tfds_inputs(place: str) -> recipe.Inputs:
  try:
    import tensorflow_datasets as tfds
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "tfds: sources need tensorflow-datasets: pip install 'gdn2-jax[tfds]'"
    ) from error
  try:
    info = tfds.builder_from_directory(place).info
  except Exception as error:  # of several libraries below it
    raise ValueError(f"tfds:{place}: {error}") from error
  if {*packed.SPLITS} - set(info.splits) or "text" not in info.features:
    raise ValueError(
      f"tfds:{place}: expected splits train and validation and a feature"
      f" 'text', found {sorted(info.splits)} and {sorted(info.features)}"
    )
  paths = {
    split: [pathlib.Path(path) for path in info.splits[split].filepaths]
    for split in packed.SPLITS
  }
  return recipe.Inputs(
    {path.name: path for split in packed.SPLITS for path in paths[split]},
    {"kind": "tfds", "name": info.full_name},
    {"validation_files": tuple(path.name for path in paths["validation"])},
  )
