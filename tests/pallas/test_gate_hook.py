"""A layer with gates of its own, down to the kernels, in the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gdn2_jax.model.mixers.gdn2 import GDN2Config, GDN2Mixer, init_gdn2_cache
from tests.numerics import rel_rms
from tests.pallas.gdn2.test_chunk_kernels import interpreted

pytestmark = pytest.mark.slow

# Results are rounded to bfloat16, the kernels' operands as well.
BOUND = 2**-7


class SquaredErase(GDN2Mixer):
  def gates(self, g, b, w):
    return g, b * b, w


def test_a_sequence_and_its_tokens_agree():
  types = {"dtype": "bfloat16"}
  config = GDN2Config(
    num_heads=1, key_dim=64, value_dim=64, implementation="mosaic_gpu"
  )
  xla = GDN2Config(num_heads=1, key_dim=64, value_dim=64, implementation="xla")
  x = 3 * jax.random.normal(jax.random.key(1), (1, 4, 32), jnp.bfloat16)
  params = nn.unbox(GDN2Mixer(xla, **types).init(jax.random.key(0), x))

  def run(mixer):
    y, _ = mixer.apply(params, x)
    cache, tokens = init_gdn2_cache(mixer.config, 1, mixer.dtype), []
    for t in range(x.shape[1]):
      token, cache = mixer.apply(params, x[:, t : t + 1], None, cache)
      tokens.append(token)
    return y, jnp.concatenate(tokens, axis=1)

  y, tokens = interpreted(run, SquaredErase(config, **types))
  want, _ = run(SquaredErase(xla, **types))
  standard, _ = run(GDN2Mixer(xla, **types))
  assert rel_rms(y, want) < BOUND
  assert rel_rms(tokens, want) < BOUND
  assert rel_rms(standard, want) > 4 * BOUND
  assert np.isfinite(np.asarray(y, np.float32)).all()
