"""Which implementation runs a call, why not another one, and the self-check."""

import json
import subprocess
import sys
import threading
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.kernels import choice, self_check, target
from gdn2_jax.ops.gdn2 import dispatch, reference
from gdn2_jax.ops.gdn2.api import (
  gdn2,
  gdn2_step,
  select_implementation,
  unsupported_reason,
)
from gdn2_jax.pallas.gdn2 import api as mosaic_gpu
from tests import kernel_stand_in, numerics

HOPPER = types.SimpleNamespace(
  device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0"
)
AMPERE = types.SimpleNamespace(
  device_kind="NVIDIA A100-SXM4-80GB", compute_capability="8.0"
)


def like(K=128, V=128, H=2, HV=2, dtype=jnp.bfloat16, step=False, **dtypes):
  """Shapes and dtypes of a call."""
  lead = (2,) if step else (2, 65)
  shapes = {n: (*lead, HV, V) if n in "vw" else (*lead, H, K) for n in "qkvgbw"}
  dtypes = dict.fromkeys("qkvbw", dtype) | {"g": jnp.float32} | dtypes
  return [jax.ShapeDtypeStruct(shapes[n], dtypes[n]) for n in "qkvgbw"]


@pytest.fixture
def hopper(monkeypatch):
  """Calls seem to run on a Hopper GPU, whose kernels are stand-ins."""
  monkeypatch.setattr(choice, "device_of", lambda x: HOPPER)
  use_kernels(monkeypatch)


def use_kernels(monkeypatch, forward=None, backward=None):
  forward = forward or kernel_stand_in.forward
  monkeypatch.setattr(mosaic_gpu, "forward", forward)
  backward = backward or kernel_stand_in.backward
  monkeypatch.setattr(mosaic_gpu, "backward", backward)


def test_without_a_gpu_xla_is_chosen_and_kernels_say_why(rng):
  assert select_implementation() == select_implementation(*like()) == "xla"
  reason = unsupported_reason("mosaic_gpu", *like())
  assert reason == "needs an NVIDIA GPU of compute capability 9.0, found cpu"
  assert unsupported_reason("xla", *like()) is None
  assert unsupported_reason("reference", *like()) is None
  case = numerics.make_case(rng, T=4)
  inputs = [jnp.asarray(case[n]) for n in numerics.INPUTS]
  with pytest.raises(NotImplementedError, match="gdn2: mosaic_gpu: needs an"):
    gdn2(*inputs, implementation="mosaic_gpu")
  with pytest.raises(NotImplementedError, match="gdn2_step: mosaic_gpu: need"):
    gdn2_step(
      *(x[:, 0] for x in inputs),
      jnp.asarray(case["initial_state"]),
      implementation="mosaic_gpu",
    )


def test_other_gpus_are_named(monkeypatch):
  monkeypatch.setattr(choice, "device_of", lambda x: AMPERE)
  reason = unsupported_reason("mosaic_gpu", *like())
  assert reason.endswith(
    "found NVIDIA A100-SXM4-80GB of compute capability 8.0"
  )
  assert select_implementation(*like()) == "xla"


@pytest.mark.parametrize(
  ("shapes", "reason"),
  [
    ({}, None),
    ({"dtype": jnp.float16, "K": 16, "V": 16}, None),
    ({"HV": 8, "V": 8}, None),  # 32 value channels per key head
    ({"K": 96, "V": 208}, None),
    ({"g": jnp.bfloat16}, None),
    ({"K": 144}, "K = 144, expected a multiple of 16 up to 128"),
    ({"K": 100}, "K = 100, expected a multiple of 16 up to 128"),
    ({"V": 24}, "24 value channels per key head, expected a multiple of 16"),
    ({"dtype": jnp.float32}, "dtype float32: tensor cores multiply 16-bit"),
    ({"b": jnp.float32}, "q, k, v, b and w differ in dtype: bfloat16, float32"),
    ({"g": np.float64}, "g is float64"),
  ],
)
def test_what_the_sequence_kernels_take(shapes, reason, hopper, monkeypatch):
  monkeypatch.setattr(self_check, "_enabled", False)
  call = like(**shapes)
  answer = unsupported_reason("mosaic_gpu", *call)
  assert answer is None if reason is None else answer.startswith(reason)
  chosen = select_implementation(*call)
  assert chosen == ("mosaic_gpu" if reason is None else "xla")


def test_the_step_kernel_takes_more(hopper, monkeypatch):
  monkeypatch.setattr(self_check, "_enabled", False)
  for shapes in ({}, {"K": 256}, {"dtype": jnp.float32}):
    call = like(step=True, **shapes)
    assert select_implementation(*call, step=True) == "mosaic_gpu"
  call = like(step=True, V=24)
  assert "24" in unsupported_reason("mosaic_gpu", *call, step=True)


