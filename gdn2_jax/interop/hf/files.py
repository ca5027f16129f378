"""Files of a folder for transformers beside its weights."""

import pathlib

from gdn2_jax.data.tokenizer.base import Tokenizer
from gdn2_jax.interop.card import Card, render_card
from gdn2_jax.interop.disk import json_bytes
from gdn2_jax.interop.hf.config import write_config
from gdn2_jax.interop.hf.tokenizer import settings, tokenizer_json
from gdn2_jax.model.config import ModelConfig

_CODE = pathlib.Path(__file__).parent / "remote"


def folder_files(
  config: ModelConfig, tokenizer: Tokenizer | None, card: Card, *, name: str
) -> dict[str, bytes]:
  """Contents by name: code, tokenizer, card, and config.json as the last.

  Args:
    config: Config of the model; param_dtype is that of the weights.
    tokenizer: Tokenizer with a tokenizer.json for transformers, or None.
    card: Facts for README.md.
    name: Name of the folder, the heading of the card.
  """
  tree = write_config(config)
  files = {
    path.name: path.read_bytes()
    for path in sorted(_CODE.glob("*.py"))
    if path.name != "__init__.py"
  }
  if tokenizer is not None:
    content = tokenizer_json(tokenizer)
    assert content is not None, tokenizer
    tokenizer_config, ids = settings(content, tokenizer.eos_id)
    tree |= ids
    files["tokenizer.json"] = json_bytes(content)
    files["tokenizer_config.json"] = json_bytes(tokenizer_config)
    files["generation_config.json"] = json_bytes(ids)
  text = render_card(
    card, config, name=name, files=files, library="transformers"
  )
  return files | {"README.md": text.encode(), "config.json": json_bytes(tree)}
