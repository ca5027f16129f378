"""Values of `data.source`, and how each is opened.

embedded, snapshot       built-in text
text:PATH                parquet, jsonl and txt files
tfds:FOLDER              a TFDS dataset with a feature "text"
FOLDER                   packed rows made by `python -m gdn2_jax.data`
NAME:0.7,NAME:0.3        a mixture of the above, with weights

All but a FOLDER are packed into the cache on first use.
"""

import dataclasses
import json
import math
import pathlib

import tokenizers
import tqdm

from gdn2_jax.data import files
from gdn2_jax.data.build import build, recipe
from gdn2_jax.data.build.inputs import TEXT_PREFIXES, open_inputs
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.text import corpus, readers
from gdn2_jax.data.tokenizer import api as tokenization

# Documents keep one order for all runs; the run's seed shuffles rows.
_DOCUMENT_SEED = 0


@dataclasses.dataclass(frozen=True)
class Weighted:
  """One source of a mixture and its weight."""

  name: str
  weight: float


def parse(source: str) -> tuple[Weighted, ...]:
  """The sources of a `data.source` string.

  Raises:
    ValueError: for a weight that is missing or not a positive number, or a
      source named twice.
  """
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
  """Refuses a source that cannot be opened, without reading its text.

  Raises:
    ValueError: naming the source and what was expected.
  """
  for entry in parse(source):
    name = entry.name
    if name in corpus.SOURCES:
      tokenization.check_spec(tokenizer)
    elif name.startswith(TEXT_PREFIXES):
      path = pathlib.Path(name.partition(":")[2])
      if not path.exists():
        raise ValueError(f"data.source={source!r}: {path} does not exist")
      tokenization.check_spec(tokenizer)
    elif not (pathlib.Path(name) / "manifest.json").is_file():
      raise ValueError(f"data.source={name!r}: {_expected(name)}")


def open_rows(
  name: str, tokenizer: str, *, cache_dir: str, verify_hashes: bool
) -> packed.Packed:
  """Opens one source of packed rows, packing its text on first use.

  Raises:
    ValueError: for a damaged file, by name, or another tokenizer.
  """
  if name in corpus.SOURCES or name.startswith(TEXT_PREFIXES):
    path = _cached(name, tokenizer, cache_dir)
    return packed.open_packed(path, verify_hashes=verify_hashes)
  found = packed.open_packed(name, verify_hashes=verify_hashes)
  _check_tokenizer(name, tokenizer, found)
  return found


def _weight_of(item: str) -> float | None:
  try:
    return float(item.rpartition(":")[2]) if ":" in item else None
  except ValueError:
    return None


def _expected(name: str) -> str:
  partial = pathlib.Path(f"{name.rstrip('/')}.partial")
  if partial.is_dir():
    return (
      "its packing was not finished; run the command that makes it once more"
    )
  return (
    f"expected one of {', '.join(corpus.SOURCES)}, text:PATH, tfds:FOLDER, or a"
    " folder with a manifest.json made by python -m gdn2_jax.data"
  )


def _check_tokenizer(name: str, tokenizer: str, found: packed.Packed) -> None:
  recorded = found.manifest["tokenizer"]
  if tokenizer == recorded["spec"]:
    return
  if pathlib.Path(tokenizer).is_file():
    given = tokenization.load_tokenizer(tokenizer)
    if given.sha256 == recorded["sha256"]:
      return
  raise ValueError(
    f"data.tokenizer={tokenizer!r}: {name!r} was packed with"
    f" {recorded['spec']!r} (sha256 {recorded['sha256'][:16]})"
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
        inputs.paths,
        path,
        recipe.Options(tokenizer=spec, seed=_DOCUMENT_SEED, **inputs.options),
        source=inputs.source,
        wait=True,  # all processes of a run come here at once
        bar=_bar,
      )
  return path


def _source_key(name: str) -> object:
  """A value that changes when the text of a source might; reads no text."""
  if name in corpus.SOURCES:
    return corpus.source_key(name)
  kind, _, place = name.partition(":")
  folder = pathlib.Path(place)
  paths = folder.iterdir() if kind == "tfds" else readers.find_files(folder)
  return [
    [str(path.resolve()), status.st_size, status.st_mtime_ns]
    for path in sorted(paths)
    for status in [path.stat()]
  ]


def _bar(label: str, unit: str, total: int) -> tqdm.tqdm:
  shown = {"unit": unit, "unit_scale": True, "leave": False}
  return tqdm.tqdm(total=total, desc=label, disable=None, **shown)
