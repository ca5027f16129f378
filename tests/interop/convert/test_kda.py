"""Kimi Delta Attention, written as its token recurrence, is GDN-2 when tied."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.interop.convert.options import Options
from gdn2_jax.interop.convert.run import convert, open_model
from gdn2_jax.interop.folder import load_model, save_model
from gdn2_jax.model.mixers.gdn2 import GDN2Mixer
from gdn2_jax.model.mixers.registry import kind_of
from tests.interop.convert import checkpoints
from tests.model.models import small_config
from tests.numerics import FLOAT32_BOUND, rel_rms
from tests.random_params import random_params

pytestmark = pytest.mark.slow

LENGTH = 24
PREFIX = "model.layers.0.attn."


def sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def kda_layer(w, x, heads, value_heads, top=1.0):
  """KDA of x [T, D] in float64: q, k, v, decay, one gate, delta rule, output.

  S <- Diag(exp(g)) S;  S <- S + beta k (v - S^T k)^T;  o = S^T q / sqrt(K)

  beta is below `top`, 2 with negative eigenvalues.
  """
  w = {name.removeprefix(PREFIX): a.astype(np.float64) for name, a in w.items()}
  x, group = x.astype(np.float64), value_heads // heads

  def conv(name):
    y = x @ w[f"{name}_proj.weight"].T
    taps = w[f"{name}_conv1d.weight"][:, 0]
    padded = np.concatenate([np.zeros((taps.shape[1] - 1, y.shape[1])), y])
    z = sum(padded[i : i + len(y)] * taps[:, i] for i in range(taps.shape[1]))
    return z * sigmoid(z)

  def unit(y):
    y = y.reshape(len(y), heads, 16)
    y = y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6)
    return np.repeat(y, group, axis=1)

  q, k = unit(conv("q")), unit(conv("k"))
  v = conv("v").reshape(len(x), value_heads, 24)
  f = x @ w["f_proj.0.weight"].T @ w["f_proj.1.weight"].T + w["dt_bias"]
  decay = np.exp(w["A_log"])[:, None]
  g = -decay * np.log1p(np.exp(f)).reshape(len(x), -1, 16)
  beta = top * sigmoid(x @ w["b_proj.weight"].T)
  g, beta = (np.repeat(a, value_heads // a.shape[1], axis=1) for a in (g, beta))

  state, o = np.zeros((value_heads, 16, 24)), np.zeros_like(v)
  for t in range(len(x)):
    state = np.exp(g[t])[:, :, None] * state
    error = v[t] - np.einsum("hkv,hk->hv", state, k[t])
    state += np.einsum("h,hk,hv->hkv", beta[t], k[t], error)
    o[t] = np.einsum("hkv,hk->hv", state, q[t]) / 4.0
  gate = x @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T
  gate = (gate + w["g_proj.1.bias"]).reshape(o.shape)
  o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-3) * w["o_norm.weight"]
  return (o * sigmoid(gate)).reshape(len(x), -1) @ w["o_proj.weight"].T


@pytest.mark.parametrize(
  ("heads", "value_heads", "decays"), [(2, 2, 2), (2, 4, 4), (2, 4, 2)]
)
def test_the_layer_computes_what_kda_does(
  tmp_path, rng, heads, value_heads, decays
):
  tensors, config = checkpoints.kda(heads, value_heads, decays)
  src = checkpoints.write(tmp_path / "kda", (tensors, config))
  report = convert(src, tmp_path / "out", source="fla", target="gdn2_jax")
  model = load_model(tmp_path / "out")
  params = jax.tree.map(lambda a: a[0], model.params["groups"]["layer_0"])
  x = rng.normal(size=(LENGTH, checkpoints.WIDTH)).astype(np.float32)
  # The token scan compiles in a third of the time.
  mixer = GDN2Mixer(
    dataclasses.replace(model.config.gdn2, implementation="reference")
  )
  y, _ = jax.jit(mixer.apply)({"params": params["mixer"]}, jnp.asarray(x[None]))
  layer = {n: a for n, a in tensors.items() if n.startswith(PREFIX)}
  exact = kda_layer(layer, x, heads, value_heads)
  assert rel_rms(y[0], exact) <= FLOAT32_BOUND

  text = str(report)
  assert "note: Kimi Delta Attention, as GDN-2 with tied gates" in text
  assert "one gate of a head, tied over its channels" in text
  assert ("a key head, repeated" in text) == (heads != decays)


def test_tied_gates_are_the_rows_repeated(tmp_path):
  tensors, config = checkpoints.kda(2, 2, 2)
  src = checkpoints.write(tmp_path / "kda", (tensors, config))
  convert(src, tmp_path / "out", source="fla", target="fla")
  found = checkpoints.read(tmp_path / "out")
  gate = tensors[f"{PREFIX}b_proj.weight"]
  for name, channels in (("b", 16), ("w", 24)):
    tied = found.pop(f"{PREFIX}{name}_proj.weight")
    assert np.array_equal(tied, np.repeat(gate, channels, axis=0))
  del tensors[f"{PREFIX}b_proj.weight"]
  checkpoints.assert_same(found, tensors)
  assert open_model(tmp_path / "out", "fla", Options()).config.pattern == "G"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"allow_neg_eigval": True}, "allow_neg_eigval=True: expected False"),
    ({"safe_gate": True}, "safe_gate=True: expected False"),
    ({"lower_bound": -5.0}, "lower_bound=-5.0: expected None"),
    ({"attnres_block_size": 2}, "attnres_block_size=2: expected None"),
    ({"model_type": "gdn2"}, "model_type='gdn2': expected 'kda'"),
    ({"num_heads": 3}, "num_heads=3, but the tensors have 2"),
  ],
)
def test_what_tied_gates_cannot_express(tmp_path, changes, message):
  tensors, config = checkpoints.kda(2, 2, 2)
  src = checkpoints.write(tmp_path / "kda", (tensors, config | changes))
  with pytest.raises(ValueError) as e:
    convert(src, tmp_path / "out", source="fla", target="gdn2_jax")
  assert message in str(e.value)
  assert not (tmp_path / "out").exists()


NATIVE = Options(as_mixer="kda")


@pytest.mark.parametrize(
  ("heads", "value_heads", "decays", "negative"),
  [
    (2, 2, 2, False),
    (2, 4, 4, False),
    pytest.param(2, 4, 2, True, marks=pytest.mark.deep),
  ],
)
def test_a_model_of_pattern_k_computes_it_too(
  tmp_path, rng, heads, value_heads, decays, negative
):
  tensors, config = checkpoints.kda(heads, value_heads, decays)
  config["allow_neg_eigval"] = negative
  src = checkpoints.write(tmp_path / "kda", (tensors, config))
  report = convert(
    src, tmp_path / "out", source="fla", target="gdn2_jax", options=NATIVE
  )
  assert "note: Kimi Delta Attention" in str(report)
  assert "tied" not in str(report)
  model = load_model(tmp_path / "out")
  assert model.config.pattern == "K"
  model.config.gdn2.implementation = "reference"
  layer = model.params["groups"]["layer_0"]["mixer"]
  params = jax.tree.map(lambda a: a[0], layer)
  assert params["beta_proj"]["kernel"].shape == (checkpoints.WIDTH, decays)
  mixer = kind_of("K").make(
    model.config, dtype="float32", param_dtype="float32"
  )
  x = rng.normal(size=(LENGTH, checkpoints.WIDTH)).astype(np.float32)
  y, _ = jax.jit(mixer.apply)({"params": params}, jnp.asarray(x[None]))
  theirs = {n: a for n, a in tensors.items() if n.startswith(PREFIX)}
  top = 2.0 if negative else 1.0
  exact = kda_layer(theirs, x, heads, value_heads, top)
  assert rel_rms(y[0], exact) <= FLOAT32_BOUND


@pytest.mark.parametrize("target", ["fla", "gdn2_jax"])
def test_there_and_back_gives_the_same_bits(tmp_path, target):
  tensors, config = checkpoints.kda(2, 4, 2)
  src = checkpoints.write(tmp_path / "kda", (tensors, config))
  convert(src, tmp_path / "a", source="fla", target=target, options=NATIVE)
  back = NATIVE if target == "fla" else Options(output_gate="sigmoid")
  convert(
    tmp_path / "a", tmp_path / "b", source=target, target="fla", options=back
  )
  checkpoints.assert_same(checkpoints.read(tmp_path / "b"), tensors)
  written = json.loads((tmp_path / "b" / "config.json").read_text())
  for key in (
    "architectures",
    "model_type",
    "num_heads",
    "num_v_heads",
    "head_dim",
    "expand_v",
    "allow_neg_eigval",
    "norm_eps",
    "conv_size",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
  ):
    assert written[key] == config[key], key
  opened = open_model(tmp_path / "b", "fla", NATIVE)
  assert opened.config == open_model(src, "fla", NATIVE).config


@pytest.mark.parametrize(
  "pattern",
  ["K", *(pytest.param(p, marks=pytest.mark.deep) for p in ("KS", "AK"))],
)
def test_own_models_are_written_and_read(tmp_path, pattern):
  config = small_config(pattern, norm_eps=1e-5)
  config.gdn2.output_gate = "sigmoid"
  config.attention = dataclasses.replace(config.attention, head_dim=8)
  params = random_params(config)
  save_model(tmp_path / "ours", params, config)
  convert(tmp_path / "ours", tmp_path / "fla", source="gdn2_jax", target="fla")
  convert(
    tmp_path / "fla",
    tmp_path / "back",
    source="fla",
    target="gdn2_jax",
    options=NATIVE,
  )
  model = load_model(tmp_path / "back")
  assert model.config.pattern == pattern
  jax.tree.map(np.testing.assert_array_equal, model.params, params)


@pytest.mark.parametrize(
  ("pattern", "changes", "target", "message"),
  [
    ("K", {}, "official", "'official' has no Kimi Delta Attention, expected"),
    ("D", {}, "fla", "the dialect 'fla' has no Gated DeltaNet, expected"),
    ("GK", {}, "fla", "pattern='GK': recurrent layers GK, expected one kind"),
    ("G", {"gates": "tied"}, "fla", "gates='tied': expected 'decoupled'"),
    ("G", {"decay": "none"}, "fla", "decay='none': expected 'channel'"),
  ],
)
def test_mixers_that_a_dialect_lacks(
  tmp_path, pattern, changes, target, message
):
  config = small_config(pattern)
  config.gdn2 = dataclasses.replace(
    config.gdn2, output_gate="sigmoid", **changes
  )
  save_model(tmp_path / "ours", random_params(config), config)
  with pytest.raises(ValueError) as e:
    convert(
      tmp_path / "ours", tmp_path / "out", source="gdn2_jax", target=target
    )
  assert message in str(e.value)


def test_a_mixer_is_chosen_for_kda_alone(tmp_path):
  src = checkpoints.write(tmp_path / "gdn2", checkpoints.fla())
  with pytest.raises(ValueError, match=r"--as=kda: .* has no Kimi Delta"):
    open_model(src, "fla", NATIVE)
  for as_mixer, source, message in (
    ("gdn", "fla", "--as=gdn: expected one of gdn2, kda"),
    ("kda", "official", "--as=kda: goes with --from=fla"),
  ):
    with pytest.raises(ValueError, match=message):
      Options(as_mixer=as_mixer).check(source, "gdn2_jax")
