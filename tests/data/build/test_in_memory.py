"""Packed folders: content, atomicity, concurrent builders, damage."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from gdn2_jax.data import files
from gdn2_jax.data.build import in_memory
from gdn2_jax.data.text import corpus as corpora
from gdn2_jax.data.text.corpus import Corpus, Document
from gdn2_jax.data.tokenizer.api import BytesTokenizer

TEXTS = ["alpha", "", "beta\x00gamma", "\u2603" * 5, "x" * 3000, "", "zz"]
FILES = [
  "manifest.json",
  "tokenizer.json",
  "train.offsets.bin",
  "train.tokens.bin",
  "validation.offsets.bin",
  "validation.tokens.bin",
]


def _corpus():
  texts = [*TEXTS, *(f"document {i}" for i in range(40))]
  documents = [Document(str(i), text) for i, text in enumerate(texts)]
  return Corpus("made by hand", tuple(documents), invalid_utf8=2)


def _build(path, **options):
  return in_memory.build_packed(
    _corpus(), BytesTokenizer(), path, tokenizer_spec="bytes", **options
  )


def test_content_and_manifest(tmp_path):
  corpus = _corpus()
  packed = _build(tmp_path / "packed", seed=5)
  assert sorted(p.name for p in packed.path.iterdir()) == FILES
  halves = corpora.split_documents(corpus.documents)
  for split, documents in zip(in_memory.SPLITS, halves, strict=True):
    ordered = corpora.shuffle_documents(documents, seed=5)
    texts = [document.text for document in ordered if document.text]
    flat = b"".join(text.encode() + b"\xfe" for text in texts)
    tokens, offsets = packed.tokens[split], packed.offsets[split]
    assert tokens.dtype == np.dtype("<u2")
    assert np.where(tokens == 256, 0xFE, tokens).tolist() == list(flat)
    found = [
      packed.tokenizer.decode(tokens[a:b])
      for a, b in itertools.pairwise(offsets)
    ]
    assert found == texts
    assert (tokens[offsets[1:] - 1] == 256).all()
    entry = packed.manifest["splits"][split]
    size = sum(len(text.encode()) for text in texts)
    assert entry["documents"] == len(texts)
    assert entry["empty_documents"] == len(documents) - len(texts)
    assert entry["bytes"] == size
    assert entry["tokens"] == size + len(texts)
    assert entry["predicted_bytes"] == size - len(texts)
    for name, recorded in entry["files"].items():
      assert recorded["sha256"] == files.sha256_file(packed.path / name)
  manifest = packed.manifest
  assert sum(s["empty_documents"] for s in manifest["splits"].values()) == 2
  assert manifest["invalid_utf8_documents"] == 2
  assert manifest["corpus_sha256"] == corpus.sha256
  assert manifest["seed"] == 5
  assert manifest["python"] == sys.version.split()[0]
  assert manifest["tokenizer"]["eos_id"] == 256
  assert set(packed.file_hashes()) == {n for n in FILES if n.endswith("bin")}


def test_first_token_bytes_are_not_predicted(tmp_path):
  texts = ["the theme", "then the"]
  corpus = Corpus("", tuple(Document("", text) for text in texts))
  packed = in_memory.pack_corpus(
    corpus, tmp_path / "packed", tokenizer_spec="bpe-262"
  )
  entry = packed.manifest["splits"]["train"]
  first = [packed.tokenizer.encode(text)[0] for text in texts]
  assert max(len(packed.tokenizer.token_bytes(i)) for i in first) > 1
  lost = sum(len(packed.tokenizer.token_bytes(i)) for i in first)
  assert entry["predicted_bytes"] == entry["bytes"] - lost


def test_large_vocabularies_take_uint32(tmp_path):
  large = dataclasses.replace(BytesTokenizer(), vocab_size=65536)
  small = dataclasses.replace(BytesTokenizer(), vocab_size=65535)
  for name, tokenizer, kind in (("a", large, "<u4"), ("b", small, "<u2")):
    packed = in_memory.build_packed(
      _corpus(), tokenizer, tmp_path / name, tokenizer_spec="bytes"
    )
    assert packed.tokens["train"].dtype == np.dtype(kind)
    assert packed.tokens["train"].max() == 256


def test_an_empty_validation_split_opens(tmp_path):
  packed = _build(tmp_path / "packed", validation_fraction=0.0)
  assert len(packed.tokens["validation"]) == 0
  assert packed.offsets["validation"].tolist() == [0]


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_training_text_is_refused(tmp_path, texts):
  corpus = Corpus("nothing", tuple(Document("", text) for text in texts))
  with pytest.raises(ValueError, match="source='nothing': no training text"):
    in_memory.pack_corpus(corpus, tmp_path / "out", tokenizer_spec="bytes")
  assert list(tmp_path.iterdir()) == []


def test_equal_builds_have_equal_files(tmp_path):
  first = _build(tmp_path / "first")
  second = _build(tmp_path / "second")
  other = _build(tmp_path / "other", seed=1)
  for name in FILES:
    assert (first.path / name).read_bytes() == (second.path / name).read_bytes()
  assert first.file_hashes() != other.file_hashes()


def test_an_existing_folder_is_reused_or_refused(tmp_path, monkeypatch):
  path = tmp_path / "packed"
  path.mkdir()
  _build(path)  # into an empty folder
  monkeypatch.setattr(
    in_memory, "_write_split", None
  )  # nothing is written again
  _build(path)
  with pytest.raises(ValueError, match="already holds other data, seed is 0"):
    _build(path, seed=1)
  foreign = tmp_path / "foreign"
  foreign.mkdir()
  (foreign / "thesis.tex").write_text("mine")
  for taken in (foreign, foreign / "thesis.tex"):
    with pytest.raises(ValueError, match="exists and is not a packed folder"):
      _build(taken)
  assert (foreign / "thesis.tex").read_text() == "mine"


ROOT = pathlib.Path(__file__).parents[3]
_BUILDER = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
from tests.data.build.test_in_memory import _build
from gdn2_jax.data import files
calls, last, real = 0, int(sys.argv[2]), {function}
def hooked(*args):
  global calls
  calls += 1
  if calls == last:
    os.kill(os.getpid(), signal.SIGKILL)
  return real(*args)
{function} = hooked
_build(sys.argv[1])
print("finished after", calls)
"""


