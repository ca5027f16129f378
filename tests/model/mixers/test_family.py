"""Every setting of the GDN-2 layer is the recurrence of its own paper.

The recurrences are float64 and have the state transition as a matrix, as the
papers write it; their gates come from the parameters, not from the layer.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.model.lm import LM, init_cache
from gdn2_jax.model.mixers import gdn2
from gdn2_jax.model.mixers.registry import kind_of
from gdn2_jax.sharding import MeshConfig, make_mesh, use_mesh
from gdn2_jax.train.state import abstract_params
from tests.model.models import (
  MAX_LENGTH,
  small_config,
  small_model,
  tokens_of,
)
from tests.numerics import FLOAT32_BOUND, rel_rms
from tests.random_params import random_params

H, HV, K, V, D = 2, 4, 16, 24, 32
GROUP = HV // H

# (letter, settings of gdn2)
CASES = {
  "gdn2": ("G", {}),
  "kda": ("K", {}),
  "kda_0_2": ("K", {"negative_eigenvalues": True}),
  "gated_deltanet": ("D", {}),
  "deltanet": ("E", {}),
  "w_only": ("G", {"erase_gate": "scalar"}),
  "b_only": ("G", {"write_gate": "scalar"}),
  "w_only_head": ("G", {"erase_gate": "head"}),
  "b_only_head": ("G", {"write_gate": "head"}),
  "erase_0_2": ("G", {"negative_eigenvalues": True}),
  "no_erase": ("G", {"erase_gate": "off"}),
  "tied": ("G", {"gates": "tied"}),
  "scalar_decay": ("G", {"decay": "scalar"}),
  "no_decay": ("G", {"decay": "none"}),
}
# XLA computes their gates: averages, no erasing, no decay, a write gate over 1.
NOT_FUSED = {"deltanet", "no_decay", "no_erase", "w_only", "b_only", "kda_0_2"}


# The others take long and rarely fail.
QUICK = ("kda", "gated_deltanet", "deltanet", "w_only")


def some_quick(names, quick):
  """Parameters of a test, deep but for some."""
  return [
    pytest.param(name, marks=() if name in quick else pytest.mark.deep)
    for name in names
  ]


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softplus(x):
  return np.logaddexp(0, x)


def on_value_heads(a):
  """[B, T, H, ...] to [B, T, HV, ...]: value heads share a key head's."""
  return np.repeat(a, GROUP, axis=2)


def delta_rule(q, k, v, alpha, beta):
  """S = (I - beta k k^T) Diag(alpha) S + beta k v^T; o = S^T q / sqrt(K).

  KDA for a vector alpha per head, Gated DeltaNet for one number, DeltaNet for
  alpha = 1. q, k [T, K], v [T, V], alpha [T, K], beta [T].
  """
  state, o = np.zeros((K, V)), []
  for q_t, k_t, v_t, a_t, beta_t in zip(q, k, v, alpha, beta, strict=True):
    transition = (np.eye(K) - beta_t * np.outer(k_t, k_t)) @ np.diag(a_t)
    state = transition @ state + beta_t * np.outer(k_t, v_t)
    o.append(state.T @ q_t / np.sqrt(K))
  return np.stack(o)


def gdn2_rule(q, k, v, alpha, b, w):
  """Eq. 10: S = (I - k (b*k)^T) Diag(alpha) S + k (w*v)^T."""
  state, o = np.zeros((K, V)), []
  for q_t, k_t, v_t, a_t, b_t, w_t in zip(q, k, v, alpha, b, w, strict=True):
    transition = (np.eye(K) - np.outer(k_t, b_t * k_t)) @ np.diag(a_t)
    state = transition @ state + np.outer(k_t, w_t * v_t)
    o.append(state.T @ q_t / np.sqrt(K))
  return np.stack(o)