@pytest.mark.parametrize("kind", ["compile", "interpret"])
def test_no_device_is_needed_where_none_is_meant(kind, monkeypatch):
  monkeypatch.setattr(self_check, "passes", None)  # it would need a device
  with target.use(kind):
    assert select_implementation(*like()) == "mosaic_gpu"
    assert select_implementation(*like(dtype=jnp.float32)) == "xla"
  assert select_implementation(*like()) == "xla"


def test_nothing_of_pallas_is_loaded_without_a_gpu():
  code = (
    "import sys, jax.numpy as jnp\n"
    "from gdn2_jax import gdn2\n"
    "x = jnp.ones((1, 2, 1, 16))\n"
    "gdn2(x, x, x, -x, x, x)\n"
    "heavy = 'gdn2_jax.pallas', 'gdn2_jax.triton', 'jax_triton'\n"
    "heavy += ('jax.experimental.pallas',)\n"
    "assert not [m for m in sys.modules if m.startswith(heavy)]\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
  "value_heads", [pytest.param(1, marks=pytest.mark.deep), 2]
)
def test_the_call_reaches_the_kernels(value_heads, hopper, rng):
  segments = np.array([[1] * 20 + [0] * 5 + [2] * 45, [3] * 70], np.int32)
  case = numerics.make_case(
    rng,
    B=2,
    T=70,
    K=64,
    V=32,
    value_heads=value_heads,
    dtype=jnp.bfloat16,
    segments=segments,
  )
  actual = numerics.evaluate(numerics.op("mosaic_gpu"), case)
  expected = numerics.evaluate(numerics.op("xla"), case)
  for name, x in expected.items():
    assert actual[name].dtype == x.dtype and actual[name].shape == x.shape
    # The same float32 sums in another order, rounded to bfloat16.
    assert numerics.rel_rms(actual[name], x) < 2**-8, name


