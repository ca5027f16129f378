"""The op benchmark: it measures what it says, and refuses wrong results."""

import dataclasses
import functools
import subprocess
import sys

import jax
import pytest

from gdn2_jax.bench import timing
from gdn2_jax.bench.op import decode as op_decode
from gdn2_jax.bench.op import run as op
from gdn2_jax.bench.results import environment
from gdn2_jax.ops.gdn2.arg_specs import ArgSpec

pytestmark = pytest.mark.deep

SPEC = ArgSpec(name="micro", B=1, T=32, H=1, K=16, V=16, tags=("train",))


def test_rows_have_error_time_memory_and_ratio():
  reference, xla = op.run_spec(SPEC, ["reference", "xla"], rounds=1)
  for row in (reference, xla):
    assert row["passed"] and 0 < row["error"] <= op.BOUND
    assert set(row["errors"]) >= {"o", "state", "dq", "dg", "dw"}
    assert row["forward_ms"] > 0 and row["both_ms"] > 0
    assert row["both_temp_bytes_per_token_head"] > 0
  assert reference["forward_vs_reference"] == 1
  ratio = reference["both_ms"] / xla["both_ms"]
  assert xla["both_vs_reference"] == pytest.approx(ratio)


def test_wrong_result_is_not_timed(monkeypatch):
  right = op.gdn2

  def wrong(*inputs, **options):
    o, state = right(*inputs, **options)
    return (o if o.dtype == "float64" else 1.001 * o), state

  monkeypatch.setattr(op, "gdn2", wrong)
  # Without gradients, which take long to compile.
  spec = dataclasses.replace(SPEC, tags=())
  (row,) = op.run_spec(spec, ["reference"], rounds=1)
  assert not row["passed"]
  assert "forward_ms" not in row and "both_ms" not in row
  result = environment() | {"rows": [row], "scaling": {}}
  result["decode"] = {"rows": []}
  assert "fails its error check" in op._table(result)


def test_decode_moves_its_state_once():
  (row,) = op_decode.run(rounds=1, batch_sizes=(1,))["rows"]
  assert row["state_bytes"] == 16 * 128 * 128 * 4
  moved = 2 * row["state_bytes"]
  assert row["step_gb_per_s"] == pytest.approx(moved / row["step_us"] / 1e3)
  assert row["fraction_of_copy"] == pytest.approx(
    row["copy_us"] / row["step_us"]
  )


def test_measurements_take_turns_and_calls_are_warmed_up():
  calls = []
  measurements = {
    name: functools.partial(
      timing.warm_seconds, functools.partial(calls.append, name), 2
    )
    for name in "ab"
  }
  seconds = timing.race(measurements, rounds=2)
  assert calls == 2 * [*"aaabbb"] and all(s > 0 for s in seconds.values())


def test_calls_of_a_chain_continue_from_its_state():
  chain = timing.Chain(lambda x: x + 1, jax.numpy.zeros(()))
  assert chain.seconds(3) > 0 and chain.state == 3


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (["ops"], "no such command; did you mean op?"),
    (["op", "spec=small"], "unexpected argument 'spec=small'"),
    (["op", "--spec=gigantic"], "gigantic"),
  ],
)
def test_bad_command_lines_are_refused(arguments, says):
  out = subprocess.run(
    [sys.executable, "-m", "gdn2_jax.bench", *arguments],
    capture_output=True,
    text=True,
    check=False,
  )
  assert out.returncode == 1
  assert says in out.stderr
