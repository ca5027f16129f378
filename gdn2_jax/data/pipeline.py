"""Dataset of a run: its configuration, batches and fingerprint.

`gdn2_jax.data.sources` says what a source may be, `gdn2_jax.data.batches` how
batches follow from the step.
"""

import dataclasses
import json
import math
from collections.abc import Iterator

import numpy as np

from gdn2_jax import files
from gdn2_jax.config_class import config_class
from gdn2_jax.data import batches as streams
from gdn2_jax.data import sources
from gdn2_jax.data.batches import Batch, TrainBatches
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.packed.rows import PackedRows, check_batch
from gdn2_jax.data.tokenizer import api as tokenization

__all__ = [
  "DataConfig",
  "Dataset",
  "TrainBatches",
  "check_batch",
  "open_dataset",
  "validate",
]

# Enough for n-gram baselines, which hold several copies in memory.
_SAMPLE_TOKENS = 1 << 24


@config_class
class DataConfig:
  """Source of the text, and the batches it is cut into.

  Attributes:
    source: "embedded", "snapshot", "text:PATH" or "tfds:FOLDER", packed into
      cache_dir on first use; a folder of packed rows made by
      `python -m gdn2_jax.data`; or a mixture, "data/a:0.7,data/b:0.3".
    tokenizer: "bytes", "bpe-N", or the path of a tokenizer.json or
      tokenizer.model. With packed folders it must be the one they were made
      with.
    seq_len: L, input tokens of a row.
    batch_size: global sequences per step.
    seed: seed of the row order.
    cache_dir: where tokenizers and packed rows are kept.
    num_threads: reader threads of a host; 0 reads in the caller's thread.
    num_workers: reader processes of a host; 0 uses threads alone, which is
      faster for packed rows. Neither changes the batches.
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
  num_workers: int = 0
  verify_hashes: bool = True


def validate(config: DataConfig) -> None:
  """Checks a configuration without reading any data.

  Raises:
    ValueError: naming the field, its value and what was expected.
  """
  lowest = {"seq_len": 1, "batch_size": 1, "num_threads": 0, "num_workers": 0}
  for name, low in lowest.items():
    value = getattr(config, name)
    if value < low:
      raise ValueError(f"data.{name}={value}: expected at least {low}")
  if not 0 <= config.seed < 2**32:
    raise ValueError(f"data.seed={config.seed}: expected 0 <= seed < 2**32")
  sources.check(config.source, config.tokenizer)


def open_dataset(config: DataConfig) -> "Dataset":
  """Opens the data of a run, packing its text on first use.

  Raises:
    ValueError: for a bad field, a damaged file (by name), a packed folder
      made with another tokenizer, or too little text for one row.
  """
  validate(config)
  entries = sources.parse(config.source)
  opened = tuple(
    sources.open_rows(
      entry,
      config.tokenizer,
      cache_dir=config.cache_dir,
      verify_hashes=config.verify_hashes,
    )
    for entry in entries
  )
  first = opened[0].tokenizer.sha256
  for entry, found in zip(entries, opened, strict=True):
    if found.tokenizer.sha256 != first:
      raise ValueError(
        f"data.source: {entry.name!r} was packed with another tokenizer"
        f" (sha256 {found.tokenizer.sha256[:16]}) than {entries[0].name!r}"
        f" ({first[:16]})"
      )
    tokens = len(found.tokens["train"])
    if tokens <= config.seq_len:
      raise ValueError(
        f"data.seq_len={config.seq_len}: the training split of"
        f" {entry.name!r} holds only {tokens} tokens"
      )
  weights = tuple(entry.weight for entry in entries)
  return Dataset(dataclasses.replace(config), opened, weights)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Batches, tokenizer and fingerprint of an opened corpus.

  A batch is a dict of [B, L] arrays: inputs, targets, segment_ids (1-based
  within a row, 0 for padding), positions (from 0 in each segment), all int32,
  and loss_mask, float32, 1 where the target counts; see `rows.make_row`.
  """

  config: DataConfig
  parts: tuple[packed.Packed, ...]
  weights: tuple[float, ...]

  @property
  def packed(self) -> packed.Packed:
    """The packed rows; of a mixture, those of its first source."""
    return self.parts[0]

  @property
  def tokenizer(self) -> tokenization.Tokenizer:
    """The tokenizer the tokens were made with."""
    return self.packed.tokenizer

  @property
  def fingerprint(self) -> str:
    """Hex SHA-256 of everything that decides the batch of a given step.

    Host, thread and worker counts do not take part. A run must not resume on
    data of another fingerprint: the step number would mean other rows.
    """
    one = len(self.parts) == 1
    formats = [
      f"{part.manifest['format']}-{part.manifest['version']}"
      for part in self.parts
    ]
    hashes = [part.file_hashes() for part in self.parts]
    found = {
      "format": formats[0] if one else formats,
      "tokenizer_sha256": self.tokenizer.sha256,
      "files_sha256": hashes[0] if one else hashes,
      "seq_len": self.config.seq_len,
      "seed": self.config.seed,
      "batch_size": self.config.batch_size,
    }
    if not one:
      found["weights"] = list(self.weights)
    return files.sha256_bytes(json.dumps(found, sort_keys=True).encode())

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
    entries = [part.manifest["splits"]["validation"] for part in self.parts]
    predicted = sum(e["tokens"] - e["documents"] for e in entries)
    if predicted == 0:
      raise ValueError(
        f"--config.data.source={self.config.source}: no document is held out "
        "for validation; hold out more: python -m gdn2_jax.data text FOLDER "
        "--out=DIR --validation_fraction=0.5, then --config.data.source=DIR"
      )
    return sum(e["predicted_bytes"] for e in entries) / predicted

  def train_tokens(self, limit: int = _SAMPLE_TOKENS) -> np.ndarray:
    """At most `limit` training tokens, uint16 or uint32: widen before sums.

    Of a mixture each source by its weight, of a source the same share of every
    shard, from its beginning.
    """
    taken = []
    for part, weight in zip(self.parts, self.weights, strict=True):
      tokens = part.tokens["train"]
      count = round(limit * weight / sum(self.weights))
      share = min(count / len(tokens), 1)
      pieces = [own[: math.ceil(share * len(own))] for own in tokens.parts]
      taken.append(np.concatenate(pieces)[:count])
    return np.concatenate(taken)

  def validation_tokens(self) -> np.ndarray:
    """All validation tokens [tokens], uint16 or uint32."""
    tokens = [part.tokens["validation"][:] for part in self.parts]
    return tokens[0] if len(tokens) == 1 else np.concatenate(tokens)

  def train_rows(self, part: int = 0) -> PackedRows:
    """Training rows of config.seq_len, of one source of a mixture, by index.

    A short last row is dropped.
    """
    return self.parts[part].rows("train", self.config.seq_len)

  def train_batches(
    self,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
  ) -> TrainBatches:
    """This host's part of the endless training stream, from a step on.

    Args:
      start_step: the step whose batch comes first.
      process_index: this host, h.
      process_count: number of hosts, H; divides config.batch_size. Host h gets
        rows h B/H .. (h+1) B/H of each global batch.

    Raises:
      ValueError: naming the argument that is out of range.
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
      [self.train_rows(part) for part in range(len(self.parts))],
      self.weights,
      seed=self.config.seed,
      batch_size=batch_size,
      start_step=start_step,
      process_index=process_index,
      process_count=process_count,
      num_threads=self.config.num_threads,
      num_workers=self.config.num_workers,
    )

  def validation_batches(
    self, seq_len: int, batch_size: int, limit: int | None = None
  ) -> Iterator[Batch]:
    """The validation split once, in a fixed order, in batches of one shape.

    The last row and the last batch are padded, so that every token except the
    first of a document is a target with loss_mask 1 exactly once, at any
    `seq_len`.

    Args:
      seq_len: L, need not be that of training.
      batch_size: rows of a batch.
      limit: most batches; None reads all.

    Raises:
      ValueError: for a size below 1.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
      if value is not None and value < 1:
        raise ValueError(f"{name}={value}: expected at least 1")
    rows = [
      part.rows("validation", seq_len, keep_partial=True) for part in self.parts
    ]
    return streams.fixed_batches(
      streams.InterleavedRows(rows),
      batch_size,
      limit,
      self.tokenizer.vocab_size,
    )