@pytest.mark.parametrize(
  ("function", "call"),
  [("os.fsync", 1), ("os.fsync", 4), ("os.fsync", 7), ("os.rename", 1)],
)
def test_a_killed_builder_leaves_nothing_that_looks_whole(
  tmp_path, function, call
):
  path = tmp_path / "packed"
  code = _BUILDER.replace("{function}", function)
  command = [sys.executable, "-c", code, str(path), str(call)]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert not path.exists()
  (left,) = tmp_path.iterdir()
  assert left.name.startswith(".packed.tmp.")
  with pytest.raises(ValueError, match=r"manifest\.json: missing"):
    in_memory.open_packed(path)
  _build(path)
  assert [p.name for p in tmp_path.iterdir()] == ["packed"]


def test_the_kill_points_above_are_inside_the_build(tmp_path):
  code = _BUILDER.replace("{function}", "os.fsync")
  command = [sys.executable, "-c", code, str(tmp_path / "packed"), "-1"]
  done = subprocess.run(
    command, capture_output=True, text=True, check=True, cwd=ROOT
  )
  # Two files a split, the tokenizer, the manifest, the folder; its parent.
  assert done.stdout.strip() == "finished after 8"


def test_a_running_builder_is_left_alone(tmp_path):
  staging = files.open_staging(tmp_path / "packed")
  _build(tmp_path / "packed")
  assert staging.is_dir()
  assert not files.publish(staging, tmp_path / "packed")
  assert not staging.exists()
  in_memory.open_packed(tmp_path / "packed")


