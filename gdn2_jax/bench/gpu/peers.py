"""fla's Triton kernels, timed on the arrays that ours get.

Their first calls autotune for minutes. So they run last, in a process and rows
of their own: a row that takes too long costs no figure of ours.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax

from gdn2_jax.bench.gpu import cases
from gdn2_jax.bench.gpu.names import PEERS
from gdn2_jax.bench.gpu.part import Job, Recorder, Row
from gdn2_jax.bench.gpu.time import make_row, race

# Label: module, function on sequences, function on one token. KDA is the
# simpler op with one erase and write strength per token: it reads less.
_FUNCTIONS = {
  "fla gdn2": ("fla.ops.gdn2", "chunk_gdn2", "fused_recurrent_gdn2"),
  "fla kda": ("fla.ops.kda", "chunk_kda", "fused_recurrent_kda"),
}


def run(recorder: Recorder, rehearse: bool) -> None:
  """Writes a row for every peer, shape and kind."""
  recorder.run(
    {
      f"{kind} {case.name}, {label}": Job(
        functools.partial(_measure, label, kind, case, rehearse)
      )
      for kind, case in cases.timed_recurrences(rehearse)
      for label in PEERS
    }
  )


def _measure(label: str, kind: str, case: cases.Case, rehearse: bool) -> Row:
  module, *names = _FUNCTIONS[label]
  function = _function(module, names[kind == "decode"])
  arguments = jax.block_until_ready(jax.jit(case.make)())
  call = make_call(label, kind, function, *arguments)
  seconds = race({label: call}, rehearse, _synchronize)
  return make_row(kind, case, arguments, seconds)


def make_call(
  label: str, kind: str, function: Callable, inputs: Any, cotangents: Any
) -> Callable[[], Any]:
  """Call of a peer: forward, forward and backward, or one token."""
  torch = importlib.import_module("torch")
  options = {"output_final_state": True}
  if kind == "decode":
    *inputs, state = inputs
    inputs = [x[:, None] for x in inputs]
    (options["initial_state"],) = _tensors([state])
  q, k, v, g, b, w = _tensors(inputs)
  tensors = [q, k, v, g, b, w]
  if label == "fla kda":
    tensors = [q, k, v, g, b[..., 0].contiguous()]
  if kind != "forward+backward":

    def forward():
      with torch.no_grad():
        return function(*tensors, **options)

    return forward
  for x in tensors:
    x.requires_grad_()
  (cotangent,) = _tensors(cotangents[:1])

  def both():
    o, state = function(*tensors, **options)
    outputs = (cotangent, state.detach())
    return torch.autograd.grad((o, state), tensors, outputs)

  return both


def _function(module, name):
  try:
    torch = importlib.import_module("torch")
    function = getattr(importlib.import_module(module), name)
  except Exception as e:  # packages that do not fit together raise anything
    lines = str(e).splitlines() or [type(e).__name__]
    raise NotImplementedError(lines[0][:100]) from e
  if not torch.cuda.is_available():
    raise NotImplementedError("torch finds no GPU")
  return function


def _synchronize(result):
  del result
  importlib.import_module("torch").cuda.synchronize()


def _tensors(arrays):
  torch = importlib.import_module("torch")
  return [torch.from_dlpack(x).clone() for x in jax.block_until_ready(arrays)]
