"""Shapes of parameters, found without a device."""

import jax

from gdn2_jax.model.accounting import abstract_params
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
