"""Operands of kernels that take many arrays."""

from typing import Any, NamedTuple


class LayerStep(NamedTuple):
  """Operands of a GDN-2 layer's step for one token.

  Outputs of the linear maps, kernels of the convolutions and their last inputs
  have one dtype: bfloat16, float16 or float32.

  Attributes:
    q: Output of the linear map, before the convolution [B, H, K].
    k: [B, H, K], as q.
    v: [B, H, V], as q.
    f: Decay before softplus [B, H, K].
    b: Erase gate before the sigmoid [B, H, K].
    w: Write gate before the sigmoid [B, H, V].
    z: Output gate before its bias and activation [B, H, V].
    taps_q: Kernel of the convolution [W, H, K].
    taps_k: [W, H, K].
    taps_v: [W, H, V].
    a_log: [H], float32.
    dt_bias: [H, K], float32.
    bias: Of the output gate [H, V], of any floating dtype.
    weight: Of the output norm [V], of any floating dtype.
    tails_q: Last inputs of the convolution in N layers, oldest first
      [N, B, W-1, H, K].
    tails_k: [N, B, W-1, H, K].
    tails_v: [N, B, W-1, H, V].
    states: S of N layers [N, B, H, K, V], float32.
    layer: Index of the layer, int32.
  """

  q: Any
  k: Any
  v: Any
  f: Any
  b: Any
  w: Any
  z: Any
  taps_q: Any
  taps_k: Any
  taps_v: Any
  a_log: Any
  dt_bias: Any
  bias: Any
  weight: Any
  tails_q: Any
  tails_k: Any
  tails_v: Any
  states: Any
  layer: Any
