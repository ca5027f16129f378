"""The recurrence over 2, 4 and 8 devices equals one device."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from gdn2_jax.kernels import target
from gdn2_jax.ops.context.states import SCHEMES, choose_scheme, start_states
from gdn2_jax.ops.gdn2.api import gdn2
from gdn2_jax.ops.gdn2.sharded import affine_map
from tests.numerics import (
  INPUTS,
  assert_close,
  evaluate,
  make_case,
  oracle,
  rel_rms,
)

T = 48
TOKENS, WHOLE = PartitionSpec(None, "context"), PartitionSpec()


def make_mesh(devices):
  return jax.make_mesh(
    (devices,),
    ("context",),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:devices],
  )


def over_devices(devices, scheme=None, implementation="xla"):
  """The op over shards, called as tests.numerics.evaluate calls the op."""

  def run(inputs, state, segment_ids, scale):
    def local(inputs, state, segment_ids):
      return gdn2(
        *inputs,
        axis_name="context",
        scale=scale,
        state=state,
        segment_ids=segment_ids,
        implementation=implementation,
        scheme=scheme,
      )

    return jax.shard_map(
      local,
      mesh=make_mesh(devices),
      in_specs=(TOKENS, WHOLE, TOKENS),
      out_specs=(TOKENS, WHOLE),
    )(inputs, state, segment_ids)

  return run


def documents():
  """[4, 48]; with 8 devices every border is a multiple of 6."""
  ids = np.zeros((4, T), np.int32)
  ids[0] = np.repeat([1, 2, 3], (12, 29, 7))  # at a border, and inside
  ids[1, 3:30] = 5  # one document over many shards, padding on both sides
  ids[2] = 7  # one document
  ids[2, 12:25] = 0  # ... that goes on after shards of padding
  ids[3, :6] = 1  # the same id again after another one: a new document
  ids[3, 6:11] = 2
  ids[3, 12:] = 1
  return ids


@functools.cache
def packed_case():
  """Two value heads to a key head, a state, and its exact results."""
  rng = np.random.default_rng(3)
  case = make_case(rng, 4, T, 2, 16, 16, value_heads=2, segments=documents())
  return case, oracle(case)


@pytest.mark.parametrize(
  ("devices", "scheme", "implementation"),
  [
    (2, None, "xla"),
    pytest.param(4, "doubling", "reference", marks=pytest.mark.deep),
    pytest.param(8, "all_to_all", "xla", marks=pytest.mark.deep),
    (8, "ring", "reference"),
  ],
)
def test_documents_over_devices_equal_one_device(
  devices, scheme, implementation
):
  case, exact = packed_case()
  run = over_devices(devices, scheme, implementation)
  assert_close(evaluate(run, case), exact)


@pytest.mark.parametrize(
  ("decay", "implementation"),
  [((-5.0, -0.1), "xla"), (0.0, "reference"), (-200.0, "reference")],
)
def test_one_document_over_devices_equals_one_device(
  rng, decay, implementation
):
  case = make_case(rng, 2, T, 2, 16, 24, g=decay)
  run = over_devices(4, None, implementation)
  assert_close(evaluate(run, case), oracle(case))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("devices", [2, 3, 8])
@pytest.mark.parametrize("reverse", [False, True])
def test_schemes_give_the_start_of_every_shard(rng, devices, scheme, reverse):
  B, H, K, V = 3, devices, 16, 24
  M = rng.standard_normal((devices, B, H, K, K)).astype(np.float32) / 4
  U = rng.standard_normal((devices, B, H, K, V)).astype(np.float32)
  state = rng.standard_normal((B, H, K, V)).astype(np.float32)
  order = range(devices)[:: -1 if reverse else 1]
  want = {order[0]: state.astype(np.float64)}
  for r, after in itertools.pairwise(order):
    want[after] = M[r].astype(np.float64) @ want[r] + U[r]

  def local(M, U, state):
    # Only the first device of the chain knows the state.
    is_first = jax.lax.axis_index("context") == order[0]
    start = start_states(
      M[0],
      U[0],
      jnp.where(is_first, state, np.nan),
      axis_name="context",
      scheme=scheme,
      reverse=reverse,
    )
    return start[None]

  shards = PartitionSpec("context")
  got = jax.jit(
    jax.shard_map(
      local,
      mesh=make_mesh(devices),
      in_specs=(shards, shards, WHOLE),
      out_specs=shards,
    )
  )(M, U, state)
  np.testing.assert_array_equal(got[order[0]], state)
  assert rel_rms(got, np.stack([want[r] for r in range(devices)])) < 1e-6


def test_the_scheme_follows_from_the_size():
  chosen = [choose_scheme(None, *size) for size in ((2, 1), (4, 16), (16, 16))]
  assert chosen == ["ring", "all_to_all", "all_to_all"]
  chosen = [choose_scheme(None, *size) for size in ((64, 16), (4, 6))]
  assert chosen == ["doubling", "doubling"]


@pytest.mark.parametrize(
  ("scheme", "want"),
  [
    ("ring", {"collective-permute": 3}),
    ("all_to_all", {"all-to-all": 2}),
    ("doubling", {"collective-permute": 4}),  # U twice, M once, the state
  ],
)
def test_only_what_the_scheme_needs_is_sent(rng, scheme, want):
  """No collective but the scheme's, none that grows with the sequence."""

  def collectives(length):
    case = make_case(rng, 2, length, 2, 16, 16)
    inputs = tuple(jnp.asarray(case[n]) for n in INPUTS)
    ids = jnp.ones((2, length), jnp.int32)

    def outputs(inputs, ids):
      run = over_devices(4, scheme, "reference")
      return run(inputs, None, ids, None)[0]

    lowered = jax.jit(outputs).lower(inputs, ids)
    text = lowered.compile({"xla_backend_optimization_level": 0}).as_text()
    names = "all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"
    return sorted(re.findall(rf" = (.*) ({names})(?:-start)?\(", text))

  found = collectives(64)
  assert found == collectives(128)
  names = [name for _, name in found]
  # Five numbers per row and shard tell where documents end.
  gathered = [shape for shape, name in found if name == "all-gather"]
  assert [shape.split("{")[0] for shape in gathered] == ["s32[2,4,5]"]
  names.remove("all-gather")
  assert {name: names.count(name) for name in names} == want


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_passes_a_border_of_documents_or_goes_back(scheme):
  """To the bit: a restart makes the map of a shard exactly zero."""
  case, _ = packed_case()
  inputs = [jnp.asarray(case[n]) for n in INPUTS]
  state, ids = case["initial_state"], jnp.asarray(case["segment_ids"])
  run = jax.jit(over_devices(4, scheme, "reference"), static_argnums=3)
  before, _ = run(tuple(inputs), state, ids, None)
  inputs[2] = inputs[2].at[0, 12:41].mul(1e3)
  after, _ = run(tuple(inputs), 1e3 * state, ids, None)
  np.testing.assert_array_equal(after[0, 12 + 29 :], before[0, 12 + 29 :])
  assert (after[0, 12:41] != before[0, 12:41]).all()
  inputs[2] = inputs[2].at[0, :12].mul(1e3)  # up to the border of shards
  first, _ = run(tuple(inputs), state, ids, None)
  np.testing.assert_array_equal(first[0, 12:], after[0, 12:])
  after = first
  inputs[2] = inputs[2].at[:, 30:].set(5.0)
  last, _ = run(tuple(inputs), state, ids, None)
  np.testing.assert_array_equal(last[:, :30], after[:, :30])


