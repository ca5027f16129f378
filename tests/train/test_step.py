"""The training step: accumulation, sharding, masks and the NaN guard."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gdn2_jax.model.lm import LM
from gdn2_jax.sharding import MeshConfig, batch_sharding, make_mesh, use_mesh
from gdn2_jax.train.loop import put_batch
from gdn2_jax.train.optimizer import learning_rate
from gdn2_jax.train.state import TrainState, init_state, plan_state
from gdn2_jax.train.step import make_train_step, masked_mean, split_microbatches
from tests.numerics import rel_rms
from tests.train.conftest import make_hybrid

ONE = MeshConfig()


class Trainer:
  """A compiled step on some mesh, and fresh states for it."""

  def __init__(self, config, mesh_config, num_devices, accumulate=1):
    self.mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    model = LM(config.model)
    with use_mesh(self.mesh):
      self.plan = plan_state(model, config.optimizer, 6, self.mesh)
      config = dataclasses.replace(config, grad_accum=accumulate)
      self._step = make_train_step(config, model, self.plan, self.mesh)
      self.lowered = self._step.lower(
        self.plan.abstract, self._abstract(config)
      )
    # The quickest program: what is tested is which numbers it gives.
    options = {"xla_backend_optimization_level": 0}
    self.compiled = self.lowered.compile(compiler_options=options)
    self.model, self.seed = model, config.seed

  def _abstract(self, config):
    shape = (config.data.batch_size, config.data.seq_len)
    sharding = batch_sharding(self.mesh)
    ints = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    floats = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    names = ("inputs", "targets", "segment_ids")
    return dict.fromkeys(names, ints) | {"loss_mask": floats}

  def fresh(self) -> TrainState:
    with use_mesh(self.mesh):
      return init_state(self.model, self.plan, self.seed)

  def step(self, state, batch):
    batch = put_batch(batch, batch_sharding(self.mesh))
    state, metrics = self.compiled(state, batch)
    return state, {k: v.item() for k, v in jax.device_get(metrics).items()}


@pytest.fixture(scope="module")
def module_config(cache_dir):
  return make_hybrid(cache_dir)


@pytest.fixture(scope="module")
def trainer(module_config):
  return Trainer(module_config, ONE, 1)


@pytest.fixture(scope="module")
def sharded(module_config):
  return Trainer(module_config, MeshConfig(fsdp=8), 8)


@pytest.fixture(scope="module")
def expected(trainer, batch):
  """First moment after a step, metrics after two, on one device."""
  state, first = trainer.step(trainer.fresh(), batch)
  moment = first_moment(state)
  _, second = trainer.step(state, batch)
  return moment, first, second


def first_moment(state):
  return optax.tree.get(jax.device_get(state.opt_state), "mu")


def assert_same_training(trainer, batch, expected):
  """Metrics of two steps, and the gradient of every parameter.

  Gradients are read off Adam's first moment. Parameters would not do: Adam
  divides by the gradient's size, so where a gradient is nearly zero rounding
  errors become steps.
  """
  state, first = trainer.step(trainer.fresh(), batch)
  moment = first_moment(state)
  _, second = trainer.step(state, batch)
  want_moment, *want = expected
  for got, wanted in zip((first, second), want, strict=True):
    for name, value in wanted.items():
      assert got[name] == pytest.approx(value, rel=1e-5), name
  for (path, got), wanted in zip(
    jax.tree_util.tree_flatten_with_path(moment)[0],
    jax.tree.leaves(want_moment),
    strict=True,
  ):
    assert rel_rms(got, wanted) <= 1e-5, jax.tree_util.keystr(path)


def test_metrics_of_a_step(expected, batch, module_config):
  _, first, second = expected
  assert first["tokens"] == batch["loss_mask"].sum()
  # Random parameters know nothing: about log(vocabulary) nats.
  assert first["loss"] == pytest.approx(np.log(260), rel=0.1)
  assert second["loss"] < first["loss"]
  schedule = learning_rate(module_config.optimizer, 6)
  assert [first["lr"], second["lr"]] == [float(schedule(i)) for i in (0, 1)]
  assert first["skipped"] == first["skipped_in_a_row"] == 0


def test_loss_is_the_mean_over_unmasked_targets(trainer, batch, expected):
  params = trainer.fresh().params
  arrays = [jnp.asarray(batch[k]) for k in ("inputs", "targets", "segment_ids")]
  losses = jax.jit(
    lambda params, *arrays: trainer.model.apply(
      {"params": params}, *arrays, method="token_losses"
    ),
    compiler_options={"xla_backend_optimization_level": 0},
  )
  nll = losses(params, *arrays)
  kept = np.asarray(nll, np.float64)[batch["loss_mask"] > 0]
  assert expected[1]["loss"] == pytest.approx(kept.mean(), rel=1e-6)


def test_fsdp_equals_single_device(sharded, batch, expected):
  assert_same_training(sharded, batch, expected)


@pytest.mark.parametrize(
  ("mesh", "devices", "microbatches"),
  [
    pytest.param(
      MeshConfig(data=2, fsdp=2, tensor=2), 8, 2, marks=pytest.mark.deep
    ),
    pytest.param(MeshConfig(fsdp=2, context=4), 8, 2, marks=pytest.mark.deep),
    pytest.param(ONE, 1, 4, marks=pytest.mark.deep),
  ],
)
def test_meshes_and_microbatches_change_nothing(
  module_config, batch, expected, mesh, devices, microbatches
):
  if microbatches > 1:
    # They differ in unmasked tokens, so a mean of means would be off.
    mask = {"loss_mask": jnp.asarray(batch["loss_mask"])}
    counts = split_microbatches(mask, microbatches)["loss_mask"].sum((1, 2))
    assert len(set(counts.tolist())) > 1
  trainer = Trainer(module_config, mesh, devices, accumulate=microbatches)
  assert_same_training(trainer, batch, expected)


def test_fsdp_divides_parameters_optimizer_state_and_memory(trainer, sharded):
  assert "sharding_constraint" in sharded.lowered.as_text()
  one, eight = (t.compiled.memory_analysis() for t in (trainer, sharded))
  # Vectors stay whole; they are a few percent of this model.
  assert eight.argument_size_in_bytes < 0.25 * one.argument_size_in_bytes
  table = sharded.fresh().params["embedding"]["table"]
  assert table.sharding.shard_shape(table.shape) == (260, 4)
  # With constraints dropped every device would hold all activations.
  assert eight.temp_size_in_bytes < 0.5 * one.temp_size_in_bytes


def bits(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_update_that_is_not_finite_changes_no_bit(
  trainer, module_config, batch, bad
):
  state, _ = trainer.step(trainer.fresh(), batch)
  before = bits((state.params, state.opt_state))
  mask = batch["loss_mask"].copy()
  mask[0, 7] = bad
  counts = []
  for _ in range(3):
    state, metrics = trainer.step(state, batch | {"loss_mask": mask})
    counts.append((metrics["skipped"], metrics["skipped_in_a_row"]))
  assert bits((state.params, state.opt_state)) == before
  assert counts == [(1, 1), (2, 2), (3, 3)]
  state, metrics = trainer.step(state, batch)
  assert (metrics["skipped"], metrics["skipped_in_a_row"]) == (3, 0)
  # The schedule did not advance on the skipped batches; the data did.
  schedule = learning_rate(module_config.optimizer, 6)
  assert metrics["lr"] == pytest.approx(float(schedule(1)))
  assert int(state.step) == 5
  assert bits(state.params) != before[: len(bits(state.params))]


def test_a_token_out_of_range_is_skipped(trainer, batch):
  inputs = batch["inputs"].copy()
  inputs[3, 2] = 10_000
  state = trainer.fresh()
  before = bits(state.params)
  state, metrics = trainer.step(state, batch | {"inputs": inputs})
  assert metrics["skipped"] == 1
  assert bits(state.params) == before


def test_batch_of_padding_gives_zero(trainer, batch):
  padding = {name: np.zeros_like(x) for name, x in batch.items()}
  state, metrics = trainer.step(trainer.fresh(), padding)
  assert metrics["loss"] == 0.0
  assert metrics["grad_norm"] == 0.0
  assert metrics["tokens"] == 0
  assert metrics["skipped"] == 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_masked_mean_ignores_what_is_masked():
  nll = jnp.asarray([[1.0, jnp.nan, 3.0, jnp.inf]])
  mask = jnp.asarray([[1.0, 0.0, 1.0, 0.0]])
  loss, grad = jax.value_and_grad(masked_mean)(nll, mask, mask.sum())
  assert loss == 2.0
  np.testing.assert_array_equal(grad, mask / 2)
  assert masked_mean(nll, mask * 0, jnp.zeros(())) == 0.0


def test_initial_parameters_do_not_depend_on_the_mesh(trainer, sharded):
  for x, y in zip(
    jax.tree.leaves(sharded.fresh().params),
    jax.tree.leaves(trainer.fresh().params),
    strict=True,
  ):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
