"""FineWeb-Edu: its configurations and its files, brought or downloaded.

Ten columns in every file: text, id, dump, url, file_path, language,
language_score, token_count (of GPT-2's tokenizer), score, int_score. Only the
text is trained on. One split, so a file is held out: 013_00000.parquet where
there is one, as others do, else the last one.

Licence of the collection: ODC-By 1.0; the pages fall under CommonCrawl's terms.
"""

import fnmatch
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping
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
_TRIES = 5
_REFUSALS = (401, 403, 404)  # answers that another try does not change

# GPT-2 tokens of the two samples that projections are made for, and the bytes
# of English web text that one of them stands for (assumed, not measured).
GPT2_TOKENS = {"10BT": 10e9, "100BT": 100e9}
BYTES_PER_GPT2_TOKEN = 4.7


def folder_of(config: str) -> str:
  """Where in the repository a configuration lies.

  Raises:
    ValueError: for an unknown name.
  """
  if config in FOLDERS:
    return FOLDERS[config]
  if _DUMP.fullmatch(config):
    return f"data/{config}"
  raise ValueError(
    f"config={config!r}: expected one of {', '.join(FOLDERS)}, or a dump such"
    " as CC-MAIN-2024-10"
  )


def held_out_files(names: list[str]) -> tuple[str, ...]:
  """The files that are held out unless the caller says otherwise.

  Args:
    names: all input files.

  Returns:
    One name; () for a single file, of which documents are held out instead.
  """
  if len(names) < 2:
    return ()
  conventional = [n for n in names if n.rpartition("/")[2] == _HELD_OUT]
  return (conventional[0] if len(conventional) == 1 else max(names),)


def local_files(
  folder: str | os.PathLike[str], config: str = ""
) -> dict[str, pathlib.Path]:
  """The parquet files of a folder the user brings, by name.

  Args:
    folder: holds parquet files, at any depth; or a copy of the repository.
    config: of such a copy, only this configuration's files are taken.

  Raises:
    ValueError: if there is none.
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
  """What `hf download` wrote down beside the files that it fetched.

  Args:
    paths: name -> file.

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
  say: Callable[[str], None] = print,
) -> tuple[dict[str, pathlib.Path], dict[str, str], str]:
  """Fetches the files of a configuration, going on with unfinished ones.

  Args:
    config: see `folder_of`.
    folder: keeps the files, laid out as in the repository.
    revision: a commit, a tag or a branch; resolved to the commit.
    limit: only the first and, held out, the last of that many files.
    say: is told about retries.

  Returns:
    name -> file, name -> SHA-256 as the repository states it, and the commit.

  Raises:
    ConnectionError: without network or package, with what to do instead.
  """
  prefix = folder_of(config)
  try:
    import huggingface_hub as hub
  except ModuleNotFoundError as error:
    raise ConnectionError(
      "downloads need huggingface_hub: pip install 'gdn2-jax[data]'."
      f" {_by_hand(config, revision)}"
    ) from error
  api = hub.HfApi()
  commit, entries = _patiently(
    lambda: _listing(api, prefix, revision), config, revision, say
  )
  names = sorted(n for n in entries if fnmatch.fnmatch(n, "*.parquet"))
  if not names:
    raise ConnectionError(
      f"{REPOSITORY}@{commit}: no parquet files in {prefix}/"
    )
  if limit is not None and limit < len(names):
    held = held_out_files(names)
    names = sorted({*names[: limit - len(held)], *held})
  paths, checksums = {}, {}
  for number, name in enumerate(names, start=1):
    say(f"file {number} of {len(names)}: {name}")
    fetched = _patiently(
      lambda name=name: hub.hf_hub_download(
        REPOSITORY,
        name,
        repo_type="dataset",
        revision=commit,
        local_dir=os.fspath(folder),
      ),
      config,
      revision,
      say,
    )
    short = name.removeprefix(f"{prefix}/")
    paths[short] = pathlib.Path(fetched)
    if entries[name]:
      checksums[short] = entries[name]
  return paths, checksums, commit


def source_entry(
  config: str, *, revision: str | None = None
) -> Mapping[str, Any]:
  """What the manifest says about where the text comes from.

  Args:
    config: of the dataset, or "" for files that the user brought.
    revision: the commit, where it is known.
  """
  return {
    "kind": "fineweb_edu",
    "repository": REPOSITORY,
    "config": config or "local",
    "revision": revision,
    "license": LICENSE,
  }


def _listing(
  api: Any, prefix: str, revision: str
) -> tuple[str, dict[str, str | None]]:
  """The commit, and path -> SHA-256 of the files under a folder."""
  commit = api.dataset_info(REPOSITORY, revision=revision).sha
  entries = api.list_repo_tree(
    REPOSITORY,
    path_in_repo=prefix,
    recursive=True,
    revision=commit,
    repo_type="dataset",
  )
  return commit, {
    entry.path: getattr(getattr(entry, "lfs", None), "sha256", None)
    for entry in entries
    if hasattr(entry, "size")
  }


def _patiently(
  attempt: Callable[[], Any],
  config: str,
  revision: str,
  say: Callable[[str], None],
  wait: float = 2.0,
) -> Any:
  """Tries a few times: mirrors answer 503 and lines drop."""
  for number in range(1, _TRIES + 1):
    try:
      return attempt()
    except Exception as error:  # of several HTTP libraries, no common base
      if isinstance(error, (TypeError, AttributeError)):
        raise
      reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
      refused = getattr(getattr(error, "response", None), "status_code", 0)
      if number == _TRIES or refused in _REFUSALS:
        raise ConnectionError(
          f"{REPOSITORY} cannot be fetched ({reason[:200]})."
          f" {_by_hand(config, revision)}"
        ) from error
      say(f"try {number} of {_TRIES}: {reason[:200]}; again in {wait:g} s")
      time.sleep(wait)
      wait *= 2


def _by_hand(config: str, revision: str) -> str:
  return (
    f"Bring the files of https://huggingface.co/datasets/{REPOSITORY}/tree/"
    f"{revision}/{folder_of(config)} in a folder (for example with: hf download"
    f" {REPOSITORY} --repo-type=dataset --revision={revision}"
    f" --include='{folder_of(config)}/*' --local-dir=FOLDER) and run the same"
    f" command with --local=FOLDER"
  )
