"""fla's Triton kernels, on the arrays that ours get, where torch has them."""

import importlib
from collections.abc import Callable
from typing import Any

import jax

# Label: module and function. chunk_kda is the simpler op with one erase and
# write strength per token: it has less to read.
_SEQUENCES = {
  "fla gdn2": ("fla.ops.gdn2", "chunk_gdn2"),
  "fla kda": ("fla.ops.kda", "chunk_kda"),
}
_STEPS = {
  "fla gdn2": ("fla.ops.gdn2", "fused_recurrent_gdn2"),
  "fla kda": ("fla.ops.kda", "fused_recurrent_kda"),
}
LABELS = tuple(_SEQUENCES)


class Missing(NotImplementedError):
  """Why a peer cannot run."""


def synchronize() -> None:
  """Waits for torch's work."""
  importlib.import_module("torch").cuda.synchronize()


def sequence(label: str, arrays: tuple[jax.Array, ...], do: Any) -> Callable:
  """A call of a peer; with `do`, its backward pass as well.

  Args:
    label: of LABELS.
    arrays: q k v g b w of gdn2.
    do: cotangent of the output, or None.

  Returns:
    f() -> the output as a torch tensor.

  Raises:
    Missing: torch, its GPU or fla is not there.
  """
  function = _function(*_SEQUENCES[label])
  inputs = _inputs(label, arrays)
  if do is None:
    return lambda: _forward(function, inputs)
  inputs = [x.requires_grad_() for x in inputs]
  (cotangent,) = _tensors((do,))

  def gradients():
    o, state = function(*inputs, output_final_state=True)
    torch = importlib.import_module("torch")
    torch.autograd.grad((o, state), inputs, (cotangent, state.detach()))
    return o

  return gradients


def step(
  label: str, arrays: tuple[jax.Array, ...], state: jax.Array
) -> Callable:
  """A call of a peer's step for one token; as `sequence`.

  Raises:
    Missing: it is not there.
  """
  function = _function(*_STEPS[label])
  inputs = _inputs(label, tuple(x[:, None] for x in arrays))
  (initial,) = _tensors((state,))
  return lambda: _forward(function, inputs, initial_state=initial)


def _inputs(label, arrays):
  q, k, v, g, b, w = _tensors(arrays)
  if label == "fla kda":
    return [q, k, v, g, b[..., 0].contiguous()]
  return [q, k, v, g, b, w]


def _forward(function, inputs, **options):
  torch = importlib.import_module("torch")
  with torch.no_grad():
    return function(*inputs, output_final_state=True, **options)[0]


def _function(module, name):
  try:
    torch = importlib.import_module("torch")
    function = getattr(importlib.import_module(module), name)
  except Exception as e:  # packages that do not fit together raise anything
    lines = str(e).splitlines() or [type(e).__name__]
    raise Missing(lines[0][:100]) from e
  if not torch.cuda.is_available():
    raise Missing("torch finds no GPU")
  return function


def _tensors(arrays):
  torch = importlib.import_module("torch")
  return [torch.from_dlpack(x).clone() for x in jax.block_until_ready(arrays)]
