"""The kernel of a layer's token in the interpreter, against the same by XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.state.types import WriteEffect

from gdn2_jax.kernels import cases, self_check, target
from gdn2_jax.kernels.operands import LayerStep
from gdn2_jax.ops import layer_step as op
from gdn2_jax.pallas import layer_step
from tests import numerics
from tests.pallas.gdn2.test_step import interpret, kernels

W = 4
CACHE = ("tails_q", "tails_k", "tails_v", "states")
FLOAT32 = ("a_log", "dt_bias", "states")


def make_operands(rng, *, B, H, K, V, dtype, layers=3, layer=2, taps=W):
  """Random operands; every other number of the other layers is NaN."""

  def normal(name, shape):
    x = rng.standard_normal(shape)
    if name in CACHE:
      others = np.arange(layers) != layer
      x[others, ..., ::2] = np.nan
    wide = jnp.asarray(x, jnp.float32)
    return wide if name in FLOAT32 else wide.astype(dtype)

  heads = {"q": (H, K), "k": (H, K), "v": (H, V)}
  shapes = {name: (B, *heads[name]) for name in "qkv"}
  shapes |= {"f": (B, H, K), "b": (B, H, K), "w": (B, H, V), "z": (B, H, V)}
  shapes |= {f"taps_{n}": (taps, *head) for n, head in heads.items()}
  shapes |= {"a_log": (H,), "dt_bias": (H, K), "bias": (H, V), "weight": (V,)}
  for n, head in heads.items():
    shapes[f"tails_{n}"] = (layers, B, taps - 1, *head)
  shapes["states"] = (layers, B, H, K, V)
  arrays = {name: normal(name, shape) for name, shape in shapes.items()}
  return LayerStep(**arrays, layer=layer)


def run(p, **kwargs):
  """Results by the kernel, by name."""
  call = functools.partial(
    op.gdn2_layer_step, implementation="mosaic_gpu", **kwargs
  )
  y, cache = interpret(call, p)
  return {"y": y, **cache}


def exact(p, **kwargs):
  """Results by XLA in float32 from the same inputs, with one layer's cache."""
  here = {name: getattr(p, name)[p.layer][None] for name in CACHE}
  p = p._replace(layer=0, **here)
  p = LayerStep(*(x.astype(jnp.float32) for x in p[:-1]), p.layer)
  y, cache = op.gdn2_layer_step(p, implementation="xla", **kwargs)
  return {"y": y, **{name: x[0] for name, x in cache.items()}}


def bits(x):
  x = np.asarray(x)
  return x.view(f"uint{8 * x.dtype.itemsize}")


def assert_right(p, **kwargs):
  """Float32 accuracy; y may add no more than the rounding to its dtype."""
  actual, wanted = run(p, **kwargs), exact(p, **kwargs)
  assert actual["y"].dtype == p.v.dtype
  for name in CACHE:
    old, new = getattr(p, name), actual[name]
    assert new.dtype == old.dtype
    for n in range(len(old)):
      if n != p.layer:
        np.testing.assert_array_equal(bits(new[n]), bits(old[n]))
    actual[name] = new[p.layer]
  for name in CACHE[:3]:  # inputs that are moved on
    np.testing.assert_array_equal(
      np.asarray(actual[name], np.float32), wanted.pop(name)
    )
  bound = dict.fromkeys(wanted, numerics.FLOAT32_BOUND)
  if p.v.dtype != jnp.float32:
    rounded = wanted["y"].astype(p.v.dtype)
    floor = numerics.rel_rms(rounded, wanted["y"])
    bound["y"] = numerics.LOW_PRECISION_FACTOR * floor
  numerics.assert_close(actual, wanted, bound)


def test_a_token_equals_the_steps_of_the_layer(rng):
  p = make_operands(rng, B=1, H=1, K=128, V=128, dtype=jnp.bfloat16)
  assert_right(p)


@pytest.mark.parametrize(
  ("B", "layer"), [(2, 0), pytest.param(1, 2, marks=pytest.mark.deep)]
)
def test_one_layer_of_the_cache_changes(B, layer, rng):
  p = make_operands(rng, B=B, H=2, K=64, V=64, dtype=jnp.float32, layer=layer)
  assert_right(p)


@pytest.mark.deep
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
  ("B", "K", "V", "layer"),
  [(3, 64, 64, 0), (3, 128, 128, 2), (1, 64, 128, 2), (1, 128, 64, 0)],
)
def test_every_shape_and_dtype(B, K, V, layer, dtype, rng):
  p = make_operands(rng, B=B, H=2, K=K, V=V, dtype=dtype, layer=layer)
  assert_right(p)


@pytest.mark.deep
@pytest.mark.parametrize("taps", [2, 3])
def test_other_options(taps, rng):
  p = make_operands(
    rng, B=1, H=1, K=64, V=64, dtype=jnp.float32, layers=1, layer=0, taps=taps
  )
  options = op.Options(erase_scale=2.0, activation="sigmoid", eps=1e-2)
  assert_right(p, options=options)


@pytest.mark.deep
def test_tokens_in_a_row(rng):
  p = make_operands(rng, B=1, H=1, K=64, V=64, dtype=jnp.float32)
  by_xla = p
  for n in range(4):
    tokens = [
      jnp.roll(x, n, axis=-1) for x in p[: LayerStep._fields.index("taps_q")]
    ]
    p, by_xla = (LayerStep(*tokens, *q[len(tokens) :]) for q in (p, by_xla))
    actual = run(p)
    y, cache = op.gdn2_layer_step(by_xla, implementation="xla")
    assert numerics.rel_rms(actual.pop("y"), y) < numerics.FLOAT32_BOUND
    p, by_xla = p._replace(**actual), by_xla._replace(**cache)


