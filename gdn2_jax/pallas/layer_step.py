r"""Kernel for one token of a whole GDN-2 layer between its linear maps.

From the outputs q, k, v, f, b, w and z of the linear maps, with the last inputs
of the convolutions and the state S of the cache (section 3.5, Eq. 10):

  q, k, v = silu(conv(q)), silu(conv(k)), silu(conv(v))
  q, k    = scale q / sqrt(sum q^2 + eps_l2), k / sqrt(sum k^2 + eps_l2)
  alpha   = exp(-exp(A_log) softplus(f + dt_bias))
  u       = sigmoid(w) v - S^T (alpha erase_scale sigmoid(b) k)
  o       = S^T (alpha q) + (q.k) u
  S'      = alpha S + k u^T
  y       = o / sqrt(mean o^2 + eps) weight act(z + bias)

All of it is float32; only y is rounded. It replaces 15 launches, each of which
takes longer than its work if there are few rows (README.md, section 14).

A block of four warps has one head of one row. It starts to load S into shared
memory, computes everything else meanwhile with one channel to a thread, and
then reads S twice. Nothing of a head is read or written by another block, so
the cache is updated in place.

Legend: N layers, B rows, H heads, K key channels, V value channels, W taps of
the convolutions; R rows of S that a thread holds columns of at a time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.pallas import mpmd
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gdn2_jax.kernels import target
from gdn2_jax.kernels.operands import LayerStep
from gdn2_jax.pallas import blocks
from gdn2_jax.pallas.gdn2.step import like, state_layout
from gdn2_jax.pallas.partition import over_batch_and_heads
from gdn2_jax.pallas.projected import EPS, sigmoid, softplus

CHANNELS = (64, 128)  # K and V: one channel to a thread; S fits shared memory
TAPS = (2, 3, 4)
_DTYPES = ("bfloat16", "float16", "float32")
_MAX_ROWS = 65535  # limit of the second axis of a grid
_WARPS, _LANES = 4, 32
_ROWS = 16  # R
# Vectors of K and of V channels in shared memory.
_ALPHA, _KEY, _ERASE, _QUERY = range(4)
_WRITE, _GATE = range(2)


# Axes of batch and heads.
_LAYOUTS = LayerStep(
  *7 * ("bh",),
  *3 * (".h",),
  *3 * ("h",),
  "",
  *3 * (".b.h",),
  ".bh",
  "",
)
_CACHE = ("tails_q", "tails_k", "tails_v", "states")  # results 1 to 4
# Maps that XLA computes as one product, of which every operand of a kernel is a
# copy. With many rows they are copied as one array, which is one launch.
_MAPS = ("q", "k", "v", "b", "w")


class _Options(NamedTuple):
  scale: float
  erase_scale: float
  activation: str
  eps: float


def layer_step_unsupported_reason(p: LayerStep) -> str | None:
  """Reason that the kernel cannot run a call, or None."""
  (B, H, K), (HV, V), W = p.q.shape, p.v.shape[1:], p.taps_q.shape[0]
  if HV != H:
    return f"{HV} value heads of {H} key heads, expected as many"
  for name, size in (("K", K), ("V", V)):
    if size not in CHANNELS:
      return f"{name} = {size}, expected one of {CHANNELS}"
  if W not in TAPS:
    return f"W = {W}, expected one of {TAPS}"
  one = (*p[: LayerStep._fields.index("a_log")], p.tails_q, p.tails_k)
  names = sorted({jnp.dtype(x.dtype).name for x in (*one, p.tails_v)})
  if len(names) > 1 or names[0] not in _DTYPES:
    return f"dtypes {', '.join(names)}, expected one of {', '.join(_DTYPES)}"
  if B > _MAX_ROWS:
    return f"{B} rows, expected at most {_MAX_ROWS}"
  return None


def gdn2_layer_step_mosaic_gpu(
  operands: LayerStep,
  *,
  scale: float,
  erase_scale: float,
  activation: str,
  eps: float,
) -> tuple[Float[Array, "B H V"], Any, Any, Any, Float[Array, "N B H K V"]]:
  """Output y, and the cache's arrays with one layer updated in place.

  Split over devices and under vmap; not differentiable. `eps` is that of the
  output norm, `activation` of its gate: "silu" or "sigmoid". The call must be
  one that `layer_step_unsupported_reason` has no reason against.
  """
  run = over_batch_and_heads(
    layer_step,
    tuple(_LAYOUTS),
    ("bh", *(getattr(_LAYOUTS, n) for n in _CACHE)),
    options=_Options(float(scale), float(erase_scale), activation, float(eps)),
  )
  layer = jnp.asarray(operands.layer, jnp.int32)
  return run(*operands._replace(layer=layer))


def layer_step(*operands: Any, options: _Options) -> tuple[Any, ...]:
  """The kernel's call on the rows and heads of one device."""
  p = LayerStep(*operands)
  return _call(options, target.current(), p._replace(layer=p.layer[None]))


