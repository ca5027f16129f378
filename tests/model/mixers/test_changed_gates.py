"""Gates changed from outside of a mixer, as a subclass would change them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from gdn2_jax.model.mixers.gate_hook import changed_gates, has_gate_hook
from gdn2_jax.model.mixers.gdn2 import GDN2Config, GDN2Mixer
from tests.model.models import small_config
from tests.numerics import rel_rms

CONFIG = GDN2Config(
  num_heads=1, key_dim=16, value_dim=16, implementation="reference"
)
BOUND = 1e-6


class SquaredErase(GDN2Mixer):
  def gates(self, g, b, w):
    return g, b * b, w


def half_write(path, g, b, w):
  return g, b, w / 2


def test_they_come_after_the_layers_own_and_end_with_the_context():
  x = jax.random.normal(jax.random.key(0), (1, 5, 16))
  standard = GDN2Mixer(CONFIG)
  params = nn.unbox(standard.init(jax.random.key(1), x))
  seen = []

  def square(path, g, b, w):
    seen.append(path)
    return g, b * b, w

  @jax.jit
  def runs(params):
    with changed_gates(square):
      squared = standard.apply(params, x)[0]
    with changed_gates(half_write):
      both = SquaredErase(CONFIG).apply(params, x)[0]
    with changed_gates(square), changed_gates(half_write):
      nested = standard.apply(params, x)[0]
    after = standard.apply(params, x)[0]
    want = SquaredErase(CONFIG).apply(params, x)[0]
    return after, squared, want, both, nested

  after, squared, want, both, nested = runs(params)
  assert rel_rms(squared, want) < BOUND
  assert rel_rms(squared, after) > 1e-3
  assert rel_rms(nested, both) < BOUND
  assert rel_rms(both, want) > 1e-3
  assert seen == [()] * 2


def test_kernels_with_gates_of_their_own_are_not_used():
  config = dataclasses.replace(CONFIG, implementation="")
  x = jnp.ones((1, 5, 16))
  mixer = GDN2Mixer(config)
  params = jax.eval_shape(mixer.init, jax.random.key(1), x)
  calls = []

  def change(path, g, b, w):
    calls.append(path)
    return g, b, w

  def run(params):
    with changed_gates(change):
      return mixer.apply(params, x)[0]

  jax.eval_shape(run, nn.unbox(params))
  assert calls == [()]


def test_mixers_with_the_hook():
  config = small_config("G")
  assert [x for x in "GKDEMNSA" if has_gate_hook(x, config)] == [*"GKDE"]
