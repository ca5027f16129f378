"""Schedule, decay mask and one AdamW step by hand."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.model.accounting import abstract_params
from gdn2_jax.train.optimizer import (
  OptimizerConfig,
  decay_mask,
  learning_rate,
  make_optimizer,
  validate,
)


def test_schedule_values():
  config = OptimizerConfig(lr=1.0, final_lr=0.1, warmup_fraction=0.1)
  rates = np.asarray(jax.vmap(learning_rate(config, 100))(jnp.arange(103)))
  # The first batch is not wasted on a rate of 0.
  np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
  # At the peak one step long, then half a cosine to the last step, then flat.
  np.testing.assert_allclose(rates[10], 1.0, rtol=1e-6)
  angle = np.pi * np.arange(90) / 89
  expected = 0.1 + 0.9 * (1 + np.cos(angle)) / 2
  np.testing.assert_allclose(rates[10:100], expected, rtol=1e-5)
  np.testing.assert_allclose(rates[99:], 0.1, rtol=1e-6)


def test_schedule_without_warmup_starts_at_the_peak():
  config = OptimizerConfig(lr=1.0, final_lr=0.5, warmup_fraction=0.0)
  schedule = learning_rate(config, 1)
  assert float(schedule(0)) == 1.0


@pytest.mark.parametrize("scan_layers", [True, False])
def test_decay_mask(config, scan_layers):
  config.model.scan_layers = scan_layers
  boxed = abstract_params(config.model)
  everything = decay_mask(OptimizerConfig(decay_mask="all"), boxed)
  assert all(jax.tree.leaves(everything))
  matrices = decay_mask(OptimizerConfig(decay_mask="matrices"), boxed)
  by_name = {True: set(), False: set()}
  for path, decays in jax.tree_util.tree_flatten_with_path(matrices)[0]:
    by_name[decays].add(path[-1].key)
  vectors = {"A_log", "dt_bias", "o_norm", "weight", "bias"}
  assert by_name[False] == vectors
  assert {"kernel", "table", "head", "q_conv"} <= by_name[True]
  assert not by_name[True] & vectors


def test_update_is_adamw():
  config = OptimizerConfig(
    lr=0.1,
    final_lr=0.1,
    warmup_fraction=0.0,
    clip_norm=0.5,
    weight_decay=0.3,
    decay_mask="matrices",
  )
  x = {"a": np.float32([3.0, -1.0]), "b": np.float32([2.0])}
  dx = {"a": np.float32([3.0, 0.0]), "b": np.float32([4.0])}  # norm 5
  axes = {"a": ("embed", "mlp"), "b": ("embed",)}
  boxes = {n: nn.LogicallyPartitioned(x[n], axes[n]) for n in x}
  optimizer = make_optimizer(config, 10, boxes)
  updates, _ = optimizer.update(dx, optimizer.init(x), x)
  for name, decay in (("a", 0.3), ("b", 0.0)):
    clipped = dx[name] * 0.1
    # The bias corrections of the first step undo the averaging exactly.
    expected = -0.1 * (
      clipped / (np.abs(clipped) + config.eps) + decay * x[name]
    )
    np.testing.assert_allclose(updates[name], expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("lr", 0.0),
    ("final_lr", 1.0),
    ("warmup_fraction", 1.0),
    ("b1", 1.0),
    ("b2", -0.1),
    ("eps", 0.0),
    ("weight_decay", -1.0),
    ("clip_norm", -1.0),
    ("decay_mask", "some"),
  ],
)
def test_senseless_values_are_refused(field, value):
  config = dataclasses.replace(OptimizerConfig(), **{field: value})
  with pytest.raises(ValueError, match=rf"--config.optimizer.{field}="):
    validate(config)


def test_mask_sees_names_not_shapes():
  stacked = nn.LogicallyPartitioned(
    jax.ShapeDtypeStruct((4, 8), jnp.float32), ("layers", "act_embed")
  )
  mask = decay_mask(OptimizerConfig(decay_mask="matrices"), {"w": stacked})
  assert mask == {"w": False}
