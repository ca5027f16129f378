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
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks
from gdn2_jax.pallas.blocks import TILE, C
from gdn2_jax.pallas.intra_grad_tree import through_the_tree

# Slots of [C, C] in one buffer, while value tiles are summed; the tree of
# decays uses them anew.
_A, _AQK, _V, _W, _DO, _R_HI, _R_LO, _DX_HI, _DX_LO = range(9)
_SLOTS = 9


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
    do: gradient of the output [B, T, H, V].
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
    "slots": blocks.smem((_SLOTS * C, C), dtype),
    "dgamma_C": plgpu.SMEM((K,), jnp.float32),
    "keys_loaded": plgpu.Barrier(num_arrivals=4, num_barriers=tiles),
    "A_loaded": plgpu.Barrier(num_arrivals=2),
    "values_loaded": plgpu.Barrier(num_arrivals=5),
    "met": plgpu.Barrier(num_arrivals=tiles),
  }
  names = tuple(scratch)

  def body(*refs):
    inputs, outputs, refs = refs[:12], refs[12:18], refs[18:]
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
  )(q, k, b, g, kinds, v, w, do, A, Aqk, states, dstates)


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

  def own(self, name):
    """This warpgroup's tile of a buffer; of S and dS, its channels."""
    return blocks.tile_of(self.s[name], self.wg)

  def slot(self, n):
    """Slot n of [C, C]."""
    return blocks.tile_of(self.s["slots"], n)

  def recomputed(self):
    """See blocks.recomputed."""
    return blocks.recomputed(self.s["kinds"].at[self.wg])

  def afresh(self, step):
    """Runs a step with masks and addresses of its own."""
    with self.recomputed():
      step()

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
    sums = self.over_values()
    through_the_tree(self, *sums)
    plgpu.wait_smem_to_gmem(0)

  def fetch_values(self, j):
    """Starts the loads of value tile j."""
    values, c = pl.ds(j * TILE, TILE), (self.row, self.h, self.c)
    loaded = self.s["values_loaded"]
    for n, slot in ((5, _V), (6, _W), (7, _DO)):
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
      for n, slot in ((8, _A), (9, _AQK)):
        plgpu.copy_gmem_to_smem(
          self.inputs[n].at[c], self.slot(slot), s["A_loaded"]
        )

    @pl.when(self.last)
    def _():
      self.fetch_values(jnp.int32(0))

    g = blocks.load_global(
      self.inputs[3].at[(*self.tokens, self.h, self.channels)]
    )
    plgpu.barrier_wait(loaded)
    kinds = self.kinds()
    for name in "qkb":
      x = blocks.load(self.own(name))
      x = jnp.where(kinds == blocks.PADDING, jnp.zeros_like(x), x)
      self.own(name)[...] = x
    g = blocks.log_decay(g, kinds)
    blocks.store_split(g, *self.g_parts())
    plgpu.commit_smem()
    gamma = blocks.decay(blocks.prefix_span(), *self.g_parts())
    suffix = blocks.decay(blocks.suffix_span(), *self.g_parts())
    E_neg, Kd = self.own("E_neg"), self.own("Kd")
    k = self.load("k")
    E_neg[...] = (-gamma * self.load("b") * k).astype(E_neg.dtype)
    Kd[...] = (suffix * k).astype(Kd.dtype)
    plgpu.barrier_wait(s["A_loaded"])
    self.meet()

  def over_values(self):
    """Sums over value tiles; writes dv and dw.

    Returns:
      The products of `scores` [C, C], a tuple; then -dE, dQg, dKd [C, TILE]
      and dgamma_C [TILE] of this warpgroup's channels.
    """
    tile = blocks.zeros()
    dgamma_C = plgpu.layout_cast(
      jnp.zeros((TILE,), jnp.float32), blocks.ROWS.reduce(1)
    )
    sums = (
      (blocks.zeros(C, C),) * (3 - self.tiles),
      tile,
      tile,
      tile,
      dgamma_C,
    )

    if self.value_tiles > 1:
      return blocks.loop(self.value_tiles, self.value_tile, sums)
    for j in range(self.value_tiles):
      sums = self.value_tile(jnp.int32(j), sums)
    return sums

  def scores(self):
    """What this warpgroup multiplies with R^T: high and low parts.

    -dT = dX R^T and dAqk = dO R^T: one warpgroup computes both, of two the
    first computes -dT and the second dAqk, whose low part is zero.
    """
    dX, dO = (self.slot(_DX_HI), self.slot(_DX_LO)), self.slot(_DO)
    if self.tiles == 1:
      return [dX, (dO,)]
    low = blocks.load(dX[1])
    low = jnp.where(blocks.everywhere(self.first), low, jnp.zeros_like(low))
    return [(self.slot(jnp.where(self.first, _DX_HI, _DO)), low)]

  def value_tile(self, j, sums):
    """Adds one value tile to the sums of over_values."""
    s = self.s
    plgpu.barrier_wait(s["values_loaded"])
    pl.when(self.first)(lambda: self.afresh(self.recompute_R))
    pl.when(self.last)(lambda: self.afresh(self.compute_dX))
    self.meet()
    pl.when(self.last)(lambda: self.write_values(j))

    *sums, dgamma_C = sums
    with self.recomputed():
      sums = self.add_products(*sums)
    with self.recomputed():
      S_dS = blocks.load(self.own("S")).astype(jnp.float32)
      S_dS *= blocks.load(self.own("dS")).astype(jnp.float32)
      dgamma_C += S_dS.sum(axis=1)
    self.meet()

    @pl.when(self.last & (j + 1 < self.value_tiles))
    def _():
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dv and dw
      self.fetch_values(j + 1)

    return *sums, dgamma_C

  def add_products(self, scores, dE_neg, dQg, dKd):
    """Adds what R, dX, dO, S and dS of a value tile give."""
    R = self.slot(_R_HI), self.slot(_R_LO)
    dX = self.slot(_DX_HI), self.slot(_DX_LO)
    dO = self.slot(_DO)
    R_T = tuple(blocks.transposed(x) for x in R)
    scores = tuple(
      blocks.in_rows(blocks.dot(acc, *blocks.split_pairs(d, R_T)))
      for acc, d in zip(scores, self.scores(), strict=True)
    )
    S_T, dS_T = (blocks.transposed(self.own(x)) for x in ("S", "dS"))
    dE_neg = blocks.in_rows(blocks.dot(dE_neg, (dX[0], S_T), (dX[1], S_T)))
    dQg = blocks.in_rows(blocks.dot(dQg, (dO, S_T)))
    dKd = blocks.dot(dKd, (R[0], dS_T), (R[1], dS_T))
    dE_neg, dQg, dKd = map(blocks.in_rows, (dE_neg, dQg, dKd))
    return tuple(map(blocks.in_rows, scores)), dE_neg, dQg, dKd

  def recompute_R(self):
    """R = A (Z - E S), into the slots of R."""
    R = self.slot(_R_HI), self.slot(_R_LO)
    A = self.slot(_A)
    v, w = (blocks.load(self.slot(n)).astype(jnp.float32) for n in (_V, _W))
    E = [
      tuple(blocks.tile_of(self.s[x], n) for x in ("E_neg", "S"))
      for n in range(self.tiles)
    ]
    X = v * w + blocks.dot(blocks.zeros(), *E)
    blocks.store_split(X, *R)
    plgpu.commit_smem()
    X_to_R = blocks.dot(blocks.zeros(), (A, R[0]), (A, R[1]))
    blocks.store_split(X_to_R, *R)
    plgpu.commit_smem()

  def compute_dX(self):
    """dX = A^T (Aqk^T dO + Kd dS), into the slots of dX."""
    dX = self.slot(_DX_HI), self.slot(_DX_LO)
    A_T = blocks.transposed(self.slot(_A))
    Aqk_T = blocks.transposed(self.slot(_AQK))
    Kd = [
      tuple(blocks.tile_of(self.s[x], n) for x in ("Kd", "dS"))
      for n in range(self.tiles)
    ]
    dR = blocks.dot(blocks.zeros(), (Aqk_T, self.slot(_DO)), *Kd)
    blocks.store_split(dR, *dX)
    plgpu.commit_smem()
    dR_to_dX = blocks.dot(blocks.zeros(), (A_T, dX[0]), (A_T, dX[1]))
    blocks.store_split(dR_to_dX, *dX)
    plgpu.commit_smem()

  def write_values(self, j):
    """dv = w*dX, dw = v*dX; they take the place of v and w."""
    values = pl.ds(j * TILE, TILE)
    # dX is loaded twice: with both gradients in registers there are too few.
    with self.recomputed():
      dv = self.load_dX() * blocks.load(self.slot(_W)).astype(jnp.float32)
      dv = dv.astype(self.slot(_V).dtype)
    with self.recomputed():
      dw = self.load_dX() * blocks.load(self.slot(_V)).astype(jnp.float32)
      self.slot(_W)[...] = dw.astype(self.slot(_W).dtype)
      self.slot(_V)[...] = dv
    plgpu.commit_smem()
    for n, slot in ((4, _V), (5, _W)):
      plgpu.copy_smem_to_gmem(
        self.slot(slot),
        self.outputs[n].at[(*self.tokens, self.h, values)],
      )

  def load_dX(self):
    """dX of the value tile."""
    high, low = (blocks.load(self.slot(n)) for n in (_DX_HI, _DX_LO))
    return high.astype(jnp.float32) + low.astype(jnp.float32)

  def write_key(self, n, x, staging):
    """Writes a gradient of q, k or b (result n); padding has none."""
    real = self.kinds() != blocks.PADDING
    staging[...] = jnp.where(real, x, 0.0).astype(staging.dtype)
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
