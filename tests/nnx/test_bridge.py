"""The layer in NNX: the same numbers, training, decoding, sharding unasked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gdn2_jax.model.lm import LM
from gdn2_jax.model.mixers.gdn2 import GDN2Config, GDN2Mixer
from gdn2_jax.nnx import GDN2, to_nnx
from tests.model.models import small_config

pytestmark = pytest.mark.slow

CONFIG = GDN2Config(
  num_heads=2, key_dim=16, value_dim=16, implementation="reference"
)


class Squared(GDN2Mixer):
  def gates(self, g, b, w):
    return g, b * b, w


class Model(nnx.Module):
  """Somebody's model with the layer in it."""

  def __init__(self, rngs):
    self.inner = nnx.Linear(5, 24, rngs=rngs)
    self.mixer = GDN2(CONFIG, 24, rngs=rngs)
    self.outer = nnx.Linear(24, 1, rngs=rngs)

  def __call__(self, x, cache=None):
    y, cache = self.mixer(self.inner(x), cache=cache)
    return self.outer(y), cache


@pytest.fixture(scope="module")
def x():
  return jax.random.normal(jax.random.key(0), (2, 6, 5))


@pytest.mark.parametrize(
  "mixer", [Squared, pytest.param(GDN2Mixer, marks=pytest.mark.deep)]
)
def test_numbers_are_those_of_linen(mixer):
  x = jax.random.normal(jax.random.key(0), (2, 6, 24))
  layer = GDN2(CONFIG, 24, rngs=nnx.Rngs(3), mixer=mixer)
  params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
  y, cache = layer(x)
  want, _ = mixer(CONFIG).apply({"params": params}, x)
  assert cache is None
  np.testing.assert_array_equal(y, want)


def test_a_model_trains(x):
  model = Model(nnx.Rngs(1))
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
  target = jnp.cumsum(x[..., :1], axis=1)

  @nnx.jit
  def step(model, optimizer):
    def loss_fn(model):
      return jnp.mean((model(x)[0] - target) ** 2)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss

  losses = [float(step(model, optimizer)) for _ in range(30)]
  assert losses[-1] < 0.5 * losses[0]
  kernel = model.mixer.q_proj["kernel"]
  assert isinstance(kernel, nnx.Param) and kernel.shape == (24, 2, 16)


def test_decoding_with_a_cache(x):
  model = Model(nnx.Rngs(1))
  want, _ = model(x)

  @nnx.jit
  def decode(model, x, cache):
    return model(x, cache)

  cache = model.mixer.init_cache(2)
  _, cache = model(x[:, :4], cache)
  for t in (4, 5):
    y, cache = decode(model, x[:, t : t + 1], cache)
    np.testing.assert_allclose(y[:, 0], want[:, t], atol=1e-5)


def test_a_language_model():
  config = small_config("S")
  tokens = jnp.asarray([[1, 2, 3, 4]])
  model = to_nnx(LM(config), tokens, rngs=nnx.Rngs(0))
  logits, _ = model(tokens)
  assert logits.shape == (1, 4, config.vocab_size)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  want, _ = LM(config).apply({"params": params}, tokens)
  np.testing.assert_array_equal(logits, want)


def test_a_wrong_config_is_refused():
  with pytest.raises(ValueError, match=r"config.key_dim=8: expected 16 to 256"):
    GDN2(GDN2Config(key_dim=8), 24, rngs=nnx.Rngs(0))
