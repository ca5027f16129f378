"""Kernel for the gradients of a chunk's inputs, all chunks in parallel.

S is the state at the start of a chunk and dS the gradient of the state at its
end, both saved. Given these, the gradients need nothing from other chunks
(section 3.4, appendix B; README.md section 5 derives them without dA):

  X = Z - E S              R = A X
  dR = Aqk^T dO + Kd dS    dX = A^T dR
  dT = -dX R^T             dAqk = dO R^T              (below the diagonal)
  dE = -dX S^T             dQg = dO S^T               dKd = R dS^T

Then dT and dAqk go back through the tree of decays, level by level. Every decay
is D = exp(a sum of log-decays). The gradient of that sum, dD, is D times the
gradient of D, and dg adds the dD of all sums that include g. No difference of
large numbers occurs.
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
    do: Gradient of the output [B, T, H, V], zero at padding, as v and w are;
      so dq, dk and db are zero there, too.
    A: [B, H, NC, C, C], 16-bit.
    Aqk: [B, H, NC, C, C], 16-bit.
    states: States at the chunk starts [B, H, NC, K, V], 16-bit.
    dstates: Gradients of the states at the chunk ends [B, H, NC, K, V], 16-bit.
    scale: Factor on q.
    rates: [B, H, 2, K], float32, or None; see projected.py. With rates, g is in
      the dtype of q.
    erase_scale: Factor on the erase gate, with rates.

  Returns:
    dq, dk, db, dg, dv, dw in the shapes and dtypes of the inputs, and each
    chunk's part of the gradient of rates [B, H, NC, 2, K], or None.
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
  # An operand: masks made in the kernel would stay in registers.
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
  """References and steps of one block of the kernel."""

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
    """This warpgroup's tile of a buffer; for S and dS, its key channels."""
    return blocks.tile_of(self.s[name], self.wg)

  def slot(self, n):
    """Slot n, a [C, C] matrix."""
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
    """Loads q (scaled), k or b of this warpgroup's channels."""
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
    """Loads the key-side operands and computes -E and Kd."""
    s = self.s
    self.fetch_keys()
    g = self.load_global(3)
    plgpu.barrier_wait(s["keys_loaded"].at[self.wg])
    with self.recomputed():
      self.take_keys(g)
    plgpu.commit_smem()  # wgmma reads g_hi and g_lo
    plgpu.barrier_wait(s["A_loaded"])  # A, Aqk and the masks
    with self.recomputed():
      E_neg = self.own("E_neg")
      gamma = blocks.decay(self.slot(Slot.PREFIX), *self.g_parts())
      eg = gamma * self.load("b") * self.load("k")
      E_neg[...] = (-eg).astype(E_neg.dtype)
    with self.recomputed():
      Kd, above = self.own("Kd"), blocks.transposed(self.slot(Slot.BELOW))
      suffix = blocks.decay(above, *self.g_parts())
      Kd[...] = (suffix * self.load("k")).astype(Kd.dtype)
    # Commits E and Kd, of which R and dX need all channels. The masks have been
    # read by all warpgroups: R overwrites them.
    self.meet()

  def fetch_keys(self):
    """Starts the loads of everything but g, and of the first value tile."""
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
    """Loads this warpgroup's channels of input n into registers, float32."""
    return blocks.load_global(self.tile_of_input(n)).astype(jnp.float32)

  def at_tokens(self, x):
    """Sets x to zero at padding."""
    return jnp.where(self.kinds() == blocks.PADDING, jnp.zeros_like(x), x)

  def take_keys(self, g):
    """Masks padding and splits g; with rates, computes norms and gates."""
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
    self.meet()  # a norm sums the squares of all warpgroups
    for n, name in enumerate("qk"):
      norm = projected.inverse_norm(squares.at[n], self.tiles)
      store(name, load(name) * norm)

  def write_key(self, n, x, staging):
    """Writes a gradient of q, k or b (result n) through a free buffer."""
    if self.is_projected:
      x = self.through_gate(x) if n == 2 else self.through_norm(n, x)
    staging[...] = x.astype(staging.dtype)
    plgpu.commit_smem()  # the TMA store reads it
    plgpu.copy_smem_to_gmem(
      staging,
      self.outputs[n].at[(*self.tokens, self.h, self.channels)],
    )

  def through_gate(self, db):
    """Gradient before the sigmoid of b, from that of b."""
    # Recomputed in float32: 1 - b of a gate rounded to 16 bits may be 0.
    b = projected.sigmoid(self.at_tokens(self.load_global(2)))
    return db * (self.erase_scale * b * (1.0 - b))

  def through_norm(self, n, dx):
    """Gradient before the norm of q or k, from that after it.

    With y = x*r: dx = r*(dy - y (y . dy)). The difference cancels where dy is
    parallel to y, so a y that was rounded to 16 bits is not accurate enough.
    """
    x = self.at_tokens(self.load_global(n))
    # q and k have a row each: no row is written while it is still read.
    products = self.s["products"].at[n]
    projected.store_share(x * dx, products, self.wg)
    self.meet()  # the product sums the channels of all warpgroups
    norm = projected.inverse_norm(self.s["squares"].at[n], self.tiles)
    x *= projected.load_sum(products, self.tiles) * norm * norm
    return norm * (dx - x)

  def write_dg(self, dg):
    """Writes the gradient of g, which is zero at padding."""
    dg = self.at_tokens(dg)
    if self.is_projected:
      dg = self.through_decay(dg)
    out = self.outputs[3]
    blocks.store_global(
      out.at[(*self.tokens, self.h, self.channels)], dg.astype(out.dtype)
    )

  def through_decay(self, dg):
    """Gradient of f, from that of g; writes the gradients of the rates."""
    rates = self.s["rates"].at[self.wg]
    f = self.at_tokens(self.load_global(3))
    _, plus, slope = projected.log_decay(f, rates)
    df = dg * projected.load_rate(rates, 0) * slope

    def sum_over_tokens():  # in place of the rates, which are in registers
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
