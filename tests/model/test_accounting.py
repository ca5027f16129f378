"""Shapes, operations and bytes, found without a device."""

import jax

from gdn2_jax.model.accounting import (
  abstract_params,
  count_parameters,
  forward_flops_per_token,
  state_bytes,
)
from tests.model.models import small_config


def test_no_program_is_compiled_for_shapes():
  """A mesh of devices that only compile runs nothing, not even a key."""
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **kwargs: compiled.append(event)
  )
  jax.clear_caches()
  try:
    abstract_params(small_config("GS"))
  finally:
    jax.monitoring.clear_event_listeners()
  assert not [event for event in compiled if "backend_compile" in event]


def test_operations_of_mamba_are_decay_writes_and_reads():
  """Beside two per parameter: KV, and 2 KV per write and per read."""
  for letter, ranks in (("M", 1), ("N", 2)):
    config = small_config(letter)
    count = count_parameters(config)
    matmuls = 2 * (count.total - count.embedding)
    got = forward_flops_per_token(config, 32) - matmuls
    state = 4 * 16 * 16
    assert got == 2 * state * (1 + 2 * ranks + 2 * ranks)


def test_cache_bytes_of_mamba():
  """States are float32, and what is kept of tokens has the model's dtype."""
  state = 4 * 16 * 16 * 4
  tails = 3 * (64 + 2 * 16) * 4
  assert state_bytes(small_config("M", num_layers=1)) == {"M": state + tails}
  angles, b, x = 4 * 4 * 4, 2 * 4 * 16 * 4, 64 * 4
  want = {"N": state + angles + b + x}
  assert state_bytes(small_config("N", num_layers=1)) == want
