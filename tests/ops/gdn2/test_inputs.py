"""What gdn2 refuses, and that it says which argument was wrong."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.gdn2.api import gdn2, gdn2_step
from gdn2_jax.ops.gdn2.xla import gdn2_xla
from tests import numerics


def good(rng, **kwargs):
  case = numerics.make_case(rng, T=4, **kwargs)
  return {n: jnp.asarray(case[n]) for n in numerics.INPUTS}


def refused(pattern, args, **options):
  with pytest.raises(ValueError, match=pattern):
    gdn2(**args, **options)


@pytest.mark.parametrize("name", numerics.INPUTS)
def test_rank_and_dtype(name, rng):
  args = good(rng)
  refused(f"{name}: got shape", args | {name: args[name][0]})
  refused(f"{name}: got dtype int32", args | {name: args[name].astype("int32")})
  refused(f"{name}: got list, expected an array", args | {name: [1.0]})


@pytest.mark.parametrize("name", ["k", "g", "b", "v", "w"])
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_sizes_that_disagree(name, axis, rng):
  args = good(rng, B=3, H=3, K=17)
  if name == "v" and axis in (2, 3):
    name = "w"  # v itself decides about HV and V
  wrong = jnp.concatenate([args[name]] * 2, axis=axis)
  if name == "v":
    args["w"] = wrong
  refused(f"gdn2: {name}: got shape", args | {name: wrong})


def test_value_heads_are_a_multiple_of_key_heads(rng):
  args = good(rng, H=2)
  args |= {n: args[n][:, :, [0, 1, 0]] for n in "vw"}
  refused("v: got 3 heads, expected a positive multiple of the 2", args)
  args |= {n: args[n][:, :, :0] for n in "vw"}
  refused("v: got 0 heads", args)


def test_head_sizes(rng):
  refused("q: got K = 15, expected 16 to 256", good(rng, K=15))
  refused("v: got V = 257, expected 16 to 256", good(rng, V=257))


def test_empty_sequences(rng):
  args = {n: x[:, :0] for n, x in good(rng).items()}
  refused("q: got shape", args)


def test_state(rng):
  args = good(rng, B=2)
  shape = (2, 2, 16, 24)
  expected = r"state: got .*, expected float32 \[B, HV, K, V\]"
  refused(expected, args, state=jnp.zeros(shape[1:]))
  refused(expected, args, state=jnp.zeros((2, 2, 24, 16)))
  refused(expected, args, state=jnp.zeros(shape, jnp.bfloat16))
  refused(expected, args, state=0.0)


def test_segment_ids(rng):
  args = good(rng, B=2)
  expected = r"segment_ids: got .*, expected integers \[B, T\] = \(2, 4\)"
  refused(expected, args, segment_ids=jnp.ones((4,), jnp.int32))
  refused(expected, args, segment_ids=jnp.ones((2, 5), jnp.int32))
  refused(expected, args, segment_ids=jnp.ones((2, 4), jnp.float32))
  refused(expected, args, segment_ids=1)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", 1j])
def test_scale(scale, rng):
  refused("scale: got", good(rng), scale=scale)


def test_implementations(rng):
  args = good(rng)
  refused("implementation: got 'cuda', expected", args, implementation="cuda")
  with pytest.raises(NotImplementedError, match="mosaic_gpu: needs an NVIDIA"):
    gdn2(**args, implementation="mosaic_gpu")


def test_positive_decay_is_seen_only_outside_jit(rng):
  args = good(rng)
  args["g"] = args["g"].at[0, 0, 0, 0].set(0.5)
  refused(r"g: got a maximum of 0\.5, expected log-decay <= 0", args)
  o, _ = jax.jit(gdn2)(**args)
  assert np.isfinite(o).all()


def test_chunk_size(rng):
  args = good(rng)
  state = jnp.zeros((1, 2, 16, 24))
  with pytest.raises(ValueError, match="chunk_size: got 24"):
    gdn2_xla(*args.values(), state, None, 1.0, chunk_size=24)


def test_step(rng):
  args = {n: x[:, 0] for n, x in good(rng).items()}
  state = jnp.zeros((1, 2, 16, 24))
  with pytest.raises(ValueError, match="q: got shape"):
    gdn2_step(**(args | {"q": args["q"][:, None]}), state=state)
  with pytest.raises(ValueError, match="state: got None"):
    gdn2_step(**args, state=None)
  with pytest.raises(ValueError, match="state: got float32"):
    gdn2_step(**args, state=state[:, :1])
  with pytest.raises(NotImplementedError, match="mosaic_gpu"):
    gdn2_step(**args, state=state, implementation="mosaic_gpu")


@pytest.mark.parametrize(
  ("layer", "words"),
  [
    (2, "layer: got 2, expected an index below the 2 states"),
    (-1, "layer: got -1"),
    (0.5, "layer: got 0.5, expected None or an integer"),
    (np.zeros(1, int), "layer: got array"),
  ],
)
def test_the_layer_of_a_step(layer, words, rng):
  args = {n: x[:, 0] for n, x in good(rng).items()}
  state = jnp.zeros((2, 1, 2, 16, 24))
  with pytest.raises(ValueError, match=re.escape(words)):
    gdn2_step(**args, state=state, layer=layer)
  with pytest.raises(ValueError, match=r"with layer, expected \[N, B, HV"):
    gdn2_step(**args, state=state[0], layer=0)
  with pytest.raises(ValueError, match=r"expected float32 \[N, B, HV"):
    gdn2_step(**args, state=state[..., 1:], layer=0)
