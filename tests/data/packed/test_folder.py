"""Packed folders: content, and refusal of damage."""

import json
import os
import re

import numpy as np
import pytest
import tokenizers

from gdn2_jax import files
from gdn2_jax.data.packed.folder import SPLITS, open_packed
from gdn2_jax.data.text.corpus import is_held_out
from tests.data.packing import borders, documents, pack

TEXTS = ["alpha", "", "beta\x00gamma", "\u2603" * 5, "x" * 3000, "", "zz"]
TEXTS += [f"document {i}" for i in range(40)]
BINARY = [
  "train-00000.offsets.bin",
  "train-00000.tokens.bin",
  "validation-00000.offsets.bin",
  "validation-00000.tokens.bin",
]


@pytest.fixture
def path(tmp_path):
  return pack(TEXTS, tmp_path / "packed", seed=5).path


@pytest.mark.parametrize("order", ["text", "place"])
def test_content_and_manifest(tmp_path, order):
  packed = pack(TEXTS, tmp_path / "packed", seed=5, order=order)
  assert sorted(p.name for p in packed.path.iterdir()) == sorted(
    [*BINARY, "manifest.json", "tokenizer.json"]
  )
  expected = {split: [] for split in SPLITS}
  for text in TEXTS:
    digest = files.sha256_bytes(text.encode())
    key = files.sha256_bytes(f"5:{digest}".encode())
    split = "validation" if is_held_out(digest, 0.1) else "train"
    expected[split].append((key, text))
  for split in SPLITS:
    texts = [text for _, text in sorted(expected[split]) if text]
    found = documents(packed, split)
    assert sorted(found) == sorted(texts)
    if split == "train":
      assert (found == texts) == (order == "text")
    tokens, offsets = packed.tokens[split][:], borders(packed.offsets[split])
    assert tokens.dtype == np.dtype("<u2")
    assert (tokens[offsets[1:] - 1] == 256).all()
    entry = packed.manifest["splits"][split]
    size = sum(len(text.encode()) for text in texts)
    assert entry["documents"] == len(texts)
    assert entry["empty_documents"] == len(expected[split]) - len(texts)
    assert entry["bytes"] == size
    assert entry["tokens"] == size + len(texts)
    assert entry["predicted_bytes"] == size - len(texts)
    for name, recorded in entry["files"].items():
      assert recorded["sha256"] == files.sha256_file(packed.path / name)
  assert packed.manifest["seed"] == 5
  assert packed.manifest["tokenizer"]["eos_id"] == 256
  assert sorted(packed.file_hashes()) == BINARY


def test_first_token_bytes_are_not_predicted(tmp_path):
  texts = ["the theme", "then the"]
  packed = pack(texts, tmp_path / "packed", tokenizer="bpe-262")
  entry = packed.manifest["splits"]["train"]
  first = [packed.tokenizer.encode(text)[0] for text in texts]
  assert max(len(packed.tokenizer.token_bytes(i)) for i in first) > 1
  lost = sum(len(packed.tokenizer.token_bytes(i)) for i in first)
  assert entry["predicted_bytes"] == entry["bytes"] - lost


@pytest.mark.parametrize(("size", "kind"), [(65535, "<u2"), (65536, "<u4")])
def test_large_vocabularies_take_uint32(tmp_path, size, kind):
  vocabulary = {"</s>": 0, "a": 1, "hole": size - 1}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  backend.add_special_tokens(["</s>"])
  (tmp_path / "tokenizer.json").write_text(backend.to_str())
  packed = pack(
    ["a"], tmp_path / "packed", tokenizer=str(tmp_path / "tokenizer.json")
  )
  assert packed.tokenizer.vocab_size == size
  assert packed.tokens["train"].dtype == np.dtype(kind)
  assert documents(packed, "train") == ["a"]


def test_an_empty_validation_split_opens(tmp_path):
  packed = pack(TEXTS, tmp_path / "packed", validation_fraction=0.0)
  assert len(packed.tokens["validation"]) == 0
  assert borders(packed.offsets["validation"]).tolist() == [0]
  assert len(documents(packed, "train")) == 45


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-2])


def _empty(path):
  path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_flip, _truncate, _empty, os.remove])
@pytest.mark.parametrize("name", BINARY)
def test_damaged_files_are_refused_by_name(path, name, damage):
  damage(path / name)
  with pytest.raises(ValueError, match=re.escape(str(path / name))):
    open_packed(path)


@pytest.mark.parametrize("damage", [_truncate, _empty, os.remove])
@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
def test_damaged_descriptions_are_refused_by_name(path, name, damage):
  damage(path / name)
  with pytest.raises(ValueError, match=re.escape(name)):
    open_packed(path)


def _edit(path, change):
  manifest = json.loads((path / "manifest.json").read_text())
  change(manifest)
  (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
  "change",
  [
    lambda m: m.update(format="other"),
    lambda m: m.update(version=1),
    lambda m: m.update(dtype="float64"),
    lambda m: m.pop("splits"),
    lambda m: m["splits"].pop("validation"),
    lambda m: m["splits"]["train"].update(tokens=-1),
    lambda m: m["splits"]["train"].update(documents="3"),
    lambda m: m["splits"]["train"].update(shards=2),
    lambda m: m["splits"]["train"]["files"].update({"../evil": {}}),
    lambda m: m["tokenizer"].update(sha256="0" * 64),
  ],
)
def test_a_changed_manifest_is_refused(path, change):
  _edit(path, change)
  with pytest.raises(ValueError, match=r"manifest|tokenizer\.json"):
    open_packed(path)


@pytest.mark.parametrize("count", ["tokens", "documents"])
def test_counts_are_checked_without_hashing(path, count):
  def increment(manifest):
    manifest["splits"]["train"][count] += 1

  _edit(path, increment)
  with pytest.raises(ValueError, match=rf"the train split holds \d+ {count}"):
    open_packed(path, verify_hashes=False)


def _replace(path, name, array):
  """Another content with a matching size and hash in the manifest."""
  data = array.tobytes()
  (path / name).write_bytes(data)
  recorded = {"size": len(data), "sha256": files.sha256_bytes(data)}
  _edit(path, lambda m: m["splits"]["train"]["files"].update({name: recorded}))


def test_ids_outside_the_vocabulary_are_refused(path):
  tokens = open_packed(path).tokens["train"][:].copy()
  tokens[7] = 259
  _replace(path, "train-00000.tokens.bin", tokens)
  with pytest.raises(
    ValueError, match=r"train-00000\.tokens\.bin: holds id 259"
  ):
    open_packed(path)


@pytest.mark.parametrize(
  ("place", "value", "message"),
  [
    (1, 2**20, "offsets do not increase"),
    (0, 1, "not the borders of documents from 0"),
    (-1, 1, "not the borders of documents from 0"),
  ],
)
def test_wrong_borders_are_refused(path, place, value, message):
  offsets = borders(open_packed(path).offsets["train"])
  offsets[place] = value
  _replace(path, "train-00000.offsets.bin", offsets)
  with pytest.raises(ValueError, match=message):
    open_packed(path)
