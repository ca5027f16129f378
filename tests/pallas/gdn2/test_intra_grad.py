"""The gradients of a chunk's inputs, alone, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.kernels import target
from gdn2_jax.pallas import blocks
from gdn2_jax.pallas.gdn2 import intra_grad
from tests import numerics
from tests.pallas.gdn2.test_chunk_kernels import (
  CONTRACT,
  error_ratios,
  interpreted,
)

C = 64
NAMES = ("dq", "dk", "db", "dg", "dv", "dw")


def make_chunks(seed, H, K, V, *, g, kinds=None, dtype=jnp.bfloat16):
  """Arguments of intra_grad for one chunk of H heads."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.standard_normal(shape)

  kinds = np.ones((1, C), np.int32) if kinds is None else kinds
  live = (kinds != blocks.PADDING)[:, :, None, None]
  key, value = (1, C, H, K), (1, C, H, V)
  arrays = [numerics.unit(normal(*key)) for _ in range(2)]
  arrays.append(numerics.sigmoid(normal(*key)))
  values = [normal(*value) * live for _ in range(3)]
  values[1] = numerics.sigmoid(values[1]) * live
  square = (1, H, 1, C, C)
  A = np.eye(C) + np.tril(normal(*square), -1) / 16
  Aqk = np.tril(normal(*square)) / 16
  states = [normal(1, H, 1, K, V) for _ in range(2)]
  low = [*arrays, *values, A, Aqk, *states]
  low = [jnp.asarray(x, jnp.float32).astype(dtype) for x in low]
  decays = jnp.asarray(rng.uniform(*g, key), jnp.float32)
  return [*low[:3], decays, jnp.asarray(kinds), *low[3:], K**-0.5]


def exact(q, k, b, g, kinds, v, w, do, A, Aqk, S, dS, scale):
  """The equations of README.md section 5 in float64, without sums of g."""
  q, k, b, g, v, w, do = (
    np.moveaxis(np.asarray(x, np.float64)[0], 1, 0)
    for x in (q, k, b, g, v, w, do)
  )
  A, Aqk, S, dS = (np.asarray(x, np.float64)[0, :, 0] for x in (A, Aqk, S, dS))
  padding, restart = (np.asarray(kinds)[0] == n for n in (0, 2))
  live = ~padding[:, None]
  q, k, b = (np.where(live, x, 0) for x in (q, k, b))
  a = np.where(live, np.where(restart[:, None], 0, np.exp(g)), 1)
  D = np.zeros((*q.shape[:1], C, C, q.shape[-1]))  # decay from s to r
  for r in range(C):
    D[:, r, r] = 1
    D[:, r, :r] = D[:, r - 1, :r] * a[:, r, None]
  prefix = np.cumprod(a, axis=1)
  e, T = b * k, np.swapaxes
  E, Kd = prefix * e, D[:, -1] * k
  R = A @ (w * v - E @ S)
  dX = T(A, 1, 2) @ (T(Aqk, 1, 2) @ do + Kd @ dS)
  dT = -np.tril(dX @ T(R, 1, 2), -1)
  dAqk = np.tril(do @ T(R, 1, 2))
  dE, dQg, dKd = -dX @ T(S, 1, 2), do @ T(S, 1, 2), R @ T(dS, 1, 2)
  to = "hrs,hrsk,hsk->hrk"
  de = np.einsum(to, dT, D, k) + prefix * dE
  dq = scale * (np.einsum(to, dAqk, D, k) + prefix * dQg)
  back = "hrs,hrsk,hrk->hsk"
  dk = np.einsum(back, dT, D, e) + scale * np.einsum(back, dAqk, D, q)
  dk += D[:, -1] * dKd + b * de
  # d(log-decay) of every pair, added to the tokens after s up to r.
  dD = dT[..., None] * e[:, :, None] + scale * dAqk[..., None] * q[:, :, None]
  dD = dD * D * k[:, None]
  dg = np.zeros_like(k)
  start = prefix * (dE * e + scale * dQg * q)
  end = dKd * Kd
  chunk = prefix[:, -1] * np.sum(S * dS, axis=-1)
  for i in range(C):
    dg[:, i] = dD[:, i:, :i].sum(axis=(1, 2)) + chunk
    dg[:, i] += start[:, i:].sum(axis=1) + end[:, :i].sum(axis=1)
  gradients = dq, dk, k * de, np.where(live, dg, 0), w * dX, v * dX
  return {
    n: np.moveaxis(x, 0, 1)[None] for n, x in zip(NAMES, gradients, strict=True)
  }


# One program for all tests of a shape: its compilation takes most of the time.
INTRA_GRAD = jax.jit(intra_grad.intra_grad, static_argnums=12)


def run(args):
  gradients = interpreted(INTRA_GRAD, *args)
  return dict(zip(NAMES, gradients, strict=False))


def special():
  kinds = np.ones((1, C), np.int32)
  kinds[0, [5, 20, 33]] = blocks.RESTART
  kinds[0, [0, 1, 40, 41, 42, 63]] = blocks.PADDING
  return kinds


@pytest.mark.slow
@pytest.mark.parametrize(
  ("K", "V", "g", "kinds"),
  [
    (64, 64, (-0.1, 0.0), None),
    (64, 64, (-5.0, 0.0), special()),
    (128, 128, (-1e-3, 0.0), None),
    (128, 128, (-200.0, 0.0), None),
  ],
)
def test_a_chunk(K, V, g, kinds):
  args = make_chunks(1, 1, K, V, g=g, kinds=kinds)
  ratios = error_ratios(run(args), exact(*args), jnp.bfloat16)
  # g is float32, but its gradient is a sum of products of 16-bit operands.
  assert not {n: r for n, r in ratios.items() if r > CONTRACT}, ratios


@pytest.mark.parametrize("rates", [False, True])
def test_traces_for_the_gpu(rates):
  args = make_chunks(3, 1, 64, 64, g=(-0.1, 0.0))
  if rates:
    args[3] = args[3].astype(args[0].dtype)

  def call(*args):
    options = {}
    if rates:
      options["rates"] = jnp.ones((1, 1, 2, 64))
    return intra_grad.intra_grad(*args, 0.125, **options)

  with target.use("compile"):
    shapes = [x.shape for x in jax.eval_shape(call, *args[:12])[:6]]
  assert shapes == [args[n].shape for n in (0, 1, 2, 3, 5, 6)]
