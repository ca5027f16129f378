"""Checkpoints as other programs write them, their names spelled out here."""

import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

OFFICIAL = pathlib.Path(__file__).parents[2] / "model" / "official_hybrid_tiny"

WIDTH, MLP, VOCAB, TAPS = 32, 48, 61, 4
FLA_CONFIG = {
  "architectures": ["GDN2ForCausalLM"],
  "model_type": "gdn2",
  "attn_mode": "chunk",
  "hidden_size": WIDTH,
  "num_hidden_layers": 4,
  "intermediate_size": MLP,
  "hidden_act": "swish",
  "vocab_size": VOCAB,
  "tie_word_embeddings": False,
  "norm_eps": 1e-3,
  "num_heads": 2,
  "num_v_heads": 4,
  "head_dim": 16,
  "expand_v": 1.5,
  "use_short_conv": True,
  "conv_size": TAPS,
  "allow_neg_eigval": True,
  "attn": {
    "layers": [1, 3],
    "num_heads": 4,
    "num_kv_heads": 2,
    "qkv_bias": False,
    "window_size": 7,
    "rope_theta": 5000.0,
  },
  "torch_dtype": "bfloat16",
  "transformers_version": "5.0.0",
}


def official():
  """(tensors, config) of the public hybrid model."""
  config = json.loads((OFFICIAL / "config.json").read_text())
  return load_file(OFFICIAL / "model.safetensors"), config


# The fields of the public program's Config, all of which it writes, as it has
# them for its recurrent model. The sizes of the recurrence are none of them.
OFFICIAL_CONFIG = {
  "org": "NVIDIA",
  "name": "gdn2_tiny",
  "block_size": 4096,
  "vocab_size": 120,
  "padding_multiple": 64,
  "padded_vocab_size": 128,
  "n_layer": 2,
  "n_head": 4,
  "n_embd": 64,
  "rotary_percentage": 1.0,
  "parallel_residual": False,
  "bias": False,
  "local_window": 2048,
  "mlp": True,
  "gdn2_per_layer": 1,
  "nope": False,
  "mamba_init": True,
  "n_query_groups": 4,
  "shared_attention_norm": False,
  "_norm_class": "FusedRMSNorm",
  "norm_eps": 1e-5,
  "_mlp_class": "LLaMAMLP",
  "intermediate_size": 160,
  "condense_ratio": 1,
}


def official_recurrent():
  """(tensors, config) of the recurrent layers 0 and 2 of the hybrid alone."""
  tensors, _ = official()
  kept = {
    name.replace(".h.2.", ".h.1."): value
    for name, value in tensors.items()
    if ".h.1." not in name and ".h.3." not in name
  }
  return kept, dict(OFFICIAL_CONFIG)


