"""Cases of `make aot`: the kernels compiled, and the units of their bytes."""

import sys
import types

import jax
import pytest

from gdn2_jax.aot.cases import find_cases, make_case


def shapes(*sizes):
  return [jax.ShapeDtypeStruct(size, "bfloat16") for size in sizes]


@pytest.fixture
def modules(monkeypatch):
  """Puts a module with the given cases where the walk finds it."""

  def add(name, cases):
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace(name=name)
    module.aot_cases = lambda: cases
    monkeypatch.setitem(sys.modules, name, module)
    return name

  return add


def test_sequences_and_single_tokens_count_their_token_heads():
  case = make_case("scan", abs, shapes((2, 128, 4, 64)))
  assert case.token_heads == 2 * 128 * 4
  assert make_case("step", abs, shapes((2, 4, 64))).token_heads == 2 * 4
  given = make_case("x", abs, shapes((7,)), {"token_heads": 3})
  assert given.token_heads == 3 and given.limits == {}
  with pytest.raises(ValueError, match="token_heads"):
    make_case("x", abs, shapes((2, 4, 8, 64, 64)))


def test_limits_are_kept_and_misspelt_ones_refused():
  options = {"max_registers": 168, "min_ctas_per_sm": 2}
  assert make_case("x", abs, shapes((2, 4, 64)), options).limits == options
  with pytest.raises(ValueError, match="max_regs"):
    make_case("x", abs, shapes((2, 4, 64)), {"max_regs": 168})


def test_cases_are_found_by_part_of_their_name(modules):
  one = modules("aot_one", [("scan_128", abs, shapes((2, 4, 64)))])
  two = modules(
    "aot_two",
    [
      ("scan_64", abs, shapes((2, 4, 64)), {"max_registers": 8}),
      ("step", abs, shapes((2, 4, 64))),
    ],
  )
  cases, absent, failures = find_cases(
    "scan", [one, two, "gdn2_jax.pallas.unwritten"]
  )
  assert [case.name for case in cases] == ["scan_128", "scan_64"]
  assert absent == ["gdn2_jax.pallas.unwritten"]
  assert failures == []
  assert len(find_cases("", [one, two])[0]) == 3


def test_a_broken_module_fails_and_hides_no_other(modules):
  broken = modules("aot_broken", None)
  good = modules("aot_good", [("step", abs, shapes((2, 4, 64)))])
  cases, _, (failure,) = find_cases("", [broken, good])
  assert [case.name for case in cases] == ["step"]
  assert "aot_broken.aot_cases(): TypeError" in failure


def test_two_cases_of_one_name_fail(modules):
  name = modules("aot_one", [("step", abs, shapes((2, 4, 64)))] * 2)
  assert "second case is called 'step'" in find_cases("", [name])[2][0]


def test_every_module_of_kernels_offers_cases():
  found, absent, failures = find_cases("")
  assert (absent, failures) == ([], [])
  assert {case.name.split(",")[0] for case in found} >= {"intra", "attention"}