def test_concurrent_builders_agree(tmp_path):
  path = tmp_path / "packed"
  code = _BUILDER.replace("{function}", "os.fsync")
  command = [sys.executable, "-c", code, str(path), "-1"]
  running = [
    subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    for _ in range(3)
  ]
  for process in running:
    _, errors = process.communicate()
    assert process.returncode == 0, errors
  assert [p.name for p in tmp_path.iterdir()] == ["packed"]
  in_memory.open_packed(path)


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


def _empty(path):
  path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_flip, _truncate, _empty, os.remove])
@pytest.mark.parametrize("name", [n for n in FILES if n.endswith(".bin")])
def test_damaged_data_is_refused_by_name(tmp_path, name, damage):
  path = tmp_path / "packed"
  _build(path)
  damage(path / name)
  with pytest.raises(ValueError, match=re.escape(str(path / name))):
    in_memory.open_packed(path)


@pytest.mark.parametrize("damage", [_truncate, _empty, os.remove])
@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
def test_damaged_description_is_refused_by_name(tmp_path, name, damage):
  path = tmp_path / "packed"
  _build(path)
  if damage is _truncate:  # the last byte is a newline, which is no loss
    damage(path / name)
    damage(path / name)
  else:
    damage(path / name)
  with pytest.raises(ValueError, match=re.escape(name)):
    in_memory.open_packed(path)


def _edit(path, change):
  manifest = json.loads((path / "manifest.json").read_text())
  change(manifest)
  (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
  "change",
  [
    lambda m: m.update(format="other"),
    lambda m: m.update(version=2),
    lambda m: m.update(dtype="float64"),
    lambda m: m.pop("seed"),
    lambda m: m.pop("splits"),
    lambda m: m["splits"].pop("validation"),
    lambda m: m["splits"]["train"].update(tokens=-1),
    lambda m: m["splits"]["train"].update(documents="3"),
    lambda m: m["splits"]["train"]["files"].update({"../evil": {}}),
    lambda m: m["tokenizer"].update(sha256="0" * 64),
  ],
)
def test_a_changed_manifest_is_refused(tmp_path, change):
  path = tmp_path / "packed"
  _build(path)
  _edit(path, change)
  with pytest.raises(ValueError, match=r"manifest|tokenizer\.json"):
    in_memory.open_packed(path)


@pytest.mark.parametrize("count", ["tokens", "documents"])
def test_counts_are_checked_without_hashing(tmp_path, count):
  path = tmp_path / "packed"
  _build(path)

  def increment(manifest):
    manifest["splits"]["train"][count] += 1

  _edit(path, increment)
  with pytest.raises(ValueError, match=r"train\.offsets\.bin"):
    in_memory.open_packed(path, verify_hashes=False)


def _replace(path, name, data):
  """Another content with a matching size and hash in the manifest."""
  (path / name).write_bytes(data)

  def change(manifest):
    manifest["splits"]["train"]["files"][name] = {
      "size": len(data),
      "sha256": files.sha256_bytes(data),
    }

  _edit(path, change)


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
  packed = _build(tmp_path / "packed")
  tokens = np.array(packed.tokens["train"])
  tokens[7] = packed.tokenizer.vocab_size
  _replace(packed.path, "train.tokens.bin", tokens.tobytes())
  with pytest.raises(ValueError, match=r"train\.tokens\.bin: holds id 259"):
    in_memory.open_packed(packed.path)


def test_offsets_must_increase(tmp_path):
  packed = _build(tmp_path / "packed")
  offsets = np.array(packed.offsets["train"])
  offsets[1] = offsets[2]
  _replace(packed.path, "train.offsets.bin", offsets.tobytes())
  with pytest.raises(ValueError, match="offsets do not increase"):
    in_memory.open_packed(packed.path)


def test_write_atomic_replaces_or_keeps(tmp_path, monkeypatch):
  path = tmp_path / "new" / "file"
  files.write_atomic(path, b"one")
  files.write_atomic(path, b"two")
  assert path.read_bytes() == b"two"

  def full(_):
    raise OSError("no space left")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="no space left"):
    files.write_atomic(path, b"three")
  assert path.read_bytes() == b"two"
  assert [p.name for p in path.parent.iterdir()] == ["file"]
