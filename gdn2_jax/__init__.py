"""Gated DeltaNet-2 in JAX (arXiv 2605.22791).

The public names below are loaded on first use, so that data workers and
`--help` never pay for importing JAX.
"""

import importlib

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
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
  if name not in _HOME:
    raise AttributeError(f"module 'gdn2_jax' has no attribute {name!r}")
  # In its module, where all is about mixers, it is `register`.
  attribute = "register" if name == "register_mixer" else name
  return getattr(importlib.import_module(_HOME[name]), attribute)


def __dir__() -> list[str]:
  return sorted(__all__)
