"""What keeps the Triton kernels from running, and how a caller is told.

No GPU and no triton is needed: stand-ins say that they are there.
"""

import importlib.metadata
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.gdn2 import reference
from gdn2_jax.triton import gdn2, support

B, T, H, K, V = 2, 5, 2, 16, 24


def shapes(dtype=jnp.bfloat16, state_dtype=jnp.float32, B=B, H=H, K=K, V=V):
  keys = jax.ShapeDtypeStruct((B, T, H, K), dtype)
  values = jax.ShapeDtypeStruct((B, T, H, V), dtype)
  state = jax.ShapeDtypeStruct((B, H, K, V), state_dtype)
  return keys, keys, values, keys, keys, values, state


def install(monkeypatch, *, jax_version, **versions):
  def version(package):
    if package not in versions:
      raise importlib.metadata.PackageNotFoundError(package)
    return versions[package]

  monkeypatch.setattr(jax, "__version__", jax_version)
  monkeypatch.setattr(importlib.metadata, "version", version)


def install_working(monkeypatch, jax_version="0.12.0.1"):
  versions = {"jax-triton": "0.3.1", "triton": "3.6.0"}
  install(monkeypatch, jax_version=jax_version, **versions)


def put_device(monkeypatch, platform="gpu", capability="8.9"):
  device = types.SimpleNamespace(
    platform=platform, device_kind="a device", compute_capability=capability
  )
  monkeypatch.setattr(jax, "local_devices", lambda backend=None: [device])


@pytest.mark.parametrize(
  ("versions", "missing"),
  [({}, "jax-triton"), ({"jax-triton": "0.3.1"}, "triton")],
)
def test_a_missing_package_is_named(monkeypatch, versions, missing):
  install(monkeypatch, jax_version="0.12.0.1", **versions)
  put_device(monkeypatch)
  reason = support.unsupported_reason(*shapes())
  assert reason.startswith(f"{missing} is not installed")
  assert "gdn2-jax[triton]" in reason


@pytest.mark.parametrize(
  "numbers",
  [
    ("0.12.0.1", "0.4.1", "3.9.0"),
    ("0.11.2", "0.4.1", "3.7.1"),
    ("0.12.0.1", "0.3.1", "3.60.0"),
    ("0.12.0.1", "0.3.10", "3.6.0"),
    ("0.13.0", "0.3.1", "3.6.0"),
  ],
)
def test_versions_that_do_not_fit_are_all_named(monkeypatch, numbers):
  jax_version, jax_triton, triton = numbers
  versions = {"jax-triton": jax_triton, "triton": triton}
  install(monkeypatch, jax_version=jax_version, **versions)
  put_device(monkeypatch)
  reason = support.unsupported_reason(*shapes())
  found = f"jax {jax_version} with jax-triton {jax_triton} and triton {triton}"
  assert reason.startswith(f"{found} are not known to work together")
  assert "jax 0.12 with jax-triton 0.3.1 and triton 3.6 are" in reason


@pytest.mark.parametrize("jax_version", ["0.11.2", "0.12.0.1"])
@pytest.mark.parametrize("capability", ["8.0", "8.9", "9.0", "12.0"])
def test_no_reason_where_all_is_well(monkeypatch, jax_version, capability):
  install_working(monkeypatch, jax_version)
  put_device(monkeypatch, capability=capability)
  assert support.unsupported_reason(*shapes()) is None


def test_a_cpu_is_no_gpu(monkeypatch):
  install_working(monkeypatch)
  reason = support.unsupported_reason(*shapes())
  assert "needs an NVIDIA GPU" in reason and reason.endswith("is a cpu")


@pytest.mark.parametrize("capability", ["7.5", "gfx942", ""])
def test_other_gpus_are_refused(monkeypatch, capability):
  install_working(monkeypatch)
  put_device(monkeypatch, capability=capability)
  reason = support.unsupported_reason(*shapes())
  assert "compute capability 8.0 or newer" in reason
  assert (capability or "no compute capability") in reason


