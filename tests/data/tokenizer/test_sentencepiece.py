"""A tokenizer.model and a Llama-style tokenizer.json, as users bring them."""

import dataclasses
import io
import json
import pickle

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, processors, trainers

from gdn2_jax.data import __main__
from gdn2_jax.data.packed.folder import open_packed
from gdn2_jax.data.pipeline import DataConfig, open_dataset
from gdn2_jax.data.tokenizer import api as tokenization
from tests.data import parquet_files

TEXTS = [
  "Return a list of words.",
  "two\n\n  lines \t tab",
  "\u2603 snow, \U0001f600",
  "nul\0 and <s> </s> <unk>",
  "a",
  "",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """Trained as Llama's was: BPE, byte fallback, no normalisation."""
  path = tmp_path_factory.mktemp("model") / "tokenizer.model"
  written = io.BytesIO()
  lines = (line for text in parquet_files.texts() for line in text.split("\n"))
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=(line for line in lines if line.strip()),
    model_writer=written,
    vocab_size=600,
    model_type="bpe",
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    num_threads=1,
    minloglevel=2,
  )
  path.write_bytes(written.getvalue())
  return path


@pytest.fixture(scope="module")
def llama_json(tmp_path_factory):
  """The layout of Llama's tokenizer.json, with a small vocabulary."""
  path = tmp_path_factory.mktemp("llama") / "tokenizer.json"
  backend = tokenizers.Tokenizer(
    models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
  )
  backend.normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  )
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace("\u2581", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  special = ["<unk>", "<s>", "</s>"]
  trainer = trainers.BpeTrainer(
    vocab_size=900,
    special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
    show_progress=False,
    max_token_length=12,
  )
  words = (word for text in parquet_files.texts()[:60] for word in text.split())
  backend.train_from_iterator(words, trainer)
  content = json.loads(backend.to_str())
  # Bytes are ordinary tokens of the model, only the first three are special.
  content["added_tokens"] = content["added_tokens"][:3]
  backend = tokenizers.Tokenizer.from_str(json.dumps(content))
  backend.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  backend.save(str(path))
  return path


@pytest.fixture(params=["model", "llama_json"])
def brought(request):
  return request.getfixturevalue(request.param)


def test_ids_round_trip_and_nothing_is_forged(brought):
  tokenizer = tokenization.load_tokenizer(brought)
  assert tokenizer.eos_id == 2
  for text in TEXTS:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)  # neither BOS nor EOS nor a spelt one
    joined = b"".join(tokenizer.token_bytes(token) for token in ids)
    assert joined.removeprefix(b" ") == text.encode()
    assert tokenizer.decode([1, *ids, 2]) == text
  assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(t) for t in TEXTS]
  for token in (-1, tokenizer.vocab_size):
    with pytest.raises(ValueError, match=f"ids: {token} is outside"):
      tokenizer.decode([token])
  with pytest.raises(ValueError, match="lone surrogate"):
    tokenizer.encode("\ud800")


def test_copies_are_equal(brought, tmp_path):
  tokenizer = tokenization.load_tokenizer(brought)
  tokenizer.save(tmp_path / "tokenizer.json")  # whatever it came from
  for copy in (
    tokenization.load_tokenizer(tmp_path / "tokenizer.json"),
    pickle.loads(pickle.dumps(tokenizer)),
  ):
    assert copy.sha256 == tokenizer.sha256
    assert [copy.encode(t) for t in TEXTS] == [
      tokenizer.encode(t) for t in TEXTS
    ]


def test_the_added_space_is_not_a_byte_of_the_text(brought):
  tokenizer = tokenization.load_tokenizer(brought)
  (first, *_) = tokenizer.encode("a list")
  covered = tokenizer.first_token_bytes(first)
  assert covered == len(tokenizer.token_bytes(first)) - 1
  assert tokenization.BytesTokenizer().first_token_bytes(97) == 1


def test_packed_with_it_and_trained_under_its_name(brought, tmp_path):
  (tmp_path / "text.jsonl").write_text(
    "\n".join(json.dumps({"text": t}) for t in parquet_files.texts()[:80])
  )
  out = tmp_path / "rows"
  argv = ["text", str(tmp_path / "text.jsonl"), f"--out={out}", "--workers=0"]
  assert __main__.main([*argv, f"--tokenizer={brought}"]) == 0
  found = open_packed(out)
  entry = found.manifest["splits"]["train"]
  assert found.manifest["tokenizer"]["spec"] == str(brought)
  config = DataConfig(
    source=str(out), tokenizer=str(brought), seq_len=32, batch_size=2
  )
  dataset = open_dataset(config)
  by_copy = dataclasses.replace(config, tokenizer=str(out / "tokenizer.json"))
  assert open_dataset(by_copy).fingerprint == dataset.fingerprint
  size = sum(
    len(
      b"".join(found.tokenizer.token_bytes(t) for t in found.tokens[split][:])
    )
    for split in ("train", "validation")
  )
  bytes_ = sum(s["bytes"] for s in found.manifest["splits"].values())
  documents = sum(s["documents"] for s in found.manifest["splits"].values())
  assert size == bytes_ + documents  # one added space per document
  assert entry["predicted_bytes"] < entry["bytes"]


def test_a_broken_model_is_named(tmp_path, model):
  path = tmp_path / "broken.model"
  for content in (b"", b"not a model", model.read_bytes()[:500]):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.model"):
      tokenization.load_tokenizer(path)
  damaged = json.dumps(
    {"format": "gdn2-sentencepiece-tokenizer", "version": 1, "model": "%%%"}
  )
  (tmp_path / "broken.json").write_text(damaged)
  with pytest.raises(ValueError, match=r"broken\.json"):
    tokenization.load_tokenizer(tmp_path / "broken.json")