@pytest.mark.deep
def test_rows_of_vmap_are_rows(rng):
  p = make_operands(rng, B=2, H=1, K=64, V=64, dtype=jnp.float32)
  tokens = LayerStep._fields.index("taps_q")
  axes = LayerStep(*tokens * (0,), *(None,) * 7, *4 * (1,), None)

  def single(p):
    p = LayerStep(
      *(x[None] for x in p[:tokens]),
      *p[tokens : tokens + 7],
      *(x[:, None] for x in p[tokens + 7 : -1]),
      p.layer,
    )
    return op.gdn2_layer_step(p, implementation="mosaic_gpu")

  call = jax.vmap(single, in_axes=(axes,), out_axes=(0, 1))
  y, cache = interpret(call, p)
  together = run(p)
  np.testing.assert_array_equal(y[:, 0], together["y"])
  np.testing.assert_array_equal(
    bits(cache["states"][:, :, 0]), bits(together["states"])
  )


def test_the_call_has_a_gradient(rng):
  p = make_operands(
    rng, B=1, H=1, K=64, V=64, dtype=jnp.float32, layers=1, layer=0
  )

  def loss(*arrays):
    step = LayerStep(*arrays, p.layer)
    y, cache = op.gdn2_layer_step(step, implementation="mosaic_gpu")
    return y.sum() + cache["states"].sum()

  with target.use("compile"):
    gradients = jax.eval_shape(
      jax.grad(loss, argnums=range(len(p) - 1)), *p[:-1]
    )
  for x, gradient in zip(p, gradients, strict=False):
    assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)


def lowered(index=0):
  _, call, shapes = layer_step.aot_cases()[index]
  donated = range(LayerStep._fields.index("tails_q"), len(shapes) - 1)
  with target.use("compile"):
    traced = jax.jit(call, donate_argnums=tuple(donated)).trace(*shapes)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text, jax.make_jaxpr(call)(*shapes).jaxpr, shapes


def test_the_cache_is_updated_in_place():
  text, jaxpr, shapes = lowered()
  assert text.count("stablehlo.custom_call") == 1
  for n, name in enumerate(CACHE, start=1):
    operand = LayerStep._fields.index(name)
    assert f"output_tuple_indices = [{n}], operand_index = {operand}" in text
  # XLA may give an aliased call two buffers, one to read and one to write.
  [body] = kernels(jaxpr)
  inputs = set(body.invars[: len(shapes)])
  written = {e.input for e in body.effects if isinstance(e, WriteEffect)}
  assert written and not written & inputs


def test_what_is_compiled_ahead_of_time_is_supported():
  for _, call, shapes in layer_step.aot_cases():
    p = LayerStep(*shapes)
    assert layer_step.layer_step_unsupported_reason(p) is None
    y, *cache = jax.eval_shape(call, *shapes)
    assert (y.shape, y.dtype) == (p.v.shape, p.v.dtype)
    assert [x.shape for x in cache] == [getattr(p, n).shape for n in CACHE]


@pytest.mark.parametrize(
  ("changes", "word"),
  [
    ({"K": 48}, "K = 48"),
    ({"V": 256}, "V = 256"),
    ({"taps": 5}, "W = 5"),
    ({"dtype": jnp.int8}, "int8"),
  ],
)
def test_a_reason_for_what_is_not_supported(changes, word, rng):
  sizes = {"B": 1, "H": 1, "K": 64, "V": 64, "dtype": jnp.float32, "layers": 1}
  p = make_operands(rng, **(sizes | {"layer": 0} | changes))
  assert word in layer_step.layer_step_unsupported_reason(p)
  with (
    target.use("compile"),
    pytest.raises(NotImplementedError, match=f"mosaic_gpu: .*{word}"),
  ):
    op.gdn2_layer_step(p, implementation="mosaic_gpu")


def test_grouped_heads_and_mixed_dtypes_are_not_supported(rng):
  p = make_operands(
    rng, B=1, H=2, K=64, V=64, dtype=jnp.float32, layers=1, layer=0
  )
  grouped = p._replace(q=p.q[:, :1])
  reason = layer_step.layer_step_unsupported_reason(grouped)
  assert "2 value heads of 1 key heads" in reason
  mixed = p._replace(f=p.f.astype(jnp.bfloat16))
  reason = layer_step.layer_step_unsupported_reason(mixed)
  assert "bfloat16, float32" in reason


def test_the_case_of_the_self_check_fits_both():
  case = cases.layer_step(jnp.dtype(jnp.bfloat16))
  outputs = jax.eval_shape(
    lambda *p: case.outputs_of(op._run_xla, *p), *case.inputs
  )
  assert len(outputs) == len(case.names)
  p = LayerStep(*case.inputs, layer=1)
  assert layer_step.layer_step_unsupported_reason(p) is None


@pytest.mark.deep
def test_the_kernel_passes_its_self_check():
  case = cases.layer_step(jnp.dtype(jnp.bfloat16))
  actual = interpret(case.outputs_of, op._run_kernel, *case.inputs)
  wide = (x.astype(jnp.float32) for x in case.inputs)
  wanted = case.outputs_of(op._run_xla, *wide)
  bound = self_check._BOUND_EPS * jnp.finfo(jnp.bfloat16).eps
  for name, x, y in zip(case.names, actual, wanted, strict=True):
    assert numerics.rel_rms(x, y) < bound, name
