"""Launches, FLOPs and bytes, counted in programs small enough to do by hand."""

import jax
import jax.numpy as jnp
import pytest

from gdn2_jax.aot.hlo_costs import launches
from gdn2_jax.aot.hlo_text import bytes_of, read_program

HLO = """\
HloModule jit_f, entry_computation_layout={(bf16[8,16]{1,0})->bf16[8,32]{1,0}}

%product (p.0: bf16[8,16], p.1: bf16[16,32]) -> bf16[8,32] {
  %p.0 = bf16[8,16]{1,0} parameter(0)
  %p.1 = bf16[16,32]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,32]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}

%product_then_cast (q.0: bf16[8,16], q.1: bf16[16,32]) -> f32[8,32] {
  %q.0 = bf16[8,16]{1,0} parameter(0)
  %q.1 = bf16[16,32]{1,0} parameter(1)
  %inner = bf16[8,32]{1,0} fusion(%q.0, %q.1), kind=kCustom, calls=%product
  ROOT %cast = f32[8,32]{1,0} convert(%inner)
}

%pick (r.0: bf16[9,16,32], r.1: s32[]) -> bf16[16,32] {
  %r.0 = bf16[9,16,32]{2,1,0} parameter(0)
  %r.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,16,32]{2,1,0} dynamic-slice(%r.0, %r.1, %zero, %zero), \
dynamic_slice_sizes={1,16,32}
  ROOT %squeezed = bf16[16,32]{1,0} bitcast(%slice)
}

%put (s.0: f32[9,8,32], s.1: f32[8,32], s.2: s32[]) -> f32[9,8,32] {
  %s.0 = f32[9,8,32]{2,1,0} parameter(0)
  %s.1 = f32[8,32]{1,0} parameter(1)
  %s.2 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %row = f32[1,8,32]{2,1,0} bitcast(%s.1)
  ROOT %put.1 = f32[9,8,32]{2,1,0} dynamic-update-slice(%s.0, %row, %s.2, \
%zero.1, %zero.1)
}

%add (t.0: f32[], t.1: f32[]) -> f32[] {
  %t.0 = f32[] parameter(0)
  %t.1 = f32[] parameter(1)
  ROOT %sum = f32[] add(%t.0, %t.1)
}

%count_rows (u.0: f32[100,8], u.1: s32[4,1], u.2: f32[4,8]) -> f32[100,8] {
  %u.0 = f32[100,8]{1,0} parameter(0)
  %u.1 = s32[4,1]{1,0} parameter(1)
  %u.2 = f32[4,8]{1,0} parameter(2)
  ROOT %scatter.1 = f32[100,8]{1,0} scatter(%u.0, %u.1, %u.2), \
update_window_dims={1}, to_apply=%add
}

%body (carry: (s32[], bf16[8,16], bf16[9,16,32], f32[9,8,32])) -> (s32[], \
bf16[8,16], bf16[9,16,32], f32[9,8,32]) {
  %carry = (s32[], bf16[8,16]{1,0}, bf16[9,16,32]{2,1,0}, \
/*index=3*/f32[9,8,32]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%carry), index=1
  %weights = bf16[9,16,32]{2,1,0} get-tuple-element(%carry), index=2
  %stack = f32[9,8,32]{2,1,0} get-tuple-element(%carry), index=3
  %w = bf16[16,32]{1,0} fusion(%weights, %i), kind=kLoop, calls=%pick, \
metadata={op_name="jit(f)/while/body/dynamic_slice"}
  %y = f32[8,32]{1,0} fusion(%x, %w), kind=kCustom, calls=%product_then_cast, \
metadata={op_name="jit(f)/while/body/dot_general"}
  %new = f32[9,8,32]{2,1,0} fusion(%stack, %y, %i), kind=kLoop, calls=%put
  ROOT %next = (s32[], bf16[8,16]{1,0}, bf16[9,16,32]{2,1,0}, \
/*index=3*/f32[9,8,32]{2,1,0}) tuple(%i, %x, %weights, %new)
}

%condition (carry.1: (s32[], bf16[8,16], bf16[9,16,32], f32[9,8,32])) -> \
pred[] {
  %carry.1 = (s32[], bf16[8,16]{1,0}, bf16[9,16,32]{2,1,0}, \
/*index=3*/f32[9,8,32]{2,1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%carry.1), index=0
  %turns = s32[] constant(9)
  ROOT %more = pred[] compare(%turn, %turns), direction=LT
}

ENTRY %main (a: (s32[], bf16[8,16], bf16[9,16,32], f32[9,8,32]), \
b: f32[100,8], c: s32[4,1], d: f32[4,8]) -> f32[100,8] {
  %a = (s32[], bf16[8,16]{1,0}, bf16[9,16,32]{2,1,0}, \
/*index=3*/f32[9,8,32]{2,1,0}) parameter(0)
  %b = f32[100,8]{1,0} parameter(1)
  %c = s32[4,1]{1,0} parameter(2)
  %d = f32[4,8]{1,0} parameter(3)
  %loop = (s32[], bf16[8,16]{1,0}, bf16[9,16,32]{2,1,0}, \
/*index=3*/f32[9,8,32]{2,1,0}) while(%a), condition=%condition, body=%body
  %kernel = bf16[4,8]{1,0} custom-call(%d), \
custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/scan/mpmd_map"}
  %gemm = (f32[4,4]{1,0}, s8[1024]{0}) custom-call(%kernel, %kernel), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["1"]}}}
  %zero.2 = f32[] constant(0)
  %zeros = f32[100,8]{1,0} broadcast(%zero.2), dimensions={}
  %copy-start = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[]) copy-start(%d)
  %copy-done = f32[4,8]{1,0} copy-done(%copy-start)
  ROOT %out = f32[100,8]{1,0} fusion(%b, %c, %copy-done), kind=kInput, \
calls=%count_rows
}
"""


