"""Kernel for the gradients of a chunk's inputs, all chunks in parallel.

S is the state at the start of a chunk and dS the gradient of the state at its
end, both saved. Given these, the gradients need nothing from other chunks
(section 3.4, appendix B; README.md section 5 derives them without dA):

  X = Z - E S              R = A X
  dR = Aqk^T dO + Kd dS    dX = A^T dR
  dT = -dX R^T             dAqk = dO R^T              (below the diagonal)
  dE = -dX S^T             dQg = dO S^T               dKd = R dS^T

Then dT and dAqk go back through the tree of decays (grad/levels.py).

A warpgroup has 64 key channels and half of the tokens, in arrays [channels,
tokens]: the decays of a channel are products along a row, and what wgmma
multiplies and returns stays in the registers of the same thread.
"""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks, inline
from gdn2_jax.pallas.blocks import ROWS, TILE, C
from gdn2_jax.pallas.gdn2.grad import columns, gates
from gdn2_jax.pallas.gdn2.grad.columns import BLOCK, HALF, PART
from gdn2_jax.pallas.gdn2.grad.levels import Levels
from gdn2_jax.pallas.gdn2.grad.memory import DO, HALVES, Memory
from gdn2_jax.pallas.gdn2.grad.values import over_values


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
  out_type = [blocks.struct(x.shape, x.dtype) for x in (q, k, b, g, v, w)]
  memory = Memory(K, q.dtype, is_projected=rates is not None)
  operands = [q, k, b, g, kinds, v, w, do, A, Aqk, states, dstates]
  if rates is not None:
    operands.append(rates)
    out_type.append(blocks.struct((B, H, T // C, 2, K), jnp.float32))

  def body(*refs):
    n, m = len(operands), len(operands) + len(out_type)
    s = memory.unpack(refs[m:])
    chunk = _Chunk(refs[:n], refs[n:m], s, V // TILE, scale, erase_scale)
    chunk.run()

  gradients = blocks.call(
    "gdn2_intra_grad",
    body,
    out_type,
    scratch_types=memory.types,
    grid=(B, H, T // C),
    grid_names=("b", "h", "c"),
    num_threads=2 * K // TILE,
    thread_name="wg",
    auto_barriers=False,  # every barrier is in the code
  )(*operands)
  return (*gradients, None) if rates is None else gradients


class _Chunk:
  """References and steps of one block of the kernel.

  Attributes:
    tile: Number of this warpgroup's 64 key channels.
    half: 0 or 1, its half of the tokens.
  """

  def __init__(self, inputs, outputs, s, value_tiles, scale, erase_scale):
    self.inputs, self.outputs, self.s = inputs, outputs, s
    self.is_projected = "rates" in s
    self.is_scaled = self.is_projected and s["q"].dtype == jnp.float16
    self.K = s["q"].shape[1]
    self.tiles, self.value_tiles = self.K // TILE, value_tiles
    self.scale, self.erase_scale = scale, erase_scale
    self.row, self.h, self.c = (lax.axis_index(n) for n in ("b", "h", "c"))
    self.wg = lax.axis_index("wg")
    self.turn = self.wg  # the same in `recomputed`: aot/turns.py follows it
    self.tile, self.half = self.wg >> 1, self.wg & 1
    self.first = self.wg == 0
    self.last = self.wg == 2 * self.tiles - 1

  def recomputed(self):
    """The same, whose addresses LLVM does not share; see opaque_zero."""
    other, zero = copy.copy(self), columns.opaque_zero()
    other.wg = self.wg + zero
    other.tile, other.half = other.wg >> 1, other.wg & 1
    other.row, other.h, other.c = self.row + zero, self.h + zero, self.c + zero
    return other

  @property
  def tokens(self):
    """Index of the chunk's tokens in global memory."""
    return (self.row, pl.ds(self.c * C, C))

  @property
  def channels(self):
    """This warpgroup's channels."""
    return pl.ds(self.tile * TILE, TILE)

  @property
  def rows(self):
    """This warpgroup's tokens."""
    return pl.ds(self.half * HALF, HALF)

  def meet(self):
    """See blocks.meet."""
    blocks.meet(self.s["met"], 2 * self.tiles)

  def arrive(self):
    """First half of `meet`, before reads that are neither TMA nor wgmma."""
    inline.sync_warps()
    plgpu.barrier_arrive(self.s["met"])

  def wait(self):
    """Second half of `meet`."""
    plgpu.barrier_wait(self.s["met"])

  def vector(self, name, n):
    """Row n of a buffer of vectors, for this warpgroup's channels."""
    return self.s[name].at[n, self.channels]

  def load_vector(self, name, n, width=HALF):
    """Row n of a buffer of vectors as an array [channels, width]."""
    x = plgpu.load(self.vector(name, n), layout=ROWS.reduce(1))
    return blocks.of_rows(x, (TILE, width))

  def total_if(self, flag, row, width=HALF):
    """Row of `totals` as an array [channels, width], or ones."""
    x = plgpu.load(self.vector("totals", row), layout=ROWS.reduce(1))
    n = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=ROWS.reduce(1))
    x = jnp.where(n < jnp.where(flag, TILE, 0), x, 1.0)
    return blocks.of_rows(x, (TILE, width))

  def kinds(self, block=None):
    """Kinds of this warpgroup's tokens as an array [channels, tokens]."""
    rows, width = self.rows, HALF
    if block is not None:
      rows, width = self.block(block), BLOCK
    kinds = plgpu.load(self.s["kinds"].at[rows], layout=ROWS.reduce(0))
    return blocks.of_columns(kinds, (TILE, width))

  def at_tokens(self, x):
    """Sets x [channels, tokens] to zero at padding."""
    return jnp.where(self.kinds() == blocks.PADDING, jnp.zeros_like(x), x)

  def key(self, name, rows=None):
    """This warpgroup's part of q, k, b, E_neg or Kd."""
    return self.s[name].at[self.rows if rows is None else rows, self.channels]

  def load(self, name, rows=None):
    """Loads q, k or b as an array [channels, tokens]."""
    return inline.widen(columns.load(self.key(name, rows)))

  def run(self):
    self.load_keys()
    sums = over_values(self)
    if self.is_projected:
      gates.fetch_raw(self)
    Levels(self, *sums).run()
    self.meet()
    if self.is_projected:
      gates.write_rates(self)

    @pl.when(self.first)
    def _():
      names = [*"qkb", *(["raw_f"] * self.is_projected)]
      for n, name in enumerate(names):
        out = self.outputs[n].at[(*self.tokens, self.h)]
        plgpu.copy_smem_to_gmem(self.s[name], out)

    plgpu.wait_smem_to_gmem(0)

  def load_global(self, n):
    """Loads this warpgroup's part of input n, [channels, tokens], float32."""
    return columns.load_global(self._in_global(self.inputs[n]))

  def _in_global(self, ref, block=None):
    first, width = self.half * HALF, HALF
    if block is not None:
      first, width = first + block * BLOCK, BLOCK
    tokens = pl.ds(self.c * C + first, width)
    return ref.at[self.row, tokens, self.h, self.channels]

  def load_keys(self):
    """Loads the key-side operands and computes -E and Kd."""
    s = self.s
    self.fetch()
    g = self.load_global(3)
    plgpu.barrier_wait(s["keys_loaded"])
    exp = jnp.exp
    if self.is_projected:
      gates.store_norms(self)
      g, exp = gates.log2_decay(self, g), jnp.exp2
    kinds = self.kinds()
    special = jnp.where(kinds == blocks.RESTART, blocks.LOG_ZERO, 0.0)
    a = exp(jnp.where(kinds == blocks.TOKEN, g, special))
    s["a"].at[self.channels, self.rows][...] = a
    if self.is_projected:
      gates.take_gate(self)  # beside the exchanges of the next lines
    decays = columns.Decays(a).climb(BLOCK)
    totals = []
    for n in range(HALF // BLOCK):
      total = jnp.where(columns.iota(HALF) == n * BLOCK, decays.total, 0.0)
      totals.append(total.sum(axis=1))
      self.vector("totals", 2 * self.half + n)[...] = totals[n]
    self.vector("totals", HALVES + self.half)[...] = totals[0] * totals[1]
    decays.climb(HALF)

    self.meet()
    self.mask("qkb")
    if self.is_scaled:
      gates.scale(self)
    k = self.load("k")
    if self.is_projected:
      (k,) = gates.of_normalised_keys(self, k)
    E_neg = -(self.load("b") * k)
    E_neg *= decays.prefix * self.total_if(self.half == 1, HALVES)
    columns.store(self.key("E_neg"), E_neg)
    Kd = k * decays.suffix * self.total_if(self.half == 0, HALVES + 1)
    if "Kd_low" in s:
      Kd, Kd_low = blocks.split(Kd, s["Kd"].dtype)
      columns.store(self.key("Kd_low"), Kd_low)
    columns.store(self.key("Kd"), Kd)
    self.meet()

  def mask(self, names):
    """Sets buffers to zero at padding, if this warpgroup has padding."""
    first = self.half * HALF

    @pl.when(inline.any_differs(self.s["kinds"], first, HALF, blocks.TOKEN))
    def _():
      for name in names:
        x = self.at_tokens(columns.load(self.key(name)))
        columns.store(self.key(name), x)
      inline.sync_warps()

  def fetch(self):
    """Starts the loads of everything but g, and of the first value tile."""
    s, loaded = self.s, self.s["keys_loaded"]

    @pl.when(self.first)
    def _():
      for n, name in enumerate("qkb"):
        source = self.inputs[n].at[(*self.tokens, self.h)]
        plgpu.copy_gmem_to_smem(source, s[name], loaded)
      plgpu.copy_gmem_to_smem(
        self.inputs[4].at[self.tokens], s["kinds"], loaded
      )
      c = (self.row, self.h, self.c)
      for n, name in ((8, "A"), (9, "Aqk")):
        plgpu.copy_gmem_to_smem(self.inputs[n].at[c], s[name], s["A_loaded"])

      if self.is_projected:
        rates = self.inputs[12].at[self.row, self.h]
        plgpu.copy_gmem_to_smem(rates, s["rates"], loaded)

    @pl.when(self.last)
    def _():
      self.fetch_values(jnp.int32(0))

  def fetch_values(self, j):
    """Starts the loads of value tile j."""
    s, loaded, c = self.s, self.s["values_loaded"], (self.row, self.h, self.c)
    for part in range(2):
      values = pl.ds(j * TILE + part * PART, PART)
      for n, name, at in ((5, "v", 0), (6, "w", 0), (7, "dX", 2 * DO)):
        source = self.inputs[n].at[(*self.tokens, self.h, values)]
        to = s[name].at[pl.ds((at + part) * C, C)]
        plgpu.copy_gmem_to_smem(source, to, loaded)
      for n, name in ((10, "S"), (11, "dS")):
        source = self.inputs[n].at[(*c, pl.ds(0, self.K), values)]
        to = s[name].at[pl.ds(part * self.K, self.K)]
        plgpu.copy_gmem_to_smem(source, to, loaded)

  def block(self, n):
    """16 of this warpgroup's tokens."""
    return pl.ds(self.half * HALF + n * BLOCK, BLOCK)

  def write(self, n, q, k, dq, dk, db, dg):
    """Writes gradients of block n [channels, 16], over q, k and b."""
    rows = self.block(n)
    dg = jnp.where(self.kinds(n) == blocks.PADDING, 0.0, dg)
    if self.is_projected:
      # The other warpgroups' sums arrive while this one computes db and dg.
      gates.share_along(self, n, q * dq, k * dk)
      db = gates.through_gate(self, rows, db)
      dg = gates.through_decay(self, rows, dg)
    columns.store(self.key("b", rows), db)
    if self.is_projected:
      columns.store(self.key("raw_f", rows), dg)
      dq, dk = gates.through_norms(self, n, (q, k), (dq, dk))
    else:
      columns.store_global(self._in_global(self.outputs[3], n), dg)
    columns.store(self.key("q", rows), dq)
    columns.store(self.key("k", rows), dk)


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
