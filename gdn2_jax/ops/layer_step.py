"""One token of a GDN-2 layer between its linear maps.

Short convolutions, norms and gates, Eq. 10, output norm and output gate, on
caches of many layers of which one is updated. XLA makes 15 launches of these,
which with few rows take longer than their work; for Hopper there is one kernel.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gdn2_jax.kernels import choice
from gdn2_jax.kernels.operands import LayerStep
from gdn2_jax.ops.context.borders import vary_together
from gdn2_jax.ops.gdn2.api import gdn2_step
from gdn2_jax.ops.gdn2.fused_gates import Projections, activate
from gdn2_jax.ops.norm import gated_rms_norm
from gdn2_jax.ops.short_conv import short_conv

_OP = "gdn2_layer_step"
# Results that are arrays of the cache.
_CACHE = ("tails_q", "tails_k", "tails_v", "states")


class Options(NamedTuple):
  """Numbers and names that a layer's step depends on.

  Attributes:
    erase_scale: Upper end of the erase gate's range.
    activation: Of the output gate, "silu" or "sigmoid".
    eps: Of the output norm.
  """

  erase_scale: float = 1.0
  activation: str = "silu"
  eps: float = 1e-5


def takes_kernel(p: LayerStep, implementation: str | None = None) -> bool:
  """True if the kernel runs a call of gdn2_layer_step.

  It does for any number of rows: the compiled step has 15 launches fewer per
  layer with one row and 12 with 64, and moves fewer bytes with both.

  Raises:
    NotImplementedError: implementation="mosaic_gpu" cannot run the call.
  """
  return choice.use_kernel(
    _OP,
    implementation,
    p.q,
    lambda: _pallas().layer_step_unsupported_reason(p),
    lambda: choice.is_right_here(
      f"mosaic_gpu {_OP}", _run_kernel, _run_xla, "layer_step", p.q
    ),
  )


def least_rows(x: Float[Array, "B T D"]) -> int:
  """Rows that a linear map of x should have on the device that runs it.

  For a Hopper GPU XLA turns a product with one row into multiplications, whose
  results it writes to memory for some maps, and a sum: o_proj then moves three
  times its weights. Two rows make it a matrix product. For wide outputs XLA
  fuses the sum, and sums several maps of one input in one launch.
  """
  return 2 if x.shape[:2] == (1, 1) and not choice.hopper_reason(x) else 1


def gdn2_layer_step(
  p: LayerStep,
  *,
  options: Options = Options(),  # noqa: B008, immutable
  implementation: str | None = None,
) -> tuple[Float[Array, "B H V"], dict[str, Array]]:
  """Output of a layer's token before the output projection, and the cache.

  Args:
    p: Operands. Value heads may be a multiple of the key heads with "xla".
    options: Erase range, activation and eps.
    implementation: "xla"; "mosaic_gpu", one kernel for Hopper that updates the
      cache in place; None chooses (takes_kernel).

  Returns:
    y [B, HV, V] in the dtype of v; and the arrays of the cache after the token
    by their names in `p`.

  Raises:
    NotImplementedError: The named implementation cannot run this call.
  """
  arrays = vary_together(p._replace(layer=jnp.asarray(p.layer, jnp.int32)))
  run = _kernel if takes_kernel(p, implementation) else _xla
  y, *cache = run(options, tuple(arrays[:-1]), arrays[-1])
  return y, dict(zip(_CACHE, cache, strict=True))


def _pallas():
  from gdn2_jax.pallas import layer_step

  return layer_step


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel(options, arrays, layer):
  """Runs the kernel; "xla" computes its gradient, which is rarely needed."""
  p = LayerStep(*arrays, layer)
  scale = p.q.shape[-1] ** -0.5
  run = _pallas().gdn2_layer_step_mosaic_gpu
  return run(p, scale=scale, **options._asdict())


def _kernel_fwd(options, arrays, layer):
  return _kernel(options, arrays, layer), (arrays, layer)


def _kernel_bwd(options, residuals, cotangents):
  arrays, layer = residuals
  _, pullback = jax.vjp(lambda *a: _xla(options, a, layer), *arrays)
  return pullback(tuple(cotangents)), None


_kernel.defvjp(_kernel_fwd, _kernel_bwd)


def _xla(options, arrays, layer):
  """The step as the layer computes it without the kernel."""
  p = LayerStep(*arrays, layer)

  def conv(name):
    x, taps, tails = (getattr(p, n + name) for n in ("", "taps_", "tails_"))
    tail = lax.dynamic_index_in_dim(tails, layer, keepdims=False)
    y, new = short_conv(
      x.reshape(x.shape[0], 1, -1),
      taps.reshape(taps.shape[0], -1),
      activation="silu",
      state=tail.reshape(*tail.shape[:2], -1),
      implementation="xla",
    )
    new = new.reshape(tail.shape)
    new = lax.dynamic_update_index_in_dim(tails, new, layer, 0)
    return y.reshape(x.shape[0], 1, *x.shape[1:]), new

  (q, tails_q), (k, tails_k), (v, tails_v) = map(conv, "qkv")
  f, b, w, z = (x[:, None] for x in (p.f, p.b, p.w, p.z))
  inputs = activate(
    Projections(q, k, v, f, b, w, p.a_log, p.dt_bias),
    erase_scale=options.erase_scale,
  )
  o, states = gdn2_step(
    *(x[:, 0] for x in inputs), p.states, layer=layer, implementation="xla"
  )
  y = gated_rms_norm(
    o[:, None],
    z,
    p.weight,
    bias=p.bias,
    activation=options.activation,
    eps=options.eps,
    implementation="xla",
  )
  return y[:, 0], tails_q, tails_k, tails_v, states


def _run_kernel(*operands):
  return _kernel(Options(), operands[:-1], operands[-1])


def _run_xla(*operands):
  return _xla(Options(), operands[:-1], operands[-1])
