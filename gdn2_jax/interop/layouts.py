"""Layouts of a foreign tensor and of the same numbers in ours.

A layout turns a tensor of a PyTorch model into parameters of `LM` (`unpack`)
and back (`pack`). Both only permute, so they are exact in every dtype. `ours`
are the shapes, or to `pack` the arrays, of our parameters:

  d model width, H heads, K channels of a head, W taps, G query groups
"""

import dataclasses
import math
from typing import override

import numpy as np

Shape = tuple[int, ...]

# Which input the first tap multiplies: the oldest, as in PyTorch's Conv1d (a
# cross-correlation), or the newest, as in a convolution proper.
CONV_ORDERS = ("oldest_first", "newest_first")


class Layout:
  """Layout of one foreign tensor; this one is the same as ours."""

  derived = ""  # reason why ours hold more numbers than theirs

  def theirs(self, *ours: Shape) -> Shape:
    """Shape of theirs."""
    return ours[0]

  def accepts(self, found: Shape, *ours: Shape) -> bool:
    """True where `unpack` takes a tensor of the shape `found`."""
    return found == self.theirs(*ours)

  def pack(self, *ours: np.ndarray) -> np.ndarray:
    """Theirs from ours."""
    return ours[0]

  def unpack(self, theirs: np.ndarray, *ours: Shape) -> tuple[np.ndarray, ...]:
    """Ours, in the shapes `ours`, from theirs."""
    return (theirs,)


class Flat(Layout):
  """One axis of theirs for all axes of ours."""

  @override
  def theirs(self, *ours):
    return (math.prod(ours[0]),)

  @override
  def pack(self, *ours):
    return ours[0].reshape(-1)

  @override
  def unpack(self, theirs, *ours):
    return (theirs.reshape(ours[0]),)


@dataclasses.dataclass(frozen=True)
class Linear(Layout):
  """Weight [out, in] of torch's Linear; kernel [in..., out...] of ours."""

  in_axes: int = 1  # of the kernel

  @override
  def theirs(self, *ours):
    n = self.in_axes
    return math.prod(ours[0][n:]), math.prod(ours[0][:n])

  @override
  def pack(self, *ours):
    return ours[0].reshape(self.theirs(ours[0].shape)[::-1]).T

  @override
  def unpack(self, theirs, *ours):
    return (theirs.T.reshape(ours[0]),)


@dataclasses.dataclass(frozen=True)
class Conv(Layout):
  """Depthwise Conv1d [H*K, 1, W]; ours [W, H, K] or [W, C], newest input last.

  Also read, where the shape tells them apart: [H*K, W], and the channels-last
  [W, H*K] and [W, 1, H*K]. No shape tells the order of the taps.
  """

  order: str = "oldest_first"  # one of CONV_ORDERS, of theirs

  @override
  def theirs(self, *ours):
    w, *channels = ours[0]
    return math.prod(channels), 1, w

  @override
  def accepts(self, found, *ours):
    w, *channels = ours[0]
    c = math.prod(channels)
    # The axes of a square cannot be told apart.
    others = () if c == w else ((c, w), (w, c), (w, 1, c))
    return found in ((c, 1, w), *others)

  @override
  def pack(self, *ours):
    taps = ours[0] if self.order == "oldest_first" else ours[0][::-1]
    return taps.reshape(len(taps), 1, -1).transpose(2, 1, 0)

  @override
  def unpack(self, theirs, *ours):
    w, *channels = ours[0]
    is_last = theirs.shape[0] == w != math.prod(channels)
    taps = theirs if is_last else theirs.T
    if self.order == "newest_first":
      taps = taps[::-1]
    return (taps.reshape(ours[0]),)


class FusedQKV(Layout):
  """Projections q, k, v in one weight [(HQ + 2G)*K, d].

  For each of the G query groups: the rows of its HQ / G heads of q, then those
  of its one head of k, then of v. Ours are [d, HQ, K], [d, G, K], [d, G, K].
  """

  @override
  def theirs(self, *ours):
    (d, heads, channels), (_, groups, _), _ = ours
    return (heads + 2 * groups) * channels, d

  @override
  def pack(self, *ours):
    d, groups, channels = ours[1].shape
    # [d, heads, K] -> [G, heads of a group, K, d]
    grouped = [
      a.reshape(d, groups, -1, channels).transpose(1, 2, 3, 0) for a in ours
    ]
    return np.concatenate(grouped, axis=1).reshape(-1, d)

  @override
  def unpack(self, theirs, *ours):
    (d, heads, channels), (_, groups, _), _ = ours
    grouped = theirs.reshape(groups, -1, channels, d)
    parts = np.split(grouped, [heads // groups, heads // groups + 1], axis=1)
    return tuple(
      part.transpose(3, 0, 1, 2).reshape(shape)
      for part, shape in zip(parts, ours, strict=True)
    )


class TiedGates(Layout):
  """Kimi Delta Attention's gate [H, d], used for b and w.

  Ours are [d, H, K] and [d, HV, V]: the row of a head on each of its channels,
  and on those of its HV / H value heads, after which b = w = beta. There is no
  way back.
  """

  derived = "one gate of a head, tied over its channels"

  @override
  def theirs(self, *ours):
    d, heads, _ = ours[0]
    return heads, d

  @override
  def unpack(self, theirs, *ours):
    column = theirs.T[:, :, None]
    return tuple(
      np.broadcast_to(
        np.repeat(column, shape[1] // column.shape[1], axis=1), shape
      )
      for shape in ours
    )


@dataclasses.dataclass(frozen=True)
class RepeatedHeads(Layout):
  """Fewer heads of theirs, each repeated for `times` heads of ours.

  There is no way back.
  """

  derived = "a key head, repeated for each of its value heads"

  inner: Layout  # of one head for one
  times: int  # heads of ours for each of theirs

  def _fewer(self, ours: tuple[Shape, ...]) -> tuple[Shape, ...]:
    return tuple((a, heads // self.times, *rest) for a, heads, *rest in ours)

  @override
  def theirs(self, *ours):
    return self.inner.theirs(*self._fewer(ours))

  @override
  def accepts(self, found, *ours):
    return self.inner.accepts(found, *self._fewer(ours))

  @override
  def unpack(self, theirs, *ours):
    few = self.inner.unpack(theirs, *self._fewer(ours))
    return tuple(np.repeat(array, self.times, axis=1) for array in few)
