"""Special cases of Eq. 10 against float64 vectors and their own recurrences."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.gdn2 import variants
from tests import numerics

pytestmark = pytest.mark.deep

VECTORS = pathlib.Path(__file__).parents[2] / "vectors"


def load_vector(name):
  with np.load(VECTORS / f"{name}.npz") as file:
    return dict(file)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
  ("name", "variant"),
  [("kda_tied", variants.kda), ("gdn_tied", variants.gated_deltanet)],
)
def test_vectors(name, variant, implementation):
  x = load_vector(name)
  o, state = variant(
    *(jnp.asarray(x[n]) for n in "qkv"),
    g=jnp.asarray(x["g"]),
    beta=jnp.asarray(x["beta"]),
    state=jnp.asarray(x["initial_state"]),
    implementation=implementation,
  )
  numerics.assert_close(
    {"o": o, "final_state": state},
    {n: x[n] for n in numerics.OUTPUTS},
  )


def make(rng, T=40):
  case = numerics.make_case(rng, B=2, T=T)
  per_head = case["g"].shape[:-1]
  scalars = {
    "g": rng.uniform(-1, 0, per_head).astype(np.float32),
    "beta": rng.uniform(0, 1, per_head).astype(np.float32),
    "dt": rng.uniform(0, 1, per_head).astype(np.float32),
    "lam": rng.uniform(0, 1, per_head).astype(np.float32),
  }
  return case, {n: jnp.asarray(x) for n, x in scalars.items()}


def test_deltanet_is_the_delta_rule(rng):
  case, scalars = make(rng)
  q, k, v, s = (
    case[n].astype(np.float64) for n in ("q", "k", "v", "initial_state")
  )
  beta = np.asarray(scalars["beta"], np.float64)[..., None]
  exact = np.zeros_like(v)
  for t in range(q.shape[1]):
    predicted = np.einsum("bhk,bhkv->bhv", k[:, t], s)
    delta = beta[:, t] * (v[:, t] - predicted)
    s = s + k[:, t][..., None] * delta[..., None, :]
    exact[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], s) / 4
  o, state = variants.deltanet(
    *(jnp.asarray(case[n]) for n in "qkv"),
    beta=scalars["beta"],
    state=jnp.asarray(case["initial_state"]),
    implementation="reference",
  )
  numerics.assert_close(
    {"o": o, "final_state": state}, {"o": exact, "final_state": s}
  )


def mamba_oracle(case, g, dt, dt_before, previous):
  """State space recurrences with a scalar decay, in float64."""
  q, k, v, s = (
    case[n].astype(np.float64) for n in ("q", "k", "v", "initial_state")
  )
  k_before, v_before = previous
  o = np.zeros_like(v)
  for t in range(q.shape[1]):
    s = np.exp(g[:, t])[..., None, None] * s
    for weight, key, value in (
      (dt[:, t], k[:, t], v[:, t]),
      (dt_before[:, t], k_before, v_before),
    ):
      write = key[..., None] * value[..., None, :]
      s = s + weight[..., None, None] * write
    k_before, v_before = k[:, t], v[:, t]
    o[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], s)
  return {"o": o, "final_state": s}


def test_mamba2(rng):
  case, scalars = make(rng)
  g, dt = (np.asarray(scalars[n], np.float64) for n in ("g", "dt"))
  nothing = case["k"][:, 0] * 0, case["v"][:, 0] * 0
  exact = mamba_oracle(case, g, dt, 0 * dt, nothing)
  o, state = variants.mamba2(
    *(jnp.asarray(case[n]) for n in "qkv"),
    g=scalars["g"],
    dt=scalars["dt"],
    state=jnp.asarray(case["initial_state"]),
    implementation="reference",
  )
  numerics.assert_close({"o": o, "final_state": state}, exact)


def test_mamba3_in_two_calls(rng):
  case, scalars = make(rng)
  g, dt, lam = (np.asarray(scalars[n], np.float64) for n in ("g", "dt", "lam"))
  previous = case["k"][:, 3] * 2, case["v"][:, 5]
  before = (1 - lam) * dt * np.exp(g)
  exact = mamba_oracle(case, g, lam * dt, before, previous)
  state, outputs = jnp.asarray(case["initial_state"]), []
  for tokens in (slice(0, 17), slice(17, None)):
    q, k, v = (jnp.asarray(case[n][:, tokens]) for n in "qkv")
    o, state = variants.mamba3(
      q,
      k,
      v,
      **{n: scalars[n][:, tokens] for n in ("g", "dt", "lam")},
      previous=previous,
      state=state,
      implementation="reference",
    )
    previous = k[:, -1], v[:, -1]
    outputs.append(o)
  numerics.assert_close(
    {"o": jnp.concatenate(outputs, axis=1), "final_state": state}, exact
  )


def test_mamba3_writes_nothing_across_a_restart(rng):
  case, scalars = make(rng)
  ids = np.repeat([[1, 2]], 20, axis=1).repeat(2, axis=0).astype(np.int32)
  arrays = [jnp.asarray(case[n]) for n in "qkv"]
  gates = {n: scalars[n] for n in ("g", "dt", "lam")}
  options = {"implementation": "reference"}
  packed, _ = variants.mamba3(*arrays, **gates, segment_ids=ids, **options)
  alone, _ = variants.mamba3(
    *(x[:, 20:] for x in arrays),
    **{n: x[:, 20:] for n, x in gates.items()},
    **options,
  )
  numerics.assert_close({"o": packed[:, 20:]}, {"o": alone})


def test_a_gate_of_the_wrong_shape_is_named(rng):
  case, scalars = make(rng)
  arrays = [jnp.asarray(case[n]) for n in "qkv"]
  with pytest.raises(ValueError, match="beta"):
    variants.deltanet(*arrays, beta=scalars["beta"][:, :3])
  with pytest.raises(ValueError, match=r"variants: g"):
    variants.mamba2(*arrays, g=jnp.asarray(case["g"]), dt=scalars["dt"])


def mimo_case(rng, T=24, R=3, H=2, HV=4, K=16, V=24):
  """Inputs of mamba3_mimo with two value heads to a key head, float32."""

  def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  return {
    "q": draw(2, T, R, H, K),
    "k": draw(2, T, R, H, K),
    "v": draw(2, T, R, HV, V),
    "g": -rng.uniform(0, 1, (2, T, H)).astype(np.float32),
    "dt": rng.uniform(0, 1, (2, T, H)).astype(np.float32),
    "lam": rng.uniform(0, 1, (2, T, H)).astype(np.float32),
    "state": draw(2, HV, K, V),
    "previous": (draw(2, R, H, K), draw(2, R, HV, V)),
  }


def mimo_oracle(case, ids):
  """Eq. 16 token by token in float64; a restart forgets the token before."""
  x = {n: np.asarray(case[n], np.float64) for n in case if n != "previous"}
  k_before, v_before = (a.astype(np.float64) for a in case["previous"])
  repeats = x["v"].shape[3] // x["k"].shape[3]
  o = np.zeros_like(x["v"])
  state = x["state"].copy()
  for row, row_ids in enumerate(ids):
    S, last = state[row], None
    write = np.einsum(
      "rhk,rhv->hkv",
      np.repeat(k_before[row], repeats, axis=1),
      v_before[row],
    )
    for t, segment in enumerate(row_ids):
      if segment == 0:
        continue
      if last is not None and segment != last:
        S, write = 0 * S, 0 * write
      last = segment
      g, dt, lam = (
        np.repeat(x[n][row, t], repeats)[:, None, None]
        for n in ("g", "dt", "lam")
      )
      q, k = (np.repeat(x[n][row, t], repeats, axis=1) for n in "qk")
      now = np.einsum("rhk,rhv->hkv", k, x["v"][row, t])
      S = np.exp(g) * (S + (1 - lam) * dt * write) + lam * dt * now
      write = now
      o[row, t] = np.einsum("rhk,hkv->rhv", q, S)
    state[row] = S
  return {"o": o, "final_state": state}


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_mamba3_mimo_with_segments_and_padding_anywhere(rng, implementation):
  case = mimo_case(rng)
  ids = np.ones((2, 24), np.int32)
  ids[0, [0, 5, 6, 13, 23]], ids[0, 14:20] = 0, 2
  ids[1] = 0
  exact = mimo_oracle(case, ids)
  for name in "qkv":
    case[name][ids == 0] = np.nan
  arrays = {n: jax.tree.map(jnp.asarray, x) for n, x in case.items()}
  qkv = [arrays.pop(name) for name in "qkv"]
  o, state = variants.mamba3_mimo(
    *qkv,
    **arrays,
    segment_ids=jnp.asarray(ids),
    implementation=implementation,
  )
  numerics.assert_close({"o": o, "final_state": state}, exact)
  np.testing.assert_array_equal(state[1], case["state"][1])


def test_mamba3_mimo_of_one_rank_is_mamba3(rng):
  case = mimo_case(rng, R=1)
  arrays = {n: jax.tree.map(jnp.asarray, x) for n, x in case.items()}
  qkv = [arrays.pop(name) for name in "qkv"]
  options = {"implementation": "reference"}
  mimo, mimo_state = variants.mamba3_mimo(*qkv, **arrays, **options)
  arrays["previous"] = tuple(x[:, 0] for x in arrays["previous"])
  siso, siso_state = variants.mamba3(
    *(x[:, :, 0] for x in qkv), **arrays, **options
  )
  np.testing.assert_array_equal(mimo[:, :, 0], siso)
  np.testing.assert_array_equal(mimo_state, siso_state)
  exact = mimo_oracle(case, np.ones((2, 24), np.int32))
  numerics.assert_close({"o": mimo, "final_state": mimo_state}, exact)


def test_mamba3_mimo_is_causal_bit_for_bit(rng):
  case, other = mimo_case(rng, T=80), mimo_case(rng, T=80)
  cut, outputs = 37, []

  @jax.jit
  def run(case):
    arrays = dict(case)
    qkv = [arrays.pop(name) for name in "qkv"]
    return variants.mamba3_mimo(*qkv, **arrays, implementation="xla")[0]

  for later in (case, other):
    mixed = {
      n: np.concatenate([case[n][:, :cut], later[n][:, cut:]], axis=1)
      for n in ("q", "k", "v", "g", "dt", "lam")
    }
    outputs.append(np.asarray(run(case | mixed)))
  np.testing.assert_array_equal(outputs[0][:, :cut], outputs[1][:, :cut])
  assert np.abs(outputs[0][:, cut] - outputs[1][:, cut]).max() > 0


def test_wrong_arguments_of_mamba3_are_named(rng):
  case = {n: jax.tree.map(jnp.asarray, x) for n, x in mimo_case(rng).items()}
  qkv = [case.pop(name) for name in "qkv"]
  with pytest.raises(ValueError, match=r"mamba3: q: got \(2, 24, 2, 16\)"):
    variants.mamba3_mimo(*(x[:, :, 0] for x in qkv), **case)
  with pytest.raises(ValueError, match=r"mamba3: q: got .* \[B, T, heads"):
    variants.mamba3(*qkv, **case)
  with pytest.raises(ValueError, match=r"mamba3: lam: got shape \(2, 23, 2\)"):
    variants.mamba3_mimo(*qkv, **(case | {"lam": case["lam"][:, 1:]}))
  with pytest.raises(ValueError, match="mamba3: k, v: got shapes"):
    variants.mamba3_mimo(qkv[0], qkv[1][:, :, :1], qkv[2], **case)
  with pytest.raises(ValueError, match="mamba3: scheme: got 'ring'"):
    variants.mamba3_mimo(*qkv, **case, scheme="ring")
