"""model.generate gives the tokens of gdn2_jax.generate."""

import jax
import pytest
import torch

from gdn2_jax.inference.generate import generate
from gdn2_jax.inference.sampling import Sampler
from tests.interop.hf.with_torch.models import make_pair, random_ids

NEW = 12
PROMPTS = [random_ids(n, seed=n).tolist() for n in (9, 4, 13)]


def of_jax(pair):
  return generate(
    pair.params,
    pair.config,
    PROMPTS,
    NEW,
    rng=jax.random.key(0),
    sampler=Sampler(temperature=0.0),
  )


def left_padded(prompts):
  length = max(map(len, prompts))
  ids = torch.tensor([[258] * (length - len(p)) + p for p in prompts])
  mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
  return ids, mask


def of_torch(pair, prompts, **options):
  ids, mask = left_padded(prompts)
  found = pair.torch.generate(
    ids,
    attention_mask=mask,
    max_new_tokens=NEW,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=258,
    **options,
  )
  return found[:, ids.shape[1] :].tolist()


def check(pattern):
  pair = make_pair(pattern)
  wanted = of_jax(pair)
  assert of_torch(pair, PROMPTS) == wanted
  assert of_torch(pair, PROMPTS, use_cache=False) == wanted
  for prompt, tokens in zip(PROMPTS, wanted, strict=True):
    assert of_torch(pair, [prompt]) == [tokens]


def test_greedy_tokens_are_those_of_jax():
  check("G")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [*"KEMNA", "DS", "GKDEMNSA"])
def test_greedy_tokens_of_every_mixer(pattern):
  check(pattern)


def test_beams_reorder_the_cache():
  pair = make_pair("DS")
  with_cache = of_torch(pair, PROMPTS, num_beams=3)
  assert with_cache == of_torch(pair, PROMPTS, num_beams=3, use_cache=False)


def test_a_cache_is_continued():
  pair = make_pair("DS")
  ids = torch.tensor([PROMPTS[0]])
  options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 258}
  whole = pair.torch.generate(ids, max_new_tokens=NEW, **options)
  first = pair.torch.generate(
    ids, max_new_tokens=5, return_dict_in_generate=True, **options
  )
  more = pair.torch.generate(
    first.sequences, cache=first.cache, max_new_tokens=NEW - 5, **options
  )
  assert more.tolist() == whole.tolist()


def test_the_cache_does_not_grow():
  pair = make_pair("DS")
  sizes = set()
  for length in (8, 20, 33):
    cache = pair.torch(torch.tensor(random_ids(1, length)), use_cache=True)
    layers = cache.cache.layers
    sizes.add(sum(x.numel() for layer in layers for x in layer.values()))
  assert len(sizes) == 1
