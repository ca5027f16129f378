"""The serving benchmark: what it counts, what it refuses, that it runs."""

import functools
import types

import jax
import numpy as np
import pytest

from gdn2_jax.bench.results import text_table
from gdn2_jax.bench.serve import models as serve_models
from gdn2_jax.bench.serve import plot as serve_plot
from gdn2_jax.bench.serve import run as serve
from gdn2_jax.bench.serve import time as serve_time
from gdn2_jax.inference.state import init_state
from gdn2_jax.model.accounting import count_parameters
from gdn2_jax.model.mixers.kv_cache import KVCache, RingCache
from tests.random_params import random_params

pytestmark = pytest.mark.deep

# The presets' "tiny": two layers of width 32 and 2 heads of 16 channels.
TINY = serve_models.PRESETS["tiny"]
HEADS = 2 * 16


def flags(**changes):
  """The flags as absl leaves them."""
  values = {
    "preset": None,
    "constancy_preset": "nano",
    "dtype": None,
    "models": ["GDN-2", "hybrid", "softmax"],
    "sections": ["decode", "prefill", "constancy"],
    "lengths": ["1K", "128K"],
    "batches": ["8", "1"],
    "constancy_lengths": ["1K", "256K"],
    "chunk": 512,
    "rounds": 7,
    "prefill_seconds": 60.0,
    "most_gb": None,
    "price_per_hour": None,
    "rehearse": False,
  }
  return types.SimpleNamespace(**(values | changes))


@functools.cache
def tiny_configs():
  configs = serve_models.make_configs(TINY, "float32")
  for config in configs.values():
    config.gdn2.implementation = "reference"  # compiles faster
  return configs


def test_presets_have_models_of_one_size():
  preset = serve_models.PRESETS["1.3B"]
  configs = serve_models.make_configs(preset, "bfloat16")
  totals = [count_parameters(c).total for c in configs.values()]
  assert max(totals) < 1.005 * min(totals)
  assert {c.model_dim for c in configs.values()} == {2304}
  assert {c.num_layers for c in configs.values()} == {18}
  # The paper's two, with the paper's widths.
  widths = [configs[name].mlp_dim for name in ("GDN-2", "hybrid")]
  assert widths == [6208, 6784]


def test_bytes_that_a_step_must_move():
  """The window of 32 is not full after 5 tokens, and is after 40."""
  recurrent = 2 * (2 * 16 * 16 * 4 + 3 * 3 * HEADS * 4)  # read and written
  slot = 2 * HEADS * 4  # a key and a value
  for name, config in tiny_configs().items():
    state = jax.eval_shape(lambda c=config: init_state(c, 3, 64))
    for length in (5, 40):
      # The new key is not read, and of a full ring one key is too old.
      layers = {
        "G": recurrent,
        "S": (min(length, 31) + 1) * slot,
        "A": (length + 1) * slot,
      }
      want = sum(layers[kind] for kind in 2 * config.pattern) // len(
        config.pattern
      )
      moved = serve_models.moved_state_bytes(state, length)
      assert moved == 3 * want, name
    total = count_parameters(config).total
    rows = 3 * 32  # of an embedding of 64
    read = serve_models.read_weight_bytes(config, 3)
    assert read == 4 * (total - 64 * 32 + rows), name


def test_a_made_state_is_one_of_that_length():
  """Its slots and positions are those that reading so many tokens leaves."""
  for name in ("hybrid", "softmax"):
    state = serve_models.state_at(tiny_configs()[name], 2, 40)
    assert np.all(state.position == 40)
    for part in state.cache:
      leaves = [np.asarray(a) for a in jax.tree.leaves(part)]
      assert all(np.isfinite(a).all() for a in leaves)
      if isinstance(part, RingCache):
        at = np.asarray(part.positions)[0, 1]
        np.testing.assert_array_equal(np.sort(at), np.arange(8, 40))
        np.testing.assert_array_equal(at % 32, np.arange(32))
      if isinstance(part, KVCache):
        assert np.all(part.next_position == 40) and np.all(part.k[..., :40, :])
        later = part.replace(next_position=part.next_position + 9)
        back = serve_models.rewound(state.replace(cache=(later,)), 40)
        assert np.all(back.cache[0].next_position == 40)


