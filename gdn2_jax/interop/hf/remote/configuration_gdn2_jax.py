# Copyright 2026 The gdn2_jax Authors. SPDX-License-Identifier: Apache-2.0
"""Config of a language model of the Gated DeltaNet-2 family."""

from types import SimpleNamespace

from transformers import PretrainedConfig

# Defaults of the parts of a config; the fields are explained by GDN2Config,
# Mamba2Config, Mamba3Config and AttentionConfig of the library gdn2_jax.
GDN2 = {
  "num_heads": 16,
  "num_value_heads": 0,
  "key_dim": 128,
  "value_dim": 128,
  "conv_width": 4,
  "negative_eigenvalues": False,
  "output_gate": "silu",
  "norm_eps": 1e-5,
  "gates": "decoupled",
  "erase_gate": "channel",
  "write_gate": "channel",
  "decay": "channel",
  "decay_init": "paper",
  "conv_init": "uniform",
}
MAMBA2 = {
  "inner_dim": 4096,
  "head_dim": 64,
  "state_dim": 64,
  "conv_width": 4,
  "decay_init": "paper",
  "conv_init": "uniform",
  "norm_eps": 1e-5,
}
MAMBA3 = {
  "inner_dim": 4096,
  "head_dim": 64,
  "state_dim": 64,
  "mimo_rank": 1,
  "rope_fraction": 0.5,
  "a_rule": "softplus",
  "decay_init": "paper",
  "out_norm": False,
  "norm_eps": 1e-5,
}
ATTENTION = {
  "num_heads": 18,
  "num_kv_heads": 0,
  "head_dim": 128,
  "window": 2048,
  "rope_base": 10000.0,
}

# Fields of `gdn2` that a letter decides.
GDN2_LETTERS = {
  "G": {},
  "K": {"gates": "tied", "decay": "channel"},
  "D": {"gates": "tied", "decay": "scalar"},
  "E": {"gates": "tied", "decay": "none"},
}
LETTERS = (*GDN2_LETTERS, "M", "N", "S", "A")


class Gdn2JaxConfig(PretrainedConfig):
  """Config of a model; names are those of gdn2_jax.ModelConfig.

  Args:
    vocab_size: Tokens.
    model_dim: Width of the residual stream (`hidden_size`).
    num_layers: Layers, a multiple of the pattern's (`num_hidden_layers`).
    pattern: Letters of the layers' mixers, repeated: G Gated DeltaNet-2, K Kimi
      Delta Attention, D Gated DeltaNet, E DeltaNet, M Mamba-2, N Mamba-3, S
      sliding-window attention, A full attention.
    mlp_dim: Hidden width of every MLP (`intermediate_size`).
    gdn2: Fields of the mixers G, K, D and E.
    mamba2: Fields of the mixer M.
    mamba3: Fields of the mixer N.
    attention: Fields of the mixers S and A.
    norm_eps: Added to the mean square in the norms of the residual stream.
    compute_dtype: Dtype of activations in gdn2_jax; here it is that of the
      parameters.
    use_cache: Return a cache by default, except in training.

  Raises:
    ValueError: A letter or a field that does not exist, or a number of layers
      that is no multiple of the pattern's.
  """

  model_type = "gdn2_jax"
  attribute_map = {  # noqa: RUF012, as in the base class
    "hidden_size": "model_dim",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "mlp_dim",
  }

  def __init__(
    self,
    vocab_size=32000,
    model_dim=2304,
    num_layers=18,
    pattern="G",
    mlp_dim=6208,
    gdn2=None,
    mamba2=None,
    mamba3=None,
    attention=None,
    norm_eps=1e-5,
    compute_dtype="float32",
    use_cache=True,
    **kwargs,
  ):
    self.vocab_size = vocab_size
    self.model_dim = model_dim
    self.num_layers = num_layers
    self.pattern = pattern
    self.mlp_dim = mlp_dim
    self.gdn2 = _complete("gdn2", gdn2, GDN2)
    self.mamba2 = _complete("mamba2", mamba2, MAMBA2)
    self.mamba3 = _complete("mamba3", mamba3, MAMBA3)
    self.attention = _complete("attention", attention, ATTENTION)
    self.norm_eps = norm_eps
    self.compute_dtype = compute_dtype
    self.use_cache = use_cache
    if not pattern:
      raise ValueError("pattern='': expected at least one letter")
    for letter in pattern:
      if letter not in LETTERS:
        raise ValueError(
          f"pattern={pattern!r}: no mixer {letter!r}, expected letters among "
          + ", ".join(LETTERS)
        )
    if num_layers < 1 or num_layers % len(pattern):
      raise ValueError(
        f"num_layers={num_layers}: expected a positive multiple of the "
        f"{len(pattern)} layers of pattern={pattern!r}"
      )
    kwargs.setdefault("tie_word_embeddings", False)
    super().__init__(**kwargs)

  def letter(self, layer):
    """Letter of a layer's mixer."""
    return self.pattern[layer % len(self.pattern)]

  def part(self, letter):
    """Fields of a letter's mixer as attributes."""
    if letter in GDN2_LETTERS:
      return SimpleNamespace(**(self.gdn2 | GDN2_LETTERS[letter]))
    parts = {"M": self.mamba2, "N": self.mamba3}
    return SimpleNamespace(**parts.get(letter, self.attention))


def _complete(name, values, defaults):
  """Fields with their defaults; refuses fields that do not exist."""
  values = dict(values or {})
  for key in values:
    if key not in defaults:
      raise ValueError(
        f"{name}[{key!r}]: no such field, expected " + ", ".join(defaults)
      )
  return defaults | values
