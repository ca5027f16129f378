"""The same model in JAX and in transformers."""

import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from gdn2_jax.data.tokenizer.api import BytesTokenizer
from gdn2_jax.interop import save_model
from gdn2_jax.interop.convert import convert
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM
from gdn2_jax.model.mixers.gdn2_config import GDN2Config
from tests.model.models import small_config
from tests.random_params import random_params

VOCAB = 260
# Five times the largest errors: 6.3e-6 of the logits of eight layers, 8.1e-7 of
# one layer's, 2.9e-6 of gradients.
TOLERANCE = 3e-5


@dataclasses.dataclass(frozen=True)
class Pair:
  """A model, its folder and what transformers loads from it."""

  config: ModelConfig
  params: Any
  folder: pathlib.Path
  torch: Any

  def logits(self, ids: np.ndarray, segment_ids: Any = None) -> np.ndarray:
    """Logits of JAX [B, T, VOCAB]."""
    with jax.default_matmul_precision("highest"):
      found, _ = LM(self.config).apply(
        {"params": self.params}, jnp.asarray(ids, jnp.int32), segment_ids
      )
    return np.asarray(found)


@functools.cache
def make_pair(pattern: str, **gdn2: Any) -> Pair:
  """One group of a pattern; `gdn2`: changes of GDN2Config."""
  changes = {"vocab_size": VOCAB, "num_layers": len(pattern)}
  if gdn2:
    fields = {"num_heads": 2, "num_value_heads": 4, "implementation": "xla"}
    sizes = {"key_dim": 16, "value_dim": 16}
    changes["gdn2"] = GDN2Config(**(fields | sizes | gdn2))
  config = small_config(pattern, **changes)
  return export(config, random_params(config))


def export(config: ModelConfig, params: Any) -> Pair:
  """Writes a model and opens it with transformers."""
  folder = pathlib.Path(tempfile.mkdtemp())
  save_model(folder / "ours", params, config, BytesTokenizer())
  convert(folder / "ours", folder / "hf", source="gdn2_jax", target="hf")
  return Pair(config, params, folder / "hf", load(folder / "hf"))


def load(folder: pathlib.Path, **options: Any) -> Any:
  """A model by transformers, not in training."""
  return AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, **options
  ).eval()


def random_ids(*shape: int, seed: int = 0) -> np.ndarray:
  """Tokens of the vocabulary."""
  return np.random.default_rng(seed).integers(0, 256, shape)


def torch_logits(model: Any, ids: np.ndarray, **options: Any) -> np.ndarray:
  """Logits of torch [B, T, VOCAB]."""
  return model(torch.tensor(ids), **options).logits.numpy()


def error(found: np.ndarray, expected: np.ndarray) -> float:
  """Largest difference over the largest expected number, which is not 0."""
  assert found.shape == expected.shape and found.dtype == expected.dtype
  scale = np.abs(expected).max()
  assert np.isfinite(found).all() and scale > 0
  return float(np.abs(found - expected).max() / scale)
