"""Weights in files: names, safetensors, published-model folders."""

from gdn2_jax.interop.card import Card
from gdn2_jax.interop.folder import Model, load_model, save_model
from gdn2_jax.interop.tensors import load_tensors, read_header, save_tensors
from gdn2_jax.interop.tree import flatten_params, param_specs, unflatten_params

__all__ = [
  "Card",
  "Model",
  "flatten_params",
  "load_model",
  "load_tensors",
  "param_specs",
  "read_header",
  "save_model",
  "save_tensors",
  "unflatten_params",
]
