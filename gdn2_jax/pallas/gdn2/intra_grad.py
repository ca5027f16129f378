"""Gradients of a chunk's inputs, all chunks in parallel.

With the state S a chunk starts from and the gradient dS of the one it ends
with, both saved, everything is local (section 3.4, appendix B; README.md
section 5 derives it without dA):

  X = Z - E S              R = A X
  dR = Aqk^T dO + Kd dS    dX = A^T dR
  dT = -dX R^T             dAqk = dO R^T              (below the diagonal)
  dE = -dX S^T             dQg = dO S^T               dKd = R dS^T

then dT and dAqk go back through the tree of decays level by level. Every
decay is exp of a sum of log-decays, dD = (what it multiplies) * (its
gradient), and dg sums the dD of all sums that g is part of: no difference of
large numbers is ever formed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks, projected
from gdn2_jax.pallas.blocks import TILE, C
from gdn2_jax.pallas.gdn2.intra_grad_tree import through_the_tree
from gdn2_jax.pallas.gdn2.intra_grad_values import Slot, over_values


def intra_grad(
  q,
  k,
  b,
  g,
  kinds,
  v,
  w,
  do,
  A,
  Aqk,
  states,
  dstates,
  scale,
  *,
  rates=None,
  erase_scale=1.0,
):
  """Runs the kernel over all chunks.

  Args:
    q: [B, T, H, K], 16-bit; T a multiple of 64, K 64 or 128.
    k: [B, T, H, K].
    b: [B, T, H, K].
    g: [B, T, H, K], float32.
    kinds: [B, T] int32, blocks.PADDING, TOKEN or RESTART.
    v: [B, T, H, V], 16-bit, V a multiple of 64.
    w: [B, T, H, V].
    do: gradient of the output [B, T, H, V], zero at padding, like v and w;
      then dq, dk and db are zero there too.
    A: [B, H, NC, C, C], 16-bit.
    Aqk: [B, H, NC, C, C], 16-bit.
    states: what chunks start from [B, H, NC, K, V], 16-bit.
    dstates: gradients of what chunks end with [B, H, NC, K, V], 16-bit.
    scale: factor on q.
    rates: [B, H, 2, K], float32: the others are as projected.py takes them,
      and g is in the dtype of q.
    erase_scale: of projected.py.

  Returns:
    dq, dk, db, dg, dv, dw in the shapes and dtypes of the inputs, and the
    shares of the chunks in the gradient of rates [B, H, NC, 2, K] or None.
  """
  B, T, H, K = q.shape
  V = v.shape[-1]
  tiles, dtype = K // TILE, q.dtype
  out_type = [blocks.struct(x.shape, x.dtype) for x in (q, k, b, g, v, w)]
  tile = blocks.smem((tiles * C, TILE), dtype)
  scratch = {
    "q": tile,
    "k": tile,
    "b": tile,
    "kinds": plgpu.SMEM((tiles, C), jnp.int32),
    "g_hi": tile,
    "g_lo": tile,
    "E_neg": tile,  # then k*x, high part
    "Kd": tile,  # then k*x, low part
    "S": tile,  # its rows are channels; then dQg, then b*k*x
    "dS": tile,  # likewise; then dQg, then q*x
    "slots": blocks.smem((Slot.COUNT * C, C), dtype),
    "dgamma_C": plgpu.SMEM((K,), jnp.float32),
    "keys_loaded": plgpu.Barrier(
      num_arrivals=4 if rates is None else 5, num_barriers=tiles
    ),
    "A_loaded": plgpu.Barrier(num_arrivals=4),
    "values_loaded": plgpu.Barrier(num_arrivals=5),
    "met": plgpu.Barrier(num_arrivals=tiles),
  }
  operands = [q, k, b, g, kinds, v, w, do, A, Aqk, states, dstates]
  if rates is not None:
    operands.append(rates)
    out_type.append(blocks.struct((B, H, T // C, 2, K), jnp.float32))
    scratch["rates"] = plgpu.SMEM((tiles, 2, TILE), jnp.float32)
    scratch["squares"] = plgpu.SMEM((2, tiles, C), jnp.float32)
    scratch["products"] = plgpu.SMEM((2, tiles, C), jnp.float32)
  names = tuple(scratch)
  # As constants: made in the kernel, these masks share registers with others.
  spans = jnp.stack([jnp.tri(C, dtype=dtype), jnp.tri(C, k=-1, dtype=dtype)])

  operands.append(spans)

  def body(*refs):
    n, m = len(operands), len(operands) + len(out_type)
    s = dict(zip(names, refs[m:], strict=True))
    chunk = _Chunk(refs[:n], refs[n:m], s, V // TILE, scale, erase_scale)
    chunk.run()

  gradients = blocks.call(
    "gdn2_intra_grad",
    body,
    out_type,
    scratch_types=list(scratch.values()),
    grid=(B, H, T // C),
    grid_names=("b", "h", "c"),
    num_threads=tiles,
    thread_name="wg",
  )(*operands)
  return (*gradients, None) if rates is None else gradients


class _Chunk:
  """One block of the kernel: the references it works on and its steps."""

  def __init__(self, inputs, outputs, s, value_tiles, scale, erase_scale):
    self.inputs, self.outputs, self.s = inputs, outputs, s
    self.tiles, self.value_tiles = s["kinds"].shape[0], value_tiles
    self.scale, self.erase_scale = scale, erase_scale
    self.is_projected = "rates" in s
    tiles = self.tiles
    self.row, self.h, self.c = (lax.axis_index(n) for n in ("b", "h", "c"))
    self.wg = lax.axis_index("wg")
    self.first = self.wg == 0
    self.last = self.wg == tiles - 1
    self.tokens = (self.row, pl.ds(self.c * C, C))

  @property
  def channels(self):
    """This warpgroup's channels."""
    return blocks.tile_slice(self.wg)

  @property
  def dgamma_C(self):
    """This warpgroup's dgamma_C."""
    return self.s["dgamma_C"].at[self.channels]

  def own(self, name):
    """This warpgroup's tile of a buffer; of S and dS, its channels."""
    return blocks.tile_of(self.s[name], self.wg)

  def slot(self, n):
    """Slot n of [C, C]."""
    return blocks.tile_of(self.s["slots"], n)

  def recomputed(self):
    """See blocks.recomputed."""
    return blocks.recomputed(self.s["kinds"].at[self.wg])

  def kinds(self):
    """Kinds of the tokens as a [C, TILE] tile."""
    return blocks.load_kinds(self.s["kinds"].at[self.wg])

  def meet(self):
    """See blocks.meet."""
    blocks.meet(self.s["met"], self.tiles)

  def load(self, name):
    """q (scaled), k or b of this warpgroup's channels."""
    x = blocks.load(self.own(name)).astype(jnp.float32)
    return x * self.scale if name == "q" else x

  def g_parts(self):
    return self.own("g_hi"), self.own("g_lo")

  def run(self):
    self.load_keys()
    sums = over_values(self)
    through_the_tree(self, *sums)
    plgpu.wait_smem_to_gmem(0)

  def fetch_values(self, j):
    """Starts the loads of value tile j."""
    values, c = pl.ds(j * TILE, TILE), (self.row, self.h, self.c)
    loaded = self.s["values_loaded"]
    for n, slot in ((5, Slot.V), (6, Slot.W), (7, Slot.DO)):
      plgpu.copy_gmem_to_smem(
        self.inputs[n].at[(*self.tokens, self.h, values)],
        self.slot(slot),
        loaded,
      )
    K = self.tiles * TILE
    for n, name in ((10, "S"), (11, "dS")):
      plgpu.copy_gmem_to_smem(
        self.inputs[n].at[(*c, pl.ds(0, K), values)], self.s[name], loaded
      )

  def load_keys(self):
    """Loads the key side and derives -E and Kd."""
    s = self.s
    self.fetch_keys()
    g = self.load_global(3)
    plgpu.barrier_wait(s["keys_loaded"].at[self.wg])
    with self.recomputed():
      self.take_keys(g)
    plgpu.commit_smem()
    plgpu.barrier_wait(s["A_loaded"])
    with self.recomputed():
      E_neg = self.own("E_neg")
      gamma = blocks.decay(self.slot(Slot.PREFIX), *self.g_parts())
      eg = gamma * self.load("b") * self.load("k")
      E_neg[...] = (-eg).astype(E_neg.dtype)
    with self.recomputed():
      Kd, above = self.own("Kd"), blocks.transposed(self.slot(Slot.BELOW))
      suffix = blocks.decay(above, *self.g_parts())
      Kd[...] = (suffix * self.load("k")).astype(Kd.dtype)
    self.meet()

  def fetch_keys(self):
    """Starts the loads of all but g, and of the first value tile."""
    s, loaded = self.s, self.s["keys_loaded"].at[self.wg]
    for n, name in enumerate("qkb"):
      plgpu.copy_gmem_to_smem(self.tile_of_input(n), self.own(name), loaded)
    plgpu.copy_gmem_to_smem(
      self.inputs[4].at[self.tokens], s["kinds"].at[self.wg], loaded
    )
    if self.is_projected:
      rates = self.inputs[12].at[self.row, self.h, pl.ds(0, 2), self.channels]
      plgpu.copy_gmem_to_smem(rates, s["rates"].at[self.wg], loaded)

    @pl.when(self.first)
    def _():
      c = (self.row, self.h, self.c)
      A, Aqk, spans = self.inputs[8], self.inputs[9], self.inputs[-1]
      for source, slot in (
        (A.at[c], Slot.A),
        (Aqk.at[c], Slot.AQK),
        (spans.at[0], Slot.PREFIX),
        (spans.at[1], Slot.BELOW),
      ):
        plgpu.copy_gmem_to_smem(source, self.slot(slot), s["A_loaded"])

    @pl.when(self.last)
    def _():
      self.fetch_values(jnp.int32(0))

  def tile_of_input(self, n):
    """This warpgroup's channels of input n, in global memory."""
    return self.inputs[n].at[(*self.tokens, self.h, self.channels)]

  def load_global(self, n):
    """The same in registers, float32."""
    return blocks.load_global(self.tile_of_input(n)).astype(jnp.float32)

  def at_tokens(self, x):
    """x, zero at padding."""
    return jnp.where(self.kinds() == blocks.PADDING, jnp.zeros_like(x), x)

  def take_keys(self, g):
    """Masks padding, splits g; computes norms and gates of projections."""
    if self.is_projected:
      g, _, _ = projected.log_decay(g, self.s["rates"].at[self.wg])
    blocks.store_split(blocks.log_decay(g, self.kinds()), *self.g_parts())
    if not self.is_projected:
      for name in "qkb":
        self.own(name)[...] = self.at_tokens(blocks.load(self.own(name)))
      return

    def load(name):
      return self.at_tokens(blocks.load(self.own(name))).astype(jnp.float32)

    def store(name, x):
      self.own(name)[...] = x.astype(self.own(name).dtype)

    store("b", self.erase_scale * projected.sigmoid(load("b")))
    squares = self.s["squares"]
    for n, name in enumerate("qk"):
      x = load(name)
      projected.store_share(x * x, squares.at[n], self.wg)
    self.meet()
    for n, name in enumerate("qk"):
      norm = projected.inverse_norm(squares.at[n], self.tiles)
      store(name, load(name) * norm)

  def write_key(self, n, x, staging):
    """Writes a gradient of q, k or b (result n)."""
    if self.is_projected:
      x = self.through_gate(x) if n == 2 else self.through_norm(n, x)
    staging[...] = x.astype(staging.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
      staging,
      self.outputs[n].at[(*self.tokens, self.h, self.channels)],
    )

  def through_gate(self, db):
    """From the gradient of b to that of what b is computed from."""
    # The rounded gate is no use: 1 - b would be 0 long before it is.
    b = projected.sigmoid(self.at_tokens(self.load_global(2)))
    return db * (self.erase_scale * b * (1.0 - b))

  def through_norm(self, n, dx):
    """From the gradient of q or k to that before the norm.

    With y = x*r: dx = r*(dy - y (y . dy)). The rounded y would leave much of
    what cancels where dy is along y.
    """
    x = self.at_tokens(self.load_global(n))
    products = self.s["products"].at[n]
    projected.store_share(x * dx, products, self.wg)
    self.meet()
    norm = projected.inverse_norm(self.s["squares"].at[n], self.tiles)
    x *= projected.load_sum(products, self.tiles) * norm * norm
    return norm * (dx - x)

  def write_dg(self, dg):
    """Writes the gradient of g; padding has none."""
    dg = self.at_tokens(dg)
    if self.is_projected:
      dg = self.through_decay(dg)
    out = self.outputs[3]
    blocks.store_global(
      out.at[(*self.tokens, self.h, self.channels)], dg.astype(out.dtype)
    )

  def through_decay(self, dg):
    """From the gradient of g to that of f; writes those of the rates."""
    rates = self.s["rates"].at[self.wg]
    f = self.at_tokens(self.load_global(3))
    _, plus, slope = projected.log_decay(f, rates)
    df = dg * projected.load_rate(rates, 0) * slope

    def sum_over_tokens():
      rates.at[0][...] = (dg * plus).sum(axis=0)
      rates.at[1][...] = df.sum(axis=0)

    blocks.in_turns(self.wg, self.tiles, self.s["met"], sum_over_tokens)
    plgpu.copy_smem_to_gmem(
      rates,
      self.outputs[6].at[self.row, self.h, self.c, pl.ds(0, 2), self.channels],
    )
    return df


