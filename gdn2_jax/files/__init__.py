"""Files written whole or not at all, and their hashes."""

from gdn2_jax.files.atomic import (
  remove_leftovers,
  replacing,
  sync_folder,
  write_atomically,
)
from gdn2_jax.files.hashes import sha256_bytes, sha256_file

__all__ = [
  "remove_leftovers",
  "replacing",
  "sha256_bytes",
  "sha256_file",
  "sync_folder",
  "write_atomically",
]
