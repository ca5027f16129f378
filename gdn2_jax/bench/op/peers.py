"""fla's naive recurrence in torch, where it is installed."""

import functools
import importlib
from typing import Any

import numpy as np

from gdn2_jax.bench import timing
from gdn2_jax.kernels.errors import relative_rms
from gdn2_jax.ops.gdn2 import arg_specs
from gdn2_jax.ops.gdn2.api import gdn2

BOUND = 1e-5


def run(spec: arg_specs.ArgSpec, rounds: int = 3) -> dict[str, Any]:
  """Row with its time, or with a note why it did not run."""
  row = {"spec": spec.name, "implementation": "fla naive"}
  try:
    torch = importlib.import_module("torch")
    naive = importlib.import_module("fla.ops.gdn2.naive")
    recurrence = naive.naive_recurrent_gdn2
  except (ImportError, AttributeError) as e:
    return row | {"note": f"not run: {e}"}
  if spec.dtype != "float32" or spec.value_heads > 1 or spec.segments > 1:
    return row | {"note": "not run: float32, one value head, one segment only"}
  arrays, _ = arg_specs.make_inputs(spec)
  q, k, v, g, b, w = (torch.from_numpy(np.array(x)) for x in arrays)
  torch.set_num_threads(1)
  o = recurrence(q, k, v, g, b, w)[0].numpy()
  exact = np.asarray(gdn2(*arrays, implementation="reference")[0])
  error = relative_rms(o.astype(np.float64), exact.astype(np.float64))
  if not error <= BOUND:
    return row | {"note": f"fails its error check ({error:.1e}): not timed"}
  call = functools.partial(recurrence, q, k, v, g, b, w)
  measure = functools.partial(timing.mean_seconds, call)
  milliseconds = 1e3 * timing.race({"fla": measure}, rounds)["fla"]
  return row | {"note": f"forward {milliseconds:.1f} ms, error {error:.1e}"}
