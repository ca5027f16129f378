"""A whole hybrid model with the public parameter names gives their logits."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from safetensors.numpy import load_file

from gdn2_jax.model.attention import AttentionConfig
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.gdn2 import GDN2Config
from gdn2_jax.model.lm import LM

FOLDER = pathlib.Path(__file__).parent / "official_hybrid_tiny"


def _config() -> ModelConfig:
  c = json.loads((FOLDER / "config.json").read_text())
  return ModelConfig(
    vocab_size=c["vocab_size"],
    model_dim=c["n_embd"],
    num_layers=c["n_layer"],
    pattern="GS",
    mlp_dim=c["intermediate_size"],
    gdn2=GDN2Config(
      num_heads=c["num_heads"],
      num_value_heads=c["num_v_heads"],
      key_dim=c["head_dim"],
      value_dim=c["head_v_dim"],
      output_gate=c["output_gate"],
      negative_eigenvalues=c["allow_neg_eigval"],
    ),
    attention=AttentionConfig(
      num_heads=c["n_head"],
      head_dim=c["n_embd"] // c["n_head"],
      window=c["local_window"],
    ),
    norm_eps=c["norm_eps"],
    dtype="float32",
    scan_layers=False,
  )


def _gdn2(w, shapes):
  """Torch layout [out, in] to kernels [in, heads, channels]."""
  mixer = {
    "A_log": w["attn.A_log"],
    "dt_bias": w["attn.dt_bias"].reshape(shapes["dt_bias"].shape),
    "o_norm": w["attn.o_norm.weight"],
  }
  for name in ("q", "k", "v"):
    mixer[f"{name}_conv"] = w[f"attn.{name}_conv1d.weight"][:, 0].T
  names = {
    "f_down": "f_proj.0",
    "f_up": "f_proj.1",
    "g_down": "g_proj.0",
    "g_up": "g_proj.1",
  }
  for name in ("q_proj", "k_proj", "v_proj", "b_proj", "w_proj", "o_proj"):
    names[name] = name
  for ours, theirs in names.items():
    mixer[ours] = {"kernel": w[f"attn.{theirs}.weight"].T}
  mixer["g_up"]["bias"] = w["attn.g_proj.1.bias"]
  return mixer


def _attention(w, heads):
  # Rows of the fused projection: for each query group q, then k, then v.
  qkv = w["attn.attn.weight"]
  head_dim = qkv.shape[0] // (3 * heads)
  grouped = qkv.reshape(heads, 3, head_dim, -1)
  mixer = {
    name: {"kernel": np.transpose(grouped[:, i], (2, 0, 1))}
    for i, name in enumerate(("q_proj", "k_proj", "v_proj"))
  }
  mixer["o_proj"] = {"kernel": w["attn.proj.weight"].T}
  return mixer


def _load(config, shapes):
  tensors = load_file(FOLDER / "model.safetensors")
  params = {
    "embedding": {"table": tensors["transformer.wte.weight"]},
    "head": tensors["lm_head.weight"].T,
    "final_norm": {"weight": tensors["transformer.ln_f.weight"]},
  }
  for n in range(config.num_layers):
    prefix = f"transformer.h.{n}."
    w = {
      name.removeprefix(prefix): value
      for name, value in tensors.items()
      if name.startswith(prefix)
    }
    group, layer = divmod(n, len(config.pattern))
    shape = shapes[f"group_{group}"][f"layer_{layer}"]["mixer"]
    if config.pattern[layer] == "G":
      mixer = _gdn2(w, shape)
    else:
      mixer = _attention(w, config.attention.num_heads)
    params.setdefault(f"group_{group}", {})[f"layer_{layer}"] = {
      "mixer": mixer,
      "mixer_norm": {"weight": w["norm_1.weight"]},
      "mlp_norm": {"weight": w["norm_2.weight"]},
      "mlp": {
        name: {"kernel": w[f"mlp.swiglu.{theirs}.weight"].T}
        for name, theirs in (("gate", "w1"), ("up", "w2"), ("down", "w3"))
      },
    }
  return jax.tree.map(
    lambda shape, value: jnp.asarray(value).reshape(shape.shape),
    shapes,
    params,
  )


def test_logits_match_the_public_model():
  config = _config()
  io = np.load(FOLDER / "io.npz")
  model = LM(config)
  tokens = jnp.asarray(io["input_ids"])
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))
  params = _load(config, shapes["params"])
  logits, _ = jax.jit(model.apply)({"params": params}, tokens)
  error = np.sqrt(np.mean((logits - io["logits"]) ** 2))
  assert error <= 1e-4 * np.sqrt(np.mean(io["logits"] ** 2))
