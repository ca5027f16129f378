"""Printed reports of the data commands."""

import numpy as np

from gdn2_jax.data.build import build
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.text import fineweb_edu

_ODD = {
  "empty_documents": "empty, left out",
  "invalid_utf8_documents": "with invalid UTF-8, replaced by U+FFFD",
  "nul_documents": "with NUL, kept",
  "long_documents": "over 1 MiB, tokenised in pieces",
}
_LEAST_SECONDS = 5.0
_SHOWN = 8  # files of a split


def print_manifest(found: packed.Packed) -> None:
  """Prints origin, tokenizer, counts and files of a packed folder."""
  manifest = found.manifest
  tokenizer = manifest["tokenizer"]
  print(f"{found.path}")
  _print_source(manifest)
  print(
    f"  tokenizer {tokenizer['spec']} (sha256 {tokenizer['sha256'][:16]}),"
    f" {tokenizer['vocab_size']} ids, EOS {tokenizer['eos_id']};"
    f" {manifest['eos_policy']}"
  )
  print(
    f"  --config.model.vocab_size={tokenizer['vocab_size']} or more; the next"
    f" multiple of 128 is {-(-tokenizer['vocab_size'] // 128) * 128}"
  )
  for split in packed.SPLITS:
    entry = manifest["splits"][split]
    text_tokens = entry["tokens"] - entry["documents"]
    ratio = f"{entry['bytes'] / text_tokens:.3f}" if text_tokens else "no"
    print(
      f"  {split}: {entry['documents']} documents ({entry['empty_documents']}"
      f" empty ones left out), {entry['bytes']} bytes, {entry['tokens']}"
      f" tokens, {ratio} bytes/token"
    )
    for name, text in _ODD.items():
      if entry[name]:
        print(f"    {entry[name]} documents {text}")
    for name, recorded in list(entry["files"].items())[:_SHOWN]:
      print(f"    {name}: {recorded['size']} bytes, {recorded['sha256']}")
    if (more := len(entry["files"]) - _SHOWN) > 0:
      print(f"    and {more} more files")


def print_row(found: packed.Packed, split: str, index: int, length: int):
  """Prints one row as text, with a line at each document border."""
  rows = found.rows(split, length, keep_partial=True)
  if not 0 <= index < len(rows):
    raise ValueError(
      f"row={index}: the {split} split has {len(rows)} rows of {length} tokens"
    )
  row = rows[index]
  predicted = int(row["loss_mask"].sum())
  print(f"{split} row {index}: {predicted} of {length} targets count")
  for segment in range(1, int(np.max(row["segment_ids"])) + 1):
    ids = row["inputs"][row["segment_ids"] == segment]
    closed = ids[-1] == found.tokenizer.eos_id
    end = "ends here" if closed else "goes on in the next row"
    print(f"----- segment {segment}: {len(ids)} tokens, {end} -----")
    print(found.tokenizer.decode(ids))


def print_rates(rates: build.Rates, workers: int) -> None:
  """Prints throughput, and the hours it makes of FineWeb-Edu's samples."""
  if rates.bytes == 0:
    return
  for label, seconds in (
    (f"in {rates.seconds:.1f} s with {workers} workers", rates.seconds),
    ("per core and second of CPU", max(rates.cpu_seconds, 1e-9)),
  ):
    print(
      f"{label}: {rates.documents / seconds:,.0f} documents/s,"
      f" {rates.tokens / seconds:,.0f} tokens/s,"
      f" {rates.bytes / seconds / 1e6:.2f} MB/s"
    )
  if rates.seconds < _LEAST_SECONDS:
    return  # starting the workers is all that was measured
  for name, tokens in fineweb_edu.GPT2_TOKENS.items():
    share = tokens * fineweb_edu.BYTES_PER_GPT2_TOKEN / rates.bytes / 3600
    print(
      f"at this rate sample-{name} takes {share * rates.seconds:,.1f} hours,"
      f" {share * rates.cpu_seconds:,.1f} hours of CPU"
    )


def _print_source(manifest: dict) -> None:
  source = manifest["source"]
  origin = ", ".join(f"{k} {v}" for k, v in source.items() if v)
  held_out = manifest["validation"]
  held_out = ", ".join(held_out.get("files", [])) or (
    f"a fraction {held_out['fraction']} of the documents"
  )
  inputs = manifest["inputs"]
  size = sum(entry["size"] for entry in inputs)
  print(f"  source: {origin}")
  print(
    f"  {len(inputs)} input files, {size} bytes; held out: {held_out};"
    f" document seed {manifest['seed']}"
  )
  for entry in manifest["skipped"]:
    print(f"  left out {entry['path']}: {entry['reason']}")
  for entry in manifest["bad_parts"]:
    print(
      f"  left out {entry['path']}, {entry['where']},"
      f" {entry['documents']} documents: {entry['reason']}"
    )
