"""Text packed while training: no build first, at a price.

Every row of the global batch is a lane. Lane r of B reads documents r, r + B,
r + 2B, ... of the seeded shuffle, end to end, and step n gives its n-th L
tokens. A host works on its own lanes only, so the global batches are the same
for any number of hosts. What this cannot do, and packed rows can:

  - seek: where a lane stands after n steps is known only by tokenising its
    documents again, so a resume costs time in proportion to the step;
  - change batch_size, or use reader processes, or mix sources;
  - tokenise once: every epoch and every run pays again.

It is meant for files looked at once or twice, and for TFDS datasets that are
not worth a copy.
"""

import concurrent.futures
import hashlib
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from gdn2_jax.data import files
from gdn2_jax.data.build import passes
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.packed.rows import make_row
from gdn2_jax.data.text import corpus, readers
from gdn2_jax.data.tokenizer.api import Tokenizer, open_tokenizer

FORMAT = "gdn2-text-stream"

# Of text that is packed in memory: held-out documents for the evaluations,
# training documents for n-gram baselines and for a "bpe-N".
SAMPLE_BYTES = 8 << 20

Batch = dict[str, np.ndarray]


@runtime_checkable
class Records(Protocol):
  """Anything with a length whose items can be had by number."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Any: ...


class Texts:
  """Random access to the documents of one split.

  Args:
    records: gives a str, bytes or a dict with one of them under "text".
    name: of the source, for errors.
  """

  def __init__(self, records: Records, name: str):
    self._records = records
    self._name = name

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> str:
    try:
      record = self._records[index]
    except Exception as error:  # of the storage library
      raise ValueError(f"{self._name}: record {index}: {error}") from error
    if isinstance(record, dict):
      record = record["text"]
    return readers.decode(record)[0]


def open_texts(name: str) -> tuple[dict[str, Texts], str]:
  """Opens "text:PATH" or "tfds:FOLDER".

  Returns:
    split -> documents, and a hash of what was opened.

  Raises:
    ValueError: if there is no text, or no held-out text.
  """
  kind, _, path = name.partition(":")
  opened, digest = (_open_tfds if kind == "tfds" else _open_files)(path)
  texts = {split: Texts(opened[split], name) for split in packed.SPLITS}
  for split, documents in texts.items():
    if len(documents) == 0:
      raise ValueError(f"data.source={name!r}: no {split} documents")
  return texts, digest


def open_stream(name: str, tokenizer_spec: str) -> tuple[packed.Packed, Texts]:
  """Opens a text source for training.

  Args:
    name: "text:PATH" or "tfds:FOLDER".
    tokenizer_spec: see `gdn2_jax.data.tokenizer.open_tokenizer`.

  Returns:
    A sample of both splits packed in memory, in the shape of a packed folder;
    and the training documents.
  """
  texts, digest = open_texts(name)
  tokenizer = open_tokenizer(
    tokenizer_spec,
    train_texts=(
      piece
      for text in _sample(texts["train"])
      for piece in passes.pieces_of(text)
    ),
  )
  manifest: dict[str, Any] = {
    "format": FORMAT,
    "version": 1,
    "source": name,
    "eos_policy": packed.EOS_POLICY,
    "bos_policy": packed.BOS_POLICY,
    "tokenizer": {
      "spec": tokenizer_spec,
      "sha256": tokenizer.sha256,
      "vocab_size": tokenizer.vocab_size,
      "eos_id": tokenizer.eos_id,
    },
    "splits": {},
  }
  tokens, offsets = {}, {}
  for split in packed.SPLITS:
    tokens[split], offsets[split], counts = _pack(
      _sample(texts[split]), tokenizer
    )
    entry = {split: {"size": len(texts[split]), "sha256": digest}}
    manifest["splits"][split] = counts | {"files": entry}
  sample = packed.Packed(
    pathlib.Path(name), manifest, tokenizer, tokens, offsets
  )
  return sample, texts["train"]


class TextBatches(Iterator[Batch]):
  """An endless iterator over lanes of documents; see the module.

  Args:
    texts: training documents.
    tokenizer: gives the ids.
    seed: of the document order.
    seq_len: L.
    batch_size: B, lanes of all hosts.
    start_step: the step whose batch comes first; getting there tokenises what
      comes before.
    process_index: this host.
    process_count: all hosts; must divide B.
  """

  def __init__(
    self,
    texts: Texts,
    tokenizer: Tokenizer,
    *,
    seed: int,
    seq_len: int,
    batch_size: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
  ):
    import grain  # imports JAX, which numpy-only callers need not pay for

    self._order = (
      grain.MapDataset.range(len(texts)).seed(seed).shuffle().repeat()
    )
    self._texts, self._tokenizer = texts, tokenizer
    self._length, self._size = seq_len, batch_size
    own = batch_size // process_count
    self._own = range(process_index * own, (process_index + 1) * own)
    self._pool = concurrent.futures.ThreadPoolExecutor(1)
    self._ahead: concurrent.futures.Future | None = None
    self.seek(start_step)

  def seek(self, step: int) -> None:
    """Makes `step` the next one, from the start of the stream."""
    if self._ahead is not None:
      concurrent.futures.wait([self._ahead])
    self._lanes = [_Lane(lane, self._size) for lane in self._own]
    for _ in range(step):
      self._fill()
      for lane in self._lanes:
        lane.drop(self._length)
    self.step = step
    self._ahead = self._pool.submit(self._make)

  def __next__(self) -> Batch:
    assert self._ahead is not None
    batch = self._ahead.result()
    self._ahead = self._pool.submit(self._make)
    self.step += 1
    return batch

  def close(self) -> None:
    """Stops the reader thread."""
    self._pool.shutdown(cancel_futures=True)

  def _make(self) -> Batch:
    self._fill()
    rows = [lane.row(self._length) for lane in self._lanes]
    for lane in self._lanes:
      lane.drop(self._length)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  def _fill(self) -> None:
    """Until every lane holds the tokens of a row and the target after it."""
    while short := [n for n in self._lanes if len(n.tokens) <= self._length]:
      texts = [self._texts[self._order[lane.next_document()]] for lane in short]
      encoded = passes.encode_documents(texts, self._tokenizer)
      for lane, text, ids in zip(short, texts, encoded, strict=True):
        if text:
          lane.append(ids)


class _Lane:
  """Tokens of one row of the batch that are not used up yet."""

  def __init__(self, first: int, stride: int):
    self._next, self._stride = first, stride
    self.tokens = np.zeros(0, np.uint16)
    self._borders = np.zeros(0, np.int64)

  def next_document(self) -> int:
    index = self._next
    self._next += self._stride
    return index

  def append(self, ids: np.ndarray) -> None:
    self._borders = np.append(self._borders, len(self.tokens))
    self.tokens = np.concatenate([self.tokens, ids])

  def row(self, length: int) -> Batch:
    return make_row(self.tokens, self._borders, start=0, length=length)

  def drop(self, length: int) -> None:
    self.tokens = self.tokens[length:]
    # A document that began before is a segment of its own in the next row.
    self._borders = self._borders[self._borders >= length] - length


def _open_files(path: str) -> tuple[dict[str, list[str]], str]:
  found: dict[str, list[str]] = {split: [] for split in packed.SPLITS}
  digest = hashlib.sha256()
  for file in readers.find_files(path):
    for part in readers.cut_into_parts(file):
      for item in readers.read_part(part):
        if not item.text:
          continue
        sha256 = files.sha256_bytes(item.text.encode())
        digest.update(bytes.fromhex(sha256))
        held_out = corpus.is_held_out(sha256, 0.1)
        found["validation" if held_out else "train"].append(item.text)
  return found, digest.hexdigest()


def _open_tfds(path: str) -> tuple[dict[str, Any], str]:
  try:
    import tensorflow_datasets as tfds
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "tfds: sources need tensorflow-datasets: pip install 'gdn2-jax[data]'"
    ) from error
  try:
    builder = tfds.builder_from_directory(path)
  except Exception as error:  # of several libraries below it
    raise ValueError(f"tfds:{path}: {error}") from error
  missing = {*packed.SPLITS} - set(builder.info.splits)
  if missing or "text" not in builder.info.features:
    raise ValueError(
      f"tfds:{path}: expected splits train and validation and a feature"
      f" 'text', found {sorted(builder.info.splits)} and"
      f" {sorted(builder.info.features)}"
    )
  opened = {
    split: builder.as_data_source(split=split) for split in packed.SPLITS
  }
  digest = hashlib.sha256()
  for name in ("dataset_info.json", "features.json", "metadata.json"):
    file = pathlib.Path(path) / name
    digest.update(file.read_bytes() if file.is_file() else b"")
  return opened, digest.hexdigest()


def _sample(texts: Texts) -> Iterator[str]:
  room = SAMPLE_BYTES
  for index in range(len(texts)):
    text = texts[index]
    if text:
      yield text
    room -= len(text)
    if room <= 0:
      return


def _pack(
  texts: Iterable[str], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
  counts = dict.fromkeys(packed.COUNTS, 0)
  arrays = [np.zeros(0, packed.token_dtype(tokenizer.vocab_size))]
  for text in texts:
    (ids,) = passes.encode_documents([text], tokenizer)
    arrays.append(ids)
    size = len(text.encode())
    counts["documents"] += 1
    counts["tokens"] += len(ids)
    counts["bytes"] += size
    counts["predicted_bytes"] += size - tokenizer.first_token_bytes(ids[0])
  offsets = np.cumsum([0, *(len(a) for a in arrays[1:])], dtype=np.int64)
  return np.concatenate(arrays), offsets, counts
