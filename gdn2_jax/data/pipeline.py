"""From a configuration to batches whose order is a function of the step.

The training stream is rows -> seeded shuffle, anew each epoch -> repeat ->
global batches. Host h of H takes the h-th H-th of every global batch, so the
concatenation over hosts is the same for any H, and the whole state of the
stream is the step number: seeking to any step costs the same as to the next.

This module never imports JAX itself; grain does, so it is imported on use.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers

from gdn2_jax.data import corpus as corpora
from gdn2_jax.data import files, packing
from gdn2_jax.data import packed as packed_lib
from gdn2_jax.data import tokenizer as tokenization
from gdn2_jax.data.rows import PackedRows, check_batch, padding_row

__all__ = [
  "DataConfig",
  "Dataset",
  "TrainBatches",
  "check_batch",
  "open_dataset",
  "validate",
]

Batch = dict[str, np.ndarray]

# Documents keep one order for all runs; the run's seed shuffles rows.
_DOCUMENT_SEED = 0


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class DataConfig:
  """What to read, and how it is cut into batches.

  Attributes:
    source: "embedded", "snapshot", or a folder of packed rows made by
      `python -m gdn2_jax.data`.
    tokenizer: "bytes", "bpe-N", or the path of a tokenizer.json. With a
      packed folder it must be the one the folder was made with.
    seq_len: L, input tokens of a row.
    batch_size: global sequences per step.
    seed: of the row order.
    cache_dir: where tokenizers and packed rows are kept.
    num_threads: reader threads of a host; 0 reads in the caller's thread.
    verify_hashes: hash all files when opening; for very large folders one may
      check once with `python -m gdn2_jax.data inspect` and turn this off.
  """

  source: str = "embedded"
  tokenizer: str = "bpe-4096"
  seq_len: int = 512
  batch_size: int = 16
  seed: int = 0
  cache_dir: str = "cache"
  num_threads: int = 2
  verify_hashes: bool = True


def validate(config: DataConfig) -> None:
  """Checks a configuration without reading any data.

  Raises:
    ValueError: naming the field, its value and what was expected.
  """
  for name, low in (("seq_len", 1), ("batch_size", 1), ("num_threads", 0)):
    value = getattr(config, name)
    if value < low:
      raise ValueError(f"data.{name}={value}: expected at least {low}")
  if not 0 <= config.seed < 2**32:
    raise ValueError(f"data.seed={config.seed}: expected 0 <= seed < 2**32")
  if config.source not in corpora.SOURCES and not _is_packed(config.source):
    raise ValueError(
      f"data.source={config.source!r}: expected one of"
      f" {', '.join(corpora.SOURCES)}, or a folder with a manifest.json made"
      " by python -m gdn2_jax.data"
    )
  if config.source in corpora.SOURCES:
    tokenization.check_spec(config.tokenizer)


def open_dataset(config: DataConfig) -> "Dataset":
  """Opens the data of a run, packing the built-in corpora on first use.

  Raises:
    ValueError: for a bad field, a damaged file (by name), a packed folder
      made with another tokenizer, or too little text for one row.
  """
  validate(config)
  if config.source in corpora.SOURCES:
    packed = _pack_built_in(config)
  else:
    packed = packing.open_packed(
      config.source, verify_hashes=config.verify_hashes
    )
    _check_tokenizer(config, packed)
  dataset = Dataset(dataclasses.replace(config), packed)
  if len(dataset.train_rows()) == 0:
    raise ValueError(
      f"data.seq_len={config.seq_len}: the training split of"
      f" {config.source!r} holds only {len(dataset.train_tokens())} tokens"
    )
  return dataset


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Batches, tokenizer and identity of an opened corpus.

  A batch is a dict of [B, L] arrays: inputs, targets, segment_ids (1-based
  within a row, 0 for padding), positions (from 0 in each segment), all int32,
  and loss_mask, float32, 1 where the target counts; see `rows.make_row`.
  """

  config: DataConfig
  packed: packing.Packed

  @property
  def tokenizer(self) -> tokenization.Tokenizer:
    """The tokenizer the tokens were made with."""
    return self.packed.tokenizer

  @property
  def manifest(self) -> dict[str, Any]:
    """Counts, hashes and origin of the packed data."""
    return self.packed.manifest

  @property
  def identity(self) -> dict[str, Any]:
    """The fields behind `fingerprint`, to show where two of them differ."""
    return {
      "format": f"{packed_lib.FORMAT}-{self.manifest['version']}",
      "tokenizer_sha256": self.tokenizer.sha256,
      "files_sha256": self.packed.file_hashes(),
      "seq_len": self.config.seq_len,
      "seed": self.config.seed,
      "batch_size": self.config.batch_size,
    }

  @property
  def fingerprint(self) -> str:
    """Hex SHA-256 of everything that decides the batch of a given step.

    Host and thread counts do not take part. A run must not resume on data of
    another fingerprint: the step number would mean other rows.
    """
    return files.sha256_bytes(
      json.dumps(self.identity, sort_keys=True).encode()
    )

  @property
  def validation_bytes_per_token(self) -> float:
    """UTF-8 bytes per predicted token of the validation split.

    The mean loss over loss_mask, in nats, becomes bits per byte as
    loss / ln 2 / validation_bytes_per_token. Every token counts as one
    prediction, EOS too (of 0 bytes), except the first of a document, which
    nothing precedes: neither it nor its bytes are counted.

    Raises:
      ValueError: if the split is empty.
    """
    entry = self.manifest["splits"]["validation"]
    predicted = entry["tokens"] - entry["documents"]
    if predicted == 0:
      raise ValueError("the validation split predicts no token")
    return entry["predicted_bytes"] / predicted

  def train_tokens(self) -> np.ndarray:
    """All training tokens [tokens], uint16 or uint32: widen before sums."""
    return self.packed.tokens["train"]

  def validation_tokens(self) -> np.ndarray:
    """All validation tokens [tokens], uint16 or uint32."""
    return self.packed.tokens["validation"]

  def train_rows(self) -> PackedRows:
    """Training rows of config.seq_len by index; a short last one is dropped."""
    packed = self.packed
    return PackedRows(
      packed.tokens["train"], packed.offsets["train"], self.config.seq_len
    )

  def train_batches(
    self,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
  ) -> "TrainBatches":
    """This host's part of the endless training stream, from a step on.

    Args:
      start_step: the step whose batch comes first.
      process_index: this host, h.
      process_count: all hosts, H; must divide config.batch_size. Host h gets
        rows h B/H .. (h+1) B/H of each global batch.

    Raises:
      ValueError: for a negative step, a host outside [0, H) or an H that does
        not divide the batch.
    """
    batch_size = self.config.batch_size
    if start_step < 0:
      raise ValueError(f"start_step={start_step}: expected at least 0")
    if process_count < 1 or batch_size % process_count:
      raise ValueError(
        f"process_count={process_count}: expected a divisor of"
        f" data.batch_size={batch_size}"
      )
    if not 0 <= process_index < process_count:
      raise ValueError(
        f"process_index={process_index}: expected one of {process_count} hosts"
      )
    return TrainBatches(
      self.train_rows(), self.config, start_step, process_index, process_count
    )

  def validation_batches(
    self, seq_len: int, batch_size: int, limit: int | None = None
  ) -> Iterator[Batch]:
    """The validation split once, in order, in batches of one shape.

    The last row and the last batch are padded, so that every token except the
    first of a document is a target with loss_mask 1 exactly once, at any
    `seq_len`.

    Args:
      seq_len: L, need not be that of training.
      batch_size: rows of a batch.
      limit: stop after that many batches; None reads all.

    Raises:
      ValueError: for a size below 1.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
      if value is not None and value < 1:
        raise ValueError(f"{name}={value}: expected at least 1")
    rows = PackedRows(
      self.packed.tokens["validation"],
      self.packed.offsets["validation"],
      seq_len,
      keep_partial=True,
    )
    return _fixed_batches(
      rows, batch_size, limit, self.packed.tokenizer.vocab_size
    )


class TrainBatches(Iterator[Batch]):
  """An endless iterator whose whole state is `step`, the next step's number."""

  def __init__(
    self,
    rows: PackedRows,
    config: DataConfig,
    start_step: int,
    process_index: int,
    process_count: int,
  ):
    import grain  # imports JAX, which numpy-only callers need not pay for

    batches = (
      grain.MapDataset.source(rows)
      .seed(config.seed)
      .shuffle()
      .repeat()
      # The stream has no end, so nothing is dropped; the exact ceiling that
      # keeps a remainder overflows at one row per host.
      .batch(config.batch_size // process_count, drop_remainder=True)
    )[process_index::process_count]
    options = grain.ReadOptions(
      num_threads=config.num_threads,
      prefetch_buffer_size=2 * config.num_threads,
    )
    self._batches = iter(batches.to_iter_dataset(options))
    self.step = start_step
    self.seek(start_step)

  def seek(self, step: int) -> None:
    """Makes `step` the next one; costs the same for any step."""
    self._batches.set_state({"next_index": step})
    self.step = step

  def __next__(self) -> Batch:
    batch = next(self._batches)
    self.step += 1
    return batch

  def close(self) -> None:
    """Stops the reader threads."""
    self._batches.close()


def _fixed_batches(
  rows: PackedRows, batch_size: int, limit: int | None, vocab_size: int
) -> Iterator[Batch]:
  count = -(-len(rows) // batch_size)
  for index in range(count if limit is None else min(count, limit)):
    start = index * batch_size
    stop = min(start + batch_size, len(rows))
    members = [rows[i] for i in range(start, stop)]
    members += [padding_row(rows.seq_len)] * (batch_size - len(members))
    batch = {name: np.stack([r[name] for r in members]) for name in members[0]}
    check_batch(batch, vocab_size)
    yield batch


def _is_packed(source: str) -> bool:
  return (pathlib.Path(source) / "manifest.json").is_file()


def _check_tokenizer(config: DataConfig, packed: packing.Packed) -> None:
  recorded = packed.manifest["tokenizer"]
  if config.tokenizer == recorded["spec"]:
    return
  if pathlib.Path(config.tokenizer).is_file():
    given = tokenization.load_tokenizer(config.tokenizer)
    if given.sha256 == recorded["sha256"]:
      return
  raise ValueError(
    f"data.tokenizer={config.tokenizer!r}: {config.source!r} was packed with"
    f" {recorded['spec']!r} (sha256 {recorded['sha256'][:16]})"
  )


def _pack_built_in(config: DataConfig) -> packing.Packed:
  spec = config.tokenizer
  is_named = spec == "bytes" or spec.startswith("bpe-")
  key = {
    "source": corpora.source_key(config.source),
    "tokenizer": spec if is_named else files.sha256_file(spec),
    "tokenizers": tokenizers.__version__,
    "version": packed_lib.VERSION,
    "seed": _DOCUMENT_SEED,
  }
  digest = files.sha256_bytes(json.dumps(key).encode())[:16]
  label = spec if is_named else "file"
  cache = pathlib.Path(config.cache_dir)
  path = cache / "packed" / f"{config.source}-{label}-{digest}"
  if path.is_dir():
    return packing.open_packed(path, verify_hashes=config.verify_hashes)
  corpus = corpora.read_corpus(config.source)
  return packing.pack_corpus(
    corpus, path, tokenizer_spec=spec, cache_dir=cache, seed=_DOCUMENT_SEED
  )
