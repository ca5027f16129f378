"""The hybrid model with its tokens split over devices equals one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.model.lm import LM, init_cache
from gdn2_jax.model.on_shards import length_axis
from gdn2_jax.sharding import MeshConfig, batch_sharding, make_mesh, use_mesh
from gdn2_jax.train.state import abstract_params
from tests.model.models import small_config
from tests.numerics import rel_rms
from tests.random_params import random_params

B, T = 4, 80
# Programs run once: LLVM would optimise for longer than all the rest takes.
FAST = {"xla_backend_optimization_level": 0}


@functools.cache
def model_and_batch():
  """Documents at and across the borders of 2 and 4 shards, padding between."""
  config = small_config("GS", vocab_size=64)
  config.gdn2.implementation = "reference"  # compiles faster
  rng = np.random.default_rng(0)
  ids = np.zeros((B, T), np.int32)
  ids[0] = np.repeat([1, 2, 3], (40, 27, 13))
  ids[1, :30], ids[1, 33:] = 1, 2
  ids[2] = 1
  ids[3, :45] = 1
  batch = {
    "inputs": rng.integers(0, config.vocab_size, (B, T)).astype(np.int32),
    "targets": rng.integers(0, config.vocab_size, (B, T)).astype(np.int32),
    "segment_ids": ids,
  }
  return config, random_params(config), batch


def loss(params, batch, config):
  nll = LM(config).apply(
    {"params": params},
    batch["inputs"],
    batch["targets"],
    batch["segment_ids"],
    method="token_losses",
  )
  return (nll * (batch["segment_ids"] != 0)).sum() / B / T, nll


def compile_gradient(config, params, batch):
  fun = jax.value_and_grad(loss, has_aux=True)
  lowered = jax.jit(fun, static_argnums=2).lower(params, batch, config)
  return lowered.compile(FAST)


@functools.cache
def on_one_device():
  config, params, batch = model_and_batch()
  return compile_gradient(config, params, batch)(params, batch)


@pytest.mark.deep
@pytest.mark.parametrize(
  "mesh",
  [
    MeshConfig(context=2),
    MeshConfig(context=4),
    MeshConfig(fsdp=2, tensor=2, context=2),
  ],
  ids=lambda m: f"fsdp{m.fsdp}-tensor{m.tensor}-context{m.context}",
)
def test_loss_and_gradients_equal_one_device(mesh):
  config, params, batch = model_and_batch()
  devices = mesh.data * mesh.fsdp * mesh.tensor * mesh.context
  with use_mesh(make_mesh(mesh, jax.devices()[:devices])) as mesh:
    shardings = jax.tree.map(
      lambda x: x.sharding, abstract_params(LM(config), mesh)
    )
    params = jax.device_put(params, shardings)
    batch = jax.device_put(batch, batch_sharding(mesh))
    compiled = compile_gradient(config, params, batch)
    (value, nll), grads = compiled(params, batch)
  (want, want_nll), want_grads = on_one_device()
  assert abs(value - want) < 1e-6 * want
  assert rel_rms(nll, want_nll) < 1e-5
  errors = jax.tree.map(rel_rms, grads, want_grads)
  worst = max(jax.tree.leaves_with_path(errors), key=lambda leaf: leaf[1])
  assert worst[1] < 1e-5, worst
  check_collectives(compiled.as_text(), mesh.shape)


COLLECTIVE = re.compile(
  r" = (.*?) (all-gather|all-to-all|all-reduce|collective-permute"
  r"|reduce-scatter)(?:-start)?\("
)


def check_collectives(text, mesh):
  """What the layers exchange, and that nothing gathers along the tokens."""
  found = []
  for shape, name in COLLECTIVE.findall(text):
    sizes = {
      int(size)
      for dims in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", shape)
      for size in dims.split(",")
    }
    if name == "all-gather":
      assert T not in sizes, shape  # parameters
    elif name == "all-reduce" and mesh["tensor"] == 1:
      assert not {T, T // mesh["context"]} & sizes, shape  # gradients
    else:
      found.append((name, re.sub(r"{.*?}", "", shape)))
  rows, heads = B // mesh["fsdp"], 2 // mesh["tensor"]
  # Three inputs of q, k and v; keys and values of the window less one. Both
  # again, reversed, in the backward pass.
  halos = {f"f32[{rows},3,{16 * heads}]": 4, f"f32[{rows},3,{48 * heads}]": 2}
  halos[f"f32[{rows},6,{heads},8]"] = 4
  for shape, count in halos.items():
    assert found.count(("collective-permute", shape)) == count, shape
  states = f"f32[{rows},{heads},16,48]"  # of two value heads to a key head
  if mesh["context"] == 2:
    assert found.count(("collective-permute", states)) == 2
  else:
    part = rows * heads // mesh["context"]
    kinds = [
      (name, shape.split(")")[0].split(", ")[0]) for name, shape in found
    ]
    for width in (16 + 48, 48):  # maps, and states
      assert kinds.count(("all-to-all", f"(f32[{part},16,{width}]")) == 2


@pytest.mark.deep
def test_a_cache_is_filled_and_used_on_shards():
  """Prefill and one token; the attention's ring is left to XLA."""
  config, params, batch = model_and_batch()
  tokens, ids = batch["inputs"][:2, :17], batch["segment_ids"][:2, :16]

  @functools.partial(jax.jit, compiler_options=FAST)
  def run(params, tokens, ids):
    apply = functools.partial(LM(config).apply, {"params": params})
    logits, cache = apply(tokens[:, :16], ids, init_cache(config, 2))
    last, _ = apply(tokens[:, 16:], None, cache)
    return jnp.concatenate([logits, last], axis=1)

  want = run(params, tokens, ids)
  with use_mesh(make_mesh(MeshConfig(context=2), jax.devices()[:2])):
    got = run(params, tokens, ids)
  assert rel_rms(got, want) < 1e-5


def test_what_does_not_divide_is_left_to_xla():
  """An odd length, and no mesh at all."""
  tokens = ("batch", "length", "heads", None)
  x = jax.ShapeDtypeStruct((4, 8, 2, 16), jnp.float32)
  odd = jax.ShapeDtypeStruct((4, 9, 2, 16), jnp.float32)
  assert length_axis((x, tokens)) is None
  with use_mesh(make_mesh(MeshConfig(data=4, context=2))):
    assert length_axis((x, tokens)) == "context"
    assert length_axis((x, tokens), (odd, tokens)) is None
    assert length_axis((x, tokens), tokens=4) == "context"
    assert length_axis((x, tokens), tokens=5) is None
  with use_mesh(make_mesh(MeshConfig(data=-1))):
    assert length_axis((x, tokens)) is None
