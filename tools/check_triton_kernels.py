"""Runs the Triton kernels on a CPU, in Triton's interpreter, against float64.

The interpreter takes torch tensors, and so this is no part of the suite:

  python3 -m venv env && env/bin/pip install torch "numpy<2.4" triton==3.6.0
  TRITON_INTERPRET=1 env/bin/python tools/check_triton_kernels.py

Any Python >= 3.11 will do; neither jax nor this package has to be installed.
It shows that the kernels compute Eq. 10; how they are called from JAX, and
what a GPU makes of them, is another matter. Exits with 1 on a miss.
"""

import importlib.util
import itertools
import os
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
FLOAT32_BOUND = 1e-5
LOW_PRECISION_FACTOR = 2
DTYPES = ("float32", "bfloat16", "float16")
INPUTS = ("q", "k", "v", "g", "b", "w")

# B, T, H, K, V: powers of two, neither, more tiles than one, one token.
SHAPES = (
  (2, 9, 2, 16, 16),
  (1, 7, 3, 48, 40),
  (1, 5, 1, 128, 64),
  (1, 3, 1, 256, 16),
  (2, 1, 2, 24, 33),
)
DECAYS = ((-5.0, -0.1), (-50.0, -5.0), (0.0, 0.0), (-200.0, 0.0))


def load_file(name):
  """Loads one file of the package, without the package around it."""
  path = ROOT / "gdn2_jax" / name
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


def make_case(rng, shape, decay, dtype):
  """Inputs as torch tensors of a dtype, the state in float32."""
  import torch

  B, T, H, K, V = shape

  def unit(*shape):
    x = rng.standard_normal(shape)
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)

  def gate(*shape):
    return 1 / (1 + np.exp(-rng.standard_normal(shape)))

  arrays = {
    "q": unit(B, T, H, K),
    "k": unit(B, T, H, K),
    "v": rng.standard_normal((B, T, H, V)),
    "g": rng.uniform(*decay, (B, T, H, K)),
    "b": gate(B, T, H, K),
    "w": gate(B, T, H, V),
    "state": rng.standard_normal((B, H, K, V)),
  }
  return {
    name: torch.tensor(x, dtype=torch.float32).to(
      torch.float32 if name in ("g", "state") else getattr(torch, dtype)
    )
    for name, x in arrays.items()
  }


def recurrence(case, segment_ids, scale, dtype=np.float64):
  """Eq. 10 token by token; padding and restarts by their definition."""
  q, k, v, g, b, w, S = (
    case[n].float().numpy().astype(dtype) for n in (*INPUTS, "state")
  )
  S, o = S.copy(), np.zeros_like(v)
  last = [0] * len(q)
  for row, t in itertools.product(range(q.shape[0]), range(q.shape[1])):
    segment = 1 if segment_ids is None else int(segment_ids[row, t])
    if segment == 0:
      continue
    if last[row] not in (0, segment):
      S[row] = 0
    last[row] = segment
    for h in range(q.shape[2]):
      at = row, t, h
      S_KV = np.exp(g[at])[:, None] * S[row, h]
      u = w[at] * v[at] - (b[at] * k[at]) @ S_KV
      S[row, h] = S_KV + np.outer(k[at], u)
      o[at] = dtype(scale) * (q[at] @ S[row, h])
  return o, S


def run_sequence(kernels, case, segment_ids, scale):
  """Launches gdn2_sequence_kernel; returns o and the state."""
  import torch

  B, T, H, K = case["q"].shape
  V = case["v"].shape[-1]
  blocks = kernels.sequence_blocks(K, V)
  # The interpreter truncates to bfloat16, where a GPU rounds: torch does it.
  o = torch.full(case["v"].shape, float("nan"))
  state = case["state"].clone()  # updated in place, as from JAX
  ids = case["q"] if segment_ids is None else torch.tensor(segment_ids)
  kernels.gdn2_sequence_kernel[(blocks.programs(B * H, V),)](
    *(case[n] for n in INPUTS),
    *(state, ids, T, o, state),
    SCALE=scale,
    H=H,
    K=K,
    V=V,
    BLOCK_K=blocks.block_k,
    BLOCK_V=blocks.block_v,
    HAS_SEGMENTS=segment_ids is not None,
  )
  return o.to(case["v"].dtype), state


def run_step(kernels, case, scale):
  """Launches gdn2_step_kernel on a case of one token."""
  import torch

  B, _, H, K = case["q"].shape
  V = case["v"].shape[-1]
  blocks = kernels.step_blocks(K, V)
  # The interpreter truncates to bfloat16, where a GPU rounds: torch does it.
  o = torch.full(case["v"].shape, float("nan"))
  state = case["state"].clone()
  kernels.gdn2_step_kernel[(blocks.programs(B * H, V),)](
    *(case[n] for n in INPUTS),
    *(state, o, state),
    SCALE=scale,
    K=K,
    V=V,
    BLOCK_K=blocks.block_k,
    BLOCK_V=blocks.block_v,
  )
  return o.to(case["v"].dtype), state


def check(name, outputs, case, segment_ids, scale, dtype):
  """Prints and judges both outputs by the accuracy contract."""
  import torch

  rel_rms = load_file("kernels/errors.py").relative_rms
  exact = recurrence(case, segment_ids, scale)
  token_scan = recurrence(case, segment_ids, scale, np.float32)
  rounded = torch.tensor(token_scan[0]).to(getattr(torch, dtype)).float()
  floors = (rel_rms(rounded.double().numpy(), exact[0]), FLOAT32_BOUND)
  good = True
  for which, x, y, floor in zip(
    ("o", "state"), outputs, exact, floors, strict=True
  ):
    bound = FLOAT32_BOUND
    if which == "o" and dtype != "float32":
      bound = LOW_PRECISION_FACTOR * floor
    error = rel_rms(x.double().numpy(), y)
    fine = bool(error <= bound)
    good &= fine
    verdict = "ok  " if fine else "MISS"
    print(f"{verdict} {name} {which}: {error:.2e} (bound {bound:.2e})")
  if segment_ids is not None:
    padding = outputs[0][torch.tensor(segment_ids == 0)]
    good &= bool((padding == 0).all())
  return good


def main():
  """Checks every case; returns the exit status."""
  assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
  kernels = load_file("triton/kernels.py")
  rng = np.random.default_rng(0)
  good = True
  for shape, decay, dtype in itertools.product(SHAPES, DECAYS, DTYPES):
    if dtype != "float32" and decay != DECAYS[0]:
      continue
    B, T, _, K, _ = shape
    scale = K**-0.5
    case = make_case(rng, shape, decay, dtype)
    if decay == DECAYS[-1]:
      case["g"][:, T // 2] = float("-inf")  # forgets all
    name = f"{dtype} {shape} g in {decay}"
    outputs = run_sequence(kernels, case, None, scale)
    good &= check(f"sequence {name}", outputs, case, None, scale, dtype)
    if T == 1:
      outputs = run_step(kernels, case, scale)
      good &= check(f"step {name}", outputs, case, None, scale, dtype)
    ids = rng.integers(0, 3, (B, T)).astype(np.int32)
    # What stands at padding must not matter, nor what an ended segment held.
    for n in INPUTS:
      case[n][ids == 0] = float("nan")
    outputs = run_sequence(kernels, case, ids, scale)
    good &= check(f"packed {name}", outputs, case, ids, scale, dtype)
  print("all within the contract" if good else "NOT within the contract")
  return 0 if good else 1


if __name__ == "__main__":
  sys.exit(main())
