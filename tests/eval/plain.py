"""Tiny byte-level models, and scores by one full forward pass."""

import functools

import jax
import numpy as np

from gdn2_jax.data.tokenizer.api import BytesTokenizer
from gdn2_jax.eval.scoring import Score
from gdn2_jax.interop.folder import Model
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM
from gdn2_jax.model.mixers.attention import AttentionConfig
from gdn2_jax.model.mixers.gdn2 import GDN2Config
from tests.random_params import random_params

VOCAB = 264  # five ids more than the tokenizer knows
LENGTH = 112  # tokens of the longest sequence any test scores


@functools.cache
def make_model(pattern: str = "G") -> Model:
  config = ModelConfig(
    vocab_size=VOCAB,
    model_dim=16,
    num_layers=len(pattern),
    pattern=pattern,
    gdn2=GDN2Config(
      num_heads=1, key_dim=16, value_dim=16, implementation="reference"
    ),
    attention=AttentionConfig(num_heads=1, head_dim=16, window=8),
    mlp_dim=24,
    dtype="float32",
  )
  return Model(config, random_params(config), BytesTokenizer())


@functools.cache
def forward(pattern: str):
  model = make_model(pattern)
  return jax.jit(lambda t: LM(model.config).apply({"params": model.params}, t))


def expected(pattern: str, context, continuation) -> Score:
  """The plain way: one full forward pass, log-softmax, gather."""
  context = list(context) or [BytesTokenizer().eos_id]
  tokens = context + list(continuation)
  padded = np.zeros((1, LENGTH), np.int32)
  padded[0, : len(tokens)] = tokens
  logits = np.asarray(forward(pattern)(padded)[0], np.float64)[0]
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  at = np.arange(len(context) - 1, len(tokens) - 1)
  best = logits[at, : BytesTokenizer().vocab_size].argmax(-1)
  nats = logp[at, list(continuation)]
  return Score(
    float(nats.sum()), bool((best == continuation).all()), tuple(nats.tolist())
  )