# The target is an argument so that jit's cache has an entry per target.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(options, target_name, p):
  assert target_name == target.current()
  (B, H, K), V = p.q.shape, p.v.shape[-1]
  operands = p._asdict()
  if B > 1 and K == V:
    maps = jnp.stack([operands.pop(name) for name in _MAPS])
    operands = {"maps": maps, **operands}

  def body(*refs):
    # Positions, because mpmd_map cannot declare scratch memory.
    pl.run_scoped(
      functools.partial(_body, *refs, names=tuple(operands), options=options),
      plgpu.SMEM((K, V), jnp.float32),
      plgpu.SMEM((4, K), jnp.float32),
      plgpu.SMEM((2, V), jnp.float32),
      plgpu.Barrier(num_arrivals=1),
    )

  # Not plgpu.kernel: see step.py.
  kernel = mpmd._mpmd_map(
    [(plgpu.Mesh(grid=(B, H), grid_names=("row", "head")), body)],
    out_types=[like(p.v), *(like(getattr(p, name)) for name in _CACHE)],
    input_output_aliases={
      list(operands).index(name): n for n, name in enumerate(_CACHE, start=1)
    },
    # An exact exp, as in step.py.
    compiler_params=plgpu.CompilerParams(approx_math=False),
    interpret=target.interpret_params(),
    name="gdn2_layer_step",
  )
  return tuple(kernel(*operands.values()))


def _body(*refs, names, options):
  inputs = dict(zip(names, refs, strict=False))
  if "maps" in inputs:
    maps = inputs.pop("maps")
    inputs |= {name: maps.at[n] for n, name in enumerate(_MAPS)}
  p = LayerStep(**inputs)
  y, tails_q, tails_k, tails_v, states = refs[len(names) : len(names) + 5]
  S, of_keys, of_values, loaded = refs[len(names) + 5 :]
  row, head = lax.axis_index("row"), lax.axis_index("head")
  here, layer, W = (row, head), p.layer[0], p.taps_q.shape[0]

  # All loads come before all sums: none waits for another at a barrier.
  taps, inputs = (
    {
      name: [_read(ref.at[i, head]) for i in range(W)]
      for name, ref in (("q", p.taps_q), ("k", p.taps_k), ("v", p.taps_v))
    },
    {name: [_read(getattr(p, name).at[here])] for name in "qkv"},
  )
  f, b, w, z = (_read(ref.at[here]) for ref in (p.f, p.b, p.w, p.z))
  a_log, weight = p.a_log[head], _read(p.weight)
  dt_bias, bias = _read(p.dt_bias.at[head]), _read(p.bias.at[head])
  plgpu.copy_gmem_to_smem(p.states.at[(layer, *here)], S, loaded)
  for name, ref in (("q", p.tails_q), ("k", p.tails_k), ("v", p.tails_v)):
    tail = [_read(ref.at[layer, row, i, head]) for i in range(W - 1)]
    inputs[name] = tail + inputs[name]

  q, k, v = (_conv_silu(taps[name], inputs[name]) for name in "qkv")
  squares = jnp.sum(q * q), jnp.sum(k * k)
  q_scale, k_scale = (lax.rsqrt(x + EPS) for x in squares)
  q_scale = q_scale * options.scale
  q_k = jnp.sum(q * k) * (q_scale * k_scale)
  q, k = q * q_scale, k * k_scale
  rate = -jnp.exp(lax.broadcast_in_dim(a_log, q.shape, ()))
  alpha = jnp.exp(rate * softplus(_wide(f) + _wide(dt_bias)))
  erase = options.erase_scale * sigmoid(_wide(b)) * k
  for n, x in (
    (_ALPHA, alpha),
    (_KEY, k),
    (_ERASE, alpha * erase),
    (_QUERY, alpha * q),
  ):
    blocks.store_untiled(of_keys.at[n], x)
  z = _wide(z) + _wide(bias)
  act = sigmoid(z) if options.activation == "sigmoid" else z * sigmoid(z)
  blocks.store_untiled(of_values.at[_WRITE], sigmoid(_wide(w)) * v)
  blocks.store_untiled(of_values.at[_GATE], _wide(weight) * act)

  plgpu.barrier_wait(loaded)
  u, o = _recall(S, of_keys, of_values)
  o = o + q_k * u
  _store_state(S, of_keys, u, states.at[(layer, *here)])
  # Barriers of sums and of vectors have passed: two threads hold each of 64
  # channels, and both have read its tail.
  for name, ref in (("q", tails_q), ("k", tails_k), ("v", tails_v)):
    for i, x in enumerate(inputs[name][1:]):
      blocks.store_untiled(ref.at[layer, row, i, head], x)
  mean = jnp.sum(o * o) * (1.0 / o.shape[0])
  gate = _load(of_values.at[_GATE], _columns(S))
  o = o * lax.rsqrt(mean + options.eps) * gate
  blocks.store_untiled(y.at[here], o.astype(y.dtype))


