"""Packs a corpus into a folder, or looks into one.

  python -m gdn2_jax.data embedded --out=DIR [--tokenizer=bpe-4096] [--seed=0]
  python -m gdn2_jax.data text PATH --out=DIR
  python -m gdn2_jax.data inspect DIR [--split=validation] [--row=N]

A folder made here can be named as `data.source` of a training configuration.
Exit status: 0 done, 2 refused (the reason is on standard error).
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import tqdm

from gdn2_jax.data import corpus as corpora
from gdn2_jax.data import packing
from gdn2_jax.data.rows import PackedRows


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.

  Args:
    argv: arguments after the program's name; None takes the process's own.

  Returns:
    The exit status.
  """
  arguments = _parser().parse_args(argv)
  try:
    if arguments.command == "inspect":
      _inspect(arguments.folder, arguments.split, arguments.row, arguments.len)
    else:
      _pack(arguments)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def _parser() -> argparse.ArgumentParser:
  # Abbreviations would turn a misspelt flag into another one.
  strict = {"allow_abbrev": False}
  parser = argparse.ArgumentParser(
    prog="python -m gdn2_jax.data",
    description="Pack a corpus into a folder of rows, or look into one.",
    **strict,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  described = {
    "embedded": "the documentation that comes with this Python (2.5 MB)",
    "snapshot": "a frozen excerpt of it (0.2 MB)",
    "text": "a .txt or .jsonl file, or a folder of them",
  }
  for name, text in described.items():
    command = commands.add_parser(name, help=f"pack {text}", **strict)
    if name == "text":
      command.add_argument("path", help="file or folder to read")
    command.add_argument("--out", required=True, help="folder to make")
    command.add_argument(
      "--tokenizer",
      default="bpe-4096",
      help="bytes, bpe-N or the path of a tokenizer.json (default: bpe-4096)",
    )
    command.add_argument(
      "--seed", type=int, default=0, help="of the document order (default: 0)"
    )
  inspect = commands.add_parser(
    "inspect", help="verify a packed folder and show one row", **strict
  )
  inspect.add_argument("folder", help="a packed folder")
  inspect.add_argument("--split", choices=packing.SPLITS, default="train")
  inspect.add_argument("--row", type=int, default=0, help="index (default: 0)")
  inspect.add_argument(
    "--len", type=int, default=256, help="tokens of a row (default: 256)"
  )
  return parser


def _pack(arguments: argparse.Namespace) -> None:
  named = arguments.command in corpora.SOURCES
  source = arguments.command if named else arguments.path
  packed = packing.pack_corpus(
    corpora.read_corpus(source),
    arguments.out,
    tokenizer_spec=arguments.tokenizer,
    seed=arguments.seed,
    progress=_with_bar,
  )
  _print_manifest(packed)
  _print_row(packed, "train", 0, 256)


def _inspect(folder: str, split: str, row: int, length: int) -> None:
  packed = packing.open_packed(folder)
  _print_manifest(packed)
  print("all sizes and hashes match the manifest")
  _print_row(packed, split, row, length)


def _with_bar(batches: Iterable[Any], label: str) -> Iterable[Any]:
  return tqdm.tqdm(batches, desc=f"tokenize {label}", unit="batch")


def _print_manifest(packed: packing.Packed) -> None:
  manifest = packed.manifest
  tokenizer = manifest["tokenizer"]
  print(f"{packed.path}")
  print(
    f"  source {manifest['source']} (sha256 {manifest['corpus_sha256'][:16]},"
    f" Python {manifest['python']}), document seed {manifest['seed']},"
    f" {manifest['invalid_utf8_documents']} documents with invalid UTF-8"
  )
  print(
    f"  tokenizer {tokenizer['spec']} (sha256 {tokenizer['sha256'][:16]}),"
    f" {tokenizer['vocab_size']} ids, EOS {tokenizer['eos_id']};"
    f" {manifest['eos_policy']}"
  )
  for split in packing.SPLITS:
    entry = manifest["splits"][split]
    text_tokens = entry["tokens"] - entry["documents"]
    ratio = f"{entry['bytes'] / text_tokens:.3f}" if text_tokens else "no"
    print(
      f"  {split}: {entry['documents']} documents ({entry['empty_documents']}"
      f" empty ones left out), {entry['bytes']} bytes, {entry['tokens']}"
      f" tokens, {ratio} bytes/token"
    )
    for name, recorded in entry["files"].items():
      print(f"    {name}: {recorded['size']} bytes, {recorded['sha256']}")


def _print_row(
  packed: packing.Packed, split: str, index: int, length: int
) -> None:
  """Decodes one row, with a line at each document border."""
  rows = PackedRows(
    packed.tokens[split], packed.offsets[split], length, keep_partial=True
  )
  if not 0 <= index < len(rows):
    raise ValueError(
      f"row={index}: the {split} split has {len(rows)} rows of {length} tokens"
    )
  row = rows[index]
  predicted = int(row["loss_mask"].sum())
  print(f"{split} row {index}: {predicted} of {length} targets count")
  for segment in range(1, row["segment_ids"].max() + 1):
    ids = row["inputs"][row["segment_ids"] == segment]
    closed = ids[-1] == packed.tokenizer.eos_id
    end = "ends here" if closed else "goes on in the next row"
    print(f"----- segment {segment}: {len(ids)} tokens, {end} -----")
    print(packed.tokenizer.decode(ids))


if __name__ == "__main__":
  sys.exit(main())
