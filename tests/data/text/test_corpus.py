"""Corpora: content, determinism, the split, and text from files."""

import hashlib
import os
import pathlib
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2_jax.data.text import corpus as corpora
from gdn2_jax.data.text import extension_docs, readers
from gdn2_jax.data.text.corpus import Document

SNAPSHOT_SHA256 = (
  "f008065314ab011553d929bdd251f791c2015bcebe11400247739db05a408b4d"
)


@pytest.fixture(scope="module")
def embedded():
  return corpora.read_corpus("embedded")


def _paragraphs(documents):
  for document in documents:
    for paragraph in re.split(r"\n[ \t]*\n", document.text):
      key = " ".join(paragraph.split())
      if len(key) >= 60:
        yield key


def test_embedded_holds_all_three_parts(embedded):
  sizes = {"topics": 0, "library": 0, "compiled": 0}
  for document in embedded.documents:
    assert document.text.strip()
    sizes[document.name.partition("/")[0]] += len(document.text.encode())
  # Any CPython 3.12 or later has at least this much.
  assert sizes["topics"] > 300_000
  assert sizes["library"] > 1_200_000
  assert sizes["compiled"] > 200_000
  assert 2_000_000 < sum(sizes.values()) < 4_000_000


def test_embedded_is_the_same_under_oo(embedded):
  code = "from gdn2_jax.data.text.corpus import read_corpus as r\n"
  code += "assert not r.__doc__\n"
  code += "for d in r('embedded').documents: print(d.sha256)"
  done = subprocess.run(
    [sys.executable, "-OO", "-c", code],
    capture_output=True,
    text=True,
    check=True,
    env={**os.environ, "PYTHONHASHSEED": "7"},
  )
  assert done.stdout.split() == [d.sha256 for d in embedded.documents]


def test_held_out_documents_repeat_no_training_paragraph(embedded):
  train, validation = corpora.split_documents(embedded.documents)
  assert not set(_paragraphs(train)) & set(_paragraphs(validation))


def test_embedded_split_holds_out_about_a_tenth(embedded):
  _, validation = corpora.split_documents(embedded.documents)
  total = sum(len(d.text) for d in embedded.documents)
  assert 0.05 < sum(len(d.text) for d in validation) / total < 0.15


def test_source_key_follows_the_library_files(monkeypatch, tmp_path):
  (tmp_path / "module.py").write_text('"""Text."""')
  monkeypatch.setattr(corpora.sysconfig, "get_path", lambda _: str(tmp_path))
  before = corpora.source_key("embedded")
  assert corpora.source_key("embedded") == before
  (tmp_path / "module.py").write_text('"""Other text."""')
  assert corpora.source_key("embedded") != before


def test_source_docstrings_come_in_source_order():
  source = b'''"""M."""
class A:
  """A."""
  def f(self):
    """Af."""
    def inner():
      """In."""
async def g():
  """G."""
def h(): pass
'''
  assert list(corpora._source_docstrings(source)) == [
    ("", "M."),
    ("A", "A."),
    ("A.f", "Af."),
    ("A.f.inner", "In."),
    ("g", "G."),
  ]


def test_unparsable_source_has_no_docstrings():
  assert list(corpora._source_docstrings(b"def (")) == []
  assert list(corpora._source_docstrings(b"x = '\x00'")) == []


def test_extension_docs():
  assert extension_docs.is_compiled("math")
  assert not extension_docs.is_compiled("json")
  assert not extension_docs.is_compiled("_testcapi")
  assert not extension_docs.is_compiled("no_such_module")
  docs = dict(extension_docs.module_docs("_struct"))
  assert docs["_struct.Struct.pack"].startswith("S.pack(")
  assert extension_docs.module_docs("no_such_module") == []


def test_snapshot_is_frozen_and_carries_its_licence():
  corpus = corpora.read_corpus("snapshot")
  digests = b"".join(bytes.fromhex(d.sha256) for d in corpus.documents)
  assert hashlib.sha256(digests).hexdigest() == SNAPSHOT_SHA256
  train, validation = corpora.split_documents(corpus.documents)
  assert len(train) == 60
  assert len(validation) == 10
  folder = pathlib.Path(corpora.__file__).parent / "snapshot"
  notice = (folder / "LICENSE-PSF.txt").read_text(encoding="ascii")
  assert "Python Software Foundation; All Rights Reserved" in notice
  assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in notice


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=8), max_size=30))
def test_split_depends_on_the_text_alone(texts):
  documents = [Document(str(i), text) for i, text in enumerate(texts)]
  train, validation = corpora.split_documents(documents)
  assert sorted(train + validation, key=lambda d: int(d.name)) == documents
  assert not {d.text for d in train} & {d.text for d in validation}
  moved = [Document("x", d.text) for d in reversed(documents)]
  again, _ = corpora.split_documents(moved)
  assert sorted(d.text for d in again) == sorted(d.text for d in train)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4])
def test_a_fraction_is_held_out(fraction):
  digests = [Document("", f"text {i}").sha256 for i in range(4000)]
  count = sum(corpora.is_held_out(digest, fraction) for digest in digests)
  spread = (4000 * fraction * (1 - fraction)) ** 0.5
  assert abs(count - 4000 * fraction) <= 5 * spread


def test_a_corpus_is_written_for_builds(tmp_path, embedded):
  corpora.write_json_lines(embedded, tmp_path / "a.jsonl")
  (part,) = readers.cut_into_parts(tmp_path / "a.jsonl")
  read = list(readers.read_part(part))
  assert [item.text for item in read] == [d.text for d in embedded.documents]
  assert not any(item.is_invalid_utf8 for item in read)


def test_unknown_source_is_named():
  with pytest.raises(ValueError, match="source='nothing': expected one of emb"):
    corpora.read_corpus("nothing")


def test_data_imports_neither_jax_nor_the_rest_of_the_package():
  code = """
import sys
import gdn2_jax.data.__main__, gdn2_jax.data.pipeline
ours = [m for m in sys.modules if m.startswith("gdn2_jax.")]
allowed = ("gdn2_jax.data", "gdn2_jax.files", "gdn2_jax.config_class")
assert all(m.startswith(allowed) for m in ours), ours
assert not {"jax", "flax", "grain"} & set(sys.modules)
"""
  subprocess.run([sys.executable, "-c", code], check=True)
