"""Collected gates against the parameters and the op; half-lives by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.analysis.gates import (
  collect_gates,
  decoupling,
  effective_memory,
  half_life,
)
from gdn2_jax.model.mixers.gdn2 import GDN2Config
from gdn2_jax.ops.gdn2.api import gdn2
from tests.model.models import small_config, tokens_of
from tests.random_params import random_params

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 8], np.int32)
SYMBOLS = ("q", "k", "v", "g", "b", "w", "o")


def config_of(pattern="GS", **changes):
  """A small model with the token scan, which compiles faster than chunks."""
  gdn2 = GDN2Config(
    num_heads=2,
    num_value_heads=4,
    key_dim=16,
    value_dim=24,
    implementation="reference",
  )
  return small_config(pattern, gdn2=gdn2, **changes)


@functools.cache
def parameters(pattern="GS"):
  return random_params(config_of(pattern))


@functools.cache
def collected(pattern="GS", **changes):
  config = config_of(pattern, **changes)
  return collect_gates(config, parameters(pattern), tokens_of(2, 8), SEGMENTS)


def test_layers_and_shapes():
  for pattern, layers in (("GS", [0, 2]), ("SG", [1, 3])):
    assert [r.layer for r in collected(pattern)] == layers
  r = collected()[0]
  assert r.q.shape == r.k.shape == r.g.shape == r.b.shape == (2, 8, 2, 16)
  assert r.v.shape == r.w.shape == r.o.shape == (2, 8, 4, 24)


def test_mamba2_layers_are_shown_as_an_op_that_erases_nothing():
  first, second = collected("M")
  assert (first.layer, second.layer) == (0, 1)
  np.testing.assert_array_equal(first.b, 0)
  assert first.q.shape == first.g.shape == (2, 8, 4, 16)
  # w = dt and g = A dt, both the same for all channels of a head.
  a_log = parameters("M")["groups"]["layer_0"]["mixer"]["A_log"]
  a = -np.exp(np.asarray(a_log)[0])
  np.testing.assert_allclose(first.g, a[:, None] * first.w, rtol=1e-6)


def test_gates_of_the_first_layer_follow_from_its_parameters():
  params, (record, _) = parameters(), collected()
  layer = jax.tree.map(
    lambda a: np.asarray(a, np.float64)[0], params["groups"]["layer_0"]
  )
  x = np.asarray(params["embedding"]["table"], np.float64)[tokens_of(2, 8)]
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
  x = x * layer["mixer_norm"]["weight"]
  p = layer["mixer"]

  def project(name):
    return np.einsum("btd,dhc->bthc", x, p[name]["kernel"])

  f = np.einsum("btd,dr->btr", x, p["f_down"]["kernel"])
  f = np.einsum("btr,rhc->bthc", f, p["f_up"]["kernel"])
  g = -np.exp(p["A_log"])[:, None] * np.log1p(np.exp(f + p["dt_bias"]))
  expected = {
    "b": 1 / (1 + np.exp(-project("b_proj"))),
    "w": 1 / (1 + np.exp(-project("w_proj"))),
    "g": g,
  }
  for name, value in expected.items():
    # Float32 sums of 32 products: a few ulp.
    np.testing.assert_allclose(
      getattr(record, name), value, rtol=1e-5, err_msg=name
    )


def test_outputs_are_the_op_on_the_collected_inputs():
  for r in collected():
    inputs = (r.q, r.k, r.v, r.g, r.b, r.w)
    o, _ = gdn2(*inputs, segment_ids=SEGMENTS, implementation="reference")
    # The same program on the same numbers, compiled alone.
    np.testing.assert_allclose(r.o, o, rtol=0, atol=1e-6)
    assert np.abs(r.o).max() > 1e-3
    assert not r.o[0, 7].any()


def test_an_unrolled_model_gives_the_same_records():
  params = dict(parameters())
  groups = params.pop("groups")
  for i in range(2):
    params[f"group_{i}"] = jax.tree.map(lambda a, i=i: a[i], groups)
  config = config_of(scan_layers=False)
  unrolled = collect_gates(config, params, tokens_of(2, 8), SEGMENTS)
  for ours, theirs in zip(unrolled, collected(), strict=True):
    assert ours.layer == theirs.layer
    for name in SYMBOLS:
      # Two programs for the same float32 sums.
      np.testing.assert_allclose(
        getattr(ours, name),
        getattr(theirs, name),
        rtol=1e-5,
        atol=1e-5,
        err_msg=name,
      )


def test_records_are_float32_whatever_the_model_computes_in():
  for record in collected(dtype="bfloat16", remat="full"):
    for name in SYMBOLS:
      assert getattr(record, name).dtype == np.float32, name


def test_a_model_without_the_layer_is_refused():
  with pytest.raises(ValueError, match=r"config\.pattern='S'"):
    collect_gates(small_config("S"), {}, tokens_of(1, 4))


def test_half_life_is_where_the_decay_reaches_one_half():
  g = -np.array([[0.5, 0.01], [3.0, 88.0]])
  tokens = half_life(g)
  np.testing.assert_allclose(np.exp(g * tokens), 0.5)
  assert half_life(np.array(-math.log(2))) == pytest.approx(1.0)
  # Signed zeros and the smallest number: infinite, never negative, no warning.
  np.testing.assert_array_equal(
    half_life(np.array([0.0, -0.0, -5e-324])), np.inf
  )
  assert half_life(jnp.float32(-200.0)) == pytest.approx(math.log(2) / 200)


@pytest.mark.parametrize("bad", [0.1, math.nan])
def test_half_life_refuses_growth_and_nan(bad):
  with pytest.raises(ValueError, match="g: a maximum of"):
    half_life(np.array([-1.0, bad]))


def test_effective_memory_multiplies_decays_and_skips_padding():
  g = np.zeros((1, 4, 1, 2), np.float32)
  g[0, :, 0, 0] = [0, 0, -3 * math.log(2), -99]
  memory = effective_memory(g, np.array([[1, 1, 2, 0]], np.int32))
  # Over three tokens the channel fell to 1/8: one halving per token.
  np.testing.assert_allclose(memory, [[1.0, np.inf]], rtol=1e-6)
  with pytest.raises(ValueError, match="segment_ids: all 0"):
    effective_memory(g, np.zeros((1, 4), np.int32))


def test_decoupling_is_zero_for_tied_gates_and_measures_each_freedom(rng):
  beta = rng.uniform(size=(2, 5, 2, 1))
  b = np.broadcast_to(beta, (2, 5, 2, 16))
  w = np.broadcast_to(beta.repeat(2, 2), (2, 5, 4, 24))
  tied = decoupling(b, w)
  for value in (tied.erase_spread, tied.write_spread, tied.gap):
    np.testing.assert_allclose(value, np.zeros(4), atol=1e-15)
  half = np.where(np.arange(16) % 2, 0.2, -0.2)
  free = decoupling(b + half, w)
  np.testing.assert_allclose(free.erase_spread, [0.2] * 4)
  np.testing.assert_allclose(free.gap, np.zeros(4), atol=1e-15)
  free = decoupling(b, w + 0.3)
  np.testing.assert_allclose(free.gap, [0.3] * 4)
  np.testing.assert_allclose(free.write_spread, np.zeros(4), atol=1e-15)
