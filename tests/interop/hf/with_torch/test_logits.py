"""Logits of transformers are those of JAX, for every mixer and ablation."""

import dataclasses

import numpy as np
import pytest
import torch

from gdn2_jax.interop.hf.remote import configuration_gdn2_jax as remote
from gdn2_jax.interop.hf.remote.recurrence import gdn2
from gdn2_jax.model.mixers.attention import AttentionConfig
from gdn2_jax.model.mixers.gdn2_config import GDN2Config
from gdn2_jax.model.mixers.mamba2 import Mamba2Config
from gdn2_jax.model.mixers.mamba3 import Mamba3Config
from tests.interop.hf.with_torch.models import (
  TOLERANCE,
  error,
  export,
  make_pair,
  random_ids,
  torch_logits,
)
from tests.model.models import small_config
from tests.random_params import random_params

ABLATIONS = [
  {"erase_gate": "scalar", "write_gate": "head"},
  {"erase_gate": "head", "write_gate": "scalar", "decay": "scalar"},
  {"erase_gate": "off", "decay": "none", "output_gate": "sigmoid"},
  {"negative_eigenvalues": True, "num_value_heads": 0, "conv_width": 2},
  {"gates": "tied", "negative_eigenvalues": True},
]


def check(pair):
  ids = random_ids(2, 37)
  found = torch_logits(pair.torch, ids)
  assert error(found, pair.logits(ids)) <= TOLERANCE


@pytest.mark.parametrize("pattern", ["G", "DS"])
def test_logits_are_those_of_jax(pattern):
  check(make_pair(pattern))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [*"KEMNA", "GKDEMNSA"])
def test_logits_of_every_mixer(pattern):
  check(make_pair(pattern))


@pytest.mark.slow
@pytest.mark.parametrize("changes", ABLATIONS)
def test_logits_of_ablations(changes):
  check(make_pair("G", **changes))


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {"out_norm": True, "a_rule": "heavy_tail", "rope_fraction": 1.0},
    {"mimo_rank": 1},
  ],
)
def test_logits_of_mamba3_variants(changes):
  mamba3 = dataclasses.replace(small_config("N").mamba3, **changes)
  config = small_config("N", num_layers=1, vocab_size=260, mamba3=mamba3)
  check(export(config, random_params(config)))


def test_the_config_has_the_defaults_of_ours():
  for ours, theirs in (
    (GDN2Config, remote.GDN2),
    (Mamba2Config, remote.MAMBA2),
    (Mamba3Config, remote.MAMBA3),
    (AttentionConfig, remote.ATTENTION),
  ):
    expected = dataclasses.asdict(ours())
    del expected["implementation"]
    assert theirs == expected


def test_padding_anywhere_changes_no_other_token():
  pair = make_pair("DS")
  ids = random_ids(3, 20)
  mask = np.ones_like(ids)
  mask[0, :7], mask[1, 15:], mask[2, 5:9] = 0, 0, 0
  found = torch_logits(pair.torch, ids, attention_mask=torch.tensor(mask))
  assert np.isfinite(found).all()
  for row in range(3):
    kept = mask[row] == 1
    alone = torch_logits(pair.torch, ids[row : row + 1, kept])
    assert error(found[row, kept], alone[0]) <= 1e-5


def test_calls_with_a_cache_give_the_logits_of_one_call():
  pair = make_pair("DS")
  ids = torch.tensor(random_ids(2, 30))
  mask = torch.ones_like(ids)
  mask[0, :5] = 0
  whole = pair.torch(ids, attention_mask=mask).logits[:, 5:]
  cache, parts = None, []
  for start, stop in ((0, 11), (11, 12), (12, 30)):
    out = pair.torch(
      ids[:, start:stop],
      attention_mask=mask[:, :stop],
      cache=cache,
      use_cache=True,
    )
    cache = out.cache
    parts.append(out.logits)
  found = torch.cat(parts, dim=1)[:, 5:]
  assert error(found.numpy(), whole.numpy()) <= 1e-5
  window = pair.config.attention.window
  assert cache.layers[1]["k"].shape[2] == window
  with pytest.raises(ValueError, match="padding among new tokens"):
    pair.torch(ids[:, :3], attention_mask=mask[:, :3], cache=cache)
  with pytest.raises(ValueError, match=r"attention_mask: shape \(2, 2\)"):
    pair.torch(ids[:, :3], attention_mask=mask[:, :2])
  with pytest.raises(ValueError, match="cache: a tuple, expected a Gdn2JaxC"):
    pair.torch(ids[:, :3], cache=())


def test_strong_and_long_decays_stay_exact(rng):
  """Chunks against the recurrence, token by token, in float64."""
  shape = (2, 50, 2, 16)
  q, k, v, b, w = (torch.tensor(rng.normal(size=shape)) for _ in range(5))
  k = k / k.norm(dim=-1, keepdim=True)
  b, w = b.sigmoid(), w.sigmoid()
  g = -torch.tensor(rng.choice([0.0, 1e-4, 1.0, 1e4], size=shape))
  state = torch.zeros(2, 2, 16, 16, dtype=torch.float64)
  wanted = []
  for t in range(50):
    state = g[:, t].exp()[..., None] * state
    read = torch.einsum("bhk,bhkv->bhv", b[:, t] * k[:, t], state)
    u = w[:, t] * v[:, t] - read
    state = state + k[:, t, :, :, None] * u[:, :, None]
    wanted.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) / 4)
  wanted = torch.stack(wanted, dim=1)
  exact, end = gdn2(q, k, v, g, b, w)
  assert error(exact.numpy(), wanted.numpy()) <= 1e-13
  assert error(end.numpy(), state.numpy()) <= 1e-13
  found, _ = gdn2(*(x.float() for x in (q, k, v, g, b, w)))
  assert error(found.double().numpy(), wanted.numpy()) <= 1e-5


def test_a_config_that_is_wrong_is_refused():
  for fields, message in (
    ({"pattern": "Gx"}, "no mixer 'x', expected letters among G, K"),
    ({"pattern": "GS", "num_layers": 3}, "num_layers=3: expected a positive"),
    ({"gdn2": {"heads": 1}}, "gdn2\\['heads'\\]: no such field"),
  ):
    with pytest.raises(ValueError, match=message):
      remote.Gdn2JaxConfig(**fields)
