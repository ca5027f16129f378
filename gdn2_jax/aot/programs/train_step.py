"""Compilation of the 1.3B hybrid's training step for H100s.

Nothing is allocated and nothing runs. Memory per device comes from XLA's buffer
assignment for the GPU, collectives from the compiled program, and on one device
also the products computed and the bytes moved.
"""

import collections
import dataclasses
import time

from gdn2_jax.aot import ptxas
from gdn2_jax.aot.hlo_text import Program, read_program
from gdn2_jax.aot.kernels import Reader, dumps
from gdn2_jax.aot.programs import step_budget
from gdn2_jax.aot.topology import h100_devices
from gdn2_jax.kernels import target
from gdn2_jax.model.lm import LM
from gdn2_jax.sharding import MeshConfig, make_mesh, use_mesh
from gdn2_jax.train.config import TrainConfig, preflight, validate
from gdn2_jax.train.lower import lower_step
from gdn2_jax.train.state import plan_state

MEMORY_BUDGET = 80e9  # bytes of a device
ROWS = 4  # of SEQ_LEN tokens, on every shard of the batch
SEQ_LEN = 4096

MESHES = {
  "one device": MeshConfig(),
  "fsdp=8": MeshConfig(fsdp=8),
  "fsdp=4 tensor=2": MeshConfig(fsdp=4, tensor=2),
}

_COLLECTIVES = (
  *("all-gather", "all-reduce", "reduce-scatter"),
  *("all-to-all", "collective-permute"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
  """One compiled training step; sizes in bytes of one device."""

  mesh: str
  devices: int
  rows: int  # of the global batch
  seq_len: int
  arguments: int  # parameters, optimizer state and batch
  outputs: int  # those that do not reuse the memory of arguments
  temporaries: int  # activations, gradients and the like
  # Instructions by kind or target; one in a loop over layers counts once.
  collectives: dict[str, int]
  custom_calls: dict[str, int]
  kernels: tuple[tuple[str, ptxas.Usage], ...]  # without repetition
  costs: dict[str, step_budget.Costs]  # empty on several devices
  limits: step_budget.Limits | None  # beside MEMORY_BUDGET
  lower_seconds: float
  compile_seconds: float

  @property
  def total(self) -> int:
    """Bytes that a device needs."""
    return self.arguments + self.outputs + self.temporaries

  @property
  def failures(self) -> list[str]:
    """Failed checks, one sentence each."""
    label = f"train step on {self.mesh}"
    found = [
      f"{label} ({kernel}): {failure}"
      for kernel, usage in self.kernels
      for failure in ptxas.judge(usage, {})
    ]
    if self.total >= MEMORY_BUDGET:
      found.append(
        f"{label}: {self.total / 1e9:.1f} GB a device, budget "
        f"{MEMORY_BUDGET / 1e9:.0f} GB"
      )
    if self.limits:
      total = self.costs["total"]
      over = step_budget.judge(total, self.total, self.limits)
      found += [f"{label}: {failure}" for failure in over]
    return found


def count_instructions(program: Program) -> tuple[dict[str, int], ...]:
  """Collectives by kind and custom calls by target."""
  found = [x for some in program.computations.values() for x in some.values()]
  kinds = (x.opcode.removesuffix("-start") for x in found)
  collectives = collections.Counter(x for x in kinds if x in _COLLECTIVES)
  calls = collections.Counter(x.target for x in found if x.target)
  return dict(sorted(collectives.items())), dict(sorted(calls.items()))


def compile_train_step(
  config: TrainConfig, name: str, reader: Reader
) -> StepReport:
  """Compiles the step on MESHES[name]; changes the config's mesh and batch."""
  config.mesh = MESHES[name]
  shards = config.mesh.data * config.mesh.fsdp
  devices = h100_devices(shards * config.mesh.tensor)
  config.data.seq_len, config.data.batch_size = SEQ_LEN, ROWS * shards
  config.grad_accum = 1
  validate(config)
  preflight(config, len(devices))
  mesh = make_mesh(config.mesh, devices)
  with dumps() as folder, target.use("compile"), use_mesh(mesh):
    model = LM(config.model)
    blueprint = plan_state(model, config.optimizer, config.num_steps, mesh)
    start = time.perf_counter()
    lowered = lower_step(config, model, blueprint, mesh)
    lowering_ends = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    kernels = [kernel for kernel in reader.read(folder) if kernel[1]]
  stats, program = compiled.memory_analysis(), read_program(compiled.as_text())
  collectives, custom_calls = count_instructions(program)
  costs, limits = {}, None
  if len(devices) == 1:
    costs = step_budget.step_costs(program, SEQ_LEN)
    if config.model.gdn2.implementation == "mosaic_gpu":
      limits = step_budget.ONE_DEVICE
  return StepReport(
    mesh=name,
    devices=len(devices),
    rows=config.data.batch_size,
    seq_len=config.data.seq_len,
    arguments=stats.argument_size_in_bytes,
    # Outputs in the memory of donated arguments are counted once.
    outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
    collectives=collectives,
    custom_calls=custom_calls,
    kernels=tuple(dict.fromkeys(kernels)),
    costs=costs,
    limits=limits,
    lower_seconds=lowering_ends - start,
    compile_seconds=end - lowering_ends,
  )


def step_lines(report: StepReport, implementation: str) -> str:
  """A compiled training step as a few lines; GB are 1e9 bytes."""
  sizes = ", ".join(
    f"{name} {getattr(report, name) / 1e9:.2f} GB"
    for name in ("arguments", "outputs", "temporaries", "total")
  )
  return "\n".join(
    (
      f"train step, 1.3B hybrid, {implementation}, {report.mesh}, "
      f"{report.rows} rows of {report.seq_len} tokens",
      f"  per device: {sizes}",
      f"  collectives: {_counts(report.collectives)}",
      f"  custom calls: {_counts(report.custom_calls)}",
      *(f"  {line}" for line in step_budget.cost_lines(report.costs)),
      *(
        f"  kernel {kernel}: {usage.registers} registers, "
        f"{usage.shared_bytes / 1024:.1f} KB shared, {usage.ctas_per_sm} "
        "CTAs/SM"
        for kernel, usage in report.kernels
      ),
      f"  lowered in {report.lower_seconds:.0f} s, compiled in "
      f"{report.compile_seconds:.0f} s",
    )
  )


def _counts(counts: dict[str, int]) -> str:
  return ", ".join(f"{n} {name}" for name, n in counts.items()) or "none"
