"""A whole hybrid model with the public parameter names gives their logits."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from gdn2_jax.interop.convert.options import Options
from gdn2_jax.interop.convert.run import open_model
from gdn2_jax.interop.tree import unflatten_params
from gdn2_jax.model.lm import LM
from tests.numerics import rel_rms

FOLDER = pathlib.Path(__file__).parent / "official_hybrid_tiny"


def test_logits_match_the_public_model():
  opened = open_model(FOLDER, "official", Options())
  io = np.load(FOLDER / "io.npz")
  params = unflatten_params(opened.tensors, opened.config)
  apply = jax.jit(LM(opened.config).apply)
  logits, _ = apply({"params": params}, jnp.asarray(io["input_ids"]))
  assert rel_rms(logits, io["logits"]) <= 1e-4
