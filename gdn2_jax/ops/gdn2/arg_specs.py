"""Named shapes of the op, shared by tests and benchmarks."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
  """Shapes of one call of gdn2.

  Attributes:
    name: Name for --spec.
    B: Batch rows.
    T: Tokens.
    H: Key heads.
    K: Key channels of a head.
    V: Value channels of a head.
    value_heads: Value heads per key head.
    g_min: Lower bound of the log-decay; g is uniform in [g_min, g_max].
    g_max: Upper bound of the log-decay.
    segments: Documents packed into a row; 1 means no segment_ids.
    dtype: Dtype of q, k, v, b and w; g is float32.
    tags: "cpu": feasible on one CPU core; "gpu": needs a GPU; "train": the
      token scan can be differentiated in a few GB.
  """

  name: str
  B: int
  T: int
  H: int
  K: int
  V: int
  value_heads: int = 1
  g_min: float = -5.0
  g_max: float = -0.1
  segments: int = 1
  dtype: str = "float32"
  tags: tuple[str, ...] = ("cpu",)

  @property
  def token_heads(self) -> int:
    """B * T * H, the unit of memory per token and head."""
    return self.B * self.T * self.H


ARG_SPECS = (
  ArgSpec(name="tiny", B=2, T=96, H=2, K=16, V=32, value_heads=2, segments=3),
  ArgSpec(name="small", B=1, T=2048, H=4, K=64, V=64, tags=("cpu", "train")),
  ArgSpec(name="packed", B=1, T=2048, H=4, K=64, V=64, segments=8),
  ArgSpec(name="grouped", B=1, T=2048, H=2, K=64, V=64, value_heads=2),
  ArgSpec(name="large", B=1, T=4096, H=8, K=128, V=128),
  ArgSpec(
    name="paper_1p3b",
    B=8,
    T=2048,
    H=16,
    K=128,
    V=128,
    dtype="bfloat16",
    tags=("gpu",),
  ),
  ArgSpec(
    name="paper_long",
    B=1,
    T=16384,
    H=16,
    K=128,
    V=128,
    dtype="bfloat16",
    tags=("gpu",),
  ),
)


def get_spec(name: str) -> ArgSpec:
  """Returns the spec of that name; raises ValueError if there is none."""
  for spec in ARG_SPECS:
    if spec.name == name:
      return spec
  names = ", ".join(spec.name for spec in ARG_SPECS)
  raise ValueError(f"spec: got {name!r}, expected one of {names}")


def make_inputs(
  spec: ArgSpec, seed: int = 0
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
  """Random (q, k, v, g, b, w) with unit q and k, and the segment_ids."""
  keys = jax.random.split(jax.random.key(seed), 6)
  qk_shape = (spec.B, spec.T, spec.H, spec.K)
  vw_shape = (spec.B, spec.T, spec.H * spec.value_heads, spec.V)

  def unit(key):
    x = jax.random.normal(key, qk_shape)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)

  q, k = unit(keys[0]), unit(keys[1])
  v = jax.random.normal(keys[2], vw_shape)
  g = jax.random.uniform(
    keys[3], qk_shape, minval=spec.g_min, maxval=spec.g_max
  )
  b = jax.nn.sigmoid(jax.random.normal(keys[4], qk_shape))
  w = jax.nn.sigmoid(jax.random.normal(keys[5], vw_shape))
  q, k, v, b, w = (x.astype(spec.dtype) for x in (q, k, v, b, w))
  segment_ids = None
  if spec.segments > 1:
    ids = 1 + jnp.arange(spec.T) * spec.segments // spec.T
    segment_ids = jnp.tile(ids[None].astype(jnp.int32), (spec.B, 1))
  return (q, k, v, g, b, w), segment_ids
