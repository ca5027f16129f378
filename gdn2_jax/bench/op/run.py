"""`python -m gdn2_jax.bench op`: implementations of gdn2 compared.

Only what is accurate is timed: the relative RMS error of every output and
gradient is at most 1e-5 in float32, and at most twice that of the token scan in
lower precision.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags

from gdn2_jax.bench import timing
from gdn2_jax.bench.op import decode as op_decode
from gdn2_jax.bench.op import peers as op_peers
from gdn2_jax.bench.results import Column, environment, text_table, write_json
from gdn2_jax.kernels.errors import relative_rms
from gdn2_jax.ops.gdn2 import arg_specs
from gdn2_jax.ops.gdn2.api import gdn2

BOUND = 1e-5
LOW_PRECISION_FACTOR = 2
# Token-heads times K * V up to which a float64 token scan with its gradient
# (one state per token) fits into a few GB.
_FLOAT64_STATES = 1 << 26
_NAMES = ("o", "state", "dq", "dk", "dv", "dg", "db", "dw")

_COLUMNS = (
  Column("shape", "spec"),
  Column("implementation", "implementation"),
  Column("error", "error", ".1e"),
  Column("fwd ms", "forward_ms", ".1f"),
  Column("x", "forward_vs_reference", ".2f"),
  Column("fwd+bwd ms", "both_ms", ".1f"),
  Column("x", "both_vs_reference", ".1f"),
  Column("B/token-head", "temp_bytes_per_token_head", ".0f"),
  Column("compile s", "compile_s", ".1f"),
)


def define_flags() -> None:
  """Defines the flags, some of them shared with `serve`."""
  flags.DEFINE_list(
    "spec", None, "op: shapes to run; default: all that suit the device"
  )
  flags.DEFINE_list("implementation", ["reference", "xla"], "op: what to time")
  flags.DEFINE_string("json", None, "op, serve: JSON file to write")
  flags.DEFINE_bool(
    "one_core",
    True,
    "op, serve: on a CPU, use one core and its CPU time; --noone_core uses all "
    "cores and the wall clock",
  )
  flags.DEFINE_bool(
    "peers", False, "op: also time fla's naive recurrence in torch"
  )
  flags.DEFINE_integer(
    "rounds", 7, "op, serve: timed calls of each function", lower_bound=1
  )


def main(values: Any) -> None:
  """Runs the benchmark and prints its tables."""
  if values.one_core:
    timing.use_one_core()
  specs = _specs(values.spec)
  result = environment()
  rows = result["rows"] = []
  for spec in tqdm.tqdm(specs, desc="shapes", disable=None):
    rows.extend(run_spec(spec, values.implementation, values.rounds))
    if values.peers:
      rows.append(op_peers.run(spec))
  result["scaling"] = _scaling(values.implementation, values.rounds)
  result["decode"] = op_decode.run(values.rounds)
  print(_table(result))
  if values.json:
    write_json(pathlib.Path(values.json), result)


def run_spec(
  spec: arg_specs.ArgSpec, implementations: list[str], rounds: int
) -> list[dict[str, Any]]:
  """Rows of error, time and memory of each implementation on one shape."""
  inputs, segment_ids = arg_specs.make_inputs(spec)
  programs = {"forward": {}, "both": {}}
  for name in implementations:
    op = _op(name, segment_ids)
    programs["forward"][name] = timing.compile_function(op, inputs)
    if name != "reference" or "train" in spec.tags:
      both = timing.compile_function(_gradient(op), inputs)
      programs["both"][name] = both
  truth, exact = _truth(spec, inputs, segment_ids, bool(programs["both"]))
  errors = {
    name: _errors(exact, [some.get(name) for some in programs.values()], inputs)
    for name in implementations
  }
  floor = errors.get("reference", {})
  rows = {
    name: {
      "spec": spec.name,
      "implementation": name,
      "error": max(errors[name].values()),
      "errors": errors[name],
      "truth": truth,
      "passed": _passes(spec, errors[name], floor),
    }
    for name in implementations
  }
  for kind, some in programs.items():
    passed = {n: x for n, x in some.items() if rows[n]["passed"]}
    times = _race(passed, inputs, rounds)
    for name, seconds in times.items():
      temporaries = some[name].temp_bytes
      rows[name] |= {
        f"{kind}_ms": seconds * 1e3,
        f"{kind}_compile_s": some[name].compile_s,
        f"{kind}_temp_bytes": temporaries,
        f"{kind}_temp_bytes_per_token_head": temporaries / spec.token_heads,
      }
      if "reference" in times:
        rows[name][f"{kind}_vs_reference"] = times["reference"] / seconds
  return list(rows.values())


def _race(
  programs: dict[str, timing.Compiled], inputs: Any, rounds: int
) -> dict[str, float]:
  """Median seconds of programs on the same inputs."""
  return timing.race(
    {
      name: functools.partial(
        timing.warm_seconds, functools.partial(program.call, *inputs)
      )
      for name, program in programs.items()
    },
    rounds,
  )


def _op(implementation, segment_ids):
  def op(*inputs):
    return gdn2(*inputs, segment_ids=segment_ids, implementation=implementation)

  return op


def _gradient(op):
  """Gradients of all six inputs, for cotangents of both outputs."""

  def loss(*inputs):
    o, state = op(*inputs)
    o = o.astype(state.dtype)
    return jnp.sum(o * o) + jnp.sum(state * state)

  return jax.grad(loss, argnums=tuple(range(6)))


def _truth(spec, inputs, segment_ids, gradients):
  """Name of the float64 algorithm, and its outputs (and gradients)."""
  states = spec.token_heads * spec.K * spec.V * spec.value_heads
  if states > _FLOAT64_STATES:
    # Too many states for the token scan's own gradient: float64 chunks, which
    # a test holds to 1e-13 of the token scan.
    name, label = "xla", "float64 chunks"
  else:
    name, label = "reference", "float64 token scan"
  with jax.enable_x64(True):
    exact_inputs = tuple(x.astype(jnp.float64) for x in inputs)
    op = _op(name, segment_ids)
    exact = jax.jit(op)(*exact_inputs)
    if gradients:
      exact = (*exact, *jax.jit(_gradient(op))(*exact_inputs))
    exact = [np.asarray(x) for x in exact]
  return label, exact


def _errors(exact, programs, inputs):
  actual = [x for program in programs if program for x in program.call(*inputs)]
  return {
    name: relative_rms(np.asarray(x, np.float64), y)
    for name, x, y in zip(_NAMES, actual, exact, strict=False)
  }


def _passes(spec, errors, floor):
  for name, error in errors.items():
    bound = BOUND
    if spec.dtype != "float32" and name not in ("state", "dg"):
      bound = LOW_PRECISION_FACTOR * floor.get(name, 0.01)
    if not error <= bound:
      return False
  return True


def _scaling(implementations, rounds):
  """Log-log slope of time against T; 1 is linear."""
  lengths = (1024, 2048, 4096, 8192)
  result = {"lengths": lengths, "H": 4, "K": 64, "V": 64}
  for name in implementations:
    for kind in ("forward", "both"):
      if kind == "both" and name == "reference":
        continue
      times = []
      for T in tqdm.tqdm(lengths, desc=f"{name} {kind}", disable=None):
        spec = arg_specs.ArgSpec(name="scaling", B=1, T=T, H=4, K=64, V=64)
        inputs, _ = arg_specs.make_inputs(spec)
        op = _op(name, None)
        function = op if kind == "forward" else _gradient(op)
        compiled = timing.compile_function(function, inputs)
        times.append(_race({name: compiled}, inputs, rounds)[name])
      slope, _ = np.polyfit(np.log(lengths), np.log(times), 1)
      result[f"{name}_{kind}"] = {
        "ms": [1e3 * t for t in times],
        "slope": float(slope),
      }
  return result


def _specs(names):
  if names:
    return [arg_specs.get_spec(name) for name in names]
  tag = "cpu" if jax.default_backend() == "cpu" else "gpu"
  return [spec for spec in arg_specs.ARG_SPECS if tag in spec.tags]


def _table(result):
  rows = []
  for row in result["rows"]:
    kind = "both" if "both_ms" in row else "forward"
    for key in ("temp_bytes_per_token_head", "compile_s"):
      if f"{kind}_{key}" in row:
        row = row | {key: row[f"{kind}_{key}"]}
    if row.get("passed") is False:
      note = f"error {row['error']:.1e}: fails its error check, not timed"
      row = row | {"note": note}
    rows.append(row)
  lines = [f"{result['device']} ({result['cpu']}), {result['clock']}"]
  lines += text_table(rows, _COLUMNS)
  truths = sorted({r["truth"] for r in rows if "truth" in r})
  lines.append(f"error: worst relative RMS, against {' or '.join(truths)}")
  lines.append("x: times as fast as the token scan; bwd: all six gradients")
  for name, entry in result["scaling"].items():
    if isinstance(entry, dict):
      ms = ", ".join(f"{x:.1f}" for x in entry["ms"])
      lines.append(f"scaling {name}: slope {entry['slope']:.2f} ({ms} ms)")
  lines += op_decode.table(result["decode"])
  return "\n".join(lines)
