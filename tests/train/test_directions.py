"""Optimizers by name: directions, settings, sharded state, exact resume."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from gdn2_jax.model.accounting import abstract_params
from gdn2_jax.model.lm import LM
from gdn2_jax.sharding import MeshConfig, make_mesh, use_mesh
from gdn2_jax.train.checkpoint.meta import CheckpointError
from gdn2_jax.train.directions import (
  OptimizerKind,
  muon_dimensions,
  register_optimizer,
)
from gdn2_jax.train.loop import train
from gdn2_jax.train.optimizer import OptimizerConfig, make_optimizer, validate
from gdn2_jax.train.report.report import Report
from gdn2_jax.train.state import plan_state
from tests.model.models import small_config
from tests.train.test_loop import Faulty, bits, interrupted, losses

NAMES = ["adamw", "adam", "nadamw", "muon", "lion", "adafactor", "sgd"]


def by_path(tree, **options):
  leaves = jax.tree_util.tree_leaves_with_path(tree, **options)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in leaves
  }


def optimizer_of(params, axes, **fields):
  config = OptimizerConfig(
    warmup_fraction=0.0, clip_norm=0.0, weight_decay=0.0, **fields
  )
  validate(config)
  boxes = {n: nn.LogicallyPartitioned(x, axes[n]) for n, x in params.items()}
  return make_optimizer(config, 100, boxes)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_matrices_of_muon_follow_from_axis_names(scan_layers):
  config = small_config("GS")
  config.scan_layers = scan_layers
  numbers = by_path(
    muon_dimensions(abstract_params(config)),
    is_leaf=lambda x: x is None or hasattr(x, "output_axis"),
  )
  first = 1 if scan_layers else 0
  group = "groups" if scan_layers else "group_0"
  one, two = (first,), (first + 1, first + 2)
  for name, want in (
    ("layer_0.mixer.q_proj.kernel", (one, two)),
    ("layer_0.mixer.o_proj.kernel", ((first, first + 1), (first + 2,))),
    ("layer_0.mixer.f_down.kernel", (one, (first + 1,))),
    ("layer_0.mixer.f_up.kernel", (one, two)),
    ("layer_1.mixer.k_proj.kernel", (one, two)),
    ("layer_1.mlp.down.kernel", (one, (first + 1,))),
    ("layer_0.mixer.q_conv", None),
    ("layer_0.mixer.dt_bias", None),
    ("layer_0.mixer.A_log", None),
    ("layer_0.mixer.g_up.bias", None),
    ("layer_0.mlp_norm.weight", None),
  ):
    assert numbers[f"{group}.{name}"] == want, name
  assert numbers["embedding.table"] is None
  assert numbers["head"] is None


def test_muon_makes_whole_matrices_orthogonal_and_leaves_others_to_adam(rng):
  shapes = {"kernel": (3, 8, 2, 6), "out": (2, 6, 8), "head": (8, 5)}
  axes = {
    "kernel": ("layers", "embed", "heads", "key_dim"),
    "out": ("heads", "value_dim", "embed"),
    "head": ("embed", "vocab"),
  }
  params = {n: np.float32(rng.normal(size=s)) for n, s in shapes.items()}
  fields = {"lr": 1.0, "final_lr": 1.0}
  muon = optimizer_of(params, axes, name="muon", **fields)
  adam = optimizer_of(params, axes, name="adamw", **fields)
  found, _ = muon.update(params, muon.init(params), params)
  want, _ = adam.update(params, adam.init(params), params)
  np.testing.assert_allclose(found["head"], want["head"], rtol=1e-6)
  matrices = [*np.reshape(found["kernel"], (3, 8, 12))]
  matrices.append(np.reshape(found["out"], (12, 8)))
  for matrix in matrices:
    # Five Newton-Schulz steps leave singular values between 0.6 and 1.3; the
    # root mean square 0.2 is what these 8 values times sqrt(12) make.
    values = np.linalg.svd(matrix)[1] / (0.2 * np.sqrt(12))
    assert values.min() > 0.6
    assert values.max() < 1.3
  # Heads are no matrices of their own.
  head = np.linalg.svd(found["kernel"][0, :, 0])[1]
  assert head.max() / head.min() > 1.5


def test_directions_are_those_of_optax(rng):
  params = {"a": np.float32(rng.normal(size=(4, 6)))}
  axes = {"a": ("embed", "mlp")}
  fields = {"lr": 0.5, "final_lr": 0.5}
  for name, options, want in (
    ("lion", ("b2=0.5",), optax.lion(0.5, b2=0.5, weight_decay=0.0)),
    ("sgd", ("nesterov=true",), optax.sgd(0.5, 0.9, nesterov=True)),
    ("adam", (), optax.adam(0.5, b2=0.95)),
    ("nadamw", (), optax.nadamw(0.5, b2=0.95, weight_decay=0.0)),
    (
      "adafactor",
      ("min_dim_size_to_factor=4", "multiply_by_parameter_scale=true"),
      optax.adafactor(0.5, min_dim_size_to_factor=4),
    ),
  ):
    found = optimizer_of(params, axes, name=name, options=options, **fields)
    state, expected_state = found.init(params), want.init(params)
    for _ in range(2):
      update, state = found.update(params, state, params)
      expected, expected_state = want.update(params, expected_state, params)
    np.testing.assert_allclose(update["a"], expected["a"], rtol=1e-5)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"name": "muom"}, r"name='muom': .*adafactor.*did you mean 'muon'"),
    ({"name": "muon", "options": ("ns_step=3",)}, "did you mean 'ns_steps'"),
    ({"name": "muon", "options": ("ns_steps=x",)}, "expected an integer"),
    ({"name": "muon", "options": ("ns_steps=0",)}, "ns_steps=0: expected 1 or"),
    ({"name": "muon", "options": ("rms=nan",)}, "rms=nan: expected a positive"),
    ({"name": "sgd", "options": ("momentum=1",)}, "0 <= x < 1"),
    ({"name": "adamw", "options": ("beta=1",)}, "adamw; expected one of none"),
    ({"name": "lion", "b2": 0.99}, r"optimizer.b2=0.99: lion does not use it"),
    ({"name": "adam", "weight_decay": 0.2}, "adam has no weight decay"),
  ],
)
def test_wrong_settings_are_refused_in_one_line(fields, message):
  with pytest.raises(ValueError, match=message) as e:
    validate(OptimizerConfig(**fields))
  assert "\n" not in str(e.value)
  assert str(e.value).startswith("--config.optimizer.")


def test_an_optimizer_of_ones_own(rng):
  def make(setup):
    decay = setup.options["decay"]
    return optax.chain(optax.trace(decay), optax.scale_by_sign())

  kind = OptimizerKind(make=make, options={"decay": 0.5})
  register_optimizer("own", kind, replace=True)
  params = {"a": np.float32(rng.normal(size=(4, 6)))}
  fields = {"name": "own", "lr": 0.5, "final_lr": 0.5}
  own = optimizer_of(params, {"a": ("embed", "mlp")}, **fields)
  update, _ = own.update(params, own.init(params), params)
  np.testing.assert_allclose(update["a"], -0.5 * np.sign(params["a"]))
  for name in ("own", "muon"):
    with pytest.raises(ValueError, match=f"name='{name}': in use"):
      register_optimizer(name, kind)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_sharded_like_the_parameters(config, name):
  """And the bytes of the state, which a plan prints, are those of the name."""
  config.optimizer = OptimizerConfig(name=name)
  if name == "adafactor":
    config.optimizer.options = ("min_dim_size_to_factor=16",)
  axes = MeshConfig(data=2, fsdp=2, tensor=2)
  with use_mesh(make_mesh(axes)) as mesh:
    plan = plan_state(LM(config.model), config.optimizer, 6, mesh)
  params = by_path(plan.abstract.params)
  for path, leaf in by_path(plan.abstract.opt_state).items():
    (owner,) = [p for n, p in params.items() if path.endswith(f".{n}")] or [
      None
    ]
    if owner is not None and owner.shape == leaf.shape:
      assert leaf.sharding == owner.sharding, path
    else:
      assert leaf.sharding.is_fully_replicated, path
  state = sum(x.size for x in jax.tree.leaves(plan.abstract.opt_state))
  total = sum(x.size for x in params.values())
  shares = {"adamw": 2, "adam": 2, "nadamw": 2, "lion": 1, "sgd": 1}
  if name in shares:
    assert shares[name] * total <= state <= shares[name] * total + 8
  elif name == "muon":
    assert 1.2 * total < state < 1.9 * total
  else:
    assert state < 0.5 * total


@pytest.fixture
def no_report(monkeypatch):
  monkeypatch.setattr(Report, "finish", lambda *_: None)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
  ("name", "options"),
  [
    pytest.param("muon", (), marks=pytest.mark.deep),
    pytest.param(
      "adafactor",
      ("min_dim_size_to_factor=16", "momentum=0.5"),
      marks=pytest.mark.deep,
    ),
    pytest.param("lion", (), marks=pytest.mark.deep),
    pytest.param("sgd", (), marks=pytest.mark.deep),
    pytest.param("nadamw", (), marks=pytest.mark.deep),
  ],
)
def test_resume_is_exact_and_the_loss_falls(
  config, dataset, tmp_path, name, options
):
  config.model.pattern = "S"
  config.optimizer = dataclasses.replace(
    config.optimizer, name=name, options=options
  )
  say = lambda line: None  # noqa: E731
  straight = train(config, tmp_path / "one", dataset=dataset, say=say)
  faulty = Faulty(dataset, {2: interrupted})
  train(config, tmp_path / "two", dataset=faulty, say=say)
  again = train(config, tmp_path / "two", dataset=dataset, say=say)
  assert bits(again.state) == bits(straight.state)
  found = losses(tmp_path / "two")
  assert found == losses(tmp_path / "one")
  assert found[-1][1] < found[0][1]
  assert all(np.isfinite(loss) for _, loss, *_ in found)
  assert jnp.isfinite(straight.state.step)
  config.optimizer.name, config.optimizer.options = "adamw", ()
  with pytest.raises(CheckpointError, match=f"name: '{name}' -> 'adamw'"):
    train(config, tmp_path / "two", dataset=dataset, say=say)