def each_head(rule, *arrays):
  """Runs a rule of one head over arrays [B, T, HV, ...]."""
  rows, heads = arrays[0].shape[0], arrays[0].shape[2]
  return np.stack(
    [
      np.stack(
        [rule(*(a[i, :, j] for a in arrays)) for j in range(heads)], axis=1
      )
      for i in range(rows)
    ]
  )


def alpha_of(letter, settings, p, x):
  """Decay [B, T, H, K], from the parameters."""
  kind = {"D": "scalar", "E": "none"}.get(letter, settings.get("decay"))
  shape = (*x.shape[:2], H, K)
  if kind == "none":
    assert "A_log" not in p
    return np.ones(shape)
  a = np.exp(p["A_log"])[:, None]
  if kind == "scalar":
    f = (x @ p["a_proj"]["kernel"] + p["dt_bias"])[..., None]
  else:
    down = x @ p["f_down"]["kernel"]
    f = np.einsum("btr,rhk->bthk", down, p["f_up"]["kernel"]) + p["dt_bias"]
  return np.broadcast_to(np.exp(-a * softplus(f)), shape)


def gate_of(name, kind, p, x, size):
  """A gate [B, T, heads, size] of GDN-2, from the parameters."""
  if kind == "off":
    return np.zeros((*x.shape[:2], H, size))
  kernel = p[f"{name}_proj"]["kernel"]
  z = sigmoid(np.tensordot(x, kernel, 1))
  if kind == "head":
    z = z[..., None]
  if kind == "scalar":
    z = z.mean(-1, keepdims=True)
  return np.broadcast_to(z, (*z.shape[:3], size))


def textbook(letter, settings, p, x, q, k, v):
  """Outputs of the recurrence [B, T, HV, V]."""
  alpha = alpha_of(letter, settings, p, x)
  q, k, alpha = map(on_value_heads, (q, k, alpha))
  top = 2 if settings.get("negative_eigenvalues") else 1
  if letter != "G" or settings.get("gates") == "tied":
    beta = top * sigmoid(x @ p["beta_proj"]["kernel"])
    return each_head(delta_rule, q, k, v, alpha, on_value_heads(beta))
  b = top * gate_of("b", settings.get("erase_gate"), p, x, K)
  w = gate_of("w", settings.get("write_gate"), p, x, V)
  return each_head(gdn2_rule, q, k, v, alpha, on_value_heads(b), w)


@pytest.mark.parametrize("name", some_quick(CASES, QUICK))
def test_the_layer_is_the_recurrence_of_its_paper(name):
  letter, settings = CASES[name]
  config = small_config(letter)
  config.gdn2 = dataclasses.replace(config.gdn2, **settings)
  config.validate()
  params = random_params(config)["groups"]["layer_0"]["mixer"]
  params = jax.tree.map(lambda a: a[0], params)
  x = np.random.default_rng(1).normal(0, 1, (2, 19, D))
  mixer = kind_of(letter).make(config, dtype="float32", param_dtype="float32")
  run = jax.jit(
    lambda x: mixer.apply({"params": params}, x, mutable=["intermediates"])
  )
  (_, _), seen = run(jnp.asarray(x, jnp.float32))
  seen = {
    n: np.asarray(a[0], np.float64) for n, a in seen["intermediates"].items()
  }
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x = np.asarray(np.asarray(x, np.float32), np.float64)
  exact = textbook(letter, settings, p, x, *(seen[n] for n in "qkv"))
  assert rel_rms(seen["o"], exact) <= FLOAT32_BOUND


@pytest.mark.parametrize("letter", some_quick("KDE", "D"))
def test_prefill_and_decode_equal_the_sequence(letter):
  _, _, apply = small_model(letter)
  tokens = tokens_of(2, 20)
  want, _ = apply(tokens)
  cache, parts = init_cache(small_config(letter), 2, MAX_LENGTH), []
  for start, end in ((0, 15), (15, 16), (16, 17), (17, 18)):
    logits, cache = apply(tokens[:, start:end], None, cache)
    parts.append(logits)
  got = jnp.concatenate(parts, axis=1)
  assert rel_rms(got, want[:, :18]) <= FLOAT32_BOUND


