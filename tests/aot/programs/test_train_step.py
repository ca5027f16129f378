"""What is read off the compiled training step, and its budget."""

import dataclasses

import pytest

from gdn2_jax.aot import ptxas, topology
from gdn2_jax.aot.hlo_text import read_program
from gdn2_jax.aot.programs import train_step
from gdn2_jax.aot.programs.step_budget import ONE_DEVICE, Costs
from tests.aot import recorded

HLO = """\
ENTRY %main (a: bf16[8]) -> f32[] {
  %p = bf16[8]{0} custom-call(%a), custom_call_target="mosaic_gpu_v2"
  %q = bf16[8]{0} custom-call(%p), custom_call_target="mosaic_gpu_v2"
  %r = (s8[4]{0}, f32[]) custom-call(%q), custom_call_target="__cudnn$fmha"
  %all-gather-start = (f32[1]{0}, f32[8]{0}) all-gather-start(%q), dims={0}
  %all-gather-done = f32[8]{0} all-gather-done(%all-gather-start)
  %all-reduce.45 = f32[] all-reduce(%copy.330), to_apply=%add
  %reduce-scatter.1 = f32[1]{0} reduce-scatter(%all-gather-done), dims={0}
  %fusion = f32[] fusion(%all-reduce.45), metadata={op_name="all-to-all"}
}
"""

REPORT = train_step.StepReport(
  mesh="fsdp=8",
  devices=8,
  rows=32,
  seq_len=4096,
  arguments=50_000_000_000,
  outputs=1_000,
  temporaries=29_000_000_000,
  collectives={"all-gather": 2},
  custom_calls={},
  kernels=(),
  costs={},
  limits=None,
  lower_seconds=1.0,
  compile_seconds=30.0,
)


def test_a_collective_counts_once_and_its_users_do_not():
  collectives, calls = train_step.count_instructions(read_program(HLO))
  assert collectives == {"all-gather": 1, "all-reduce": 1, "reduce-scatter": 1}
  assert calls == {"__cudnn$fmha": 1, "mosaic_gpu_v2": 2}


def test_the_memory_budget_can_be_overrun():
  assert REPORT.failures == []
  over = dataclasses.replace(REPORT, temporaries=30_000_000_000)
  assert "80.0 GB a device, budget 80 GB" in over.failures[0]


def test_the_limits_of_one_device_can_be_overrun():
  total = Costs(tflops=175.4, gigabytes=326.2, launches=1494)
  report = dataclasses.replace(
    REPORT, mesh="one device", costs={"total": total}, limits=ONE_DEVICE
  )
  assert report.failures == [
    "train step on one device: 175.4 TFLOP of products, budget 137.5",
    "train step on one device: 79.0 GB a device, budget 53",
  ]
  assert "  total" in train_step.step_lines(report, "mosaic_gpu")


def test_a_bad_kernel_fails_the_step():
  text, shared = recorded.C7512, recorded.module("scan_0")
  usage = ptxas.parse(text, recorded.PTX, shared)
  bad = dataclasses.replace(REPORT, kernels=(("scan", usage),))
  (failure,) = bad.failures
  assert "train step on fsdp=8 (scan): wgmma is serialised" in failure
  assert "kernel scan: 168 registers" in train_step.step_lines(bad, "xla")


def test_lines_say_what_was_compiled():
  text = train_step.step_lines(REPORT, "xla")
  assert "xla, fsdp=8, 32 rows of 4096 tokens" in text
  assert "total 79.00 GB" in text
  assert "2 all-gather" in text and "custom calls: none" in text


def test_the_target_is_shipped_with_the_package():
  text = topology.TARGET.read_text()
  assert "major: 9" in text and "ACCELERATED_FEATURES" in text


@pytest.mark.parametrize(
  "hidden, what", [("plugin", "CUDA 13 plugin"), ("ptxas", "ptxas")]
)
def test_what_is_missing_is_said_in_one_line(monkeypatch, hidden, what):
  def find_spec(name):
    return None if hidden == "plugin" or name == "nvidia" else object()

  monkeypatch.setattr(topology.importlib.util, "find_spec", find_spec)
  monkeypatch.setattr(topology.shutil, "which", lambda name: None)
  monkeypatch.setattr(topology.pathlib.Path, "exists", lambda path: False)
  reason = topology.missing_tool()
  assert what in reason and "\n" not in reason
