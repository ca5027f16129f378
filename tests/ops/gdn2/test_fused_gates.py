"""Norms and gates of the layer: as arrays, and left to the kernels."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gdn2_jax.kernels import choice, self_check, target
from gdn2_jax.ops.gdn2.fused_gates import (
  Projections,
  activate,
  gdn2_fused_gates,
)
from gdn2_jax.pallas.gdn2 import api as mosaic_gpu
from tests import kernel_stand_in, numerics

HOPPER = types.SimpleNamespace(device_kind="H100", compute_capability="9.0")


@pytest.fixture
def hopper(monkeypatch):
  """Calls seem to run on a Hopper GPU, whose kernels are stand-ins."""
  monkeypatch.setattr(choice, "device_of", lambda x: HOPPER)
  monkeypatch.setattr(mosaic_gpu, "forward", kernel_stand_in.forward)
  monkeypatch.setattr(mosaic_gpu, "backward", kernel_stand_in.backward)


def make_projections(rng, B=2, T=70, H=2, HV=4, K=48, V=32):
  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

  return Projections(
    q=normal(B, T, H, K),
    k=normal(B, T, H, K),
    v=normal(B, T, HV, V),
    f=normal(B, T, H, K),
    b=normal(B, T, H, K),
    w=normal(B, T, HV, V),
    a_log=jnp.asarray(rng.uniform(0, 2, H), jnp.float32),
    dt_bias=jnp.asarray(rng.standard_normal((H, K)) - 3, jnp.float32),
  )


def loss_of(implementation, segment_ids, **options):
  def loss(p, state):
    o, state = gdn2_fused_gates(
      p,
      state=state,
      segment_ids=segment_ids,
      implementation=implementation,
      **options,
    )
    return jnp.sum(jnp.sin(o.astype(jnp.float32))) + jnp.sum(jnp.cos(state))

  return jax.value_and_grad(loss, argnums=(0, 1))


def test_gates_lie_in_their_ranges(rng):
  p = make_projections(rng)
  q, k, v, g, b, w = activate(p, erase_scale=2.0)
  for x in (q, k):
    norms = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
    np.testing.assert_allclose(norms, 1, atol=2**-7)
  assert v is p.v and g.dtype == jnp.float32 and (g < 0).all()
  assert 1 < b.max() <= 2 and b.min() >= 0
  assert w.min() >= 0 and w.max() <= 1
  np.testing.assert_array_equal(activate(p)[4] * 2, b)


@pytest.mark.slow
@pytest.mark.parametrize("erase_scale", [1.0, 2.0])
def test_the_kernels_get_projections_and_give_their_gradients(
  erase_scale, hopper, rng
):
  p = make_projections(rng)
  state = jnp.asarray(rng.standard_normal((2, 4, 48, 32)), jnp.float32)
  segment_ids = jnp.asarray([[1] * 20 + [0] * 5 + [2] * 45, [3] * 70])
  options = {"erase_scale": erase_scale}
  text = jax.jit(loss_of("mosaic_gpu", segment_ids, **options)).lower(p, state)
  assert "gdn2_forward" in text.as_text()
  actual = loss_of("mosaic_gpu", segment_ids, **options)(p, state)
  expected = loss_of("xla", segment_ids, **options)(p, state)
  for x, y in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape
    # The arrays of "xla" have been rounded to bfloat16, the stand-ins' not.
    assert numerics.rel_rms(x, y) < 2**-6


def rates_reach(monkeypatch, p, backward=kernel_stand_in.backward):
  """Whether a traced call gave the kernels projections, not arrays."""
  seen = []

  def forward(q, k, v, g, b, w, rates, *rest, **options):
    seen.append(rates is not None)
    return kernel_stand_in.forward(q, k, v, g, b, w, rates, *rest, **options)

  monkeypatch.setattr(mosaic_gpu, "forward", forward)
  monkeypatch.setattr(mosaic_gpu, "backward", backward)
  jax.eval_shape(lambda p: gdn2_fused_gates(p)[0], p)
  return seen[-1]


def test_what_differs_in_dtype_is_left_to_arrays(hopper, monkeypatch, rng):
  monkeypatch.setattr(self_check, "_enabled", False)
  p = make_projections(rng)
  assert rates_reach(monkeypatch, p)
  p = p._replace(f=p.f.astype(jnp.float32))
  assert not rates_reach(monkeypatch, p)


@pytest.mark.slow
def test_none_of_it_is_chosen_unless_it_proves_right(checks, monkeypatch):
  def without_rates(q, k, v, g, b, w, rates, *rest, **options):
    gradients = kernel_stand_in.backward(
      q, k, v, g, b, w, rates, *rest, **options
    )
    drates = gradients[6]
    if drates is not None:
      drates = drates * 2
    return (*gradients[:6], drates, gradients[7])

  p = make_projections(np.random.default_rng(0), HV=2, K=64, V=64)
  with pytest.warns(RuntimeWarning, match="gates fails its self-check.*dstate"):
    assert not rates_reach(monkeypatch, p, without_rates)
  monkeypatch.setattr(self_check, "_passed", {})
  assert rates_reach(monkeypatch, p)


def test_a_step_on_a_mesh_traces_the_real_kernels():
  """Splitting a call forbids constants in it; the interpreter never splits."""
  mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(AxisType.Auto,) * 2)
  p = make_projections(np.random.default_rng(0), HV=2, K=64, V=64)
  spec = NamedSharding(mesh, PartitionSpec("b", None, "h"))
  p = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=spec if x.ndim == 4 else None
    ),
    p,
  )
  state = jax.ShapeDtypeStruct((2, 2, 64, 64), jnp.float32)
  with target.use("compile"), jax.set_mesh(mesh):
    _, gradients = jax.eval_shape(loss_of("mosaic_gpu", None), p, state)
  for x, y in zip(gradients[0], p, strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
