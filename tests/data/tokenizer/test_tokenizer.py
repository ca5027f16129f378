"""Tokenizers: lossless, deterministic, immune to forged special tokens."""

import functools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2_jax.data.text import corpus
from gdn2_jax.data.tokenizer import api as tokenization
from gdn2_jax.data.tokenizer.api import BytesTokenizer

SPECIALS = ["<|eos|>", "<|bos|>", "<|pad|>", "</s>", "<0x41>", "\u2581", "\x00"]
TEXT = st.lists(st.text() | st.sampled_from(SPECIALS), max_size=6).map("".join)


def _train_texts():
  train, _ = corpus.split_documents(corpus.read_corpus("snapshot").documents)
  return [document.text for document in train]


@functools.cache
def _tokenizer(spec):
  return tokenization.open_tokenizer(spec, train_texts=_train_texts())


@pytest.mark.parametrize("spec", ["bytes", "bpe-257", "bpe-1024"])
@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_round_trip(spec, text):
  tokenizer = _tokenizer(spec)
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
  assert tokenizer.eos_id not in ids
  assert all(0 <= token < tokenizer.vocab_size for token in ids)
  assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]
  # An id array as generation has it, with special ids in between.
  marked = np.asarray([*ids, tokenizer.eos_id], np.int32)
  assert tokenizer.decode(marked) == text


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=40))
def test_any_bytes_decode(data):
  tokenizer = _tokenizer("bytes")
  assert tokenizer.decode(list(data)) == data.decode("utf-8", "replace")
  bpe = _tokenizer("bpe-257")  # one id per byte, in another order
  by_byte = {bpe.token_bytes(i): i for i in range(bpe.vocab_size)}
  ids = [by_byte[bytes([byte])] for byte in data]
  assert bpe.decode(ids) == data.decode("utf-8", "replace")


def test_training_is_deterministic_across_processes():
  first = _tokenizer("bpe-1024")
  again = tokenization.train_bpe(iter(_train_texts()), 1024)
  assert again.to_json() == first.to_json()
  code = """
from gdn2_jax.data.text import corpus
from gdn2_jax.data.tokenizer import api
train, _ = corpus.split_documents(corpus.read_corpus("snapshot").documents)
print(api.train_bpe([d.text for d in train], 1024).sha256)
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
  )
  assert done.stdout.strip() == first.sha256


def test_sizes_and_compression():
  assert _tokenizer("bytes").vocab_size == 259
  assert _tokenizer("bytes").eos_id == 256
  assert _tokenizer("bpe-1024").vocab_size == 1024
  text = "The quick brown fox returns a new list of the items."
  assert len(text) / len(_tokenizer("bpe-1024").encode(text)) > 1.5


def test_a_small_corpus_gives_fewer_ids():
  tokenizer = tokenization.train_bpe(["ab ab ab"], 4096)
  assert 257 < tokenizer.vocab_size < 270
  assert tokenizer.decode(tokenizer.encode("ab\xe9")) == "ab\xe9"


def test_digits_are_single_tokens():
  ids = tokenization.train_bpe(["12345 12345 " * 50], 300).encode("12345")
  assert len(ids) == 5


@pytest.mark.parametrize("spec", ["bytes", "bpe-1024"])
def test_save_load_pickle(spec, tmp_path):
  tokenizer = _tokenizer(spec)
  path = tmp_path / "run" / "tokenizer.json"
  tokenizer.save(path)
  text = "def f(x): return '<|eos|>' + 1234\u2603"
  for copy in (
    tokenization.load_tokenizer(path),
    tokenization.open_tokenizer(str(path)),
    pickle.loads(pickle.dumps(tokenizer)),
  ):
    assert type(copy) is type(tokenizer)
    assert copy.sha256 == tokenizer.sha256
    assert (copy.vocab_size, copy.eos_id) == (
      tokenizer.vocab_size,
      tokenizer.eos_id,
    )
    assert copy.encode(text) == tokenizer.encode(text)
  assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]


def test_hashes_differ():
  specs = ["bytes", "bpe-257", "bpe-1024"]
  assert len({_tokenizer(spec).sha256 for spec in specs}) == 3


def _foreign(eos):
  """A word-level-free SentencePiece-like file with traps switched on."""
  vocabulary = {"<s>": 0, eos: 1, "<unk>": 2, "<0x41>": 3, "\u2581": 4}
  vocabulary |= {"a": 5, "b": 6, "\u2581a": 7, "hole": 12}
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocabulary, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True
    )
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  backend.decoder = tokenizers.decoders.Metaspace()
  backend.add_special_tokens(["<s>", eos])
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"<s> $A {eos}", special_tokens=[("<s>", 0), (eos, 1)]
  )
  backend.enable_truncation(2)
  backend.enable_padding(length=9)
  return backend.to_str()


@pytest.mark.parametrize("eos", ["</s>", "<|endoftext|>"])
def test_foreign_file(tmp_path, eos):
  path = tmp_path / "tokenizer.json"
  path.write_text(_foreign(eos), encoding="utf-8")
  tokenizer = tokenization.load_tokenizer(path)
  assert tokenizer.eos_id == 1
  assert tokenizer.vocab_size == 13
  # Neither truncated to 2, nor padded to 9, nor wrapped in <s> ... </s>.
  assert tokenizer.encode("a b a") == [7, 4, 6, 7]
  assert tokenizer.encode_batch(["a b a", "a"]) == [[7, 4, 6, 7], [7]]
  assert tokenizer.decode([0, 7, 4, 6, 7, 1]) == "a b a"
  found = [tokenizer.token_bytes(i) for i in (1, 3, 7, 11)]
  assert found == [b"", b"A", b" a", b""]


def test_foreign_file_without_eos(tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text(_foreign("<end>"), encoding="utf-8")
  with pytest.raises(ValueError, match="no end-of-document token"):
    tokenization.load_tokenizer(path)


@pytest.mark.parametrize(
  "content",
  ["", "{", "[]", '{"format": "gdn2-bytes-tokenizer", "version": 2}', "{}"],
)
def test_unusable_file_is_named(tmp_path, content):
  path = tmp_path / "broken.json"
  path.write_text(content)
  with pytest.raises(ValueError, match=r"broken\.json"):
    tokenization.load_tokenizer(path)


@pytest.mark.parametrize(
  "spec", ["bpe-", "bpe-256", "bpe-x", "bpe--300", "byte", "", "no/such.json"]
)
def test_unknown_spec_is_named(spec):
  with pytest.raises(ValueError, match="tokenizer="):
    tokenization.check_spec(spec)
  with pytest.raises(ValueError, match="tokenizer="):
    tokenization.open_tokenizer(spec)


@pytest.mark.parametrize("spec", ["bytes", "bpe-257"])
def test_bad_arguments_are_named(spec):
  tokenizer = _tokenizer(spec)
  for ids in ([-1], [tokenizer.vocab_size]):
    with pytest.raises(ValueError, match=f"ids: {ids[0]} is outside"):
      tokenizer.decode(ids)
    with pytest.raises(ValueError, match=f"ids: {ids[0]} is outside"):
      tokenizer.token_bytes(ids[0])
  with pytest.raises(ValueError, match="text: a lone surrogate at 1"):
    tokenizer.encode("a\ud800")
  with pytest.raises(ValueError, match="text: a lone surrogate at 1"):
    tokenizer.encode_batch(["a\ud800"])


def test_bytes_tokenizer_is_utf8():
  assert BytesTokenizer().encode("a\u00e9") == [97, 195, 169]
