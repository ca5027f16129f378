"""The parts of a training step, and limits that can be exceeded."""

import dataclasses

import pytest

from gdn2_jax.aot.hlo_costs import Launch
from gdn2_jax.aot.hlo_text import read_program
from gdn2_jax.aot.programs.step_budget import (
  ONE_DEVICE,
  Costs,
  cost_lines,
  judge,
  part_of,
  step_costs,
)

LAYER = "jit(train_step)/jvp(LM.token_losses)/LM.hidden/groups/layer_0"
BACKWARD = LAYER.replace("jvp", "transpose(jvp").replace(")/LM", "))/LM")


def launch(path, **changes):
  fields = {
    "name": "fusion.1",
    "opcode": "fusion",
    "type": "bf16[4,4096,2304]{2,1,0}",
    "path": path,
    "target": "",
    "times": 1,
    "flops": 0,
    "read": 4096,
    "written": 4096,
  }
  return Launch(**(fields | changes))


@pytest.mark.parametrize(
  "path, changes, want",
  [
    (f"{LAYER}/mlp/up/dot_general", {"flops": 10**12}, "MLP products"),
    (f"{BACKWARD}/mixer/q_proj/dot", {"flops": 10**12}, "mixer products"),
    (f"{LAYER}/btd,dv->btv/dot", {"flops": 10**12}, "loss products"),
    (f"{LAYER}/mlp/mul", {}, "SwiGLU"),
    (f"{LAYER}/mlp_norm/reduce_sum", {}, "norms and residuals"),
    (f"{LAYER}/mixer/mixer._mix/concatenate", {}, "around attention"),
    (f"{LAYER}/mixer/mixer._recur/select_n", {}, "around GDN-2"),
    (
      f"{LAYER}/mixer/mixer._recur/jit(f)/gdn2_intra_grad/mpmd_map",
      {"target": "mosaic_gpu_v2"},
      "GDN-2 kernels",
    ),
    (
      f"{LAYER}/mixer/mixer._mix/jit(f)/attention_grad_q/mpmd_map",
      {"target": "mosaic_gpu_v2"},
      "attention kernels",
    ),
    (
      f"{LAYER}/mlp/up/convert_element_type",
      {"type": "bf16[2304,6784]{1,0}", "read": 8192},
      "weights to bf16",
    ),
    # Half as many bytes, but of activations.
    (f"{LAYER}/mlp/convert_element_type", {"read": 8192}, "SwiGLU"),
    ("jit(train_step)/jvp(LM.token_losses)/reduce_max", {}, "loss"),
    ("jit(train_step)/mul", {}, "optimizer"),
    ("", {}, "unnamed"),
  ],
)
def test_parts_go_by_modules(path, changes, want):
  assert part_of(launch(path, **changes), 4096) == want


HLO = """\
ENTRY %main (a: bf16[4,4096,512], b: bf16[512,512]) -> bf16[4,4096,512] {
  %a = bf16[4,4096,512]{2,1,0} parameter(0)
  %b = bf16[512,512]{1,0} parameter(1)
  %c = bf16[4,4096,512]{2,1,0} dot(%a, %b), lhs_contracting_dims={2}, \
rhs_contracting_dims={0}, metadata={op_name="jit(train_step)/mlp/up/dot"}
  ROOT %d = bf16[4,4096,512]{2,1,0} negate(%c), \
metadata={op_name="jit(train_step)/mlp/neg"}
}
"""


def test_parts_add_up():
  costs = step_costs(read_program(HLO), 4096)
  activations, weight = 4 * 4096 * 512 * 2, 512 * 512 * 2
  assert list(costs) == ["MLP products", "SwiGLU", "total"]
  assert costs["SwiGLU"].gigabytes == pytest.approx(2 * activations / 1e9)
  assert costs["total"] == Costs(
    tflops=2 * 4 * 4096 * 512 * 512 / 1e12,
    gigabytes=(4 * activations + weight) / 1e9,
    launches=2,
  )
  lines = cost_lines(costs)
  assert lines[-1].split() == ["total", "2", "0.0", "0.1"]
  assert cost_lines({}) == []


# What the step took when the limits were set.
GOOD = Costs(tflops=137.456, gigabytes=326.2, launches=1494)


@pytest.mark.parametrize(
  "field, value, said",
  [
    ("tflops", 152.7, "152.7 TFLOP of products, budget 137.5"),
    ("gigabytes", 434.3, "434.3 GB moved, budget 330"),
    ("launches", 2772, "2,772 launches, budget 1,500"),
  ],
)
def test_every_limit_can_be_exceeded(field, value, said):
  assert judge(GOOD, 52_400_000_000, ONE_DEVICE) == []
  over = dataclasses.replace(GOOD, **{field: value})
  assert judge(over, 52_400_000_000, ONE_DEVICE) == [said]
  assert judge(GOOD, 78_700_000_000, ONE_DEVICE) == [
    "78.7 GB a device, budget 53"
  ]
