"""The op against float64: decay, gates, lengths, segments.

Ground truth: the float64 recurrence of tests/numerics.py with its hand-written
adjoint. Every output and every gradient is compared by name.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.gdn2.api import gdn2
from tests import numerics

IMPLEMENTATIONS = ("reference", "xla")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("b", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(
  "g",
  [0.0, -1e-4, (-0.1, 0.0), (-5.0, -0.1), (-40.0, 0.0), (-200.0, 0.0), -200.0],
  ids=str,
)
def test_decay_and_erase(g, b, implementation, rng):
  case = numerics.make_case(rng, g=g, b=b)
  actual = numerics.evaluate(numerics.op(implementation), case)
  numerics.assert_close(actual, numerics.oracle(case))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  "T",
  [
    1,
    2,
    *(pytest.param(T, marks=pytest.mark.deep) for T in (63, 64, 1000)),
    65,
  ],
)
def test_lengths(T, implementation, rng):
  case = numerics.make_case(rng, T=T, H=1, g=(-1.0, 0.0))
  actual = numerics.evaluate(numerics.op(implementation), case)
  numerics.assert_close(actual, numerics.oracle(case))


@pytest.mark.parametrize(
  ("chunk_size", "packed"),
  [(1, False), (32, True), pytest.param(64, False, marks=pytest.mark.deep)],
)
def test_chunk_size_does_not_matter(chunk_size, packed, rng):
  ids = np.ones((2, 130), np.int32)
  ids[0, 20:] = 2
  ids[0, 96:] = 3
  ids[1, 5:80] = 0
  case = numerics.make_case(rng, B=2, T=130, segments=ids if packed else None)
  actual = numerics.evaluate(numerics.op("xla", chunk_size), case)
  numerics.assert_close(actual, numerics.oracle(case))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64(implementation, rng):
  with jax.enable_x64(True):
    case = numerics.make_case(rng)
    case = {
      n: np.asarray(x, np.float64) if isinstance(x, np.ndarray) else x
      for n, x in case.items()
    }
    actual = numerics.evaluate(numerics.op(implementation), case)
    assert actual["final_state"].dtype == actual["dg"].dtype == np.float64
    numerics.assert_close(actual, numerics.oracle(case), 1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_defaults_are_zero_state_and_key_scale(implementation, rng):
  case = numerics.make_case(rng)
  inputs = [jnp.asarray(case[n]) for n in numerics.INPUTS]
  o, state = gdn2(*inputs, implementation=implementation)
  case["initial_state"] = np.zeros_like(case["initial_state"])
  exact = numerics.oracle(case)
  numerics.assert_close(
    {"o": o, "final_state": state}, {n: exact[n] for n in numerics.OUTPUTS}
  )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_segments_in_any_order_with_padding_anywhere(implementation, rng):
  ids = np.array(
    [
      [0] * 3 + [4] * 20 + [2] * 1 + [4] * 6 + [0] * 5 + [4] * 15 + [9] * 15,
      [7] * 16 + [0] * 16 + [7] * 16 + [1] * 12 + [0] * 5,
      [0] * 65,
    ],
    np.int32,
  )
  case = numerics.make_case(rng, B=3, g=(-1.0, 0.0), segments=ids)
  actual = numerics.evaluate(numerics.op(implementation), case)
  exact = numerics.oracle(case)
  numerics.assert_close(actual, exact)
  padding = ids == 0
  for name in ("o", *numerics.GRADIENTS[:-1]):
    assert not np.asarray(actual[name])[padding].any(), name
  np.testing.assert_array_equal(
    actual["final_state"][2], case["initial_state"][2]
  )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_rows_equal_separate_calls(implementation, rng):
  lengths = (33, 1, 33, 33)
  ids = np.repeat(np.arange(1, 5), lengths)[None].astype(np.int32)
  case = numerics.make_case(rng, T=100, g=(-1.0, 0.0), segments=ids)
  packed = numerics.evaluate(numerics.op(implementation), case)
  for i, (start, length) in enumerate(
    zip(np.cumsum((0, *lengths)), lengths, strict=False)
  ):
    tokens = slice(start, start + length)
    one = {n: case[n][:, tokens] for n in (*numerics.INPUTS, "do")}
    one |= {"scale": case["scale"]}
    for end, at in (("initial_state", 0), ("dfinal_state", len(lengths) - 1)):
      one[end] = case[end] * np.float32(i == at)
    alone = numerics.evaluate(numerics.op(implementation), one)
    names = ("o", *numerics.GRADIENTS[:-1])
    numerics.assert_close(
      {n: packed[n][:, tokens] for n in names}, {n: alone[n] for n in names}
    )
    if i == len(lengths) - 1:
      numerics.assert_close(packed, {"final_state": alone["final_state"]})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cut", [1, 32, 50])
def test_split_and_carry_equals_whole(implementation, cut, rng):
  case = numerics.make_case(rng, g=(-1.0, 0.0))
  run = numerics.op(implementation)
  whole = numerics.evaluate(run, case, gradients=False)
  state, parts = case["initial_state"], []
  for tokens in (slice(0, cut), slice(cut, None)):
    part = {n: case[n][:, tokens] for n in numerics.INPUTS}
    part |= {"initial_state": state, "scale": case["scale"]}
    part = numerics.evaluate(run, part, gradients=False)
    parts.append(part["o"])
    state = part["final_state"]
  joined = {"o": np.concatenate(parts, axis=1), "final_state": state}
  numerics.assert_close(joined, whole)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("p", [5, 16, 33, 64])
def test_no_output_depends_on_the_future(implementation, p, rng):
  case = numerics.make_case(rng)
  case["do"][:, p:] = 0
  case["dfinal_state"][:] = 0
  grads = numerics.evaluate(numerics.op(implementation), case)
  for name in numerics.GRADIENTS[:-1]:
    future = np.asarray(grads[name])[:, p:]
    assert not future.any(), f"{name} sees the future"
    assert np.asarray(grads[name])[:, :p].any(), name
