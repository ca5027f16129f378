# Copyright 2026 The gdn2_jax Authors. SPDX-License-Identifier: Apache-2.0
"""Cache of a model between calls, of a size that does not grow with tokens.

Only layers "A", full attention, keep the keys and values of all tokens; layers
"S" keep those of their window.
"""


class Gdn2JaxCache:
  """Tensors of every layer by name, each with the batch axis first.

  Attributes:
    layers: For each layer its tensors by name, None before the first call.
    seen: Tokens of a row that were read, padding included.
    tokens: Those of each row that are no padding [B], None before the first
      call.
  """

  is_compileable = False
  is_croppable = False

  def __init__(self, num_layers):
    self.layers = [None] * num_layers
    self.seen = 0
    self.tokens = None

  def __len__(self):
    return len(self.layers)

  @property
  def is_linear(self):
    """False for each layer: generation must not pass tokens again."""
    return [False] * len(self.layers)

  @property
  def is_sliding(self):
    """False for each layer."""
    return [False] * len(self.layers)

  def get_seq_length(self, layer_idx=0):
    """Tokens that were read, padding included."""
    return self.seen

  def get_max_length(self, layer_idx=0):
    """-1: there is no limit."""
    return -1

  def get_max_cache_shape(self, layer_idx=0):
    """-1: there is no limit."""
    return -1

  def reorder_cache(self, beam_idx):
    """Rows in another order, for beam search."""
    self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

  def batch_select_indices(self, indices):
    """Rows of these indices."""
    self._map(lambda x: x[indices])

  def batch_repeat_interleave(self, repeats):
    """Every row, repeated."""
    self._map(lambda x: x.repeat_interleave(repeats, dim=0))

  def reset(self):
    """Forgets everything."""
    self.layers = [None] * len(self.layers)
    self.seen = 0
    self.tokens = None

  def _map(self, function):
    if self.tokens is not None:
      self.tokens = function(self.tokens)
    self.layers = [
      layer and {name: function(x) for name, x in layer.items()}
      for layer in self.layers
    ]
