"""Gated DeltaNet-2 in JAX (arXiv 2605.22791).

The public names below are loaded on first use, so that data workers and
`--help` never pay for importing JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from gdn2_jax.inference.generate import generate, stream
  from gdn2_jax.inference.state import decode_step, init_state, prefill
  from gdn2_jax.interop.folder import load_model, save_model
  from gdn2_jax.model.config import ModelConfig
  from gdn2_jax.model.lm import LM
  from gdn2_jax.model.mixers.registry import MixerKind
  from gdn2_jax.model.mixers.registry import register as register_mixer
  from gdn2_jax.ops.gdn2 import gdn2, gdn2_step

_HOME = {
  "gdn2": "gdn2_jax.ops.gdn2",
  "gdn2_step": "gdn2_jax.ops.gdn2",
  "LM": "gdn2_jax.model.lm",
  "MixerKind": "gdn2_jax.model.mixers.registry",
  "ModelConfig": "gdn2_jax.model.config",
  "decode_step": "gdn2_jax.inference.state",
  "generate": "gdn2_jax.inference.generate",
  "init_state": "gdn2_jax.inference.state",
  "load_model": "gdn2_jax.interop.folder",
  "prefill": "gdn2_jax.inference.state",
  "register_mixer": "gdn2_jax.model.mixers.registry",
  "save_model": "gdn2_jax.interop.folder",
  "stream": "gdn2_jax.inference.generate",
}

__version__ = "0.2.0"
# Spelt out, because type checkers read it.
__all__ = [
  "LM",
  "MixerKind",
  "ModelConfig",
  "__version__",
  "decode_step",
  "gdn2",
  "gdn2_step",
  "generate",
  "init_state",
  "load_model",
  "prefill",
  "register_mixer",
  "save_model",
  "stream",
]

if not TYPE_CHECKING:  # it would make every name Any

  def __getattr__(name: str):
    if name not in _HOME:
      raise AttributeError(f"module 'gdn2_jax' has no attribute {name!r}")
    # In its module, where all is about mixers, it is `register`.
    attribute = "register" if name == "register_mixer" else name
    return getattr(importlib.import_module(_HOME[name]), attribute)


def __dir__() -> list[str]:
  return sorted(__all__)
