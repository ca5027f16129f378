r"""Parameters, memory and FLOPs of a config, with nothing allocated.

  python -m gdn2_jax.plan --config=configs/gdn2_1p3b.py
  python -m gdn2_jax.plan --config=configs/gdn2_1p3b.py --devices=8 \
    --config.mesh.fsdp=-1 --config.grad_accum=4 --json
  python -m gdn2_jax.plan --compare=baselines/gdn2:1p3b,baselines/kda:1p3b

Parameters, state bytes of a sequence and FLOPs are counted. The memory of a
training step per device comes from the compiled program, which is never run. It
is compiled for the CPU backend with as many simulated devices as the mesh has:
arguments (parameters, optimizer state, batch) are exact for any backend,
temporaries (activations) are an estimate of those on a GPU. --compare prints a
table of several configs in place of that: parameters, states, FLOPs.
"""

import dataclasses
import json
import math
import time
from typing import Any

import jax
from absl import flags

from gdn2_jax import cli, config_flag
from gdn2_jax.model.accounting import (
  count_parameters,
  forward_flops_per_token,
  state_bytes,
  train_flops_per_token,
)
from gdn2_jax.model.comparison import compare, format_comparison
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM, has_growing_cache
from gdn2_jax.model.mixers.registry import kind_of
from gdn2_jax.sharding import (
  MESH_AXES,
  make_mesh,
  mesh_shape,
  use_mesh,
)
from gdn2_jax.train.config import TrainConfig, preflight, validate
from gdn2_jax.train.lower import lower_step
from gdn2_jax.train.state import TrainState, plan_state

_CONFIG = config_flag.define()
_DEVICES = flags.DEFINE_integer(
  "devices",
  None,
  "Number of devices to plan for; default: the size of the mesh.",
  lower_bound=1,
)
_COMPARE = flags.DEFINE_list(
  "compare",
  [],
  "Configs to compare, separated by commas, each a name or FILE[:RECIPE]; the "
  "first is the reference.",
)
_JSON = flags.DEFINE_bool(
  "json", False, "Print one JSON object in place of text."
)
_COMPILE = flags.DEFINE_bool(
  "compile", True, "Compile the training step to find its memory."
)


def plan(
  config: TrainConfig, num_devices: int, compile_step: bool = True
) -> dict[str, Any]:
  """All figures of a config as a JSON-ready dict; its data is not read.

  To compile the step, for its memory, JAX must have `num_devices`.

  Raises:
    ValueError: a field is wrong or does not fit the devices.
  """
  validate(config)
  preflight(config, num_devices)
  model, seq_len = config.model, config.data.seq_len
  count = count_parameters(model)
  tokens = config.num_steps * config.data.batch_size * seq_len
  by_kind = state_bytes(model, seq_len)
  train_flops = train_flops_per_token(model, seq_len)
  figures = {
    "parameters": dataclasses.asdict(count) | {"total": count.total},
    "state_tokens": seq_len if has_growing_cache(model) else None,
    "state_bytes_per_sequence": {
      "total": sum(by_kind.values()),
      **{kind_of(letter).name: size for letter, size in by_kind.items()},
    },
    "flops_per_token": {
      "forward": forward_flops_per_token(model, seq_len),
      "train": train_flops,
    },
    "run": {
      "steps": config.num_steps,
      "tokens_per_step": config.data.batch_size * seq_len,
      "tokens": tokens,
      "flops": tokens * train_flops,
    },
    "mesh": mesh_shape(config.mesh, num_devices),
  }
  if compile_step:
    figures["memory_per_device"] = _step_memory(config, num_devices)
  return figures


def compiled_step(
  config: TrainConfig, num_devices: int
) -> tuple[jax.stages.Compiled, TrainState]:
  """Compiles the step on shapes; also returns the state's sharded shapes."""
  devices = jax.devices()[:num_devices]
  with use_mesh(make_mesh(config.mesh, devices)) as mesh:
    model = LM(config.model)
    blueprint = plan_state(model, config.optimizer, config.num_steps, mesh)
    lowered = lower_step(config, model, blueprint, mesh)
    # Faster to compile; buffers and collectives are chosen before LLVM.
    options = {"xla_backend_optimization_level": 0}
    return lowered.compile(compiler_options=options), blueprint.abstract