def fla(dtype=ml_dtypes.bfloat16, seed=0):
  """(tensors, config) of a hybrid with grouped heads under fla's names."""
  draw = _Draw(seed, dtype)
  tensors = _around(draw, layers=4)
  for n in (0, 2):
    tensors |= _gdn2(draw, f"model.layers.{n}.attn.", heads=2, value_heads=4)
  for n in (1, 3):
    prefix = f"model.layers.{n}.attn."
    tensors |= {
      f"{prefix}q_proj.weight": draw(WIDTH, WIDTH),
      f"{prefix}k_proj.weight": draw(WIDTH // 2, WIDTH),
      f"{prefix}v_proj.weight": draw(WIDTH // 2, WIDTH),
      f"{prefix}o_proj.weight": draw(WIDTH, WIDTH),
    }
  return tensors, json.loads(json.dumps(FLA_CONFIG))


def kda(heads, value_heads, decays, dtype=np.float32, seed=0):
  """(tensors, config) of a one-layer Kimi Delta Attention model of fla.

  `decays` heads have a decay and a gate: the value heads, or before fla did
  grouped heads in its kernels, the key heads.
  """
  draw = _Draw(seed, dtype)
  tensors = _around(draw, layers=1)
  prefix = "model.layers.0.attn."
  mixer = _gdn2(draw, prefix, heads, value_heads, decays=decays)
  del mixer[f"{prefix}w_proj.weight"]
  mixer[f"{prefix}b_proj.weight"] = draw(decays, WIDTH)
  config = json.loads(json.dumps(FLA_CONFIG)) | {
    "architectures": ["KDAForCausalLM"],
    "model_type": "kda",
    "num_hidden_layers": 1,
    "num_heads": heads,
    "num_v_heads": value_heads,
    "allow_neg_eigval": False,
    "safe_gate": False,
    "lower_bound": None,
    "attnres_block_size": None,
    "attn": None,
  }
  return tensors | mixer, config


class _Draw:
  """Random tensors of the sizes of a trained model's."""

  def __init__(self, seed, dtype):
    self.rng = np.random.default_rng(seed)
    self._dtype = dtype

  def __call__(self, *shape, mean=0.0, scale=0.3):
    return self.rng.normal(mean, scale, shape).astype(self._dtype)


def _around(draw, layers):
  tensors = {
    "model.embeddings.weight": draw(VOCAB, WIDTH),
    "model.norm.weight": draw(WIDTH, mean=1.0),
    "lm_head.weight": draw(VOCAB, WIDTH),
  }
  for n in range(layers):
    prefix = f"model.layers.{n}."
    tensors |= {
      f"{prefix}attn_norm.weight": draw(WIDTH, mean=1.0),
      f"{prefix}mlp_norm.weight": draw(WIDTH, mean=1.0),
      f"{prefix}mlp.gate_proj.weight": draw(MLP, WIDTH),
      f"{prefix}mlp.up_proj.weight": draw(MLP, WIDTH),
      f"{prefix}mlp.down_proj.weight": draw(WIDTH, MLP),
    }
  return tensors


def _gdn2(draw, prefix, heads, value_heads, decays=None):
  """One layer with 16 key and 24 value channels; `decays` heads of decay."""
  keys, values = heads * 16, value_heads * 24
  decays = decays or heads
  rng = draw.rng
  tensors = {
    "q_proj.weight": draw(keys, WIDTH),
    "k_proj.weight": draw(keys, WIDTH),
    "v_proj.weight": draw(values, WIDTH),
    "q_conv1d.weight": draw(keys, 1, TAPS),
    "k_conv1d.weight": draw(keys, 1, TAPS),
    "v_conv1d.weight": draw(values, 1, TAPS),
    "f_proj.0.weight": draw(24, WIDTH),
    "f_proj.1.weight": draw(decays * 16, 24),
    "b_proj.weight": draw(keys, WIDTH),
    "w_proj.weight": draw(values, WIDTH),
    "A_log": np.log(rng.uniform(1, 16, decays)).astype(np.float32),
    "dt_bias": rng.uniform(-6, -2, decays * 16).astype(np.float32),
    "g_proj.0.weight": draw(24, WIDTH),
    "g_proj.1.weight": draw(values, 24),
    "g_proj.1.bias": draw(values),
    "o_norm.weight": draw(24, mean=1.0),
    "o_proj.weight": draw(WIDTH, values),
  }
  return {prefix + name: value for name, value in tensors.items()}


def write(folder, checkpoint):
  """Writes (tensors, config) as a folder; a config of None is left out."""
  tensors, config = checkpoint
  folder.mkdir(parents=True, exist_ok=True)
  arrays = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
  save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
  if config is not None:
    (folder / "config.json").write_text(json.dumps(config))
  return folder


def read(folder):
  """Tensors of a folder with one weights file."""
  return load_file(folder / "model.safetensors")


def assert_same(found, expected):
  """The same names, shapes, dtypes and bits."""
  assert set(found) == set(expected)
  for name, value in expected.items():
    assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
    assert found[name].tobytes() == np.ascontiguousarray(value).tobytes(), name
