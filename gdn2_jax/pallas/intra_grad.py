"""Gradients of a chunk's inputs, all chunks in parallel.

With the state S a chunk starts from and the gradient dS of the one it ends
with, both saved, everything is local (section 3.4, appendix B; README.md
section 4 derives it without dA):

  X = Z - E S              R = A X
  dR = Aqk^T dO + Kd dS    dX = A^T dR
  dT = -dX R^T             dAqk = dO R^T              (below the diagonal)
  dE = -dX S^T             dQg = dO S^T               dKd = R dS^T

then dT and dAqk go back through the tree of decays level by level. Every
decay is exp of a sum of log-decays, dD = (what it multiplies) * (its
gradient), and dg sums the dD of all sums that g is part of: no difference of
large numbers is ever formed.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks
from gdn2_jax.pallas.blocks import TILE, C
from gdn2_jax.pallas.intra_grad_tree import through_the_tree
from gdn2_jax.pallas.intra_grad_values import Slot, over_values


def intra_grad(q, k, b, g, kinds, v, w, do, A, Aqk, states, dstates, scale):
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

  Returns:
    dq, dk, db, dg, dv, dw in the shapes and dtypes of the inputs.
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
    "keys_loaded": plgpu.Barrier(num_arrivals=4, num_barriers=tiles),
    "A_loaded": plgpu.Barrier(num_arrivals=4),
    "values_loaded": plgpu.Barrier(num_arrivals=5),
    "met": plgpu.Barrier(num_arrivals=tiles),
  }
  names = tuple(scratch)
  # As constants: made in the kernel, these masks share registers with others.
  spans = jnp.asarray(np.stack([np.tri(C), np.tri(C, k=-1)]), dtype)

  def body(*refs):
    inputs, outputs, refs = refs[:13], refs[13:19], refs[19:]
    s = dict(zip(names, refs, strict=True))
    _Chunk(inputs, outputs, s, tiles, V // TILE, scale).run()

  return blocks.call(
    body,
    out_type,
    scratch_types=list(scratch.values()),
    grid=(B, H, T // C),
    grid_names=("b", "h", "c"),
    num_threads=tiles,
    thread_name="wg",
  )(q, k, b, g, kinds, v, w, do, A, Aqk, states, dstates, spans)


class _Chunk:
  """One block of the kernel: the references it works on and its steps."""

  def __init__(self, inputs, outputs, s, tiles, value_tiles, scale):
    self.inputs, self.outputs, self.s = inputs, outputs, s
    self.tiles, self.value_tiles, self.scale = tiles, value_tiles, scale
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
    """All warpgroups have come here, and see what the others stored."""
    plgpu.commit_smem()
    if self.tiles > 1:
      plgpu.barrier_arrive(self.s["met"])
      plgpu.barrier_wait(self.s["met"])

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
    s, loaded = self.s, self.s["keys_loaded"].at[self.wg]
    c = (self.row, self.h, self.c)
    for n, name in enumerate("qkb"):
      plgpu.copy_gmem_to_smem(
        self.inputs[n].at[(*self.tokens, self.h, self.channels)],
        self.own(name),
        loaded,
      )
    plgpu.copy_gmem_to_smem(
      self.inputs[4].at[self.tokens], s["kinds"].at[self.wg], loaded
    )

    @pl.when(self.first)
    def _():
      A, Aqk, spans = self.inputs[8], self.inputs[9], self.inputs[12]
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

    g = blocks.load_global(
      self.inputs[3].at[(*self.tokens, self.h, self.channels)]
    )
    plgpu.barrier_wait(loaded)
    with self.recomputed():
      kinds = self.kinds()
      for name in "qkb":
        x = blocks.load(self.own(name))
        x = jnp.where(kinds == blocks.PADDING, jnp.zeros_like(x), x)
        self.own(name)[...] = x
      g = blocks.log_decay(g, kinds)
      blocks.store_split(g, *self.g_parts())
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

  def write_key(self, n, x, staging):
    """Writes a gradient of q, k or b (result n)."""
    staging[...] = x.astype(staging.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
      staging,
      self.outputs[n].at[(*self.tokens, self.h, self.channels)],
    )

  def write_dg(self, dg):
    """Writes the gradient of g; padding has none."""
    real = self.kinds() != blocks.PADDING
    blocks.store_global(
      self.outputs[3].at[(*self.tokens, self.h, self.channels)],
      jnp.where(real, dg, 0.0),
    )


def aot_cases():
  """Calls that the ahead-of-time check compiles."""
  cases = []
  for name, B, T, H, K, dtype in (
    ("K=V=128 B=8 T=2048", 8, 2048, 16, 128, jnp.bfloat16),
    ("K=V=128 B=1 T=16384", 1, 16384, 16, 128, jnp.bfloat16),
    ("K=V=64", 8, 2048, 16, 64, jnp.bfloat16),
    ("K=V=128 fp16", 8, 2048, 16, 128, jnp.float16),
  ):
    chunks = T // C
    x = blocks.struct((B, T, H, K), dtype)
    g = blocks.struct((B, T, H, K), jnp.float32)
    kinds = blocks.struct((B, T), jnp.int32)
    square = blocks.struct((B, H, chunks, C, C), dtype)
    states = blocks.struct((B, H, chunks, K, K), dtype)
    scale = K**-0.5
    cases.append(
      (
        f"intra_grad {name}",
        lambda *args, scale=scale: intra_grad(*args, scale),
        [x, x, x, g, kinds, x, x, x, square, square, states, states],
      )
    )
  return cases
