"""Gates of a subclass: the same in training, decoding and analysis."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gdn2_jax.analysis.gates import collect_gates
from gdn2_jax.model.mixers import gdn2, kinds, registry
from gdn2_jax.model.mixers.gdn2 import GDN2Config, GDN2Mixer, init_gdn2_cache
from gdn2_jax.ops.gdn2.api import gdn2 as op
from gdn2_jax.sharding import MeshConfig, make_mesh, use_mesh
from tests.model.models import small_config, tokens_of
from tests.numerics import rel_rms
from tests.random_params import random_params

CONFIG = GDN2Config(num_heads=2, num_value_heads=4, key_dim=16, value_dim=24)
# Float32 sums in another order.
BOUND = 1e-5


class SquaredErase(GDN2Mixer):
  def gates(self, g, b, w):
    return g, b * b, w


class LearnedErase(GDN2Mixer):
  """A parameter of its own, and a submodule."""

  def gates(self, g, b, w):
    power = self.param("power", nn.initializers.constant(2.0), (1, 1, 1, 1))
    return g, b**power, jax.nn.sigmoid(nn.Dense(w.shape[-1], name="mix")(w))


class Squaring:
  """A mixin that is no module."""

  def gates(self, g, b, w):
    return g, b * b, w


class MixedIn(Squaring, GDN2Mixer):
  pass


class SetUp(GDN2Mixer):
  """The hook is an attribute of the instance."""

  def setup(self):
    self.gates = Squaring().gates


class Inherited(SquaredErase):
  pass


@pytest.fixture
def x():
  return 3 * jax.random.normal(jax.random.key(1), (2, 12, 32))


@functools.cache
def initial(mixer, shape):
  return nn.unbox(mixer.init(jax.random.key(0), jnp.ones(shape)))["params"]


def params_of(mixer, x):
  return initial(mixer, x.shape)


@functools.partial(jax.jit, static_argnums=0)
def sequence(mixer, params, x, segment_ids=None):
  return mixer.apply({"params": params}, x, segment_ids)[0]


@functools.partial(jax.jit, static_argnums=0)
def token_by_token(mixer, params, x):
  def step(cache, token):
    y, cache = mixer.apply({"params": params}, token[:, None], None, cache)
    return cache, y[:, 0]

  cache = init_gdn2_cache(mixer.config, x.shape[0], mixer.dtype)
  _, y = jax.lax.scan(step, cache, x.swapaxes(0, 1))
  return y.swapaxes(0, 1)


@pytest.mark.parametrize(
  "implementation",
  [
    "reference",
    *(pytest.param(x, marks=pytest.mark.deep) for x in ("", "xla")),
  ],
)
def test_sequence_tokens_and_sown_values_agree(x, implementation):
  config = dataclasses.replace(CONFIG, implementation=implementation)
  mixer, standard = SquaredErase(config), GDN2Mixer(config)
  params = params_of(standard, x)
  y = sequence(mixer, params, x)
  assert rel_rms(y, sequence(standard, params, x)) > 1e-3
  assert rel_rms(token_by_token(mixer, params, x), y) < BOUND

  def sown(mixer):
    (y, _), seen = mixer.apply({"params": params}, x, mutable=["intermediates"])
    return y, {k: v[0] for k, v in seen["intermediates"].items()}

  _, before = sown(standard)
  collected, after = sown(mixer)
  assert rel_rms(collected, y) < BOUND
  np.testing.assert_array_equal(after["b"], before["b"] ** 2)
  o, _ = op(*(after[name] for name in "qkvgbw"))
  assert rel_rms(after["o"], o) < BOUND


@pytest.mark.deep
def test_gradients_of_a_sequence_are_those_of_its_tokens(x):
  mixer = SquaredErase(CONFIG)
  params = params_of(mixer, x)

  def gradient(run, mixer):
    return jax.grad(lambda p: jnp.sum(jnp.sin(run(mixer, p, x))))(params)

  got, want = gradient(sequence, mixer), gradient(token_by_token, mixer)
  errors = jax.tree.map(rel_rms, got, want)
  worst = max(jax.tree.leaves_with_path(errors), key=lambda leaf: leaf[1])
  assert worst[1] < BOUND, worst
  other = gradient(sequence, GDN2Mixer(CONFIG))
  kernels = (grads["b_proj"]["kernel"] for grads in (got, other))
  assert rel_rms(*kernels) > 1e-2


@pytest.mark.deep
def test_packed_documents_are_those_read_alone(x):
  mixer = SquaredErase(CONFIG)
  params = params_of(mixer, x)
  ids = np.repeat([[1, 2, 0]], (5, 6, 1), axis=1).repeat(2, 0)
  packed = sequence(mixer, params, x, jnp.asarray(ids))
  standard = sequence(GDN2Mixer(CONFIG), params, x, jnp.asarray(ids))
  assert rel_rms(packed, standard) > 1e-3
  for tokens in (slice(0, 5), slice(5, 11)):
    alone = token_by_token(mixer, params, x[:, tokens])
    assert rel_rms(packed[:, tokens], alone) < BOUND


@pytest.mark.parametrize(
  "cls",
  [
    Inherited,
    *(
      pytest.param(cls, marks=pytest.mark.deep)
      for cls in (MixedIn, SetUp, LearnedErase)
    ),
  ],
)
def test_every_way_to_override_is_seen(cls, x):
  mixer = cls(CONFIG)
  params = params_of(mixer, x)
  y = sequence(mixer, params, x)
  assert rel_rms(token_by_token(mixer, params, x), y) < BOUND
  standard = {k: v for k, v in params.items() if k not in ("power", "mix")}
  assert rel_rms(sequence(GDN2Mixer(CONFIG), standard, x), y) > 1e-3
  if cls is not LearnedErase:
    same = sequence(SquaredErase(CONFIG), params, x)
    np.testing.assert_array_equal(y, same)


def test_a_replaced_method_of_the_layer_is_seen(x, monkeypatch):
  mixer = GDN2Mixer(CONFIG)
  params = params_of(mixer, x)
  want = sequence(SquaredErase(CONFIG), params, x)
  monkeypatch.setattr(GDN2Mixer, "gates", SquaredErase.gates)
  got, _ = mixer.apply({"params": params}, x)
  assert rel_rms(got, want) < BOUND


def test_kernels_compute_the_gates_only_where_they_are_standard(x, monkeypatch):
  class OtherName(GDN2Mixer):
    def gate(self, g, b, w):
      raise AssertionError("never called")

  calls = []

  def spy(*args, **options):
    calls.append(options["erase_scale"])
    return projected(*args, **options)

  projected = gdn2.gdn2_fused_gates
  monkeypatch.setattr(gdn2, "gdn2_fused_gates", spy)
  scalar = dataclasses.replace(CONFIG, erase_gate="scalar")
  negative = dataclasses.replace(CONFIG, negative_eigenvalues=True)
  for mixer, expected in (
    (GDN2Mixer(CONFIG), [1.0]),
    (GDN2Mixer(negative), [2.0]),
    (OtherName(CONFIG), [1.0]),
    (nn.remat(GDN2Mixer)(CONFIG), [1.0]),
    (GDN2Mixer(scalar), []),
    (SquaredErase(CONFIG), []),
    (nn.remat(SquaredErase)(CONFIG), []),
  ):
    calls.clear()
    jax.eval_shape(mixer.init, jax.random.key(0), x)
    assert calls == expected, mixer


def test_the_hook_is_given_what_the_config_asks_for(x):
  config = dataclasses.replace(
    CONFIG, erase_gate="scalar", write_gate="scalar", negative_eigenvalues=True
  )
  params = params_of(GDN2Mixer(config), x)

  def sown(mixer):
    _, seen = mixer.apply({"params": params}, x, mutable=["intermediates"])
    return seen["intermediates"]["b"][0]

  b = sown(GDN2Mixer(config))
  assert b.std(-1).max() < 1e-6 and b.max() > 1
  np.testing.assert_array_equal(sown(SquaredErase(config)), b * b)


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (lambda g, b, w: (g, b.mean(-1), w), r"b: got shape \(2, T, 2\), expected"),
    (lambda g, b, w: (g[..., :1], b, w), r"g: got shape \(2, T, 2, 1\), exp"),
    (lambda g, b, w: (g, b, w[:, :, :2]), r"w: got shape \(2, T, 2, 24\), exp"),
    (lambda g, b, w: (g, 0.5, w), "b: got float, expected an array"),
    (lambda g, b, w: (-g, b, w), "g: got a maximum of .*, expected log-decay"),
    (lambda g, b, w: (g, b), r"Own.gates: returned tuple of 2, expected the"),
    (lambda g, b, w: None, r"Own.gates: returned NoneType, expected the arr"),
  ],
)
@pytest.mark.parametrize("is_token", [False, True])
def test_wrong_gates_are_named_in_one_line(change, says, is_token, x):
  class Own(GDN2Mixer):
    def gates(self, g, b, w):
      return change(g, b, w)

  params, cache = params_of(GDN2Mixer(CONFIG), x), None
  if is_token:
    x, cache = x[:, :1], init_gdn2_cache(CONFIG, 2, "float32")
  says = says.replace(" T,", f" {x.shape[1]},")
  with pytest.raises(ValueError, match=says) as error:
    Own(CONFIG).apply({"params": params}, x, None, cache)
  assert "\n" not in str(error.value)


@pytest.mark.deep
def test_gates_on_shards_of_tokens(x):
  mixer = SquaredErase(dataclasses.replace(CONFIG, implementation="reference"))
  params = params_of(mixer, x)
  ids = jnp.asarray(np.repeat([[1, 2]], (5, 7), axis=1).repeat(2, 0))
  want = sequence(mixer, params, x, ids)
  assert rel_rms(sequence(GDN2Mixer(CONFIG), params, x, ids), want) > 1e-3

  @jax.jit
  def on_mesh(params, x, ids):
    return mixer.apply({"params": params}, x, ids)[0]

  with use_mesh(make_mesh(MeshConfig(context=2), jax.devices()[:2])):
    text = on_mesh.lower(params, x, ids).as_text()
    got = on_mesh(params, x, ids)
  assert "collective_permute" in text
  assert rel_rms(got, want) < BOUND


@pytest.mark.deep
def test_collected_gates_are_those_of_the_subclass():
  config = small_config("GS")
  params, tokens = random_params(config), tokens_of(2, 8)
  standard = collect_gates(config, params, tokens)
  registry.register(
    "z", kinds.gdn2_kind("squared erase", SquaredErase), replace=True
  )
  config = small_config("zS")
  records = collect_gates(config, params, tokens)
  assert rel_rms(records[0].b, standard[0].b ** 2) < BOUND
  for record in records:
    o, _ = op(*(getattr(record, name) for name in "qkvgbw"))
    assert rel_rms(record.o, o) < BOUND
