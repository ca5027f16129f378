"""The planner: exact counts, memory read off a compiled step."""

import importlib
import json

import jax
import pytest

from gdn2_jax.plan import format_plan, plan
from tests.model.models import small_config
from tests.tiny_run import run_many


def tiny(pattern="GS"):
  config = importlib.import_module("gdn2_jax.configs.tiny_cpu").get_config()
  config.model = small_config(pattern, vocab_size=64)
  config.data.seq_len, config.data.batch_size = 32, 64
  return config


@pytest.fixture(scope="module")
def one():
  """The plan for one device, of layers that compile fast."""
  return plan(tiny("S"), 1)


@pytest.mark.slow
def test_arguments_are_exact_and_sharded(one):
  config = tiny("S")
  count = one["parameters"]["total"]
  memory = one["memory_per_device"]
  assert memory["parameters"] == 4 * count
  # Two float32 moments a parameter, and the counters of the optimizer.
  assert 8 * count <= memory["optimizer"] <= 8 * count + 64
  batch = 64 * 32 * 4 * 4
  counters = memory["arguments"] - 12 * count - batch
  assert 0 <= counters <= 128
  assert memory["temporaries"] > 0
  config.mesh.fsdp = 2
  two = plan(config, 2)
  assert two["memory_per_device"]["parameters"] < 0.6 * memory["parameters"]


@pytest.mark.slow
def test_accumulation_needs_less_memory(one):
  config = tiny("S")
  whole = one["memory_per_device"]["temporaries"]
  config.grad_accum = 8
  assert plan(config, 1)["memory_per_device"]["temporaries"] < 0.7 * whole


def test_flops_are_six_per_parameter_and_the_mixers():
  config = tiny()
  figures = plan(config, 1, compile_step=False)
  counts = figures["parameters"]
  matmul = 6 * (counts["total"] - counts["embedding"])
  # Two recurrences: 7 K V per value head; two windows of 7 in 32 tokens, in
  # which token t sees min(t + 1, 7) keys.
  recurrence = 7 * 16 * 24 * 4
  seen = sum(min(t + 1, 7) for t in range(32)) / 32
  attention = 4 * 8 * 4 * seen
  want = matmul + 3 * 2 * (recurrence + attention)
  assert figures["flops_per_token"]["train"] == pytest.approx(want)


def test_a_cache_that_grows_is_planned_for_the_rows_of_the_data():
  config = tiny()
  config.model.pattern = "A"
  figures = plan(config, 1, compile_step=False)
  # Keys and values of 2 heads of 8 channels in each layer, and its position.
  layer = 2 * 32 * 2 * 8 * 4 + 4
  want = config.model.num_layers * layer
  assert figures["state_bytes_per_sequence"]["total"] == want
  assert "state of one sequence, of 32 tokens" in format_plan(figures)
  config.mesh.tensor = 4
  with pytest.raises(ValueError, match=r"attention\.num_kv_heads gives 2"):
    plan(config, 4, compile_step=False)


def test_mesh_that_does_not_fit_is_refused():
  config = tiny()
  config.mesh.tensor = 3
  with pytest.raises(ValueError, match=r"mesh\.tensor=3"):
    plan(config, 2, compile_step=False)


def test_text_names_every_section(one):
  text = format_plan(one)
  for word in ("blocks", "optimizer state", "FLOPs per token", "activations"):
    assert word in text


def test_command_line():
  """Prints JSON; refuses an argument without dashes."""
  base = ["--config=configs/gdn2_1p3b.py", "--json", "--nocompile"]
  done, refused = run_many("gdn2_jax.plan", [base, [*base, "config=tiny_cpu"]])
  assert json.loads(done["out"])["parameters"]["blocks"] == 1302638112
  assert refused["code"] == 1
  assert "unexpected argument 'config=tiny_cpu'" in refused["err"]


def test_the_planner_allocates_no_parameters():
  """Planning the 1.3B model leaves no large array behind."""
  config = importlib.import_module("gdn2_jax.configs.gdn2_1p3b").get_config()
  before = sum(a.nbytes for a in jax.live_arrays())
  plan(config, 1, compile_step=False)
  assert sum(a.nbytes for a in jax.live_arrays()) - before < 1e6
