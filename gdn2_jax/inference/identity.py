"""Identity of a state: its model's function, weights and tokenizer.

A state means nothing to any other model, and nothing in its numbers would tell.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from gdn2_jax.interop.tree import flatten_params
from gdn2_jax.model.config import EXECUTION, LAYOUT, ModelConfig, without


@dataclasses.dataclass(frozen=True)
class Identity:
  """Hashes of what decides a state; made by `identify`.

  Attributes:
    config: of the model.
    weights: SHA-256 of all parameters, by their flat names.
    tokenizer: SHA-256 of what decides the token ids; "" where there is none.
  """

  config: ModelConfig
  weights: str
  tokenizer: str

  @functools.cached_property
  def function(self) -> str:
    """The fields of the config that decide the function, as canonical JSON."""
    return function_of(self.config)

  @functools.cached_property
  def model(self) -> str:
    """SHA-256 of `function`."""
    return hash_text(self.function)


def identify(
  params: Any, config: ModelConfig, tokenizer: Any = None
) -> Identity:
  """Hashes a model, once for all its states; reads every parameter.

  Args:
    params: unboxed parameters of LM(config), on any devices of this process.
    config: of the model. How it is computed (remat, scan_layers, scan_unroll,
      loss_chunk, implementation) is left out of the hash: it leaves the
      function as it is.
    tokenizer: with an attribute `sha256`, as those of `gdn2_jax.data` have;
      None where there is no text.

  Raises:
    ValueError: parameters of another model.
  """
  return Identity(
    config=config,
    weights=hash_tensors(flatten_params(params, config)),
    tokenizer="" if tokenizer is None else tokenizer.sha256,
  )


def function_of(config: ModelConfig) -> str:
  """What of a config decides the function, as canonical JSON."""
  tree = without(dataclasses.asdict(config), *LAYOUT, *EXECUTION)
  return json.dumps(tree, sort_keys=True, separators=(",", ":"))


def hash_text(text: str) -> str:
  """Hex SHA-256 of a text."""
  return hashlib.sha256(text.encode()).hexdigest()


def hash_tensors(tensors: Mapping[str, np.ndarray]) -> str:
  """Hex SHA-256 of names, dtypes, shapes and every bit, in any order of names.

  Tensors are hashed side by side: hashlib lets other threads run.
  """
  with concurrent.futures.ThreadPoolExecutor() as pool:
    lines = pool.map(_hash_tensor, tensors.keys(), tensors.values())
    return hash_text("\n".join(sorted(lines)))


def _hash_tensor(name: str, x: np.ndarray) -> str:
  # As bytes: NumPy lends no buffers of bfloat16.
  data = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
  digest = hashlib.sha256(data).hexdigest()
  return f"{name} {x.dtype} {list(x.shape)} {digest}"
