"""Kernels that compute norms and gates, in the interpreter, against float64.

Errors are at most twice those of norms and gates that are 16-bit arrays, with
"xla" behind them: float32 sums, rounded at the same places.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gdn2_jax.model.mixers import gdn2
from gdn2_jax.model.mixers.gdn2 import GDN2Config, GDN2Mixer
from gdn2_jax.ops.gdn2.fused_gates import Projections, gdn2_fused_gates
from tests import numerics
from tests.pallas.gdn2.test_chunk_kernels import CONTRACT, interpreted

pytestmark = pytest.mark.slow
BFLOAT16, FLOAT16 = jnp.bfloat16, jnp.float16
KEYS = ("q", "k", "f", "b")
NAMES = ("q", "k", "v", "f", "b", "w", "a_log", "dt_bias")


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def make_projections(rng, T, K, V, dtype=BFLOAT16):
  """Projections of one head, dt as a layer starts with, and cotangents."""
  p = {n: rng.standard_normal((1, T, 1, K)) for n in KEYS}
  p |= {n: rng.standard_normal((1, T, 1, V)) for n in "vw"}
  p = {n: np.array(jnp.asarray(x, dtype)) for n, x in p.items()}
  p["b"][0, ::7] += 6  # open gates, which a rounded gate cannot tell apart
  p["a_log"] = np.float32(rng.uniform(0, 2.7, 1))
  p["dt_bias"] = np.float32(np.log(np.expm1(rng.uniform(1e-3, 0.1, (1, K)))))
  return Projections(**p)


def truth(p, case, erase_scale):
  """Outputs and gradients in float64."""
  x = Projections(*(np.asarray(a).astype(np.float64) for a in p))
  norms = {
    n: np.sqrt((a**2).sum(-1, keepdims=True) + 1e-6)
    for n, a in (("q", x.q), ("k", x.k))
  }
  b, w, slope = map(sigmoid, (x.b, x.w, x.f + x.dt_bias))
  rate = -np.exp(x.a_log)[:, None]
  plus = np.logaddexp(0, x.f + x.dt_bias)
  inputs = {
    "q": x.q / norms["q"],
    "k": x.k / norms["k"],
    "v": x.v,
    "g": rate * plus,
    "b": erase_scale * b,
    "w": w,
  }
  exact = numerics.oracle(case | inputs)
  out = {n: exact[n] for n in ("o", "final_state", "dv", "dinitial_state")}
  for n in "qk":
    y, dy = inputs[n], exact[f"d{n}"]
    along = (y * dy).sum(-1, keepdims=True)
    out[f"d{n}"] = (dy - y * along) / norms[n]
  out["db"] = exact["db"] * erase_scale * b * (1 - b)
  out["dw"] = exact["dw"] * w * (1 - w)
  out["df"] = exact["dg"] * rate * slope
  out["da_log"] = (exact["dg"] * inputs["g"]).sum((0, 1, 3))
  out["ddt_bias"] = out["df"].sum((0, 1))
  return out


def run(implementation, p, case, erase_scale):
  o_and_state, pullback = jax.vjp(
    lambda p, state: gdn2_fused_gates(
      p,
      erase_scale=erase_scale,
      state=state,
      segment_ids=case["segment_ids"],
      implementation=implementation,
    ),
    jax.tree.map(jnp.asarray, p),
    jnp.asarray(case["initial_state"]),
  )
  do, dfinal = jnp.asarray(case["do"]), jnp.asarray(case["dfinal_state"])
  dp, dinitial = pullback((do, dfinal))
  out = {f"d{n}": x for n, x in dp._asdict().items()}
  o, final = o_and_state
  return out | {"o": o, "final_state": final, "dinitial_state": dinitial}


@pytest.mark.parametrize(
  ("T", "K", "V", "erase_scale", "dtype"),
  [
    (150, 64, 64, 1.0, BFLOAT16),
    (64, 128, 64, 2.0, BFLOAT16),
    pytest.param(64, 64, 64, 1.0, FLOAT16, marks=pytest.mark.deep),
  ],
)
def test_outputs_and_gradients(T, K, V, erase_scale, dtype, rng):
  padding = np.s_[:, 40:50]
  segments = np.full((1, T), 2, np.int32)
  segments[:, :40] = 1
  segments[padding] = 0
  case = numerics.make_case(
    rng, T=T, H=1, K=K, V=V, dtype=dtype, segments=segments
  )
  p = make_projections(rng, T, K, V, dtype)
  exact = truth(p, case, erase_scale)
  arrays = run("xla", p, case, erase_scale)
  for x in (*p[:6], case["do"]):
    x[padding] = np.nan
  actual = interpreted(run, "mosaic_gpu", p, case, erase_scale)
  for name in ("o", "dq", "dk", "dv", "df", "db", "dw"):
    x = np.asarray(actual[name], np.float32)
    assert not x[padding].any(), name
  ratios = {
    name: numerics.rel_rms(actual[name], x) / numerics.rel_rms(arrays[name], x)
    for name, x in exact.items()
  }
  # Measured: at most 1.57.
  assert max(ratios.values()) <= CONTRACT, ratios


@pytest.mark.deep
def test_in_sections(rng, cut):
  # Against the uncut kernels: the gradient of A_log is one number here, whose
  # error is a matter of luck in every implementation.
  T, K, V = 190, 64, 64
  case = numerics.make_case(rng, T=T, H=1, K=K, V=V, dtype=BFLOAT16)
  p = make_projections(rng, T, K, V)
  exact = truth(p, case, 1.0)
  args = run, "mosaic_gpu", p, case, 1.0
  whole = interpreted(*args)
  cut(3)
  parts = interpreted(*args)
  ratios = {
    name: numerics.rel_rms(parts[name], x) / numerics.rel_rms(whole[name], x)
    for name, x in exact.items()
  }
  # Measured: at most 1.07, of A_log.
  assert max(ratios.values()) <= 1.25, ratios


@pytest.mark.deep
@pytest.mark.parametrize("settings", [{"gates": "tied"}, {"decay": "scalar"}])
def test_gates_with_one_channel_per_head(settings, monkeypatch):
  # They are broadcast before the kernels.
  def mixer(implementation, dtype="bfloat16"):
    config = GDN2Config(
      num_heads=1,
      key_dim=64,
      value_dim=64,
      implementation=implementation,
      **settings,
    )
    return GDN2Mixer(config, dtype=dtype)

  x = 2 * jax.random.normal(jax.random.key(1), (1, 130, 32), jnp.bfloat16)
  params = nn.unbox(mixer("xla").init(jax.random.key(0), x))
  # The gates of an untrained layer hardly differ between tokens.
  params = jax.tree.map(lambda a: 6 * a if a.ndim > 1 else a, params)
  calls = []

  def spy(p, **options):
    calls.append([a.shape[-1] for a in (p.f, p.b, p.w)])
    return fused(p, **options)

  fused = gdn2.gdn2_fused_gates
  monkeypatch.setattr(gdn2, "gdn2_fused_gates", spy)

  def run(mixer):
    def loss(params, x):
      y, _ = mixer.apply(params, x)
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, y), (dparams, dx) = grad(params, x)
    return {"y": y, "dx": dx, **dparams["params"]}

  got = interpreted(run, mixer("mosaic_gpu"))
  tied = settings == {"gates": "tied"}
  assert calls and all(
    shape == ([64, 1, 1] if tied else [1, 64, 64]) for shape in calls
  )
  want, exact = run(mixer("xla")), run(mixer("xla", "float32"))
  names = {"beta_proj"} if tied else {"a_proj", "b_proj", "w_proj"}
  assert names <= got.keys()
  for name, tree in exact.items():
    for path, leaf in jax.tree.leaves_with_path(tree):
      actual, arrays = (
        dict(jax.tree.leaves_with_path(run[name]))[path] for run in (got, want)
      )
      assert np.isfinite(np.asarray(actual, np.float32)).all(), name
      error = numerics.rel_rms(actual, leaf)
      rounding = numerics.rel_rms(arrays, leaf)
      assert error <= CONTRACT * rounding, (name, error, rounding)
