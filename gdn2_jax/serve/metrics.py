"""Counters of the server, in the text format of Prometheus."""

import collections
import threading
import time
from collections.abc import Callable

import prometheus_client as prometheus

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST
_WINDOW = 10.0  # seconds over which the rate of tokens is taken
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
  """Requests, tokens and times of one server; safe for threads."""

  def __init__(self):
    self._registry = registry = prometheus.CollectorRegistry()
    self._requests = prometheus.Counter(
      "gdn2_requests",
      "Requests for completions, by HTTP status; 499: the client left.",
      ["status"],
      registry=registry,
    )
    self._prompt = prometheus.Counter(
      "gdn2_prompt_tokens", "Tokens of prompts.", registry=registry
    )
    self._output = prometheus.Counter(
      "gdn2_completion_tokens", "Tokens chosen.", registry=registry
    )
    self._queue = prometheus.Histogram(
      "gdn2_queue_seconds",
      "Seconds that an answer waited for a row.",
      buckets=_SECONDS,
      registry=registry,
    )
    self._first = prometheus.Histogram(
      "gdn2_time_to_first_token_seconds",
      "Seconds from the request to the first token of an answer.",
      buckets=_SECONDS,
      registry=registry,
    )
    self._recent: collections.deque[tuple[float, int]] = collections.deque()
    self._lock = threading.Lock()
    self.show(
      "gdn2_tokens_per_second",
      f"Tokens chosen per second in the last {_WINDOW:g} seconds.",
      self._rate,
    )

  def show(self, name: str, text: str, value: Callable[[], float]) -> None:
    """Adds a gauge whose value is read when it is asked for."""
    gauge = prometheus.Gauge(name, text, registry=self._registry)
    gauge.set_function(value)

  def request(self, status: int) -> None:
    """Counts a request for completions that has ended."""
    self._requests.labels(str(status)).inc()

  def prompt(self, tokens: int) -> None:
    """Counts the tokens of prompts."""
    self._prompt.inc(tokens)

  def queued(self, seconds: float) -> None:
    """Notes how long an answer waited for a row."""
    self._queue.observe(seconds)

  def first(self, seconds: float) -> None:
    """Notes the time to the first token of an answer."""
    self._first.observe(seconds)

  def tokens(self, count: int) -> None:
    """Counts tokens that were chosen."""
    self._output.inc(count)
    with self._lock:
      self._recent.append((time.monotonic(), count))
      self._trim()

  def render(self) -> bytes:
    """All of it as text."""
    return prometheus.generate_latest(self._registry)

  def _rate(self) -> float:
    with self._lock:
      self._trim()
      return sum(count for _, count in self._recent) / _WINDOW

  def _trim(self):
    oldest = time.monotonic() - _WINDOW
    while self._recent and self._recent[0][0] < oldest:
      self._recent.popleft()
