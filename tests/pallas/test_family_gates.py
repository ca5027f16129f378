"""Gates with one channel per head, in kernels that compute the gates.

Broadcasting happens before the kernels: results and gradients must be those of
"xla", which computes the gates as arrays, within twice its own error.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gdn2_jax.model.mixers import gdn2
from gdn2_jax.model.mixers.gdn2 import GDN2Config, GDN2Mixer
from tests.numerics import rel_rms
from tests.pallas.gdn2.test_chunk_kernels import CONTRACT, interpreted

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("settings", [{"gates": "tied"}, {"decay": "scalar"}])
def test_outputs_and_gradients(settings, monkeypatch):
  def mixer(implementation, dtype="bfloat16"):
    config = GDN2Config(
      num_heads=1,
      key_dim=64,
      value_dim=64,
      implementation=implementation,
      **settings,
    )
    return GDN2Mixer(config, dtype=dtype)

  x = 2 * jax.random.normal(jax.random.key(1), (1, 70, 32), jnp.bfloat16)
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
      error, rounding = rel_rms(actual, leaf), rel_rms(arrays, leaf)
      assert error <= CONTRACT * rounding, (name, error, rounding)
