"""Rotary position embedding over the full head, in the half-split layout.

Channel i of the first half and channel i of the second half form a pair that is
rotated by position * base^(-2 i / D).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gdn2_jax.ops.checks import check_integers


def apply_rope(
  x: Float[Array, "B T H D"],
  positions: Int[Array, "B T"],
  *,
  base: float = 10000.0,
) -> Float[Array, "B T H D"]:
  """Rotates queries or keys by their positions.

    (x1, x2) -> (x1 cos a - x2 sin a, x2 cos a + x1 sin a),
    a = position * base^(-2 i / D),  i = 0 .. D/2 - 1

  The angle is one float32 product (float64 for float64 x) of the integer
  position and a frequency, so its error grows as position * 2^-24 radians.

  Args:
    x: Queries or keys [B, T, H, D], D even.
    positions: [B, T] integers, below 2^24 (exact in float32).
    base: The slowest pair rotates by about 1/base radians per token.

  Returns:
    [B, T, H, D] in x.dtype.

  Raises:
    ValueError: D is odd, a shape or dtype is wrong, or base <= 1.
  """
  if x.ndim != 4 or x.shape[-1] % 2:
    raise ValueError(f"x: expected [B, T, H, D] with even D, got {x.shape}")
  check_integers("positions", positions, "[B, T]", x.shape[:2])
  if not base > 1:
    raise ValueError(f"base: expected a number above 1, got {base}")
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  half = x.shape[-1] // 2
  frequency = jnp.asarray(float(base) ** (-np.arange(half) / half), dtype)
  angle_BT1F = positions.astype(dtype)[:, :, None, None] * frequency.reshape(
    (1, 1, 1, half)
  )
  cos, sin = jnp.cos(angle_BT1F), jnp.sin(angle_BT1F)
  x1, x2 = jnp.split(x.astype(dtype), 2, axis=-1)
  turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
  return turned.astype(x.dtype)
