"""Costs of the compiled training step by part of the model, and limits.

Counted from the compiled program (`hlo_costs`): nothing is assumed of a GPU's
speed, and nothing is said of it.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence

from gdn2_jax.aot.hlo_costs import Launch, launches
from gdn2_jax.aot.hlo_text import Program, arrays

# Part of the model: what the path of its operations contains; the first counts.
_PRODUCTS = (
  ("loss products", r"btd,dv|btv,dv|btd,btv"),
  ("MLP products", "/mlp/"),
  ("mixer products", ""),
)
_KERNEL_PARTS = (
  ("attention kernels", r"/(gdn2_)?attention"),
  ("convolution kernels", r"/(gdn2_)?short_conv"),
  ("gated norm kernels", r"/(gdn2_)?gated_norm"),
  ("GDN-2 kernels", ""),
)
_PARTS = (
  ("norms and residuals", "mixer_norm|mlp_norm|final_norm"),
  ("SwiGLU", r"/mlp/|jit\(silu\)"),
  ("around attention", r"\._mix\b"),
  ("around GDN-2", r"\._(recur|gates|decay|short_conv|output)\b"),
  ("embedding", r"\bembedding\b"),
  ("stacks of the scan", "dynamic_update_slice|dynamic_slice"),
  ("rest of the layers", r"LM\.hidden"),
  ("loss", "token_losses"),
  ("optimizer", r"^jit\(train_step\)"),
  ("unnamed", ""),
)
_LARGE = 1e8  # FLOPs from which a product is more than a reduction
_TARGET = "mosaic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
  """Sums over launches."""

  tflops: float  # of matrix products outside of our kernels
  gigabytes: float  # 1e9 bytes read and written
  launches: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits(Costs):
  """Most that a step may take; a device's memory in 1e9 bytes."""

  memory_gigabytes: float


# The 1.3B hybrid with kernels on one device, 4 rows of 4,096 tokens. Layers
# computed twice take 175 TFLOP, a loop over them 430 GB and 2,800 launches.
ONE_DEVICE = Limits(
  tflops=137.5, gigabytes=330.0, launches=1500, memory_gigabytes=53.0
)


def step_costs(program: Program, seq_len: int) -> dict[str, Costs]:
  """Costs of the parts of a step, dearest first; "total" is last.

  By `seq_len`, the tokens of a row, activations are told from weights.
  """
  parts = collections.defaultdict(list)
  found = launches(program)
  for launch in found:
    parts[part_of(launch, seq_len)].append(launch)
  costs = {part: _sum(some) for part, some in parts.items()}
  ordered = sorted(costs.items(), key=lambda item: -item[1].gigabytes)
  return {**dict(ordered), "total": _sum(found)}


def part_of(launch: Launch, seq_len: int) -> str:
  """The part of the model that a launch belongs to."""
  if _TARGET in launch.target:
    return _first(_KERNEL_PARTS, launch.path)
  if launch.flops > _LARGE:
    return _first(_PRODUCTS, launch.path)
  halves = abs(launch.read - 2 * launch.written) < 64
  results = arrays(launch.type)
  if halves and all(
    element == "bf16" and seq_len not in shape for element, shape in results
  ):
    return "weights to bf16"
  return _first(_PARTS, launch.path)


def _first(parts: Iterable[tuple[str, str]], path: str) -> str:
  return next(part for part, found in parts if re.search(found, path))


def _sum(some: Sequence[Launch]) -> Costs:
  return Costs(
    tflops=sum(x.times * x.flops for x in some) / 1e12,
    gigabytes=sum(x.times * (x.read + x.written) for x in some) / 1e9,
    launches=sum(x.times for x in some),
  )


def judge(total: Costs, memory_bytes: int, limits: Limits) -> list[str]:
  """Exceeded limits, one sentence each."""
  memory = memory_bytes / 1e9
  figures = (
    (total.tflops, limits.tflops, f"{total.tflops:.1f} TFLOP of products"),
    (total.gigabytes, limits.gigabytes, f"{total.gigabytes:.1f} GB moved"),
    (total.launches, limits.launches, f"{total.launches:,} launches"),
    (memory, limits.memory_gigabytes, f"{memory:.1f} GB a device"),
  )
  return [
    f"{text}, budget {limit:,g}"
    for value, limit, text in figures
    if value > limit
  ]


def cost_lines(costs: dict[str, Costs]) -> list[str]:
  """Lines of a table of `step_costs`; none for no costs."""
  if not costs:
    return []
  head = f"{'part':<22}{'launches':>9}{'TFLOP':>8}{'GB moved':>10}"
  rows = [
    f"{part:<22}{x.launches:>9,}{x.tflops:>8.1f}{x.gigabytes:>10.1f}"
    for part, x in costs.items()
  ]
  return [head, *rows]