def _conv_silu(taps, inputs):
  """silu(conv) from the taps and the inputs, the oldest first."""
  z = sum(_wide(a) * _wide(x) for a, x in zip(taps, inputs, strict=True))
  return z * sigmoid(z)


def _wide(x):
  return x.astype(jnp.float32)


def _recall(S, of_keys, of_values):
  """u, and S^T (alpha q), both [V] in the layout of columns of S."""
  K, V = S.shape
  layout = state_layout(V)

  def tile(n, sums):
    rows = pl.ds(n * _ROWS, _ROWS)
    S_RV = _load(S.at[rows], layout)
    return tuple(
      plgpu.layout_cast(total + S_RV * _along_rows(of_keys, m, rows, V), layout)
      for total, m in zip(sums, (_ERASE, _QUERY), strict=True)
    )

  zeros = plgpu.layout_cast(jnp.zeros((_ROWS, V), jnp.float32), layout)
  erased, recalled = blocks.loop(K // _ROWS, tile, (zeros, zeros))
  write = _load(of_values.at[_WRITE], _columns(S))
  return write - erased.sum(axis=0), recalled.sum(axis=0)


def _store_state(S, of_keys, u, state):
  """Stores alpha S + k u^T."""
  K, V = S.shape
  layout = state_layout(V)
  u_RV = lax.broadcast_in_dim(u, (_ROWS, V), (1,))

  def tile(n, _):
    rows = pl.ds(n * _ROWS, _ROWS)
    new = _load(S.at[rows], layout) * _along_rows(of_keys, _ALPHA, rows, V)
    new = new + _along_rows(of_keys, _KEY, rows, V) * u_RV
    blocks.store_untiled(state.at[rows], plgpu.layout_cast(new, layout))

  blocks.loop(K // _ROWS, tile, None)


def _along_rows(of_keys, n, rows, V):
  """Part of a vector of key channels, repeated in every column [R, V]."""
  vector = _load(of_keys.at[n, rows], state_layout(V).reduce(1))
  return lax.broadcast_in_dim(vector, (_ROWS, V), (0,))


def _columns(S):
  """Layout of a vector of S's columns."""
  return state_layout(S.shape[1]).reduce(0)


def _read(ref, layout=None):
  """Loads an array; a vector with one channel to a thread by default."""
  layout = _one_each(ref.shape[-1]) if layout is None else layout
  return plgpu.load(ref, layout=layout, optimized=False)


def _load(ref, layout):
  return _wide(_read(ref, layout))


def _one_each(channels):
  """Layout of a vector: a channel to a thread, 64 twice."""
  copies = _WARPS * _LANES // channels
  more = (fragmented_array.Replicated(copies),) if copies > 1 else ()
  return plgpu.Layout.TILED(
    fragmented_array.Tiling(((channels,), (_LANES,), (1,))),
    warp_dims=(-3, *more),
    lane_dims=(-2,),
    vector_dim=-1,
  )


def aot_cases() -> list[tuple[str, Callable, list[Any]]]:
  """Representative calls: name, function, arguments."""

  def case(name, B, H, K, V, dtype="bfloat16", layers=1, activation="silu"):
    def of(*shape, dtype=dtype):
      return jax.ShapeDtypeStruct(shape, dtype)

    keys, values, W = of(B, H, K), of(B, H, V), 4
    operands = LayerStep(
      *(keys, keys, values, keys, keys, values, values),
      *(of(W, H, K), of(W, H, K), of(W, H, V)),
      a_log=of(H, dtype="float32"),
      dt_bias=of(H, K, dtype="float32"),
      bias=of(H, V),
      weight=of(V),
      tails_q=of(layers, B, W - 1, H, K),
      tails_k=of(layers, B, W - 1, H, K),
      tails_v=of(layers, B, W - 1, H, V),
      states=of(layers, B, H, K, V, dtype="float32"),
      layer=of(dtype="int32"),
    )

    def step(*operands):
      return gdn2_layer_step_mosaic_gpu(
        LayerStep(*operands),
        scale=K**-0.5,
        erase_scale=1.0,
        activation=activation,
        eps=1e-5,
      )

    return name, step, list(operands)

  return [
    case("layer step B=1", 1, 16, 128, 128),
    case("layer step B=64", 64, 16, 128, 128),
    case("layer step K=64 V=64", 64, 16, 64, 64, activation="sigmoid"),
    case("layer step K=128 V=64", 64, 16, 128, 64),
    case("layer step float16", 64, 16, 128, 128, "float16"),
    case("layer step float32", 64, 16, 128, 128, "float32"),
  ]
