"""The mixers that come with the package; importing this registers them.

G, K, D and E are one module with different gates: Gated DeltaNet-2 as
config.gdn2 says, and its special cases, which take all but the gates from
config.gdn2.
"""

import dataclasses
from typing import Any

from gdn2_jax.model.mixers.attention import AttentionMixer
from gdn2_jax.model.mixers.gdn2 import GDN2Mixer, init_gdn2_cache
from gdn2_jax.model.mixers.gdn2_config import GDN2Config
from gdn2_jax.model.mixers.kv_cache import init_kv_cache
from gdn2_jax.model.mixers.mamba2 import Mamba2Mixer, init_mamba2_cache
from gdn2_jax.model.mixers.mamba3 import Mamba3Mixer, init_mamba3_cache
from gdn2_jax.model.mixers.registry import MixerKind, register_built_in

OP_ARRAYS = ("q", "k", "v", "g", "b", "w", "o")


def gdn2_kind(
  name: str, mixer: type[GDN2Mixer] = GDN2Mixer, **gates: str
) -> MixerKind:
  """Kind of GDN2Mixer, or of a subclass with gates of its own.

  Args:
    name: Name in reports.
    mixer: Class of the module.
    **gates: Fields of GDN2Config that the letter decides; the others are those
      of config.gdn2.
  """

  def settings(config: Any) -> GDN2Config:
    return dataclasses.replace(config.gdn2, **gates) if gates else config.gdn2

  def validate(config: Any, path: str) -> None:
    for field in gates:
      value = getattr(config.gdn2, field)
      default = getattr(GDN2Config(), field)
      if value not in (default, gates[field]):
        raise ValueError(
          f"{path}.gdn2.{field}={value!r}: expected {gates[field]!r}, which "
          f"{name} in pattern={config.pattern!r} implies, or the default"
        )
    settings(config).validate(f"{path}.gdn2")

  return MixerKind(
    name=name,
    make=lambda config, **fields: mixer(settings(config), **fields),
    init_cache=lambda config, batch_size, _: init_gdn2_cache(
      settings(config), batch_size, config.dtype
    ),
    flops=lambda config, _: recurrence_flops(config.gdn2),
    validate=validate,
    sizes=lambda config: [
      ("gdn2.num_heads", "heads", config.gdn2.num_heads),
      ("gdn2.num_value_heads", "heads", config.gdn2.value_heads),
    ],
    min_shard=lambda config: config.gdn2.conv_width - 1,
    state_floats=lambda config: (
      config.gdn2.value_heads * config.gdn2.key_dim * config.gdn2.value_dim
    ),
    has_fused_gates=lambda config: (
      settings(config).has_fusible_gates and mixer.gates is GDN2Mixer.gates
    ),
    gates=OP_ARRAYS,
    is_indexed=True,
  )


def recurrence_flops(config: GDN2Config) -> float:
  """Forward operations of one recurrence per token, all heads.

  Counted from Eq. 10 for every implementation: decay KV, erase 2KV, write 2KV,
  output 2KV.
  """
  return 7.0 * config.key_dim * config.value_dim * config.value_heads


def _attention(name: str, *, full: bool) -> MixerKind:
  """A kind of AttentionMixer, with a window or without."""

  def make(config, **fields):
    return AttentionMixer(
      config.attention, config.num_layers, full=full, **fields
    )

  def init_cache(config, batch_size, max_length):
    c = config.attention
    slots = max_length if full else c.window
    shape = (batch_size, c.kv_heads, slots, c.head_dim)
    return init_kv_cache(shape, config.dtype, ring=not full)

  def flops(config, seq_len):
    c = config.attention
    window = seq_len if full else min(c.window, seq_len)
    # Token t sees min(t + 1, window) keys.
    seen = window - window * (window - 1) / (2 * seq_len)
    return 4.0 * c.head_dim * c.num_heads * seen

  return MixerKind(
    name=name,
    make=make,
    init_cache=init_cache,
    flops=flops,
    validate=lambda config, path: config.attention.validate(
      f"{path}.attention"
    ),
    sizes=lambda config: [
      ("attention.num_heads", "heads", config.attention.num_heads),
      ("attention.num_kv_heads", "kv_heads", config.attention.kv_heads),
    ],
    min_shard=lambda config: 0,
    is_indexed=True,
    grows=full,
  )


def _mamba2() -> MixerKind:
  """The kind of Mamba2Mixer."""
  return MixerKind(
    name="Mamba-2",
    make=lambda config, **fields: Mamba2Mixer(
      config.mamba2, config.num_layers, **fields
    ),
    init_cache=lambda config, batch_size, _: init_mamba2_cache(
      config.mamba2, batch_size, config.dtype
    ),
    flops=lambda config, _: _writes_and_reads(config.mamba2, 1),
    validate=lambda config, path: config.mamba2.validate(f"{path}.mamba2"),
    sizes=lambda config: [
      ("mamba2.inner_dim / head_dim", "heads", config.mamba2.num_heads)
    ],
    min_shard=lambda config: config.mamba2.conv_width - 1,
    state_floats=lambda config: (
      config.mamba2.inner_dim * config.mamba2.state_dim
    ),
    has_fused_gates=lambda config: False,
    gates=OP_ARRAYS,
    is_indexed=True,
  )


def _mamba3() -> MixerKind:
  """The kind of Mamba3Mixer, whose tokens cannot be split over devices."""
  return MixerKind(
    name="Mamba-3",
    make=lambda config, **fields: Mamba3Mixer(
      config.mamba3, config.num_layers, **fields
    ),
    init_cache=lambda config, batch_size, _: init_mamba3_cache(
      config.mamba3, batch_size, config.dtype
    ),
    flops=lambda config, _: _writes_and_reads(
      config.mamba3, config.mamba3.mimo_rank
    ),
    validate=lambda config, path: config.mamba3.validate(f"{path}.mamba3"),
    sizes=lambda config: [
      ("mamba3.inner_dim / head_dim", "heads", config.mamba3.num_heads)
    ],
    state_floats=lambda config: (
      config.mamba3.inner_dim * config.mamba3.state_dim
    ),
    has_fused_gates=lambda config: False,
  )


def _writes_and_reads(config: Any, rank: int) -> float:
  """Forward operations per token of recurrences that erase nothing.

  Decay KV, and for every rank write 2KV and output 2KV, all heads.
  """
  return (1.0 + 4.0 * rank) * config.state_dim * config.inner_dim


register_built_in("G", gdn2_kind("Gated DeltaNet-2"))
register_built_in(
  "K", gdn2_kind("Kimi Delta Attention", gates="tied", decay="channel")
)
register_built_in(
  "D", gdn2_kind("Gated DeltaNet", gates="tied", decay="scalar")
)
register_built_in("E", gdn2_kind("DeltaNet", gates="tied", decay="none"))
register_built_in("M", _mamba2())
register_built_in("N", _mamba3())
register_built_in("S", _attention("sliding-window attention", full=False))
register_built_in("A", _attention("full attention", full=True))
