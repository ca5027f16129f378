"""Packs text into a folder of rows, or looks into one.

  python -m gdn2_jax.data fineweb_edu sample-10BT --out=DIR --tokenizer=FILE
  python -m gdn2_jax.data fineweb_edu --local=FOLDER --out=DIR
  python -m gdn2_jax.data text PATH --out=DIR
  python -m gdn2_jax.data embedded --out=DIR [--tokenizer=bpe-4096] [--seed=0]
  python -m gdn2_jax.data inspect DIR [--split=validation] [--row=N]

A folder made here can be named as `data.source` of a training configuration.
A command that was killed goes on where it was when it runs again.
Exit status: 0 done, 2 refused (the reason is on standard error), 130 Ctrl-C.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Sequence

import tqdm

from gdn2_jax.data import sources
from gdn2_jax.data.build import build, recipe, report
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.text import fineweb_edu
from gdn2_jax.data.tokenizer.api import check_spec


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command line, by default the process's; returns its status."""
  arguments = _parser().parse_args(argv)
  run = {"inspect": _inspect, "fineweb_edu": _fineweb_edu, "tfds": _tfds}
  try:
    run.get(arguments.command, _pack)(arguments)
  except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("interrupted; the same command goes on from here", file=sys.stderr)
    return 130
  return 0


def _parser() -> argparse.ArgumentParser:
  # Abbreviations would turn a misspelt flag into another one.
  strict = {"allow_abbrev": False}
  parser = argparse.ArgumentParser(
    prog="python -m gdn2_jax.data",
    description="Pack text into a folder of rows, or look into one.",
    **strict,
  )
  commands = parser.add_subparsers(dest="command", required=True)

  def add(name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=text, **strict)

  fineweb = add("fineweb_edu", "pack FineWeb-Edu, downloaded or brought")
  _add_fineweb_flags(fineweb)
  fineweb.add_argument(
    "--checksums", help="file of `sha256sum` lines that the inputs must match"
  )
  _add_output_flags(fineweb, "bpe-32000")
  _add_build_flags(fineweb)
  text = add("text", "pack .parquet, .jsonl and .txt files")
  text.add_argument("path", help="a file, or a folder of them at any depth")
  _add_output_flags(text, "bpe-4096")
  _add_build_flags(text)
  described = {
    "embedded": "pack the documentation that comes with this Python (2.5 MB)",
    "snapshot": "pack a frozen excerpt of it (0.2 MB)",
  }
  for name, description in described.items():
    _add_output_flags(add(name, description), "bpe-4096")
  tfds = add("tfds", "prepare FineWeb-Edu as a TFDS dataset of ArrayRecords")
  _add_fineweb_flags(tfds)
  tfds.add_argument("--out", required=True, help="data_dir of TFDS")
  inspect = add("inspect", "verify a packed folder and show one row")
  inspect.add_argument("folder", help="a packed folder")
  inspect.add_argument("--split", choices=packed.SPLITS, default="train")
  inspect.add_argument("--row", type=int, default=0, help="index (default: 0)")
  inspect.add_argument(
    "--len", type=int, default=256, help="tokens of a row (default: 256)"
  )
  return parser


def _add_fineweb_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    "config",
    nargs="?",
    default="",
    help=f"{', '.join(fineweb_edu.FOLDERS)}, or a dump such as"
    " CC-MAIN-2024-10; may be left out with --local",
  )
  command.add_argument(
    "--local", help="read parquet files of this folder, download nothing"
  )
  command.add_argument(
    "--download_dir",
    default="data/fineweb_edu_files",
    help="where downloads are kept (default: %(default)s)",
  )
  command.add_argument(
    "--revision",
    default=fineweb_edu.REVISION,
    help="commit of the repository (default: v1.4.0, %(default).12s)",
  )
  command.add_argument(
    "--max_files", type=int, help="number of files to take, one is held out"
  )


def _add_output_flags(command: argparse.ArgumentParser, tokenizer: str) -> None:
  command.add_argument("--out", required=True, help="folder to make")
  command.add_argument(
    "--tokenizer",
    default=tokenizer,
    help="bytes, bpe-N, or the path of a tokenizer.json or SentencePiece"
    " tokenizer.model (default: %(default)s)",
  )
  command.add_argument(
    "--seed",
    type=int,
    default=0,
    help="seed of the document order (default: 0)",
  )