def test_a_step_by_kernel_has_xlas_gradient(hopper, rng, monkeypatch):
  from gdn2_jax.pallas.gdn2 import step

  def stand_in(q, k, v, g, b, w, states, layer, scale):
    assert v.ndim == 3 and states.shape[2] == v.shape[1]
    wide = [
      jnp.repeat(x, v.shape[1] // q.shape[1], axis=1) for x in (q, k, g, b)
    ]
    q, k, g, b = wide
    return dispatch.step_of("xla")(q, k, v, g, b, w, states, layer, scale)

  monkeypatch.setattr(step, "gdn2_step_mosaic_gpu", stand_in)
  case = numerics.make_case(rng, B=2, T=1, V=32, value_heads=2)
  results = []
  for name in ("mosaic_gpu", "xla"):

    def run(inputs, state, segment_ids, scale, name=name):
      token = (x[:, 0] for x in inputs)
      o, state = gdn2_step(*token, state, scale=scale, implementation=name)
      return o[:, None], state

    results.append(numerics.evaluate(run, case))
  numerics.assert_close(*results)


@pytest.fixture
def triton(monkeypatch):
  """Calls seem to run on an Ampere GPU; the token scan stands in for Triton."""
  from gdn2_jax.triton import gdn2 as kernels
  from gdn2_jax.triton import support

  monkeypatch.setattr(choice, "device_of", lambda x: AMPERE)
  monkeypatch.setattr(self_check, "_enabled", False)
  for name in ("versions_reason", "device_reason"):
    monkeypatch.setattr(support, name, lambda: None)
  monkeypatch.setattr(kernels, "gdn2_triton", reference.gdn2_reference)
  monkeypatch.setattr(
    kernels, "gdn2_step_triton", reference.gdn2_step_reference
  )


def test_triton_says_why_not(rng):
  reason = unsupported_reason("triton", *like(step=True), step=True)
  assert reason is not None and unsupported_reason("triton", *like()) == reason
  case = numerics.make_case(rng, T=1)
  inputs = [jnp.asarray(case[n]) for n in numerics.INPUTS]
  with pytest.raises(NotImplementedError, match="gdn2: triton: "):
    gdn2(*inputs, implementation="triton")


def test_triton_is_chosen_for_a_step_only(triton):
  call = like(step=True)
  assert select_implementation(*call, step=True) == "triton"
  assert select_implementation(*like()) == "xla"
  assert unsupported_reason("triton", *like()) is None


@pytest.mark.parametrize(
  "value_heads", [pytest.param(1, marks=pytest.mark.deep), 2]
)
@pytest.mark.parametrize("segments", [None, np.array([[1, 1, 0, 2, 2]] * 2)])
def test_the_call_reaches_triton(value_heads, segments, triton, rng):
  case = numerics.make_case(
    rng, B=2, T=5, value_heads=value_heads, segments=segments
  )
  actual, expected = (
    numerics.evaluate(numerics.op(name), case, gradients=False)
    for name in ("triton", "reference")
  )
  numerics.assert_close(actual, expected)
  with pytest.raises(NotImplementedError, match="have no gradient"):
    numerics.evaluate(numerics.op("triton"), case)
  token = [jnp.asarray(case[n])[:, 0] for n in numerics.INPUTS]
  state = jnp.asarray(case["initial_state"])

  def loss(state, name):
    o, final = gdn2_step(*token, state, implementation=name)
    return jnp.sum(o**2) + jnp.sum(final**2)

  grads = [jax.grad(loss)(state, name) for name in ("triton", "reference")]
  assert numerics.rel_rms(*grads) < numerics.FLOAT32_BOUND


def count_runs(monkeypatch):
  runs = []
  compare = self_check._compare

  def counted(name, *args):
    runs.append((name, threading.current_thread()))
    return compare(name, *args)

  monkeypatch.setattr(self_check, "_compare", counted)
  return runs


@pytest.mark.slow
def test_right_kernels_are_chosen_in_silence_and_checked_once(
  checks, monkeypatch
):
  use_kernels(monkeypatch)
  runs = count_runs(monkeypatch)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    # Also while something is traced, on whatever mesh.
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    chosen = []

    @jax.jit
    def f(x):
      chosen.append(select_implementation(*like()))
      return jax.vmap(
        lambda x: (chosen.append(select_implementation(*like())), x)[1]
      )(x)

    with jax.set_mesh(mesh):
      jax.grad(lambda x: f(x).sum())(jnp.ones(2))
  assert chosen == ["mosaic_gpu", "mosaic_gpu"] and len(runs) == 1
  (key,) = json.loads(checks.read_text())
  for part in ("mosaic_gpu", "bfloat16", "cpu", jax.__version__):
    assert part in key
  # Another process reads the file; another dtype is another question.
  monkeypatch.setattr(self_check, "_passed", {})
  assert select_implementation(*like()) == "mosaic_gpu" and len(runs) == 1
  assert select_implementation(*like(dtype=jnp.float16)) == "mosaic_gpu"
  assert len(runs) == 2 and len(json.loads(checks.read_text())) == 2


@pytest.mark.parametrize(
  ("kernels", "says"),
  [
    ({"forward": kernel_stand_in.wrong_forward}, "o differs from 'xla' by 1"),
    ({"forward": kernel_stand_in.nan_forward}, "o differs from 'xla' by nan"),
    pytest.param(
      {"backward": kernel_stand_in.wrong_backward},
      r"dg differs .* by 2\.0e\+00",
      marks=pytest.mark.deep,
    ),
    ({"forward": kernel_stand_in.broken_forward}, "RuntimeError: no such chip"),
  ],
)
def test_wrong_kernels_warn_once_and_xla_runs(
  kernels, says, checks, monkeypatch
):
  use_kernels(monkeypatch, **kernels)
  runs = count_runs(monkeypatch)
  with pytest.warns(RuntimeWarning, match=f"mosaic_gpu fails .*{says}"):
    assert select_implementation(*like()) == "xla"
  assert select_implementation(*like()) == "xla"
  assert len(runs) == 1 and not checks.exists()


def test_one_of_several_processes_cannot_fall_back(checks, monkeypatch):
  use_kernels(monkeypatch, forward=kernel_stand_in.wrong_forward)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(RuntimeError, match="Other processes"):
    select_implementation(*like())


def test_off_means_not_called(checks, monkeypatch):
  use_kernels(monkeypatch, forward=kernel_stand_in.wrong_forward)
  runs = count_runs(monkeypatch)
  self_check.enable(False)
  assert select_implementation(*like()) == "mosaic_gpu" and not runs


def test_a_named_implementation_is_not_checked(checks, monkeypatch, rng):
  use_kernels(monkeypatch)
  runs = count_runs(monkeypatch)
  case = numerics.make_case(rng, T=4, V=16, dtype=jnp.bfloat16)
  inputs = [jnp.asarray(case[n]) for n in numerics.INPUTS]
  gdn2(*inputs, implementation="mosaic_gpu")
  assert not runs


def test_the_step_is_checked_by_itself(checks, monkeypatch):
  from gdn2_jax.pallas.gdn2 import step

  monkeypatch.setattr(step, "gdn2_step_mosaic_gpu", dispatch.step_of("xla"))
  call = like(step=True)
  assert select_implementation(*call, step=True) == "mosaic_gpu"
  (key,) = json.loads(checks.read_text())
  assert key.startswith("mosaic_gpu step | bfloat16")


@pytest.mark.slow
def test_a_cache_that_cannot_be_used_is_no_loss(checks, monkeypatch):
  use_kernels(monkeypatch)
  checks.parent.mkdir()
  checks.write_text("not json")
  assert select_implementation(*like()) == "mosaic_gpu"
  assert len(json.loads(checks.read_text())) == 1
  monkeypatch.setattr(self_check, "_passed", {})
  monkeypatch.setattr(self_check, "_path", lambda: checks / "below a file")
  assert select_implementation(*like()) == "mosaic_gpu"
