"""One token of a GDN-2 layer on its cache, by gdn2_layer_step."""

from typing import Any

from jaxtyping import Array

from gdn2_jax.model.mixers.gdn2_config import GDN2Config
from gdn2_jax.model.mixers.layer_cache import CacheLayer
from gdn2_jax.ops.gdn2.fused_gates import Projections, with_all_channels
from gdn2_jax.ops.layer_step import (
  LayerStep,
  Options,
  gdn2_layer_step,
  takes_kernel,
)


def token_in_kernel(
  p: Projections,
  taps: tuple[Array, ...],
  gate: tuple[Array, ...],
  part: CacheLayer,
  config: GDN2Config,
  implementation: str | None,
) -> tuple[Array, CacheLayer] | None:
  """Runs a layer between its linear maps in one kernel, where it supports it.

  Args:
    p: Outputs of the linear maps for one token, T = 1, q, k and v before the
      convolutions.
    taps: Kernels of the convolutions of q, k and v, [W, heads, channels].
    gate: Output gate before its bias and activation [B, 1, HV, V], the bias
      [HV, V], and the weight of the output norm [V].
    part: The layer's part of a GDN2Cache.
    config: Config of the layer, whose gates kernels can compute.
    implementation: As that of gdn2_layer_step.

  Returns:
    The input of the output projection [B, 1, HV, V] and the new cache; None if
    the kernel does not run this call.
  """
  step = _operands(with_all_channels(p), taps, gate, part)
  if not takes_kernel(step, implementation):
    return None
  options = Options(config.erase_scale, config.output_gate, config.norm_eps)
  y, arrays = gdn2_layer_step(
    step, options=options, implementation=implementation
  )
  new: dict[str, Any] = {"state": arrays["states"]}
  for name in "qkv":
    old = getattr(part.cache, f"conv_{name}")
    new[f"conv_{name}"] = arrays[f"tails_{name}"].reshape(old.shape)
  return y[:, None], part.replace(cache=part.cache.replace(**new))


def _operands(p, taps, gate, part):
  def of_heads(tails, x):
    return tails.reshape(*tails.shape[:3], *x.shape[2:])

  z, bias, weight = gate
  cache = part.cache
  return LayerStep(
    *(x[:, 0] for x in (p.q, p.k, p.v, p.f, p.b, p.w, z)),
    *taps,
    p.a_log,
    p.dt_bias,
    bias,
    weight,
    of_heads(cache.conv_q, p.q),
    of_heads(cache.conv_k, p.k),
    of_heads(cache.conv_v, p.v),
    cache.state,
    part.layer,
  )
