"""FineWeb-Edu: its configurations, its files and their download.

Ten columns in every file: text, id, dump, url, file_path, language,
language_score, token_count (of GPT-2's tokenizer), score, int_score. Only the
text is trained on. One split, so a file is held out: 013_00000.parquet where
there is one, as others do, else the last one.

Licence of the collection: ODC-By 1.0; the pages fall under CommonCrawl's terms.
"""

import functools
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

REPOSITORY = "HuggingFaceFW/fineweb-edu"
LICENSE = "ODC-By-1.0"
# v1.4.0; a moving branch would mean other data under the same name.
REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"

COLUMNS = (
  ("text", "string"),
  ("id", "string"),
  ("dump", "string"),
  ("url", "string"),
  ("file_path", "string"),
  ("language", "string"),
  ("language_score", "float64"),
  ("token_count", "int64"),
  ("score", "float64"),
  ("int_score", "int64"),
)

FOLDERS = {
  "sample-10BT": "sample/10BT",
  "sample-100BT": "sample/100BT",
  "sample-350BT": "sample/350BT",
  "default": "data",
}
_DUMP = re.compile(r"CC-MAIN-20\d\d-\d\d")
_HELD_OUT = "013_00000.parquet"

# GPT-2 tokens of the two samples that projections are made for, and the bytes
# of English web text that one of them stands for (assumed, not measured).
GPT2_TOKENS = {"10BT": 10e9, "100BT": 100e9}
BYTES_PER_GPT2_TOKEN = 4.7


def folder_of(config: str) -> str:
  """Folder of a configuration in the repository; refuses unknown names."""
  if config in FOLDERS:
    return FOLDERS[config]
  if _DUMP.fullmatch(config):
    return f"data/{config}"
  raise ValueError(
    f"config={config!r}: expected one of {', '.join(FOLDERS)}, a dump such as"
    " CC-MAIN-2024-10, or none with --local=FOLDER"
  )


def held_out_files(names: list[str]) -> tuple[str, ...]:
  """The file that is held out by default; () if there is only one."""
  if len(names) < 2:
    return ()  # documents are held out instead
  conventional = [n for n in names if n.rpartition("/")[2] == _HELD_OUT]
  return (conventional[0] if len(conventional) == 1 else max(names),)


def local_files(
  folder: str | os.PathLike[str], config: str = ""
) -> dict[str, pathlib.Path]:
  """The parquet files of a folder, at any depth: name -> path.

  Of a copy of the repository only the files of `config` are taken.
  """
  root = pathlib.Path(folder)
  if config and (root / folder_of(config)).is_dir():
    root = root / folder_of(config)
  # Dot folders hold the downloader's own unfinished files.
  found = {
    path.relative_to(root).as_posix(): path
    for path in sorted(root.rglob("*.parquet"))
    if not any(p.startswith(".") for p in path.relative_to(root).parts)
  }
  if not found:
    raise ValueError(f"local={str(folder)!r}: no parquet files in this folder")
  return found


def recorded(
  paths: Mapping[str, pathlib.Path],
) -> tuple[dict[str, str], str | None]:
  """Hashes and the commit that huggingface_hub recorded beside its files.

  Returns:
    name -> SHA-256, for the files where it is known; and the commit, if all
    files are known to be of one.
  """
  checksums, commits = {}, set()
  for name, path in paths.items():
    commit, digest = _download_record(path.resolve())
    commits.add(commit)
    if digest:
      checksums[name] = digest
  return checksums, commits.pop() if len(commits) == 1 else None


def _download_record(path: pathlib.Path) -> tuple[str | None, str | None]:
  for root in path.parents[:4]:  # data/CC-MAIN-2024-10/000_00000.parquet
    place = path.relative_to(root).as_posix()
    record = root / ".cache" / "huggingface" / "download" / f"{place}.metadata"
    if record.is_file():
      commit, etag, *_ = [*record.read_text().split(), "", ""]
      # Large files have their SHA-256 as etag, others the hash of a git blob.
      is_sha256 = re.fullmatch("[0-9a-f]{64}", etag)
      return commit or None, etag if is_sha256 else None
  return None, None


def download(
  config: str,
  folder: str | os.PathLike[str],
  *,
  revision: str = REVISION,
  limit: int | None = None,
) -> dict[str, pathlib.Path]:
  """Fetches the files of a configuration, going on with unfinished ones.

  Args:
    config: see `folder_of`.
    folder: keeps the files, laid out as in the repository, with what
      `recorded` reads beside them.
    revision: a commit, a tag or a branch.
    limit: number of files to take, the one to hold out among them.

  Returns:
    name -> file.

  Raises:
    ConnectionError: without network or package, with what to do instead.
  """
  prefix = folder_of(config)
  try:
    import huggingface_hub

    fetch = functools.partial(
      huggingface_hub.snapshot_download,
      REPOSITORY,
      repo_type="dataset",
      local_dir=os.fspath(folder),
    )
    # Lists first: without a network the download itself would be content with
    # what an earlier one left in the folder.
    listed = fetch(
      revision=revision, allow_patterns=f"{prefix}/*.parquet", dry_run=True
    )
    names = sorted(entry.filename for entry in listed)
    if not names:
      raise ValueError(f"no parquet files in {prefix}/")
    if limit is not None and limit < len(names):
      held = held_out_files(names)
      names = sorted({*names[: limit - len(held)], *held})
    fetch(revision=listed[0].commit_hash, allow_patterns=names)
  except Exception as error:  # of several HTTP libraries, no common base
    cause = error.__cause__ or error
    reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
    if isinstance(error, ModuleNotFoundError):
      reason = "no huggingface_hub: pip install 'gdn2-jax[data]'"
    place = f"{REPOSITORY}@{revision}"
    raise ConnectionError(
      f"{place} cannot be fetched ({reason}). {_by_hand(config, revision)}"
    ) from error
  root = pathlib.Path(folder)
  return {name.removeprefix(f"{prefix}/"): root / name for name in names}


def source_entry(config: str, revision: str | None) -> dict[str, Any]:
  """Origin of the text, for the manifest; "" is the user's own files."""
  return {
    "kind": "fineweb_edu",
    "repository": REPOSITORY,
    "config": config or "local",
    "revision": revision,
    "license": LICENSE,
  }


def _by_hand(config: str, revision: str) -> str:
  return (
    f"Bring the files of https://huggingface.co/datasets/{REPOSITORY}/tree/"
    f"{revision}/{folder_of(config)} in a folder (for example with: hf download"
    f" {REPOSITORY} --repo-type=dataset --revision={revision}"
    f" --include='{folder_of(config)}/*' --local-dir=FOLDER) and run the same"
    f" command with --local=FOLDER"
  )
