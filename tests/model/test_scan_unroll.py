"""Groups of layers unrolled in their scan: the same model, without a loop."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gdn2_jax.model.lm import LM, init_cache, without_stacks
from tests.model.models import small_config, tokens_of

# Another program sums in another order: losses of 4.1 nats differed by 5e-7,
# gradients, of which the largest is 5.3, by 2e-6.
ATOL = 5e-6


def config_of(scan_unroll: int, groups: int = 2, **changes):
  config = small_config(
    "GS", num_layers=2 * groups, scan_unroll=scan_unroll, **changes
  )
  config.gdn2.implementation = "reference"  # compiles faster
  return config


@functools.cache
def params_of(scan_unroll: int):
  init = jax.jit(LM(config_of(scan_unroll)).init)
  return nn.unbox(init(jax.random.key(0), tokens_of(1, 4)))["params"]


def grads_of(config):
  """Jitted value and gradient of the mean loss."""

  def loss(params, tokens):
    args = tokens[:, :-1], tokens[:, 1:]
    nll = LM(config).apply({"params": params}, *args, method="token_losses")
    return nll.mean()

  return jax.jit(jax.value_and_grad(loss))


def loops_of(scan_unroll: int) -> int:
  """While loops of a forward pass of four groups, as it is handed to XLA."""
  model, tokens = LM(config_of(scan_unroll, groups=4)), tokens_of(1, 9)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)
  lowered = jax.jit(lambda p, t: model.apply(p, t)[0]).lower(params, tokens)
  return lowered.as_text().count("stablehlo.while")


@pytest.mark.slow
def test_parameters_are_the_same_to_the_bit():
  jax.tree.map(np.testing.assert_array_equal, params_of(0), params_of(1))


@pytest.mark.slow
def test_losses_and_gradients_are_the_same():
  params, tokens = params_of(1), tokens_of(2, 17)
  want = grads_of(config_of(1))(params, tokens)
  got = grads_of(config_of(0))(params, tokens)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=ATOL), got, want
  )


@pytest.mark.slow
def test_a_cache_goes_through_unrolled_groups():
  tokens, params = tokens_of(2, 12), params_of(1)
  want = LM(config_of(1)).apply({"params": params}, tokens)[0]
  config = config_of(0)
  step = jax.jit(LM(config).apply)
  cache = init_cache(config, 2)
  first, cache = step({"params": params}, tokens[:, :8], None, cache)
  second, _ = step({"params": params}, tokens[:, 8:], None, cache)
  got = jnp.concatenate([first, second], axis=1)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_parameters_without_stacks_are_those_of_the_same_model():
  config, tokens = config_of(0), tokens_of(1, 1)
  params, alone = without_stacks(params_of(0), config)
  assert not alone.scan_layers and "groups" not in params

  def outputs(config, params):
    run = functools.partial(LM(config).apply, {"params": params})
    return jax.jit(lambda cache: run(tokens, None, cache))(
      init_cache(config, 1)
    )

  both = outputs(config, params_of(0)), outputs(alone, params)
  for x, y in zip(*map(jax.tree.leaves, both), strict=True):
    np.testing.assert_allclose(x, y, atol=ATOL)


@pytest.mark.parametrize("changes", [{"scan_layers": False}, {"remat": "none"}])
def test_parameters_of_a_loop_over_groups_stay_stacked(changes):
  config = config_of(1, **changes)
  params, alone = without_stacks({"groups": {}}, config)
  assert params == {"groups": {}} and alone is config


def test_no_loop_over_groups_is_left():
  # Those of the op are in the body once, or once for every group.
  inner = loops_of(1) - 1
  assert inner > 0
  assert loops_of(2) == 2 * inner + 1
  assert loops_of(0) == loops_of(4) == 4 * inner


@pytest.mark.parametrize(
  "changes, kept_apart",
  [
    ({"scan_unroll": 0}, True),
    ({"scan_unroll": 2, "groups": 4}, False),  # a loop does it
    ({"scan_unroll": 1}, False),
    ({"scan_unroll": 1, "groups": 1}, True),  # XLA drops loops of one turn
    ({"scan_unroll": 1, "scan_layers": False}, True),
  ],
)
def test_xla_is_kept_from_merging_both_passes(changes, kept_apart):
  """Else it would take the forward's results for those recomputed."""
  model, tokens = LM(config_of(**changes, remat="full")), tokens_of(1, 9)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)
  program = str(jax.make_jaxpr(model.apply)(params, tokens))
  found = re.findall(
    r"policy=<function nothing_saveable[^>]*>\s+prevent_cse=(\w+)", program
  )
  assert found and set(found) == {str(kept_apart)}


@pytest.mark.parametrize("scan_unroll", [-1, 3, 5, 8])
def test_other_numbers_are_refused(scan_unroll):
  message = f"^model.scan_unroll={scan_unroll}: expected 0 .* of the 4 groups"
  with pytest.raises(ValueError, match=message):
    config_of(scan_unroll, groups=4).validate()


def test_divisors_are_taken():
  for scan_unroll in (0, 1, 2, 4):
    config_of(scan_unroll, groups=4).validate()
