"""Kernels to compile ahead of time.

A kernel module lists them in a function

  aot_cases() -> [(name, function, [jax.ShapeDtypeStruct, ...]), ...]

whose tuples may end in a mapping with any of

  max_registers     per thread, of every kernel in the function
  min_ctas_per_sm   of every kernel in the function
  token_heads       B T H, where the first shape is not [B, T, H, ...]
"""

import dataclasses
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from gdn2_jax.aot.ptxas import LIMITS

MODULES = (
  "gdn2_jax.pallas.gdn2.step",
  "gdn2_jax.pallas.layer_step",
  "gdn2_jax.pallas.gdn2.intra",
  "gdn2_jax.pallas.gdn2.scan",
  "gdn2_jax.pallas.gdn2.sections",
  "gdn2_jax.pallas.gdn2.intra_grad",
  "gdn2_jax.pallas.gdn2.scan_grad",
  "gdn2_jax.pallas.gated_norm",
  "gdn2_jax.pallas.short_conv",
  "gdn2_jax.pallas.attention.forward",
  "gdn2_jax.pallas.attention.backward",
)


@dataclasses.dataclass(frozen=True)
class Case:
  """One function to compile for the GPU."""

  name: str
  function: Callable[..., Any]  # launches at least one kernel
  shapes: Sequence[Any]  # of its arguments, without shardings
  limits: Mapping[str, int]  # of its kernels, see LIMITS
  token_heads: int  # B T H, by which the bytes moved are divided


def make_case(
  name: str,
  function: Callable[..., Any],
  shapes: Sequence[Any],
  options: Mapping[str, int] | None = None,
) -> Case:
  """Case of one tuple of aot_cases()."""
  limits = dict(options or {})
  token_heads = limits.pop("token_heads", None)
  unknown = sorted(set(limits) - set(LIMITS))
  if unknown:
    raise ValueError(
      f"{name}: options {unknown}, expected some of {[*LIMITS, 'token_heads']}"
    )
  if token_heads is None:
    first = jax.tree.leaves(shapes)[0].shape
    # [B, T, H, K] of a sequence, [B, H, K] of a single token.
    if len(first) not in (3, 4):
      raise ValueError(
        f"{name}: the first shape is {first}, expected [B, T, H, K] or "
        "[B, H, K]; otherwise give the option token_heads"
      )
    token_heads = math.prod(first[:-1])
  return Case(name, function, shapes, limits, token_heads)


def find_cases(
  only: str = "", modules: Iterable[str] = MODULES
) -> tuple[list[Case], list[str], list[str]]:
  """Cases with `only` in their names, missing modules, and failures."""
  cases: dict[str, Case] = {}
  absent, failures = [], []
  for module in modules:
    if importlib.util.find_spec(module) is None:
      absent.append(module)
      continue
    try:
      offered = importlib.import_module(module).aot_cases()
      for case in (make_case(*parts) for parts in offered):
        if case.name in cases:
          raise ValueError(f"a second case is called {case.name!r}")
        cases[case.name] = case
    except Exception as e:
      failures.append(f"{module}.aot_cases(): {type(e).__name__}: {e}")
  return [c for name, c in cases.items() if only in name], absent, failures
