"""Layouts of one parameter in foreign files and in ours.

A layout turns tensors of a PyTorch model into parameters of `LM` (`unpack`) and
back (`pack`). Both only permute, so they are exact in every dtype. In between
stand the sizes, known from the shapes of ours:

  d model width, H heads, K channels of a head, W taps, G query groups
"""

import dataclasses
import math
from typing import override

import numpy as np

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]
Arrays = tuple[np.ndarray, ...]

# Which input the first tap multiplies: the oldest, as in PyTorch's Conv1d (a
# cross-correlation), or the newest, as in a convolution proper.
CONV_ORDERS = ("oldest_first", "newest_first")


class Layout:
  """One or more tensors of theirs, and those of ours that hold the same."""

  def theirs(self, ours: Shapes) -> Shapes:
    """Shapes of theirs."""
    raise NotImplementedError

  def accepts(self, ours: Shapes, found: Shapes) -> bool:
    """Whether `unpack` takes tensors of theirs of the shapes `found`."""
    return found == self.theirs(ours)

  def pack(self, ours: Arrays) -> Arrays:
    """Theirs from ours; a layout that goes one way only has none."""
    raise NotImplementedError

  def unpack(self, theirs: Arrays, ours: Shapes) -> Arrays:
    """Ours, in the shapes `ours`, from theirs."""
    raise NotImplementedError


class Flat(Layout):
  """One axis of theirs for all axes of ours, in the same order."""

  @override
  def theirs(self, ours: Shapes) -> Shapes:
    return tuple((math.prod(shape),) for shape in ours)

  @override
  def pack(self, ours: Arrays) -> Arrays:
    return tuple(array.reshape(-1) for array in ours)

  @override
  def unpack(self, theirs: Arrays, ours: Shapes) -> Arrays:
    return tuple(
      array.reshape(shape) for array, shape in zip(theirs, ours, strict=True)
    )


class Same(Layout):
  """Not changed at all."""

  @override
  def theirs(self, ours: Shapes) -> Shapes:
    return ours

  @override
  def pack(self, ours: Arrays) -> Arrays:
    return ours

  @override
  def unpack(self, theirs: Arrays, ours: Shapes) -> Arrays:
    return theirs


