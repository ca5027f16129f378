"""Sequences in sections that run in parallel, in the interpreter.

The contract is that of test_chunk_kernels.py. Real calls are cut only if they
are long, so most tests force a number of sections.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.pallas import blocks
from gdn2_jax.pallas.gdn2 import intra, scan, scan_grad, sections
from tests import numerics
from tests.pallas.gdn2 import test_chunk_kernels
from tests.pallas.gdn2.test_chunk_kernels import (
  BFLOAT16,
  evaluated,
  interpreted,
  kernels,
)

C = blocks.C


@functools.cache
def program(function, **options):
  """The same compiled function for every call with the same options."""
  return jax.jit(functools.partial(function, **options))


@pytest.mark.parametrize(
  ("B", "H", "V", "T", "count"),
  [
    (8, 16, 128, 2048, 1),
    (8, 16, 128, 16384, 1),
    (1, 16, 128, 16384, 8),
    (1, 16, 128, 2048, 1),
    (2, 16, 128, 16384, 1),
    (1, 24, 128, 16384, 5),
    (1, 16, 128, 4096, 8),
    (1, 4, 64, 16384, 22),
    (1, 1, 64, 1 << 20, 181),
  ],
)
def test_sections_fill_the_gpu(B, H, V, T, count):
  assert scan.section_count(B, H, V, T // C) == count


def test_no_section_is_empty():
  for chunks in range(1, 600):
    for B in (1, 2, 3, 5):
      count = scan.section_count(B, 8, 128, chunks)
      assert count == 1 or count >= 3, (B, chunks)
      assert (count - 1) * -(-chunks // count) < chunks, (B, chunks)


def make_keys(rng, chunks, K):
  """Key-side operands of scan for one head, as large as those of intra."""

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape) / 8, BFLOAT16)

  wide = [normal(1, 1, chunks, C, K) for _ in range(3)]
  Aqk, A = (jnp.tril(normal(1, 1, chunks, C, C)) for _ in range(2))
  gamma_C = rng.uniform(0, 1, (1, 1, chunks, K))
  return *wide, Aqk, A, jnp.asarray(gamma_C, jnp.float32)


def make_values(rng, chunks, *leading):
  """v, w and float32 states [1, 1, *leading, 64, 64]."""
  v, w = (
    jnp.asarray(rng.standard_normal((1, chunks * C, 1, 64)), BFLOAT16)
    for _ in range(2)
  )
  states = rng.standard_normal((1, 1, *leading, 64, 64))
  return v, w, jnp.asarray(states, jnp.float32)


def affine_map(keys, chunks):
  """Exact P and, for given Z, U of a range of chunks."""
  Y_neg, _, Kd, _, A, gamma_C = (np.asarray(x, np.float64)[0, 0] for x in keys)

  def run(S, Z=None):
    for c in chunks:
      R = Y_neg[c] @ S
      if Z is not None:
        R += A[c] @ Z[c * C : (c + 1) * C]
      S = gamma_C[c][:, None] * S + Kd[c].T @ R
    return S

  return run


def test_start_states(rng):
  # Three sections of one chunk: the last state takes P and U of the second.
  keys = make_keys(rng, 3, 64)
  Y_neg, _, Kd, _, A, gamma_C = keys
  v, w, state = make_values(rng, 3)
  starts = interpreted(
    sections.start_states, Y_neg, Kd, A, gamma_C, v, w, state, sections=3
  )
  Z = (np.asarray(v, np.float64) * np.asarray(w, np.float64))[0, :, 0]
  first, second, third = np.asarray(starts, np.float64)[0, 0]
  np.testing.assert_array_equal(first, state[0, 0])
  # The rounding of `state` in Y S, and only that of hi + lo.
  exact = affine_map(keys, [0])(first, Z)
  assert numerics.rel_rms(second, exact) < 2**-9
  exact = affine_map(keys, [1])(second, Z)
  assert numerics.rel_rms(third, exact) < 2**-15


def test_scan_of_sections_is_that_of_its_parts(rng):
  # Three chunks in two sections: the last is shorter. Bit for bit.
  keys = make_keys(rng, 3, 64)
  v, w, states = make_values(rng, 3, 2)
  o, final, saved = interpreted(
    scan.scan, *keys, v, w, states, save=True, sections=2
  )
  for n, part in enumerate((slice(0, 2), slice(2, 3))):
    tokens = slice(part.start * C, part.stop * C)
    want = interpreted(
      scan.scan,
      *(x[:, :, part] for x in keys),
      *(x[:, tokens] for x in (v, w)),
      states[:, :, n],
      save=True,
    )
    np.testing.assert_array_equal(o[:, tokens], want[0])
    np.testing.assert_array_equal(saved[:, :, part], want[2])
  np.testing.assert_array_equal(final, want[1])


@pytest.mark.slow
@pytest.mark.parametrize("K", [64, 128])
def test_transitions(K, rng):
  # Sections of two chunks.
  keys = make_keys(rng, 6, K)
  Y_neg, _, Kd, _, _, gamma_C = keys
  hi, lo = interpreted(sections.transitions, Y_neg, Kd, gamma_C, sections=3)
  P = np.swapaxes(np.float64(hi) + np.float64(lo), -1, -2)[0, 0, 0]
  exact = affine_map(keys, [2, 3])(np.eye(K))
  assert numerics.rel_rms(P, exact) < 2**-16


@pytest.mark.slow
@pytest.mark.parametrize("token", [3 * C, 3 * C + 5])
def test_a_restart_makes_the_transition_zero(token, rng):
  case = numerics.make_case(rng, T=6 * C, H=1, K=64, V=64, dtype=BFLOAT16)
  kinds = np.ones((1, 6 * C), np.int32)
  kinds[0, token] = blocks.RESTART
  q, k, b, g = (jnp.asarray(case[n]) for n in "qkbg")
  Y_neg, _, Kd, _, _, gamma_C = interpreted(
    program(intra.intra, scale=1.0), q, k, b, g, jnp.asarray(kinds)
  )
  transitions = program(sections.transitions, sections=3)
  for x in interpreted(transitions, Y_neg, Kd, gamma_C):
    assert not np.any(x)


def exact_scans(keys, values, states):
  """o, final state and gradient of the initial state of scan and scan_grad."""
  f64 = functools.partial(np.asarray, dtype=np.float64)
  Y_neg, Qg, Kd, Aqk, A, gamma_C = (f64(x)[0, 0] for x in keys)
  v, w, do = (f64(x)[0, :, 0].reshape(-1, C, x.shape[-1]) for x in values)
  S, dS = (f64(x)[0, 0] for x in states)
  o = []
  for c in range(len(A)):
    R = A[c] @ (v[c] * w[c]) + Y_neg[c] @ S
    o.append(Qg[c] @ S + Aqk[c] @ R)
    S = gamma_C[c][:, None] * S + Kd[c].T @ R
  for c in reversed(range(len(A))):
    dR = Aqk[c].T @ do[c] + Kd[c] @ dS
    dS = gamma_C[c][:, None] * dS + Qg[c].T @ do[c] + Y_neg[c].T @ dR
  return np.concatenate(o), S, dS


@pytest.mark.deep
@pytest.mark.parametrize("g", [0.0, (-0.1, 0.0), (-5.0, 0.0), (-200.0, 0.0)])
def test_sections_are_as_accurate_as_the_whole(g, rng):
  case = numerics.make_case(rng, T=4 * C, H=1, K=64, V=64, g=g, dtype=BFLOAT16)
  x = {n: jnp.asarray(y) for n, y in case.items() if n[0] != "s"}
  q, k, b, g, v, w, do = (x[n] for n in (*"qkbgvw", "do"))
  kinds = jnp.ones((1, 4 * C), jnp.int32)
  keys = interpreted(
    program(intra.intra, scale=case["scale"]), q, k, b, g, kinds
  )
  Y_neg, Qg, Kd, Aqk, A, gamma_C = keys
  grad_keys = Y_neg, Qg, Kd, Aqk, gamma_C
  S, dS = x["initial_state"], x["dfinal_state"]
  exact = exact_scans(keys, (v, w, do), (S, dS))
  errors = []
  for count in (1, 4):
    cut = functools.partial(program, sections=count)
    if count > 1:
      S = interpreted(
        cut(sections.start_states), Y_neg, Kd, A, gamma_C, v, w, S
      )
      dS = interpreted(cut(sections.end_gradients), *grad_keys, do, dS)
    o, final, _ = interpreted(cut(scan.scan, save=False), *keys, v, w, S)
    _, dinitial = interpreted(cut(scan_grad.scan_grad), *grad_keys, do, dS)
    actual = o[0, :, 0], final[0, 0], dinitial[0, 0]
    errors.append([*map(numerics.rel_rms, actual, exact)])
  whole, cut = np.array(errors)
  # Start states are rounded as those of the whole; 1.2 allows for chance.
  assert (cut <= 1.2 * whole).all(), (whole, cut)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("T", "K", "V", "count"),
  [
    pytest.param(256, 128, 128, 4, marks=pytest.mark.deep),
    pytest.param(300, 64, 128, 3, marks=pytest.mark.deep),
  ],
)
def test_contract(T, K, V, count, rng, cut):
  case = numerics.make_case(
    rng, T=T, H=1, K=K, V=V, g=(-0.1, 0.0), dtype=BFLOAT16
  )
  cut(count)
  test_chunk_kernels.check(case)


@pytest.mark.deep
@pytest.mark.slow
def test_float16(rng, cut):
  case = numerics.make_case(
    rng, T=256, H=1, K=64, V=64, dtype=jnp.float16, g=(-0.5, 0.0)
  )
  for name in ("initial_state", "dfinal_state"):
    case[name] /= 4  # as in test_chunk_kernels.test_float16
  cut(4)
  test_chunk_kernels.check(case)


@pytest.mark.slow
def test_documents_and_padding(rng, cut):
  # Restarts in the second section and at the start of the third, padding
  # between, and two documents that continue over a border.
  lengths = [100, 9, 83, 190]
  segments = np.repeat([1, 0, 2, 3], lengths)[None]
  case = numerics.make_case(
    rng, T=sum(lengths), H=1, K=64, V=64, dtype=BFLOAT16, segments=segments
  )
  exact = numerics.oracle(case)
  padding = np.s_[:, 100:109]
  for name in (*numerics.INPUTS, "do"):
    case[name][padding] = np.nan
  cut(3)
  actual = evaluated(kernels, case)
  ratios = test_chunk_kernels.error_ratios(actual, exact, BFLOAT16)
  assert max(ratios.values()) <= test_chunk_kernels.CONTRACT, ratios


@pytest.mark.deep
@pytest.mark.slow
def test_the_future_changes_no_bit(rng, cut):
  # A loss on the tokens before p, in the second of three sections. The same
  # call twice gives the same bits.
  p, T = 100, 192
  case = numerics.make_case(rng, T=T, H=1, K=64, V=64, dtype=BFLOAT16)
  case["do"][:, p:] = 0
  case["dfinal_state"][:] = 0
  cut(3)
  before, again = (evaluated(kernels, case) for _ in range(2))
  other = numerics.make_case(
    rng, T=T, H=1, K=64, V=64, dtype=BFLOAT16, g=(-40.0, 0.0)
  )
  for name in numerics.INPUTS:
    case[name][:, p:] = other[name][:, p:]
  case["v"][:, p:] *= 1000
  after = evaluated(kernels, case)
  for name in ("o", *numerics.GRADIENTS):
    x, y = (np.asarray(r[name], np.float32) for r in (before, after))
    np.testing.assert_array_equal(x, np.asarray(again[name], np.float32))
    past = ... if name.endswith("_state") else np.s_[:, :p]
    assert x[past].any(), name
    np.testing.assert_array_equal(x[past], y[past], err_msg=name)
    if name != "o" and not name.endswith("_state"):
      assert not y[:, p:].any(), name
