"""What is read off a compiled decoding step."""

import dataclasses

from gdn2_jax.aot.hlo_text import read_program
from gdn2_jax.aot.programs.decode_step import decode_lines, read_step
from gdn2_jax.configs import gdn2_1p3b

HLO = """\
HloModule jit_decode_block

%body (b.0: (f32[3,1,16,128,128], bf16[8,16])) -> (f32[3,1,16,128,128], f32[]) {
  %b.0 = (f32[3,1,16,128,128]{4,3,2,1,0}, bf16[8,16]{1,0}) parameter(0)
  %states = f32[3,1,16,128,128]{4,3,2,1,0} get-tuple-element(%b.0), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%b.0), index=1
  %y = bf16[8,32]{1,0} custom-call(%x), custom_call_target="__cublas$gemm"
  %kernel = f32[3,1,16,128,128]{4,3,2,1,0} custom-call(%states, %y), \
custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(f)/gdn2_layer_step/call"}
  ROOT %end = (f32[3,1,16,128,128]{4,3,2,1,0}, bf16[8,16]{1,0}) tuple(%kernel, \
%x)
}

%unfinished (c.0: (f32[3,1,16,128,128], bf16[8,16])) -> pred[] {
  %c.0 = (f32[3,1,16,128,128]{4,3,2,1,0}, bf16[8,16]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: (f32[3,1,16,128,128], bf16[8,16])) -> f32[3,1,16,128,128] {
  %a = (f32[3,1,16,128,128]{4,3,2,1,0}, bf16[8,16]{1,0}) parameter(0)
  %loop = (f32[3,1,16,128,128]{4,3,2,1,0}, bf16[8,16]{1,0}) while(%a), \
condition=%unfinished, body=%body
  ROOT %final = f32[3,1,16,128,128]{4,3,2,1,0} get-tuple-element(%loop), index=0
}
"""
# What XLA makes of a step on a slice of the states.
COPY = (
  "  %copy.1 = f32[1,16,128,128]{3,2,1,0} copy(%states)\n  %kernel = f32[3,1,16"
)


def report_of(text, weights=800):
  config = dataclasses.replace(gdn2_1p3b.get_config().model, num_layers=3)
  return read_step(read_program(text), config, 1, weights=weights, seconds=1.0)


def test_one_turn_of_the_loop_is_counted():
  report = report_of(HLO)
  assert report.launches == 2 and report.copies == ()
  assert report.moved == 2 * (8 * 16 + 8 * 32)  # the product alone
  assert report.failures == []
  assert "2 launches (0.7 a layer)" in decode_lines(report)
  assert "0.96 times the weights" in decode_lines(report)


def test_a_copy_of_states_is_a_failure():
  report = report_of(HLO.replace("  %kernel = f32[3,1,16", COPY), 10**8)
  assert report.failures == ["decoding step of 1 rows: copy.1 copies states"]


def test_too_many_launches_and_bytes_are_failures():
  report = dataclasses.replace(report_of(HLO), launches=120, moved=1600)
  assert report.failures == [
    "decoding step of 1 rows: 40.0 launches a layer, budget 20",
    "decoding step of 1 rows: moves 2.00 times the bytes of the weights, "
    "budget 1.02",
  ]
