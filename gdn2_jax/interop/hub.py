"""Published folders on the Hugging Face Hub: download and upload.

A name is "hf:USER/NAME@REVISION". Only the files of a published folder are
transferred, so no pickle and no program is; `load_model` then checks them as it
checks any folder.
"""

import os
import pathlib
import re
from typing import Any

from gdn2_jax.interop.disk import read_json

PREFIX = "hf:"
# Of a published folder; run.py, a program, is not fetched.
_FILES = (
  "config.json",
  "manifest.json",
  "model*.safetensors",
  "model.safetensors.index.json",
  "tokenizer.json",
  "README.md",
)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_INSTALL = "no huggingface_hub: pip install 'gdn2-jax[hub]'"


def is_hub_name(name: str | os.PathLike) -> bool:
  """True for "hf:USER/NAME", with or without a revision."""
  return str(name).startswith(PREFIX)


def check_name(name: str) -> None:
  """Raises ValueError unless a name has the form of the Hub's."""
  _parse(name, None)


def fetch(name: str, revision: str | None = None) -> pathlib.Path:
  """Downloads a published folder, or finds it in the cache of the Hub's client.

  Args:
    name: "hf:USER/NAME" or "hf:USER/NAME@REVISION".
    revision: commit, tag or branch; required unless it is part of the name, so
      that the same program gets the same weights next year.

  Returns:
    The folder in the cache.

  Raises:
    ValueError: a malformed name, or no revision; names the newest commit.
    ConnectionError: no network, package, repository or permission.
  """
  repository, revision = _parse(name, revision)
  api = _api()
  if revision is None:
    newest = _ask(name, api.model_info, repository).sha
    raise ValueError(
      f"revision: missing for {name!r}; expected a commit, tag or branch; the "
      f"newest commit is {newest}"
    )
  folder = _ask(
    f"{PREFIX}{repository}@{revision}",
    api.snapshot_download,
    repository,
    revision=revision,
    allow_patterns=list(_FILES),
  )
  return pathlib.Path(folder)


def push(
  folder: str | os.PathLike,
  repository: str,
  *,
  private: bool = True,
  message: str = "",
) -> str:
  """Uploads a published folder as one commit; makes the repository.

  Args:
    folder: as `save_model` wrote it; the caller has checked it by `load_model`.
    repository: "USER/NAME", with or without "hf:".
    private: a new repository is visible to its owner alone.
    message: of the commit.

  Returns:
    "hf:USER/NAME@COMMIT", which `load_model` reads.

  Raises:
    ValueError: a malformed name.
    ConnectionError: no network, package, or permission to write.
  """
  path = _parse(repository, None)[0]
  manifest = read_json(pathlib.Path(folder) / "manifest.json")
  api, name = _api(), f"{PREFIX}{path}"
  _ask(name, api.create_repo, path, private=private, exist_ok=True)
  commit = _ask(
    name,
    api.upload_folder,
    repo_id=path,
    folder_path=os.fspath(folder),
    allow_patterns=[*manifest["files"], "manifest.json", "README.md"],
    commit_message=message or f"Model {pathlib.Path(folder).absolute().name}",
  )
  return f"{name}@{commit.oid}"


def _parse(name: str, revision: str | None) -> tuple[str, str | None]:
  """Repository and revision of a name."""
  repository, _, pinned = name.removeprefix(PREFIX).partition("@")
  if not _REPOSITORY.fullmatch(repository):
    raise ValueError(
      f"{name!r}: expected hf:USER/NAME or hf:USER/NAME@REVISION"
    )
  if pinned and revision is not None and pinned != revision:
    raise ValueError(f"revision={revision!r}: {name!r} names another one")
  return repository, pinned or revision


def _api() -> Any:
  try:
    import huggingface_hub
  except ModuleNotFoundError as e:
    raise ConnectionError(_INSTALL) from e
  # Read when a client is made: the library reads it when it is imported.
  return huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def _ask(name: str, call: Any, *args: Any, **options: Any) -> Any:
  """Calls the client; any failure becomes one line."""
  try:
    return call(*args, **options)
  except Exception as error:  # of several HTTP libraries, no common base
    cause = error.__cause__ or error
    reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
    raise ConnectionError(f"{name}: the Hub: {reason}") from error