def test_bfloat16_is_as_good_as_on_one_device(rng):
  case = make_case(rng, 2, T, 2, 16, 16, dtype=jnp.bfloat16)
  exact = oracle(case)

  def one_device(inputs, state, segment_ids, scale):
    return gdn2(*inputs, state=state, scale=scale, implementation="reference")

  floor = evaluate(one_device, case)
  bound = {n: 2 * rel_rms(floor[n], x) for n, x in exact.items()}
  got = evaluate(over_devices(4, None, "reference"), case)
  assert_close(got, exact, bound)


@pytest.mark.parametrize(
  ("scheme", "message"),
  [
    ("all_to_all", r"'all_to_all' for 3 rows \(B \* H\) on 2 devices"),
    ("tree", r"scheme: got 'tree', expected None or one of ring"),
  ],
)
def test_schemes_that_do_not_fit_are_refused(rng, scheme, message):
  case = make_case(rng, 3, 8, 1, 16, 16)
  inputs = tuple(case[n] for n in INPUTS)
  with pytest.raises(ValueError, match=message):
    over_devices(2, scheme)(inputs, None, None, None)


def test_one_shard_is_the_op(rng):
  case = make_case(rng, 1, 8, 1, 16, 16)
  inputs = tuple(case[n] for n in INPUTS)
  run = jax.jit(over_devices(1, None, "reference"), static_argnums=3)
  o, state = run(inputs, None, None, None)
  want, want_state = gdn2(*inputs, implementation="reference")
  np.testing.assert_array_equal(o, want)
  np.testing.assert_array_equal(state, want_state)


@pytest.mark.slow
@pytest.mark.parametrize("restart", [False, True])
def test_the_kernels_give_the_map_of_a_shard(rng, restart):
  """Interpreted, on one device: the interpreter knows no other."""
  ids = np.ones((1, 64), np.int32)
  if restart:
    ids[:, 40:] = 2
  case = make_case(
    rng, 1, 64, 1, 32, 32, dtype=jnp.bfloat16, g=(-0.05, 0.0), segments=ids
  )
  inputs = tuple(jnp.asarray(case[n]) for n in INPUTS)

  @functools.partial(jax.jit, static_argnames="name")
  def run(*inputs, name):
    documents = jnp.asarray(ids)
    return affine_map(*inputs, segment_ids=documents, implementation=name)

  with target.use("interpret"):
    M, U, reads = run(*inputs, name="mosaic_gpu")
  want_M, want_U, want_reads = run(*inputs, name="xla")
  # One rounding step of bfloat16: the kernels multiply 16-bit operands.
  assert rel_rms(U, want_U) < 2**-7
  assert rel_rms(reads, want_reads) < 2**-7
  if restart:
    np.testing.assert_array_equal(M, 0)
    np.testing.assert_array_equal(want_M, 0)
  else:
    assert np.abs(want_M).max() > 0.01 and rel_rms(M, want_M) < 2**-7