@dataclasses.dataclass(frozen=True)
class Linear(Layout):
  """Weight [out, in] of torch's Linear; kernel [in..., out...] of ours.

  Attributes:
    in_axes: input axes of the kernel.
  """

  in_axes: int = 1

  @override
  def theirs(self, ours: Shapes) -> Shapes:
    return tuple(
      (math.prod(shape[self.in_axes :]), math.prod(shape[: self.in_axes]))
      for shape in ours
    )

  @override
  def pack(self, ours: Arrays) -> Arrays:
    return tuple(
      a.reshape(math.prod(a.shape[: self.in_axes]), -1).T for a in ours
    )

  @override
  def unpack(self, theirs: Arrays, ours: Shapes) -> Arrays:
    return tuple(
      array.T.reshape(shape) for array, shape in zip(theirs, ours, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Conv(Layout):
  """Depthwise Conv1d [H*K, 1, W]; ours [W, H, K], the newest input last.

  Also read, where the shape tells them apart: [H*K, W], and the channels-last
  [W, H*K] and [W, 1, H*K]. The order of the taps no shape tells.

  Attributes:
    order: one of CONV_ORDERS, of theirs.
  """

  order: str = "oldest_first"

  @override
  def theirs(self, ours: Shapes) -> Shapes:
    return tuple((h * k, 1, w) for w, h, k in ours)

  @override
  def accepts(self, ours: Shapes, found: Shapes) -> bool:
    return all(
      self._taps_axis(shape, wanted) is not None
      for shape, wanted in zip(ours, found, strict=True)
    )

  def _taps_axis(self, ours: Shape, found: Shape) -> int | None:
    w, h, k = ours
    if found == (h * k, 1, w):
      return 2
    if h * k == w:
      return None  # a square tells nothing
    axes = {(h * k, w): 1, (w, h * k): 0, (w, 1, h * k): 0}
    return axes.get(found)

  @override
  def pack(self, ours: Arrays) -> Arrays:
    packed = []
    for array in ours:
      taps = array if self.order == "oldest_first" else array[::-1]
      packed.append(taps.reshape(len(taps), 1, -1).transpose(2, 1, 0))
    return tuple(packed)

  @override
  def unpack(self, theirs: Arrays, ours: Shapes) -> Arrays:
    unpacked = []
    for array, shape in zip(theirs, ours, strict=True):
      taps = array if self._taps_axis(shape, array.shape) == 0 else array.T
      if self.order == "newest_first":
        taps = taps[::-1]
      unpacked.append(taps.reshape(shape))
    return tuple(unpacked)


class FusedQKV(Layout):
  """Projections q, k and v in one weight [(HQ + 2G) * K, d].

  For each of the G query groups: the rows of its HQ / G heads of q, then those
  of its one head of k, then of v. Ours are [d, HQ, K], [d, G, K], [d, G, K].
  """

  @override
  def theirs(self, ours: Shapes) -> Shapes:
    (d, heads, channels), (_, groups, _), _ = ours
    return (((heads + 2 * groups) * channels, d),)

  @override
  def pack(self, ours: Arrays) -> Arrays:
    d, groups, channels = ours[1].shape
    # [d, heads, K] -> [G, heads of a group, K, d]
    grouped = [
      a.reshape(d, groups, -1, channels).transpose(1, 2, 3, 0) for a in ours
    ]
    return (np.concatenate(grouped, axis=1).reshape(-1, d),)

  @override
  def unpack(self, theirs: Arrays, ours: Shapes) -> Arrays:
    (d, heads, channels), (_, groups, _), _ = ours
    grouped = theirs[0].reshape(groups, -1, channels, d)
    parts = np.split(grouped, [heads // groups, heads // groups + 1], axis=1)
    return tuple(
      part.transpose(3, 0, 1, 2).reshape(shape)
      for part, shape in zip(parts, ours, strict=True)
    )


class TiedGates(Layout):
  """Kimi Delta Attention's one gate of a head [H, d], for b and w alike.

  Ours are [d, H, K] and [d, HV, V]: the row of a head on each of its channels,
  and on those of its HV / H value heads, after which b = w = beta. Goes one way
  only.
  """

  @override
  def theirs(self, ours: Shapes) -> Shapes:
    (d, heads, _), _ = ours
    return ((heads, d),)

  @override
  def unpack(self, theirs: Arrays, ours: Shapes) -> Arrays:
    column = theirs[0].T[:, :, None]
    return tuple(
      np.broadcast_to(
        np.repeat(column, shape[1] // column.shape[1], axis=1), shape
      )
      for shape in ours
    )


@dataclasses.dataclass(frozen=True)
class RepeatedHeads(Layout):
  """Theirs have fewer heads: each serves `times` heads of ours in a row.

  Goes one way only.

  Attributes:
    inner: layout of one head for one.
    times: heads of ours for each of theirs.
  """

  inner: Layout
  times: int

  @override
  def theirs(self, ours: Shapes) -> Shapes:
    return self.inner.theirs(self._fewer(ours))

  @override
  def accepts(self, ours: Shapes, found: Shapes) -> bool:
    return self.inner.accepts(self._fewer(ours), found)

  @override
  def unpack(self, theirs: Arrays, ours: Shapes) -> Arrays:
    few = self.inner.unpack(theirs, self._fewer(ours))
    return tuple(np.repeat(array, self.times, axis=1) for array in few)

  def _fewer(self, ours: Shapes) -> Shapes:
    return tuple((a, heads // self.times, *rest) for a, heads, *rest in ours)
