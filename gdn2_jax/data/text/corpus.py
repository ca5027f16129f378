"""Text that needs no download, and its split by document.

The embedded corpus is the documentation every CPython carries: the language
reference topics of `pydoc`, the docstrings of the standard library (read from
its source, so `python -OO` sees the same text) and those of its C modules.
It differs between Python versions, so its hash travels with whatever is built
from it; `snapshot` is a small frozen excerpt that does not.
"""

import ast
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence

from gdn2_jax import files
from gdn2_jax.data.text import extension_docs

SOURCES = ("embedded", "snapshot")

_SNAPSHOT = pathlib.Path(__file__).parent / "snapshot" / "snapshot.jsonl"
_NOT_LIBRARY = frozenset(
  ("site-packages", "dist-packages", "test", "tests", "idle_test")
)
# Shorter paragraphs ("Raises ValueError.", list headings) recur honestly.
_REPEAT_CHARS = 60
# The smallest salt for which topics, library and C docstrings each hold out
# 7 to 13% of their bytes (Python 3.12): few long documents dominate each.
_SPLIT_SALT = 7
_PARAGRAPH_END = re.compile(r"\n[ \t]*\n")


@dataclasses.dataclass(frozen=True)
class Document:
  """One text that is read on its own; `name` is for humans only."""

  name: str
  text: str

  @functools.cached_property
  def sha256(self) -> str:
    """Hex SHA-256 of the UTF-8 text; the name does not take part."""
    return files.sha256_bytes(self.text.encode())


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents in a fixed order, all without lone surrogates."""

  documents: tuple[Document, ...]


def read_corpus(source: str) -> Corpus:
  """Reads "embedded" (about 2.3 MB) or "snapshot" (0.2 MB)."""
  if source == "embedded":
    return Corpus(tuple(_embedded_documents()))
  if source == "snapshot":
    lines = map(json.loads, _SNAPSHOT.read_bytes().splitlines())
    documents = (Document(line["name"], line["text"]) for line in lines)
    return Corpus(tuple(documents))
  raise ValueError(f"source={source!r}: expected one of {', '.join(SOURCES)}")


def write_json_lines(corpus: Corpus, path: pathlib.Path) -> None:
  """Writes a corpus as a file that builds can read."""
  with open(path, "w", encoding="ascii") as file:
    for document in corpus.documents:
      line = {"name": document.name, "text": document.text}
      file.write(json.dumps(line) + "\n")


def source_key(source: str) -> str:
  """A hash that changes when `read_corpus(source)` might."""
  if source == "snapshot":
    return files.sha256_file(_SNAPSHOT)
  # Names, sizes and times of the library's files take 20 ms, parsing them 3 s.
  # These two files are the recipe: a change to it is a change of the corpus.
  recipe = [files.sha256_file(f) for f in (__file__, extension_docs.__file__)]
  digest = hashlib.sha256(repr((sys.version, recipe)).encode())
  for path, name in _library_files():
    status = path.stat()
    digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
  return digest.hexdigest()


def split_documents(
  documents: Sequence[Document],
) -> tuple[list[Document], list[Document]]:
  """(train, validation) by the hash of each text; a tenth is held out."""
  train, validation = [], []
  for document in documents:
    held_out = is_held_out(document.sha256, 0.1)
    (validation if held_out else train).append(document)
  return train, validation


def is_held_out(text_sha256: str, validation_fraction: float) -> bool:
  """True if a text, given by its hex SHA-256, is held out.

  That depends on the text alone: it survives reordering and growth of a corpus,
  and equal documents are never on different sides.
  """
  digest = files.sha256_bytes(f"{_SPLIT_SALT}:{text_sha256}".encode())
  return int(digest[:16], 16) < validation_fraction * 2.0**64


def _embedded_documents() -> Iterator[Document]:
  # The topics quote one another and the docstrings: whoever comes first keeps
  # a paragraph, or held-out documents would repeat training text.
  seen: set[str] = set()
  for name, text in _raw_documents():
    text = _without_repeats(_well_formed(text), seen)
    if text:
      yield Document(name, text)


def _raw_documents() -> Iterator[tuple[str, str]]:
  from pydoc_data import topics

  for name, text in sorted(topics.topics.items()):
    yield f"topics/{name}", text
  seen: set[str] = set()
  for path, name in _library_files():
    docstrings = list(_source_docstrings(path.read_bytes()))
    yield f"library/{name}", _join_docstrings(docstrings, seen)
  for name, docstrings in _extension_docstrings().items():
    yield f"compiled/{name}", _join_docstrings(docstrings, seen)


def _library_files() -> Iterator[tuple[pathlib.Path, str]]:
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  found = []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
    for name in names:
      if name.endswith(".py") and not name.startswith("test_"):
        path = pathlib.Path(folder) / name
        found.append((path, path.relative_to(root).as_posix()))
  return iter(sorted(found, key=lambda item: item[1]))


def _source_docstrings(source: bytes) -> Iterator[tuple[str, str]]:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # invalid escapes in old modules
    try:
      tree = ast.parse(source)
    except (SyntaxError, ValueError):  # deliberately broken examples
      return
  pending: list[tuple[str, ast.AST]] = [("", tree)]
  while pending:
    name, node = pending.pop()
    if text := ast.get_docstring(node):
      yield name, text
    inner = [
      (f"{name}.{child.name}".lstrip("."), child)
      for child in node.body
      if isinstance(
        child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
      )
    ]
    pending += reversed(inner)  # a stack: source order comes out


def _extension_docstrings() -> dict[str, list[list[str]]]:
  # -I also drops PYTHONOPTIMIZE, so -OO callers get the same text.
  command = [sys.executable, "-I", "-S", extension_docs.__file__]
  done = subprocess.run(command, capture_output=True, check=True)
  return json.loads(done.stdout)


def _join_docstrings(
  docstrings: Iterable[Sequence[str]], seen: set[str]
) -> str:
  parts = []
  for name, text in docstrings:
    text = text.strip()
    if text and text not in seen:
      seen.add(text)
      parts.append(f"{name}\n{text}" if name else text)
  return "\n\n\n".join(parts)


def _without_repeats(text: str, seen: set[str]) -> str:
  kept = []
  for paragraph in _PARAGRAPH_END.split(text):
    key = " ".join(paragraph.split())
    if len(key) >= _REPEAT_CHARS:
      if key in seen:
        continue
      seen.add(key)
    kept.append(paragraph)
  return "\n\n".join(kept).strip()


def _well_formed(text: str) -> str:
  return text.encode("utf-8", "replace").decode()
