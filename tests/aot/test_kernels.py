"""From a case to its report, with the dumps of a compiler that is not here."""

import importlib.util
import os
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.aot import kernels, triton
from gdn2_jax.aot.__main__ import compile_kernels, compile_triton
from gdn2_jax.aot.cases import make_case
from gdn2_jax.kernels import target
from tests.aot import recorded

SHAPE = jax.ShapeDtypeStruct((2, 4, 128), "bfloat16")


def double(x):
  """A kernel that doubles [2, 4, 128]."""

  def body(x_gmem, o_gmem):
    i = jax.lax.axis_index("i")
    o_gmem[i] = x_gmem[i] * 2

  return plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
    grid=(2,),
    grid_names=("i",),
  )(x)


def cuda_module(function, *shapes):
  lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
  return lowered.compiler_ir("stablehlo")


def test_bytes_are_those_of_operands_and_results():
  one = cuda_module(double, SHAPE)
  assert kernels.kernel_bytes(one) == [2 * 2 * 4 * 128 * 2]
  both = cuda_module(lambda x: double(double(x) + 1), SHAPE)
  assert len(kernels.kernel_bytes(both)) == 2
  assert kernels.kernel_bytes(cuda_module(jnp.sin, SHAPE)) == []


@pytest.mark.parametrize("dtype, size", [("bfloat16", 2), ("float32", 4)])
def test_bytes_depend_on_the_dtype(dtype, size):
  shape = jax.ShapeDtypeStruct((2, 4, 128), dtype)
  assert kernels.kernel_bytes(cuda_module(double, shape)) == [2 * 1024 * size]


class FakeLowered:
  """Dumps as Mosaic GPU does: modules when lowering, the rest when new."""

  compiled = 0

  def __init__(self, launches):
    self.launches = launches

  def dump(self, name, text):
    pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"], name).write_text(text)

  def compile(self):
    for base, constant, ptxas in self.launches:
      module = recorded.module(base, constant=constant)
      for when in ("before", "after"):
        self.dump(f"{base}.{when}_layout_inference.txt", module)
      if ptxas:
        self.dump(f"{base}.ptxas", ptxas)
        self.dump(f"{base}.ptx", recorded.PTX)
    assert target.current() == "compile"

  def compiler_ir(self, dialect):
    return [1024] * len(self.launches)


@pytest.fixture
def compile_dumps(monkeypatch):
  """Compiles a case that launches (base name, constant, ptxas text), ...."""
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  reader = kernels.Reader()
  monkeypatch.setattr(kernels, "kernel_bytes", lambda module: module)

  def run(*launches, **options):
    lowered = FakeLowered(launches)
    monkeypatch.setattr(
      jax, "jit", lambda f: type("", (), {"lower": lambda self, *a: lowered})()
    )
    case = make_case("case", abs, [SHAPE], options)
    return kernels.compile_case(case, sharding, reader)

  return run


def test_kernels_are_reported_in_the_order_of_launch(compile_dumps):
  reports = compile_dumps(
    ("scan_9", 1, recorded.GOOD), ("intra_10", 2, recorded.SPILL)
  )
  assert [report.kernel for report in reports] == ["scan", "intra"]
  assert [report.usage.registers for report in reports] == [168, 255]
  assert reports[0].bytes_per_token_head == 1024 / 8
  assert reports[0].failures == []
  assert "case (intra): spills" in reports[1].failures[0]
  assert "MOSAIC_GPU_DUMP_TO" not in os.environ


def test_a_kernel_compiled_before_keeps_its_report(compile_dumps):
  compile_dumps(("scan_0", 1, recorded.SPILL))
  (report,) = compile_dumps(("scan_1", 1, None))
  assert report.usage.spill_stores == 96
  with pytest.raises(ValueError, match="no report of scan"):
    compile_dumps(("scan_2", 5, None))


def test_the_report_may_belong_to_an_equal_kernel(compile_dumps):
  launches = ("scan_0", 1, None), ("scan_1", 1, recorded.GOOD)
  assert [r.usage.registers for r in compile_dumps(*launches)] == [168, 168]


def test_a_budget_reaches_the_kernels_of_a_case(compile_dumps):
  (report,) = compile_dumps(("scan_0", 1, recorded.GOOD), max_registers=167)
  assert "its budget is 167" in report.failures[0]


def test_a_case_without_a_kernel_is_refused(compile_dumps):
  with pytest.raises(ValueError, match="no kernel"):
    compile_dumps()


def test_only_known_noise_is_dropped(capfd):
  with kernels.without_noise():
    os.write(2, b"nvdisasm invocation failed: not found\n")
    os.write(2, b"E ptxas fatal: unresolved\n")
  assert capfd.readouterr().err == "E ptxas fatal: unresolved\n"


def test_a_kernel_that_breaks_does_not_hide_the_others(monkeypatch, capsys):
  cases = [make_case(name, abs, [SHAPE]) for name in ("bad", "good")]

  def compile_case(case, sharding, reader):
    if case.name == "bad":
      raise RuntimeError("Layout inference failed\nat length")
    usage = kernels.ptxas.parse(
      recorded.GOOD, recorded.PTX, recorded.module("a")
    )
    return [
      kernels.KernelReport(
        case=case.name,
        kernel="scan",
        usage=usage,
        limits={"min_ctas_per_sm": 2},
        bytes_per_token_head=4352.0,
        compile_seconds=1.5,
      )
    ]

  main = "gdn2_jax.aot.__main__"
  monkeypatch.setattr(f"{main}.compile_case", compile_case)
  monkeypatch.setattr(f"{main}.topology.h100_sharding", lambda: None)
  monkeypatch.setattr(f"{main}.cases_lib.find_cases", lambda o: (cases, [], []))
  reports, failures = compile_kernels("", kernels.Reader())
  assert len(reports) == 1
  assert failures == [
    "bad: RuntimeError: Layout inference failed",
    "good (scan): 1 CTAs per SM, its budget is 2",
  ]
  assert "| good | scan" in capsys.readouterr().out


def test_triton_kernels_are_printed_and_can_fail(monkeypatch, capsys):
  rows = [
    {"kernel": "step", "target": "sm_80", "registers": 64, "failures": []},
    {"kernel": "step", "target": "sm_89", "failures": ["step: spills"]},
    {"kernel": "sequence", "target": "sm_80", "registers": 80},
  ]
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
  monkeypatch.setattr(triton, "compile_all", lambda targets: rows)
  assert compile_triton("step") == (rows[:2], ["step: spills"])
  printed = "triton: kernel step, target sm_80, registers 64\n"
  assert printed in capsys.readouterr().out
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert compile_triton("") == ([], [])
  assert "not compiled: triton is not" in capsys.readouterr().out