@pytest.fixture(scope="module")
def result():
  """Everything but GDN-2, which compiles for longest."""
  options = serve.read_options(
    flags(rehearse=True, models=["hybrid", "softmax"], price_per_hour=3.0)
  )
  assert options["preset"] == "tiny"
  options |= {"lengths": [32], "batches": [2]}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(serve_models, "random_params", random_params)
    patch.setattr(
      serve_models,
      "make_configs",
      lambda preset, dtype, names: {n: tiny_configs()[n] for n in names},
    )
    check = serve_time.check
    patch.setattr(  # of the model that compiles faster
      serve_time, "check", lambda x: check(x) if x.name == "softmax" else 0.0
    )
    yield serve.run(options)


def rows_of(result, section):
  return [row for row in result["rows"] if row["section"] == section]


def test_decoding_is_compared_with_its_floor(result):
  rows = rows_of(result, "decode")
  assert [row["model"] for row in rows] == ["hybrid", "softmax"]
  for row in rows:
    assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
    assert row["tokens_per_s"] == pytest.approx(2 / (row["ms"] / 1e3))
    assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["ms"])
    moved = row["weight_bytes_read"] + row["state_bytes_moved"]
    rate = moved / (row["floor_ms"] / 1e3)
    assert row["copy_gb_per_s"] == pytest.approx(rate / 1e9)
    hours = 1e6 / row["tokens_per_s"] / 3600
    assert row["usd_per_million_tokens"] == pytest.approx(3.0 * hours)
  hybrid, softmax = rows
  # Keys and values of 32 tokens, two rows, in two layers, and the positions.
  assert softmax["state_bytes"] == 2 * 2 * (32 * 2 * HEADS * 4 + 4)
  assert hybrid["state_bytes"] < softmax["state_bytes"]


def test_prompts_are_really_read(result):
  for row in rows_of(result, "prefill"):
    assert row["tokens_per_s"] == pytest.approx(32 / (row["ms"] / 1e3))
    assert row["temp_bytes"] > 0
  rows = rows_of(result, "constancy")
  assert [row["tokens_read"] for row in rows] == [32, 64]
  assert rows[0]["state_bytes"] == rows[1]["state_bytes"]
  assert all(row["finite"] and row["process_bytes"] > 0 for row in rows)


def test_table_and_plot_show_every_row(result):
  text = serve.table(result)
  assert "REHEARSAL" in text and "USD/M tokens" in text
  lines = [
    line
    for line in text.splitlines()
    if line.partition(" ")[0] in ("hybrid", "softmax")
  ]
  assert len(lines) == len(result["rows"])
  options = result["options"] | {"price_per_hour": None}
  assert "USD" not in serve.table(result | {"options": options})
  figure = serve_plot.draw(result)
  axes = figure.axes
  assert all(
    a.get_xlabel() and a.get_ylabel() and a.get_title("left") for a in axes
  )
  assert {(a.get_xscale(), a.get_yscale()) for a in axes} == {("log", "log")}


def test_what_does_not_fit_or_takes_too_long_is_said():
  config = tiny_configs()["softmax"]
  subject = serve_time.Subject(name="softmax", config=config, params=())
  (row,) = serve_time.decode([subject], [1 << 20], [4], 1, 1e9)
  assert "not run: 2.1 GB" in row["note"]
  assert "not run: 2.1 GB" in text_table([row], serve._COLUMNS)[1]


def test_a_model_that_decodes_wrongly_is_not_timed(monkeypatch):
  monkeypatch.setattr(serve_time, "check", lambda subject: 0.1)
  monkeypatch.setattr(serve_models, "random_params", lambda config: None)
  with pytest.raises(ValueError, match="softmax: decoding differs"):
    serve.run(serve.read_options(flags(rehearse=True, models=["softmax"])))


@pytest.mark.parametrize(
  "changes,says",
  [
    ({"lengths": ["1K", "x"]}, "--lengths=x: "),
    ({"lengths": ["700"]}, "--lengths=700: expected a multiple of --chunk=512"),
    ({"batches": ["0"]}, "--batches=0: "),
    ({"batches": []}, "--batches: "),
    ({"models": ["mamba"]}, "--models=mamba: expected one of GDN-2, hybrid"),
    ({"sections": ["train"]}, "--sections=train: "),
    ({"price_per_hour": -1.0}, "--price_per_hour=-1.0: "),
    ({"chunk": 0}, "--chunk=0: "),
    ({"most_gb": float("nan")}, "--most_gb=nan: "),
  ],
)
def test_bad_flags_are_named(changes, says):
  with pytest.raises(ValueError) as refused:
    serve.read_options(flags(**changes))
  assert says in str(refused.value)


def test_lengths_are_read_with_their_unit():
  options = serve.read_options(flags())
  assert options["lengths"] == [1024, 131072] and options["batches"] == [1, 8]