@pytest.mark.parametrize(
  ("arrays", "expected"),
  [
    (shapes(dtype=jnp.dtype("float64")), "q is float64"),
    (shapes(state_dtype=jnp.dtype("float64")), "state is float64"),
    (shapes(K=272), "K = 272"),
    (shapes(B=2**20, H=2**8, V=512), "B * H * V"),
  ],
)
def test_shapes_and_dtypes_are_refused(monkeypatch, arrays, expected):
  install_working(monkeypatch)
  put_device(monkeypatch)
  assert expected in support.unsupported_reason(*arrays)


@pytest.fixture
def launches(monkeypatch):
  """The token scan stands in for the kernels; lists what it is called with."""
  calls = []

  def step(scale, capability, *arrays):
    calls.append(arrays[6].shape)
    return reference.gdn2_step_reference(*arrays, scale)

  def sequence(scale, capability, *arrays):
    calls.append(arrays[6].shape)
    ids = arrays[7] if len(arrays) > 7 else None
    return reference.gdn2_reference(*arrays[:7], ids, scale)

  monkeypatch.setattr(gdn2, "_step", step)
  monkeypatch.setattr(gdn2, "_sequence", sequence)
  return calls


def random_inputs(rng, *lead):
  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  keys, values = (*lead, H, K), (*lead, H, V)
  q, k, g, b = (normal(*keys) for _ in range(4))
  v, w = normal(*values), normal(*values)
  return q, k, v, -jnp.abs(g), b, w, normal(lead[0], H, K, V)


def run_step(*arrays):
  return gdn2.gdn2_step_triton(*arrays, 0.25)


def run_sequence(*arrays, segment_ids=None):
  return gdn2.gdn2_triton(*arrays, segment_ids, 0.25)


@pytest.mark.parametrize("argument", range(7))
@pytest.mark.parametrize(
  ("run", "lead"), [(run_step, (B,)), (run_sequence, (B, T))]
)
def test_a_gradient_is_refused_by_name(launches, rng, run, lead, argument):
  arrays = random_inputs(rng, *lead)

  def loss(x):
    o, state = run(*arrays[:argument], x, *arrays[argument + 1 :])
    return jnp.sum(o) + jnp.sum(state)

  with pytest.raises(NotImplementedError, match='implementation="xla"'):
    jax.grad(loss)(arrays[argument])
  with pytest.raises(
    NotImplementedError, match=r"gdn2: triton: .* no gradient"
  ):
    jax.jit(lambda x: jax.jvp(loss, (x,), (x,)))(arrays[argument])
  assert np.isfinite(loss(arrays[argument])) and launches


@pytest.mark.parametrize("packed", [False, True])
def test_vmap_becomes_batch_rows(launches, rng, packed):
  arrays = random_inputs(rng, B, T)
  many = [jnp.stack([x, 0.5 * x, 2 * x]) for x in arrays]
  many[1] = arrays[1]  # one k for all
  ids = jnp.asarray([[1, 1, 0, 2, 2], [3, 0, 3, 3, 1]]) if packed else None

  def run(*arrays):
    return run_sequence(*arrays, segment_ids=ids)

  in_axes = tuple(None if x is arrays[1] else 0 for x in many)
  o, state = jax.vmap(run, in_axes)(*many)
  assert launches[-1] == (3 * B, H, K, V)
  for n in range(3):
    one = run(*(x if x is arrays[1] else x[n] for x in many))
    np.testing.assert_allclose(o[n], one[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state[n], one[1], rtol=1e-5, atol=1e-5)


def test_importing_the_package_imports_no_triton():
  code = (
    "import sys, gdn2_jax.triton.support, gdn2_jax.triton.gdn2\n"
    "import gdn2_jax.aot.triton\n"
    "assert not {'triton', 'jax_triton'} & set(sys.modules)\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