def _step_memory(config: TrainConfig, num_devices: int) -> dict[str, Any]:
  """Bytes of the compiled training step; nothing is allocated."""
  start = time.perf_counter()
  compiled, state = compiled_step(config, num_devices)
  seconds = time.perf_counter() - start
  stats = compiled.memory_analysis()
  sizes = {
    name: _shard_bytes(getattr(state, name)) for name in ("params", "opt_state")
  }
  # Outputs that reuse the donated arguments' memory are counted once.
  outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  total = stats.argument_size_in_bytes + outputs + stats.temp_size_in_bytes
  return {
    "parameters": sizes["params"],
    "optimizer": sizes["opt_state"],
    "arguments": stats.argument_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
    "total": total,
    "compiled_for": jax.default_backend(),
    "compile_seconds": round(seconds, 1),
  }


def _shard_bytes(tree: Any) -> int:
  """Bytes of one device's shards of a tree of abstract arrays."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def format_plan(figures: dict[str, Any]) -> str:
  """The figures as text for a terminal."""
  parameters, run = figures["parameters"], figures["run"]
  flops = figures["flops_per_token"]
  lines = ["parameters"]
  lines += [f"  {name:<26}{n:>16,}" for name, n in parameters.items()]
  tokens = figures["state_tokens"]
  which = "whatever its length" if tokens is None else f"of {tokens:,} tokens"
  lines.append(f"state of one sequence, {which}")
  lines += [
    f"  {name:<26}{_bytes(n):>16}"
    for name, n in figures["state_bytes_per_sequence"].items()
  ]
  lines += [
    "FLOPs per token",
    f"  {'forward':<26}{flops['forward'] / 1e9:>13.4g} GF",
    f"  {'forward and backward':<26}{flops['train'] / 1e9:>13.4g} GF",
    "run",
    f"  {'steps':<26}{run['steps']:>16,}",
    f"  {'tokens per step':<26}{run['tokens_per_step']:>16,}",
    f"  {'tokens':<26}{run['tokens']:>16.4g}",
    f"  {'FLOPs':<26}{run['flops']:>16.3g}",
  ]
  memory = figures.get("memory_per_device")
  if memory:
    mesh = " x ".join(f"{a}={n}" for a, n in figures["mesh"].items())
    lines.append(
      f"memory per device, mesh {mesh}, compiled for "
      f"{memory['compiled_for']} in {memory['compile_seconds']} s"
    )
    lines += [
      f"  {label:<26}{_bytes(memory[name]):>16}"
      for name, label in {
        "parameters": "parameters",
        "optimizer": "optimizer state",
        "temporaries": "activations, temporaries",
        "total": "total",
      }.items()
    ]
  return "\n".join(lines)


def _bytes(n: int) -> str:
  for unit in ("B", "KiB", "MiB"):
    if n < 1024:
      return f"{n:,.4g} {unit}"
    n /= 1024
  return f"{n:,.4g} GiB"


def _read_models(names: list[str]) -> dict[str, tuple[ModelConfig, int]]:
  """Models and row lengths of configs, by the names that were given."""
  models = {}
  for name in names:
    config = config_flag.load(name)
    try:
      validate(config)
    except ValueError as e:
      cli.fail(f"--compare={name}: {e}")
    models[name] = config.model, config.data.seq_len
  return models


def main(argv: list[str]) -> None:
  """Entry point: prints the plan of --config or the table of --compare."""
  cli.refuse_positional(argv, "--config.model.num_layers=12")
  if _COMPARE.value:
    if _CONFIG.value is not None:
      cli.fail("--compare and --config: expected one of the two")
    jax.config.update("jax_platforms", "cpu")
    rows = compare(_read_models(_COMPARE.value))
    print(
      json.dumps(rows, indent=2) if _JSON.value else format_comparison(rows)
    )
    return
  config = config_flag.read(_CONFIG)
  with cli.one_line_errors():
    sizes = (getattr(config.mesh, axis) for axis in MESH_AXES)
    named = math.prod(n for n in sizes if n > 0)
    num_devices = _DEVICES.value or named
    # Simulated CPU devices: planning for eight GPUs needs none.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", num_devices)
    figures = plan(config, num_devices, _COMPILE.value)
  print(json.dumps(figures, indent=2) if _JSON.value else format_plan(figures))


if __name__ == "__main__":
  cli.run(main, __doc__)
