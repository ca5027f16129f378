"""config.json of a folder for transformers: the fields of ModelConfig.

Fields of execution are left out, and the parts of mixers that the pattern does
not have.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from gdn2_jax import config_json
from gdn2_jax.interop.hf.names import LETTERS, check_letters
from gdn2_jax.model.config import EXECUTION, ModelConfig

MODEL_TYPE = "gdn2_jax"
_CLASSES = {
  "AutoConfig": "configuration_gdn2_jax.Gdn2JaxConfig",
  "AutoModel": "modeling_gdn2_jax.Gdn2JaxModel",
  "AutoModelForCausalLM": "modeling_gdn2_jax.Gdn2JaxForCausalLM",
}
_SIZES = ("vocab_size", "model_dim", "num_layers", "pattern", "mlp_dim")
_FIELDS = (*_SIZES, "norm_eps")
_PARTS = {"gdn2": "GKDE", "mamba2": "M", "mamba3": "N", "attention": "SA"}
_COMPUTE = "compute_dtype"  # ModelConfig.dtype; theirs is that of parameters


def write_config(config: ModelConfig) -> dict[str, Any]:
  """config.json of a model."""
  check_letters(config)
  tree = dataclasses.asdict(config)
  parts = {name: tree[name] for name in _parts(config.pattern)}
  for part in parts.values():
    for name in EXECUTION:
      part.pop(name, None)
  return {
    "architectures": [_CLASSES["AutoModelForCausalLM"].partition(".")[2]],
    "model_type": MODEL_TYPE,
    "auto_map": _CLASSES,
    **{name: tree[name] for name in _FIELDS},
    **parts,
    _COMPUTE: config.dtype,
    "dtype": config.param_dtype,
    "tie_word_embeddings": False,
    "use_cache": True,
  }


def read_config(
  tree: Mapping[str, Any], path: str | os.PathLike
) -> ModelConfig:
  """The model of a config.json, with default fields of execution.

  Keys that transformers adds are not read.

  Raises:
    ValueError: another model_type, a missing field, an unknown field of a
      mixer, a wrong value.
  """
  if tree.get("model_type") != MODEL_TYPE:
    raise ValueError(
      f"{path}: model_type={tree.get('model_type')!r}, expected {MODEL_TYPE!r}"
    )
  if tree.get("tie_word_embeddings"):
    raise ValueError(f"{path}: tie_word_embeddings=True: expected False")
  pattern = tree.get("pattern")
  if not isinstance(pattern, str) or set(pattern) - set(LETTERS):
    raise ValueError(
      f"{path}: pattern={pattern!r}: expected letters among "
      + ", ".join(LETTERS)
    )
  fields = {}
  for name in (*_FIELDS, *_parts(pattern), _COMPUTE):
    if name not in tree:
      raise ValueError(f"{path}: {name}: missing field")
    fields[name] = tree[name]
  fields["dtype"] = fields.pop(_COMPUTE)
  try:
    config = config_json.from_dict(ModelConfig, fields, "config")
    config.validate("config")
  except ValueError as e:
    raise ValueError(f"{path}: {e}") from None
  return config


def _parts(pattern: str) -> list[str]:
  """Names of the parts of a config that a pattern needs."""
  return [
    name for name, letters in _PARTS.items() if set(letters) & set(pattern)
  ]
