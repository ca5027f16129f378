"""Folders that Hugging Face transformers opens, with our code in torch."""

from gdn2_jax.interop.hf.config import read_config, write_config
from gdn2_jax.interop.hf.files import folder_files
from gdn2_jax.interop.hf.names import check_letters, moves
from gdn2_jax.interop.hf.tokenizer import tokenizer_json

__all__ = [
  "check_letters",
  "folder_files",
  "moves",
  "read_config",
  "tokenizer_json",
  "write_config",
]
