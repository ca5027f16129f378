"""Identity of a model: hashes of its config, weights and tokenizer.

A state is valid for one model only, and its numbers do not show for which.
"""

import concurrent.futures
import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from gdn2_jax.files import sha256_bytes
from gdn2_jax.interop.tree import flatten_params
from gdn2_jax.model.config import EXECUTION, LAYOUT, ModelConfig, without


@dataclasses.dataclass(frozen=True)
class Identity:
  """Hashes of a model, which its states and sessions carry.

  Attributes:
    config: model config.
    weights: SHA-256 of all parameters, by their flat names.
    tokenizer: SHA-256 of the tokenizer, "" without one.
  """

  config: ModelConfig
  weights: str
  tokenizer: str

  @functools.cached_property
  def function(self) -> str:
    """Config fields that decide the function, as canonical JSON."""
    return function_of(self.config)

  @functools.cached_property
  def model(self) -> str:
    """SHA-256 of `function`."""
    return sha256_bytes(self.function.encode())


def identify(
  params: Any, config: ModelConfig, tokenizer: Any = None
) -> Identity:
  """Hashes a model, once for all its states; reads every parameter.

  Args:
    params: unboxed parameters of LM(config), on any devices of this process.
    config: model config. The hash leaves out fields that do not change the
      function: remat, scan_layers, scan_unroll, loss_chunk, implementation.
    tokenizer: object with an attribute `sha256`, as the tokenizers of
      `gdn2_jax.data`; None without text.

  Raises:
    ValueError: parameters of another model.
  """
  return Identity(
    config=config,
    weights=hash_tensors(flatten_params(params, config)),
    tokenizer="" if tokenizer is None else tokenizer.sha256,
  )


def function_of(config: ModelConfig) -> str:
  """Config fields that decide the function, as canonical JSON."""
  tree = without(dataclasses.asdict(config), *LAYOUT, *EXECUTION)
  return json.dumps(tree, sort_keys=True, separators=(",", ":"))


def hash_tensors(tensors: Mapping[str, np.ndarray]) -> str:
  """Hex SHA-256 of names, dtypes, shapes and bits, in any order of names."""
  # In threads: hashlib releases the interpreter lock.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    lines = pool.map(_hash_tensor, tensors.keys(), tensors.values())
    return sha256_bytes("\n".join(sorted(lines)).encode())


def _hash_tensor(name: str, x: np.ndarray) -> str:
  # As bytes, because NumPy has no buffer protocol for bfloat16.
  data = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
  return f"{name} {x.dtype} {list(x.shape)} {sha256_bytes(data)}"
