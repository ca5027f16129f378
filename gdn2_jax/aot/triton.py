"""Compilation of the Triton kernels, without a GPU.

Needs triton. The arguments are described to it as jax_triton does: pointers are
aligned to 16 bytes, and T is a number that is known when the program runs.
"""

import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from gdn2_jax.aot import ptxas
from gdn2_jax.aot.topology import find_ptxas

_HEADS = 16
_SHAPES = ((128, 128), (256, 256), (64, 64), (48, 40))  # K, V
_DTYPES = ("bf16", "fp32")
_INPUTS = ("q", "k", "v", "g", "b", "w")


def compile_all(
  targets: Sequence[int] = (80, 89, 120),
) -> list[dict[str, Any]]:
  """Rows of every kernel, shape and compute capability (80 for 8.0).

  Bytes of spills (stores and loads) and stack are a thread's, those of shared
  memory a program's. `failures` are sentences: a kernel that does not compile,
  that spills, or that has a stack.
  """
  from triton.backends.compiler import GPUTarget

  results = []
  for arch in targets:
    for name, num_warps, source in _sources():
      result = {"kernel": name, "arch": arch, "failures": []}
      results.append(result)
      try:
        result |= _compile(num_warps, source, GPUTarget("cuda", arch, 32))
      except Exception as e:  # one broken kernel must not hide the others
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        result["failures"].append(f"{name}, sm_{arch}: {reason}")
        continue
      for figure in ("spill_bytes", "stack_bytes"):
        if result[figure]:
          found = f"{figure} is {result[figure]}, expected 0"
          result["failures"].append(f"{name}, sm_{arch}: {found}")
  return results


def _sources() -> Iterator[tuple[str, int, Any]]:
  """Name, warps and Triton source of every kernel and representative shape."""
  from gdn2_jax.triton import kernels

  for K, V in _SHAPES:
    for dtype in _DTYPES:
      blocks = kernels.step_blocks(K, V)
      constants = {"SCALE": K**-0.5, "K": K, "V": V}
      yield (
        f"step {dtype} K={K} V={V}",
        blocks.num_warps,
        _source(kernels.gdn2_step_kernel, dtype, blocks, constants),
      )
      blocks = kernels.sequence_blocks(K, V)
      for segments in (False, True):
        more = {"H": _HEADS, "HAS_SEGMENTS": segments}
        yield (
          f"{'packed' if segments else 'sequence'} {dtype} K={K} V={V}",
          blocks.num_warps,
          _source(
            kernels.gdn2_sequence_kernel, dtype, blocks, constants | more
          ),
        )


def _source(kernel, dtype, blocks, constants):
  from triton.compiler import ASTSource

  constants = constants | {
    "BLOCK_K": blocks.block_k,
    "BLOCK_V": blocks.block_v,
  }
  types = {f"{name}_ptr": f"*{dtype}" for name in _INPUTS}
  types |= {"g_ptr": "*fp32", "o_ptr": f"*{dtype}", "T": "i32"}
  types |= {"state_in_ptr": "*fp32", "state_ptr": "*fp32"}
  has_ids = constants.get("HAS_SEGMENTS")
  types["segment_ids_ptr"] = "*i32" if has_ids else types["q_ptr"]
  signature = {
    name: "constexpr" if name in constants else types[name]
    for name in kernel.arg_names
  }
  aligned = {
    (i,): [["tt.divisibility", 16]]
    for i, name in enumerate(kernel.arg_names)
    if name.endswith("_ptr")
  }
  return ASTSource(kernel, signature, constants, aligned)


def _compile(num_warps, source, target):
  import triton

  options = {"num_warps": num_warps}
  compiled = triton.compile(source, target=target, options=options)
  ptx = compiled.asm["ptx"]
  return {
    "ptx_version": re.search(r"\.version (\S+)", ptx)[1],
    "shared_bytes": compiled.metadata.shared,
    "num_warps": num_warps,
    **_assemble(ptx),
  }


def _assemble(ptx: str) -> dict[str, int]:
  """Registers, spills and stack of a kernel, as ptxas counts them."""
  target = re.search(r"\.target (\w+)", ptx)[1]
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "kernel.ptx"
    path.write_text(ptx)
    command = [str(find_ptxas()), "-v", f"-arch={target}", str(path)]
    command += ["-o", str(path.with_suffix(".cubin"))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
  if run.returncode:
    raise RuntimeError(f"ptxas: {run.stderr.strip()}")
  registers, stack, stores, loads = ptxas.counts(run.stderr)
  return {
    "registers": registers,
    "spill_bytes": stores + loads,
    "stack_bytes": stack,
  }