def _add_build_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    "--workers",
    type=int,
    default=os.cpu_count() or 1,
    help="processes (default: %(default)s, one per core)",
  )
  command.add_argument(
    "--validation_files",
    type=lambda text: tuple(name for name in text.split(",") if name) or None,
    help="input files to hold out, names or patterns with commas between",
  )
  command.add_argument(
    "--validation_fraction",
    type=float,
    help="share of documents to hold out where no file is",
  )
  command.add_argument(
    "--shard_tokens",
    type=int,
    default=recipe.SHARD_TOKENS,
    help="most tokens of a shard, about (default: %(default)s)",
  )
  command.add_argument(
    "--skip_bad_shards",
    action="store_true",
    dest="skip_bad",
    help="leave out and count what cannot be read, instead of stopping",
  )


def _fineweb_edu(arguments: argparse.Namespace) -> None:
  check_spec(arguments.tokenizer)  # before anything is downloaded
  paths = _fineweb_files(arguments)
  checksums, revision = fineweb_edu.recorded(paths)
  if arguments.checksums:
    checksums = _read_checksums(arguments.checksums, list(paths))
  source = fineweb_edu.source_entry(arguments.config, revision)
  options = {"validation_fraction": 0.01}
  if not arguments.validation_files and arguments.validation_fraction is None:
    options["validation_files"] = fineweb_edu.held_out_files(list(paths))
  _build(arguments, recipe.Inputs(paths, source, options, checksums))


def _fineweb_files(arguments: argparse.Namespace) -> dict[str, pathlib.Path]:
  """Name -> path of the user's own files, or of those to download."""
  if arguments.max_files is not None and arguments.max_files < 1:
    raise ValueError(f"max_files={arguments.max_files}: expected at least 1")
  if arguments.local:
    paths = fineweb_edu.local_files(arguments.local, arguments.config)
    return {n: paths[n] for n in sorted(paths)[: arguments.max_files]}
  return fineweb_edu.download(
    arguments.config,
    arguments.download_dir,
    revision=arguments.revision,
    limit=arguments.max_files,
  )


def _pack(arguments: argparse.Namespace) -> None:
  name = arguments.command
  if name == "text":
    name = f"text:{arguments.path}"
  with sources.open_inputs(name) as inputs:
    _build(arguments, inputs)


def _build(arguments: argparse.Namespace, inputs: recipe.Inputs) -> None:
  """Builds with the flags that the command has."""
  flags = vars(arguments)
  workers = flags.get("workers", 0)
  if workers < 0:
    raise ValueError(f"workers={workers}: expected at least 0")
  given = {
    field.name: flags[field.name]
    for field in dataclasses.fields(recipe.Options)
    if flags.get(field.name) is not None
  }
  built = build.build_rows(
    inputs,
    arguments.out,
    recipe.Options(**inputs.options | given),
    workers=workers,
    bar=tqdm.tqdm,
    say=functools.partial(tqdm.tqdm.write, file=sys.stderr),
  )
  report.print_manifest(built.packed)
  report.print_row(built.packed, "train", 0, 256)
  if built.rates is None:
    print("already complete, nothing was done")
  else:
    report.print_rates(built.rates, workers)


def _read_checksums(path: str, names: list[str]) -> dict[str, str]:
  """Name -> SHA-256, from lines "<sha256>  <name>" of sha256sum."""
  found = {}
  lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
  for number, line in enumerate(lines, start=1):
    digest, _, name = line.strip().partition(" ")
    name = name.lstrip(" *")
    if not name and not digest:
      continue
    if len(digest) != 64 or not name:
      raise ValueError(f"{path}:{number}: expected '<sha256>  <file name>'")
    for known in names:
      if name == known or name.endswith(f"/{known}"):
        found[known] = digest.lower()
  if missing := sorted(set(names) - set(found)):
    raise ValueError(f"{path}: no line for {missing[0]}")
  return found


def _tfds(arguments: argparse.Namespace) -> None:
  try:
    from gdn2_jax.data.text import tfds_builder
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"no {error.name}: pip install 'gdn2-jax[data,tfds]'"
    ) from error

  config = arguments.config or "local"
  tfds_builder.check_config(config)  # before anything is downloaded
  paths = _fineweb_files(arguments)
  builder = tfds_builder.prepare(paths, arguments.out, config=config)
  print(builder.info)


def _inspect(arguments: argparse.Namespace) -> None:
  found = packed.open_packed(arguments.folder)
  report.print_manifest(found)
  print("all sizes and hashes match the manifest")
  report.print_row(found, arguments.split, arguments.row, arguments.len)


if __name__ == "__main__":
  sys.exit(main())
