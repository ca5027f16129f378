"""Metrics: the text format, and numbers that add up."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from gdn2_jax.serve.metrics import Metrics
from tests.serve.conftest import Call, ask, until


def read(text):
  """{name with labels: value} of all samples."""
  return {
    (sample.name, *sample.labels.values()): sample.value
    for family in text_string_to_metric_families(text)
    for sample in family.samples
  }


def test_counts_of_requests_and_tokens(open_client, metrics):
  """Times and tokens come from the worker, which tests share."""
  client = open_client()
  before = read(metrics.render().decode())
  ask(client, max_tokens=5, temperature=0)
  ask(client, prompt="xy", max_tokens=3, temperature=0, n=2)
  ask(client, max_tokens=-1)
  text = client.get("/metrics")
  assert text.headers["content-type"].startswith("text/plain; version=")
  got = read(text.text)
  assert got["gdn2_requests_total", "200"] == 2
  assert got["gdn2_requests_total", "400"] == 1
  assert got["gdn2_prompt_tokens_total",] == 6
  assert got["gdn2_running_requests",] == got["gdn2_waiting_requests",] == 0
  assert got["gdn2_sessions",] == 0
  after = read(metrics.render().decode())
  for name, count in {
    "gdn2_completion_tokens_total": 11,
    "gdn2_queue_seconds_count": 3,
    "gdn2_time_to_first_token_seconds_count": 3,
  }.items():
    assert after[name,] - before[name,] == count, name
  assert after["gdn2_tokens_per_second",] >= 1.1
  total = "gdn2_queue_seconds_sum", "gdn2_time_to_first_token_seconds_sum"
  queued, first = (after[name,] - before[name,] for name in total)
  assert 0 < queued < first < 60


def test_running_and_waiting(make, worker):
  app = make(max_output_tokens=100_000)
  body = {"prompt": "de f", "max_tokens": 100_000, "temperature": 0}

  def shown():
    got = read(app.service.metrics.render().decode())
    return got["gdn2_running_requests",], got["gdn2_waiting_requests",]

  async def main():
    calls = [Call(app, body).start() for _ in range(5)]
    await until(lambda: shown() == (3, 2))
    for call in calls:
      call.leave()
      await call.end()
    await until(lambda: shown() == (0, 0))

  asyncio.run(main())
  got = read(app.service.metrics.render().decode())
  assert got["gdn2_requests_total", "499"] == 5


def test_the_rate_forgets():
  metrics = Metrics()
  metrics.tokens(50)
  assert metrics._rate() == 5
  metrics._recent[0] = (metrics._recent[0][0] - 11, 50)
  assert metrics._rate() == 0 and not metrics._recent
