"""What ptxas says is read right, and every check can fail."""

import dataclasses

import pytest

from gdn2_jax.aot.ptxas import MAX_SHARED_BYTES, Usage, judge, parse
from tests.aot import recorded

USAGE = Usage(
  registers=168,
  spill_stores=0,
  spill_loads=0,
  stack_frame=0,
  threads=128,
  shared_bytes=100_000,
)


def read(ptxas, **kwargs):
  module = recorded.module("scan_0")
  return parse(ptxas, recorded.PTX, kwargs.get("module", module))


def test_a_good_kernel_passes():
  usage = read(recorded.GOOD)
  want = dataclasses.replace(USAGE, shared_bytes=197656)
  assert usage == want
  assert judge(usage, {}) == []


def test_a_spill_fails():
  usage = read(recorded.SPILL)
  assert usage.registers == 255
  assert (usage.spill_stores, usage.spill_loads) == (96, 108)
  assert usage.stack_frame == 64
  (failure,) = judge(usage, {})
  assert "96 bytes stored" in failure and "108 bytes loaded" in failure
  for name in ("spill_stores", "spill_loads"):
    assert judge(dataclasses.replace(USAGE, **{name: 4}), {})


@pytest.mark.parametrize("code", ["C7510", "C7511", "C7512"])
def test_serialised_wgmma_fails(code):
  usage = read(getattr(recorded, code))
  (failure,) = judge(usage, {})
  assert "serialised" in failure and code in failure


def test_serialisation_without_a_known_code_fails():
  text = recorded.C7512.replace("(C7512) ", "")
  assert "serialised" in judge(read(text), {})[0]


def test_a_warning_fails_and_a_note_does_not():
  (failure,) = judge(read(recorded.WARNING), {})
  assert "ptxas warns" in failure
  usage = read(recorded.NOTE)
  assert "C7517" in usage.notes[0]
  assert judge(usage, {}) == []


def test_sums_out_of_turn_fail():
  usage = dataclasses.replace(USAGE, out_of_turn=("let them take turns",))
  assert judge(usage, {}) == ["let them take turns"]


def test_too_much_shared_memory_fails():
  most = dataclasses.replace(USAGE, shared_bytes=MAX_SHARED_BYTES)
  assert judge(most, {}) == []
  over = dataclasses.replace(USAGE, shared_bytes=MAX_SHARED_BYTES + 16)
  assert "shared memory" in judge(over, {})[0]


def test_budgets_fail_when_overrun():
  assert judge(USAGE, {"max_registers": 168, "min_ctas_per_sm": 2}) == []
  (failure,) = judge(USAGE, {"max_registers": 160})
  assert "168 registers, its budget is 160" in failure
  (failure,) = judge(USAGE, {"min_ctas_per_sm": 3})
  assert "2 CTAs per SM, its budget is 3" in failure


@pytest.mark.parametrize(
  "registers, threads, shared, want",
  [
    (168, 128, 1_000, 3),  # 21 units of 256 registers a warp, 3 a partition
    (160, 128, 1_000, 3),
    (128, 128, 1_000, 4),
    (129, 128, 1_000, 3),  # rounded up to 136
    (255, 256, 1_000, 1),
    (255, 384, 1_000, 0),  # more registers than an SM has
    (32, 1024, 1_000, 2),
    (32, 128, 1_000, 16),  # 2,048 threads
    (16, 32, 1_000, 32),  # no more CTAs than 32
    (64, 128, 115_712, 2),  # 113 KiB and 1 KiB kept back, twice
    (64, 128, 115_713, 1),
    (64, 128, 232_448, 1),
  ],
)
def test_occupancy(registers, threads, shared, want):
  usage = dataclasses.replace(
    USAGE, registers=registers, threads=threads, shared_bytes=shared
  )
  assert usage.ctas_per_sm == want
  assert bool(judge(usage, {})) == (want == 0)


def test_scratch_stands_in_for_a_launch_without_a_size():
  usage = parse(recorded.GOOD, recorded.PTX, "module {}", recorded.RESOURCES)
  assert usage.shared_bytes == 197632


@pytest.mark.parametrize(
  "ptxas, ptx, module, what",
  [
    ("", recorded.PTX, recorded.module("a"), "registers"),
    (
      recorded.GOOD.replace("spill", "spilt"),
      recorded.PTX,
      recorded.module("a"),
      "stack frame",
    ),
    (recorded.GOOD, "", recorded.module("a"), "maxntid"),
    (recorded.GOOD, recorded.PTX, "", "smem_scratch_bytes"),
    (recorded.GOOD * 2, recorded.PTX, recorded.module("a"), "2 times"),
  ],
)
def test_a_missing_figure_is_not_a_good_one(ptxas, ptx, module, what):
  with pytest.raises(ValueError, match=what):
    parse(ptxas, ptx, module)
