"""Special cases of Eq. 10 against float64 vectors and their own recurrences."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.gdn2 import variants
from tests import numerics

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
