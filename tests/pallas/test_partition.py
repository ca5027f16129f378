"""Kernel calls under vmap and on a mesh, with stand-ins for the kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gdn2_jax.kernels import target
from gdn2_jax.pallas.gdn2 import api as mosaic_gpu
from gdn2_jax.pallas.partition import fingerprint, over_batch_and_heads
from tests import kernel_stand_in, numerics

TOKENS, STATES = P("data", None, "heads"), P("data", "heads")
GATHERS = ("all-gather", "all-to-all", "collective-permute")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
  monkeypatch.setattr(mosaic_gpu, "forward", kernel_stand_in.forward)
  monkeypatch.setattr(mosaic_gpu, "backward", kernel_stand_in.backward)


def make_mesh(*shape):
  names = ("data", "heads")
  return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 2)


def put(mesh, spec, x):
  return jax.device_put(x, NamedSharding(mesh, spec))


def arrays_of(rng, B=4, T=64, H=2, K=64, V=64):
  case = numerics.make_case(rng, B=B, T=T, H=H, K=K, V=V, dtype=jnp.bfloat16)
  names = (*numerics.INPUTS, "initial_state")
  return [jnp.asarray(case[name]) for name in names]


def kinds_of(B, T):
  kinds = np.ones((B, T), np.int32)
  kinds[1, T // 2] = 2
  kinds[0, T // 3 : T // 2] = 0
  return jnp.asarray(kinds)


def loss_of(kinds):
  def loss(*inputs):
    o, final = mosaic_gpu.gdn2_mosaic_gpu(*inputs, kinds, 0.125)
    return jnp.sum(jnp.sin(o.astype(jnp.float32))) + jnp.sum(jnp.sin(final))

  return loss


def gradient_of(kinds):
  return jax.grad(loss_of(kinds), argnums=tuple(range(7)))


def assert_equal(actual, expected):
  for x, y in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    # Float32 sums in another order may round to the neighbouring bfloat16.
    low = jnp.result_type(y) == jnp.bfloat16
    assert numerics.rel_rms(x, y) < (2**-9 if low else numerics.FLOAT32_BOUND)


def test_gradients_on_a_mesh_gather_nothing(rng):
  arrays, kinds = arrays_of(rng), kinds_of(4, 64)
  expected = jax.jit(gradient_of(kinds))(*arrays)
  mesh = make_mesh(4, 2)
  specs = [*(6 * [TOKENS]), STATES]
  arrays = [put(mesh, s, x) for s, x in zip(specs, arrays, strict=True)]
  gradient = jax.jit(gradient_of(put(mesh, P("data"), kinds)))
  with jax.set_mesh(mesh):
    compiled = gradient.lower(*arrays).compile()
    text = compiled.as_text()
    actual = compiled(*arrays)
  assert not [name for name in GATHERS if name in text]
  assert "bf16[1,64,1,64]" in text  # a kernel sees one row and one head
  assert_equal(actual, expected)
  for x, spec in zip(actual, specs, strict=True):
    assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)


@pytest.mark.slow
def test_a_mesh_without_a_split_of_heads_or_with_odd_rows(rng):
  arrays, kinds = arrays_of(rng, B=3, H=3), kinds_of(3, 64)
  expected = gradient_of(kinds)(*arrays)
  mesh = make_mesh(8, 1)
  assert_equal(
    jax.jit(gradient_of(kinds))(*(put(mesh, P(), x) for x in arrays)), expected
  )

  @jax.jit
  def uneven(*arrays):  # three rows over eight devices
    rows = NamedSharding(mesh, P("data"))
    arrays = [jax.lax.with_sharding_constraint(x, rows) for x in arrays]
    return gradient_of(kinds)(*arrays)

  assert_equal(uneven(*arrays), expected)


@pytest.mark.slow
def test_under_scan_and_remat_on_a_mesh(rng):
  arrays, kinds = arrays_of(rng), kinds_of(4, 64)

  def loss(state, *inputs):
    def layer(state, _):
      o, state = mosaic_gpu.gdn2_mosaic_gpu(*inputs, state, kinds, 0.125)
      return state, jnp.sum(o.astype(jnp.float32) ** 2)

    state, sums = jax.lax.scan(jax.checkpoint(layer), state, None, length=2)
    return jnp.sum(state**2) + jnp.sum(sums)

  *inputs, state = arrays
  gradient = jax.grad(loss, argnums=(0, 1, 4))
  expected = jax.jit(gradient)(state, *inputs)
  mesh = make_mesh(2, 2)
  state = put(mesh, STATES, state)
  inputs = [put(mesh, TOKENS, x) for x in inputs]
  with jax.set_mesh(mesh):
    compiled = jax.jit(gradient).lower(state, *inputs).compile()
  assert not [name for name in GATHERS if name in compiled.as_text()]
  assert_equal(compiled(state, *inputs), expected)


def test_the_first_pass_under_remat_saves_nothing(rng):
  arrays, kinds = arrays_of(rng, B=2), kinds_of(2, 64)

  def forwards(loss):
    text = jax.jit(jax.value_and_grad(loss)).lower(*arrays).as_text()
    options = {"erase_scale": 1.0, "scale": 0.125}
    names = {
      save: fingerprint(str(tuple(sorted({**options, "save": save}.items()))))
      for save in (False, True)
    }
    return {save: f"@gdn2_forward_{n}" in text for save, n in names.items()}

  assert forwards(loss_of(kinds)) == {False: False, True: True}
  remat = jax.checkpoint(loss_of(kinds))
  assert forwards(remat) == {False: True, True: True}


@pytest.mark.parametrize("axes", [("data", "heads"), ("data",)])
def test_shard_map(axes, rng):
  arrays, kinds = arrays_of(rng), jnp.ones((4, 64), jnp.int32)
  expected = jax.jit(jax.value_and_grad(loss_of(kinds), argnums=3))(*arrays)
  heads = "heads" if "heads" in axes else None
  tokens, states = P("data", None, heads), P("data", heads)

  def run(*inputs):
    return mosaic_gpu.gdn2_mosaic_gpu(*inputs, None, 0.125)

  sharded = jax.shard_map(
    run,
    mesh=make_mesh(2, 2),
    in_specs=(*(6 * [tokens]), states),
    out_specs=(tokens, states),
    axis_names=set(axes),
  )

  def loss(*arrays):
    o, final = sharded(*arrays)
    return jnp.sum(jnp.sin(o.astype(jnp.float32))) + jnp.sum(jnp.sin(final))

  actual = jax.jit(jax.value_and_grad(loss, argnums=3))(*arrays)
  assert_equal(actual, expected)


@pytest.mark.slow
def test_vmap_is_more_rows(rng):
  arrays, kinds = arrays_of(rng, B=2), kinds_of(2, 64)
  q, *others = arrays
  many = jnp.stack([q, -q, 2 * q])
  # Everything but q is the same for all: their gradients are sums.
  mapped = jax.vmap(gradient_of(kinds), in_axes=(0, *(6 * [None])))
  assert_equal(
    jax.jit(mapped)(many, *others),
    jax.tree.map(
      lambda *x: jnp.stack(x),
      *(gradient_of(kinds)(x, *others) for x in many),
    ),
  )

  def total(q, *others):
    run = jax.vmap(loss_of(kinds), in_axes=(0, *(6 * [None])))
    return jnp.sum(run(q, *others))

  grads = jax.grad(total, argnums=(0, 1, 6))(many, *others)
  parts = [gradient_of(kinds)(x, *others) for x in many]
  expected = (
    jnp.stack([p[0] for p in parts]),
    sum(p[1].astype(jnp.float32) for p in parts),
    sum(p[6] for p in parts),
  )
  for x, y in zip(grads, expected, strict=True):
    assert numerics.rel_rms(x, y) < 2**-7  # dk sums in bfloat16


@pytest.mark.parametrize(
  ("T", "K", "V"),
  [
    (1, 16, 16),
    pytest.param(70, 48, 80, marks=pytest.mark.deep),
    pytest.param(128, 96, 64, marks=pytest.mark.deep),
  ],
)
def test_padding_to_tiles_changes_nothing(T, K, V, rng):
  case = numerics.make_case(rng, T=T, K=K, V=V, dtype=jnp.bfloat16)
  kinds = kinds_of(2, T)[1:] if T > 2 else None

  def run(inputs, state, segment_ids, scale):
    del segment_ids
    return mosaic_gpu.gdn2_mosaic_gpu(*inputs, state, kinds, scale)

  if kinds is not None:
    case["segment_ids"] = np.cumsum(np.asarray(kinds) == 2, axis=1) + 1
  actual = numerics.evaluate(run, case)
  expected = numerics.evaluate(numerics.op("xla"), case)
  for name, x in expected.items():
    assert actual[name].dtype == x.dtype and actual[name].shape == x.shape
    # The same float32 sums in another order, rounded to bfloat16.
    assert numerics.rel_rms(actual[name], x) < 2**-8, name


def _twice(x, y, *, c):
  return c * x, {"y": [c * y, y.sum(axis=-1)]}


def test_equal_calls_are_compiled_once_and_named_after_their_source():
  traced = []

  def fun(x, y, *, c):
    traced.append(c)
    return _twice(x, y, c=c)

  def call(c, x, y):
    split = over_batch_and_heads(fun, ("bh", "b"), ("bh", "b"), c=c)
    return split(x, y)

  x, y = jnp.ones((2, 4, 3)), jnp.ones((2, 5))
  for _ in range(2):
    a, tree = call(2.0, x, y)
  np.testing.assert_array_equal(a, 2 * x)
  assert tree["y"][0].shape == (2, 5) and tree["y"][1].shape == (2,)
  before = len(traced)
  call(2.0, x, y)
  assert len(traced) == before
  call(3.0, x, y)
  assert len(traced) > before
  with target.use("compile"):
    before = len(traced)
    call(3.0, x, y)
    assert len(traced) > before
  lowered = jax.jit(functools.partial(call, 2.0)).lower(x, y).as_text()
  assert f"gdn2_fun_{fingerprint(str((('c', 2.0),)))}" in lowered
  assert fingerprint(str((("c", 3.0),))) not in lowered


def _opaque(x):
  """What XLA cannot see into, as it cannot see into a kernel."""
  shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
  return (jax.pure_callback(lambda x: np.cumsum(x, axis=1), shape, x),)


@pytest.mark.parametrize("split", [True, False])
def test_without_the_wrapper_xla_gathers(split):
  mesh = make_mesh(2, 2)
  x = put(mesh, TOKENS, np.ones((2, 3, 2, 5), np.float32))
  call = over_batch_and_heads(_opaque, ("b.h",), ("b.h",)) if split else _opaque
  # Only compiled: nothing keeps a callback alive inside of a partition.
  compiled = jax.jit(lambda x: call(x + 1)[0]).lower(x).compile().as_text()
  assert ("all-gather" in compiled) != split
  assert ("f32[1,3,1,5]{3,2,1,0} custom-call" in compiled) == split


def _add_to_layer(x, states, layer):
  return x + 1, states.at[layer].add(x)


def test_vmap_over_states_of_many_layers():
  x = jnp.arange(2.0 * 3 * 4).reshape(2, 3, 4)  # mapped axis, rows, heads
  states = jnp.arange(2.0 * 5 * 3 * 4).reshape(2, 5, 3, 4)
  run = over_batch_and_heads(_add_to_layer, ("bh", ".bh", ""), ("bh", ".bh"))
  y, new = jax.vmap(run, in_axes=(0, 0, None))(x, states, jnp.int32(3))
  np.testing.assert_array_equal(y, x + 1)
  np.testing.assert_array_equal(new, states.at[:, 3].add(x))
  with pytest.raises(NotImplementedError, match="which all rows share"):
    jax.vmap(run)(x, states, jnp.zeros(2, jnp.int32))
