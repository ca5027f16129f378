"""The dimension glossary and the array aliases used at public boundaries.

One letter, one meaning, in every signature, legend and docstring:

  B   batch (sequences)                 D   model width
  T   time (tokens of a sequence)       F   MLP width
  H   key heads                         N   chunks of a sequence
  HV  value heads, a multiple of H      C   tokens of a chunk
  K   key channels of a head            W   taps of the short convolution,
  V   value channels of a head              or tokens of an attention window

The symbols are the paper's (arXiv 2605.22791): q query, k key, v value,
g = log(alpha) log-decay (<= 0), b erase gate (key axis), w write gate (value
axis), S state, o output.
"""

from typing import TYPE_CHECKING, no_type_check

from jaxtyping import Array, Bool, Float, Int

Activations = Float[Array, "B T D"]
Tokens = Int[Array, "B T"]
SegmentIds = Int[Array, "B T"]

QueryKey = Float[Array, "B T H K"]  # q, k, g and b
Value = Float[Array, "B T HV V"]  # v, w and o
DeltaState = Float[Array, "B HV K V"]  # S, float32

StepQueryKey = Float[Array, "B H K"]
StepValue = Float[Array, "B HV V"]

Mask = Bool[Array, "B T"]

if TYPE_CHECKING:

  def unchecked_at_run_time[F](function: F) -> F:
    """Leaves a function out of the checks of shapes and types at run time."""
    return function

else:
  # To static checkers, it would make the function Any.
  unchecked_at_run_time = no_type_check