@pytest.mark.deep
@pytest.mark.parametrize("letter", "KDE")
def test_packed_documents_are_those_read_alone(letter):
  _, _, apply = small_model(letter)
  tokens, ids = tokens_of(1, 20), np.zeros((1, 20), np.int32)
  ids[:, :9], ids[:, 9:18] = 1, 2
  packed, _ = apply(tokens, jnp.asarray(ids))
  for document in (slice(0, 9), slice(9, 18)):
    alone, _ = apply(tokens[:, document])
    assert rel_rms(packed[:, document], alone) <= FLOAT32_BOUND


@functools.cache
def loss_and_gradient(letter):
  """A function of params and batch, and its arguments."""
  config = small_config(letter, vocab_size=64)
  rng = np.random.default_rng(0)
  ids = np.repeat([[1, 2, 0]], (23, 14, 3), axis=1).repeat(2, 0)
  batch = {
    "tokens": rng.integers(0, 64, (2, 40)).astype(np.int32),
    "targets": rng.integers(0, 64, (2, 40)).astype(np.int32),
    "segment_ids": ids.astype(np.int32),
  }

  def loss(params, batch):
    nll = LM(config).apply({"params": params}, **batch, method="token_losses")
    return (nll * (batch["segment_ids"] != 0)).mean()

  return config, jax.value_and_grad(loss), random_params(config), batch


@functools.cache
def on_one_device(letter):
  _, fun, params, batch = loss_and_gradient(letter)
  return jax.jit(fun)(params, batch)


@pytest.mark.deep
@pytest.mark.parametrize(
  "mesh",
  [MeshConfig(context=2), MeshConfig(fsdp=2, tensor=2)],
  ids=["context2", "fsdp2-tensor2"],
)
@pytest.mark.parametrize("letter", "KDE")
def test_devices_compute_what_one_does(letter, mesh):
  config, fun, params, batch = loss_and_gradient(letter)
  size = mesh.fsdp * mesh.tensor * mesh.context
  with use_mesh(make_mesh(mesh, jax.devices()[:size])) as mesh:
    shardings = jax.tree.map(
      lambda leaf: leaf.sharding, abstract_params(LM(config), mesh)
    )
    placed = jax.device_put(params, shardings)
    lowered = jax.jit(fun).lower(placed, batch)
    # Tokens are exchanged by the layer itself, parameters by the compiler.
    is_split = "collective_permute" in lowered.as_text()
    assert is_split == (mesh.shape["context"] > 1)
    got = lowered.compile()(placed, batch)
  errors = jax.tree.map(rel_rms, got, on_one_device(letter))
  worst = max(jax.tree.leaves_with_path(errors), key=lambda leaf: leaf[1])
  assert worst[1] <= FLOAT32_BOUND, worst


@pytest.mark.parametrize("name", CASES)
def test_which_settings_run_fused_in_the_kernels(name, monkeypatch):
  letter, settings = CASES[name]
  config = small_config(letter)
  config.gdn2 = dataclasses.replace(config.gdn2, **settings)
  calls = []

  def spy(*args, **options):
    calls.append(options["erase_scale"])
    return fused(*args, **options)

  fused = gdn2.gdn2_fused_gates
  monkeypatch.setattr(gdn2, "gdn2_fused_gates", spy)
  kind = kind_of(letter)
  mixer = kind.make(config, dtype="float32", param_dtype="float32")
  x = jax.ShapeDtypeStruct((1, 4, D), jnp.float32)
  jax.eval_shape(mixer.init, jax.random.key(0), x)
  top = 2.0 if settings.get("negative_eigenvalues") else 1.0
  assert calls == ([] if name in NOT_FUSED else [top])
  assert kind.has_fused_gates(config) == (name not in NOT_FUSED)
