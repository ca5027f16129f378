"""Tokens per second, model FLOP/s and their share of the device's peak."""

import time
from collections.abc import Callable

import jax

# Dense bfloat16 FLOP/s without sparsity, from NVIDIA's data sheets (H100 SXM
# and PCIe, H200 SXM, A100). Matched by prefix, the longest first.
PEAK_FLOPS = {
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA A100": 312e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Peak bfloat16 FLOP/s of a device; None if unknown."""
  for prefix in sorted(PEAK_FLOPS, key=len, reverse=True):
    if device_kind.startswith(prefix):
      return PEAK_FLOPS[prefix]
  return None


class Throughput:
  """Rates over the steps since the last reading, padding included.

  Call `restart` after the first step and after a pause: it has compiled, or
  waited for something other than training.
  """

  def __init__(
    self,
    tokens_per_step: int,
    flops_per_token: float,
    devices: list[jax.Device] | None = None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    devices = jax.devices() if devices is None else devices
    self._tokens_per_step = tokens_per_step
    self._flops_per_token = flops_per_token
    self._num_devices = len(devices)
    self._peak = peak_flops(devices[0].device_kind)
    self._clock = clock
    self._since: tuple[int, float] | None = None

  def restart(self, step: int) -> None:
    """Starts a measurement after `step` finished steps."""
    self._since = (step, self._clock())

  def read(self, step: int) -> dict[str, float]:
    """Rates up to `step` finished steps, {} if none; restarts."""
    since, now = self._since, self._clock()
    self._since = (step, now)
    if since is None or step <= since[0] or now <= since[1]:
      return {}
    step_s = (now - since[1]) / (step - since[0])
    tokens_per_s = self._tokens_per_step / step_s
    flops = tokens_per_s * self._flops_per_token / self._num_devices
    rates = {
      "tokens_per_s": tokens_per_s,
      "step_s": step_s,
      "tflops_per_device": flops / 1e12,
    }
    if self._peak is not None:
      rates["mfu"] = flops / self._peak
    return rates
