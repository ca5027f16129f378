"""Flat names: the same for every way to build a model, and bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gdn2_jax.interop.tree import (
  cast_params,
  flatten_params,
  param_specs,
  unflatten_params,
)
from gdn2_jax.model.lm import LM
from tests.model.models import small_config
from tests.random_params import random_params


def config_of(scan_layers=True, pattern="GS", **changes):
  return small_config(pattern, scan_layers=scan_layers, **changes)


@pytest.fixture(scope="module", params=[("G", "float32"), ("GGS", "bfloat16")])
def model(request):
  pattern, dtype = request.param
  config = config_of(pattern=pattern, param_dtype=dtype)
  return config, random_params(config)


def assert_same(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True
  ):
    assert isinstance(a, jax.Array) and a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_round_trip_is_bit_equal(model):
  config, params = model
  assert_same(unflatten_params(flatten_params(params, config), config), params)


def test_names_do_not_depend_on_scan_layers(model):
  config, params = model
  unrolled = dataclasses.replace(config, scan_layers=False)
  tensors = flatten_params(params, config)
  tree = unflatten_params(tensors, unrolled)
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  boxed = jax.eval_shape(LM(unrolled).init, jax.random.key(0), tokens)
  abstract = nn.unbox(boxed)["params"]
  assert jax.tree.structure(tree) == jax.tree.structure(abstract)
  for a, b in zip(
    jax.tree.leaves(tree), jax.tree.leaves(abstract), strict=True
  ):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
  back = flatten_params(tree, unrolled)
  assert list(back) == list(tensors)
  for name, value in tensors.items():
    np.testing.assert_array_equal(back[name], value, err_msg=name)
  assert_same(unflatten_params(back, config), params)


@pytest.fixture(scope="module")
def hybrid():
  config = config_of(pattern="GS")
  return config, random_params(config)


def test_names_are_those_of_the_docstring(hybrid):
  names = list(param_specs(hybrid[0]))
  assert names[0] == "embedding.table" and names[-1] == "head"
  mixers = {"A_log", "dt_bias", "q_proj.kernel", "g_up.bias", "o_norm"}
  assert {f"layers.0.mixer.{name}" for name in mixers} < set(names)
  assert "layers.1.mixer.q_proj.kernel" in names
  assert "layers.1.mixer.A_log" not in names
  assert {"layers.1.mlp.down.kernel", "final_norm.weight"} < set(names)


def test_float32_leaves_stay_float32(model):
  config, params = model
  dtypes = {name: spec.dtype for name, spec in param_specs(config).items()}
  assert dtypes["layers.0.mixer.A_log"] == jnp.float32
  assert dtypes["layers.0.mixer.q_proj.kernel"] == config.param_dtype
  rounded = cast_params(
    params, dataclasses.replace(config, param_dtype="float16")
  )
  mixer = rounded["groups"]["layer_0"]["mixer"]
  assert mixer["A_log"].dtype == mixer["dt_bias"].dtype == jnp.float32
  assert mixer["q_proj"]["kernel"].dtype == jnp.float16


def test_all_differences_are_listed(hybrid):
  config, params = hybrid
  tensors = flatten_params(params, config)
  bad = dict(tensors)
  del bad["layers.2.mixer.A_log"]
  bad["layers.4.mixer.A_log"] = tensors["layers.2.mixer.A_log"]
  bad["head"] = tensors["head"].T
  bad["final_norm.weight"] = tensors["final_norm.weight"].astype(np.float16)
  with pytest.raises(ValueError) as caught:
    unflatten_params(bad, config)
  for part in (
    "missing layers.2.mixer.A_log",
    "unexpected layers.4.mixer.A_log",
    "head: float32[61, 32], expected float32[32, 61]",
    "final_norm.weight: float16[32], expected float32[32]",
  ):
    assert part in str(caught.value)


def test_parameters_of_another_model_are_refused(hybrid):
  config, params = hybrid
  other = dataclasses.replace(config, num_layers=2)
  with pytest.raises(ValueError, match=r"unexpected layers\.2\."):
    flatten_params(params, other)
  with pytest.raises(ValueError, match="num_layers=1000000000"):
    param_specs(dataclasses.replace(config, num_layers=10**9))
