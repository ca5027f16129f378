"""Values of `data.source`, and how each is opened.

embedded, snapshot       built-in text, packed on first use
FOLDER                   packed rows made by `python -m gdn2_jax.data`
FOLDER:0.7,FOLDER:0.3    a mixture of the above, with weights
text:PATH                parquet, jsonl and txt files, packed while training
tfds:FOLDER              a TFDS dataset with a text feature, likewise
"""

import dataclasses
import json
import math
import pathlib

import tokenizers

from gdn2_jax.data import files
from gdn2_jax.data.build import in_memory
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.text import corpus as corpora
from gdn2_jax.data.tokenizer import api as tokenization

TEXT_PREFIXES = ("text:", "tfds:")

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
    ValueError: for a weight that is missing or not a positive number, a
      source named twice, or text to be packed while training in a mixture.
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
    if name.startswith(TEXT_PREFIXES):
      raise ValueError(
        f"data.source={source!r}: {name!r} is packed while training and cannot"
        " be mixed; pack it with python -m gdn2_jax.data first"
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
    if name.startswith(TEXT_PREFIXES):
      path = pathlib.Path(name[len("text:") :])
      if not path.exists():
        raise ValueError(f"data.source={source!r}: {path} does not exist")
      tokenization.check_spec(tokenizer)
    elif name in corpora.SOURCES:
      tokenization.check_spec(tokenizer)
    elif not (pathlib.Path(name) / "manifest.json").is_file():
      raise ValueError(f"data.source={name!r}: {_expected(name)}")


def open_rows(
  name: str, tokenizer: str, *, cache_dir: str, verify_hashes: bool
) -> packed.Packed:
  """Opens one source of packed rows, packing a built-in one on first use.

  Raises:
    ValueError: for a damaged file, by name, or another tokenizer.
  """
  if name in corpora.SOURCES:
    return _pack_built_in(name, tokenizer, cache_dir, verify_hashes)
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
    f"expected one of {', '.join(corpora.SOURCES)}, a folder with a"
    " manifest.json made by python -m gdn2_jax.data, or (not in a mixture)"
    " text:PATH or tfds:FOLDER"
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


def _pack_built_in(
  name: str, spec: str, cache_dir: str, verify_hashes: bool
) -> packed.Packed:
  is_named = spec == "bytes" or spec.startswith("bpe-")
  key = {
    "source": corpora.source_key(name),
    "tokenizer": spec if is_named else files.sha256_file(spec),
    "tokenizers": tokenizers.__version__,
    "version": packed.VERSION,
    "seed": _DOCUMENT_SEED,
  }
  digest = files.sha256_bytes(json.dumps(key).encode())[:16]
  label = spec if is_named else "file"
  cache = pathlib.Path(cache_dir)
  path = cache / "packed" / f"{name}-{label}-{digest}"
  if path.is_dir():
    return packed.open_packed(path, verify_hashes=verify_hashes)
  corpus = corpora.read_corpus(name)
  return in_memory.pack_corpus(
    corpus, path, tokenizer_spec=spec, cache_dir=cache, seed=_DOCUMENT_SEED
  )