def aot_cases() -> list[tuple[str, Callable, list[Any], dict[str, int]]]:
  """Representative calls: name, function, shapes of arguments, options."""

  def case(name, B, T, H, K, dtype="bfloat16", *, rates=False):
    struct = jax.ShapeDtypeStruct
    x = struct((B, T, H, K), dtype)
    g = struct((B, T, H, K), dtype if rates else "float32")
    kinds = struct((B, T), "int32")
    square = struct((B, H, T // C, C, C), dtype)
    states = struct((B, H, T // C, K, K), dtype)
    extra = [struct((B, H, 2, K), "float32")] * rates

    def call(*args):
      options = {"rates": args[12]} if rates else {}
      return intra_grad(*args[:12], K**-0.5, **options)

    shapes = [x, x, x, g, kinds, x, x, x, square, square, states, states]
    return name, call, shapes + extra, {"token_heads": B * T * H}

  return [
    case("intra_grad", 8, 2048, 16, 128),
    case("intra_grad T=16384", 1, 16384, 16, 128),
    case("intra_grad K=64 V=64", 8, 2048, 16, 64),
    case("intra_grad float16", 8, 2048, 16, 128, "float16"),
    case("intra_grad, gates", 8, 2048, 16, 128, rates=True),
    case("intra_grad, gates, T=16384", 1, 16384, 16, 128, rates=True),
    case("intra_grad, gates, K=64 V=64", 8, 2048, 16, 64, rates=True),
  ]
