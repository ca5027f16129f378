"""Means on the device are those of the gates that are collected."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.analysis.gate_means import gate_means
from tests.analysis.test_gates import (
  SEGMENTS,
  collected,
  config_of,
  parameters,
)
from tests.model.models import small_config, tokens_of


def test_means_are_those_of_the_gates():
  found = gate_means(config_of(), parameters(), tokens_of(2, 8), SEGMENTS)
  layers = collected()
  assert list(found) == [layer.layer for layer in layers] == [0, 2]
  real = SEGMENTS != 0
  for layer in layers:
    half_lives = math.log(2) / -layer.g[real].mean(0)
    want = {
      "half_life": np.exp(np.log(half_lives).mean()),
      "erase": layer.b[real].mean(),
      "write": layer.w[real].mean(),
    }
    assert found[layer.layer] == pytest.approx(want, rel=1e-4)


def test_without_gates_there_is_nothing_to_measure():
  tokens = jnp.zeros((1, 4), jnp.int32)
  assert gate_means(small_config("S"), {}, tokens, tokens) == {}