@pytest.fixture(scope="module")
def counted():
  return {x.name: x for x in launches(read_program(HLO))}


def moved(launch):
  return launch.read, launch.written


def test_views_and_ends_of_copies_launch_nothing(counted):
  assert list(counted) == [
    "w",
    "y",
    "new",
    "kernel",
    "gemm",
    "zeros",
    "copy-start",
    "out",
  ]


def test_a_loop_turns_as_often_as_its_condition_says(counted):
  assert [counted[n].times for n in ("w", "y", "new", "out")] == [9, 9, 9, 1]
  known = 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
  told = read_program(HLO.replace("body=%body", known))
  assert {x.name: x.times for x in launches(told)}["w"] == 7


def test_products_inside_fusions_are_counted(counted):
  assert counted["y"].flops == 2 * 8 * 16 * 32
  assert counted["gemm"].flops == 2 * 4 * 8 * 4
  assert counted["kernel"].flops == counted["new"].flops == 0


def test_a_slice_is_read_and_an_update_is_written(counted):
  index = 4
  assert moved(counted["w"]) == (16 * 32 * 2 + index, 16 * 32 * 2)
  # The stack is neither read nor written but for the row.
  assert moved(counted["new"]) == (8 * 32 * 4 + index, 8 * 32 * 4)
  # A scatter reads indices and updates, and reads and writes what they hit.
  assert moved(counted["out"]) == (4 * 4 + 4 * 8 * 4, 2 * 4 * 8 * 4)


def test_whole_operands_and_results(counted):
  assert moved(counted["y"]) == ((8 * 16 + 16 * 32) * 2, 8 * 32 * 4)
  assert moved(counted["kernel"]) == (4 * 8 * 4, 4 * 8 * 2)
  # Without the workspace of cuBLAS.
  assert moved(counted["gemm"]) == (2 * 4 * 8 * 2, 4 * 4 * 4)
  assert moved(counted["zeros"]) == (0, 100 * 8 * 4)
  assert moved(counted["copy-start"]) == (4 * 8 * 4, 4 * 8 * 4)


def test_where_a_launch_comes_from(counted):
  assert counted["y"].path == "jit(f)/while/body/dot_general"
  assert counted["kernel"].target == "mosaic_gpu_v2"


def test_a_product_read_whole_elsewhere_is_read_whole():
  """One slice does not hide another use of the same operand."""
  text = HLO.replace(
    "ROOT %squeezed = bf16[16,32]{1,0} bitcast(%slice)",
    "%all = bf16[16,32]{1,0} reduce(%r.0, %zero), dimensions={0}\n"
    "  ROOT %squeezed = bf16[16,32]{1,0} add(%all, %slice)",
  )
  (w,) = (x for x in launches(read_program(text)) if x.name == "w")
  assert w.read == 9 * 16 * 32 * 2 + 4


@pytest.mark.parametrize(
  "type_, want",
  [
    ("(bf16[4,8]{1,0:T(8,128)}, /*index=1*/f32[], pred[3]{0})", 64 + 4 + 3),
    ("f8e4m3fn[6]{0}", 6),
    ("s4[5]{0}", 3),
    ("c64[2]{0}", 16),
    ("token[]", 0),
  ],
)
def test_bytes_of_types(type_, want):
  assert bytes_of(type_) == want


def test_text_of_something_else_is_refused():
  with pytest.raises(ValueError, match=r"no ENTRY computation; .*as_text"):
    read_program("module @jit_f {\n}\n")


def compiled(function, *shapes):
  lowered = jax.jit(function).lower(
    *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
  )
  return launches(read_program(lowered.compile().as_text()))


def flops(found):
  return sum(x.times * x.flops for x in found)


def test_products_of_a_compiled_program():
  found = compiled(lambda a, b: jnp.tanh(a @ b) @ b.T, (64, 48), (48, 32))
  assert flops(found) == 2 * 2 * 64 * 48 * 32


def test_a_compiled_scan_costs_what_it_costs_unrolled():
  def chain(x, weights, unroll):
    def turn(x, w):
      return jnp.sin(x @ w), None

    return jax.lax.scan(turn, x, weights, unroll=unroll)[0]

  shapes = (64, 48), (5, 48, 48)
  looped = compiled(lambda x, w: chain(x, w, 1), *shapes)
  unrolled = compiled(lambda x, w: chain(x, w, 5), *shapes)
  assert max(x.times for x in looped) == 5
  assert {x.times for x in unrolled} == {1}
  assert flops(looped) == flops(unrolled) == 5 * 2 * 64 * 48 * 48


def test_a_compiled_update_of_a_stack_moves_one_entry_a_turn():
  def fill(x):
    return jax.lax.scan(lambda x, _: (x * 2, x), x, None, length=50)[1]

  found = compiled(fill, (1000,))
  entry, stack = 1000 * 4, 50 * 1000 * 4
  moved = sum(x.times * (x.read + x.written) for x in found)
  # The stack is made once and filled once; as a whole 50 times it would be 50.
  assert 2 * stack < moved < 8 * stack
  assert max(x.written for x in found if x.times == 50) <= 2 * entry + 8
