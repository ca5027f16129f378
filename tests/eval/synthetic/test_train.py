"""Small models: equal starts, equal data, runs alone and together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.eval.synthetic.latency import decoding_cost
from gdn2_jax.eval.synthetic.mixers import Sizes, choice_of
from gdn2_jax.eval.synthetic.model import (
  build,
  count_parameters,
  init_caches,
  init_params,
)
from gdn2_jax.eval.synthetic.mqar import Mqar
from gdn2_jax.eval.synthetic.score import score
from gdn2_jax.eval.synthetic.steps import (
  FIRST_VALUE,
  NO_LABEL,
  NONE,
  QUERY,
  QUERY_SECOND,
  VALUES,
  VOCAB_SIZE,
  Example,
)
from gdn2_jax.eval.synthetic.tasks import Overwrite, SetAdd
from gdn2_jax.eval.synthetic.train import Cell, Program, Training

pytestmark = pytest.mark.slow

SMALL = Sizes(model_dim=16, mlp_dim=16, implementation="reference")
SHORT = Training(steps=8, batch_size=4, warmup=2, scored=16, points=2)
TASK = Overwrite(hot=2, cold=2, writes=6)
CELL = Cell(TASK, "gdn2", SMALL, SHORT)


@pytest.fixture(scope="module")
def alone():
  program = Program(CELL, width=1)
  return program, program.run([1], [1e-2])[0]


@pytest.mark.deep
def test_a_run_is_a_function_of_its_config_and_seed(alone):
  program, first = alone
  again, other = program.run([1], [1e-2])[0], program.run([2], [1e-2])[0]
  assert again.curve == first.curve and again.metrics == first.metrics
  assert other.curve != first.curve


@pytest.mark.deep
def test_a_run_does_not_depend_on_those_beside_it(alone):
  _, first = alone
  together = Program(CELL, width=3).run([0, 1, 1], [1e-2, 1e-2, 2e-2])
  assert [(o.seed, o.lr) for o in together] == [(0, 1e-2), (1, 1e-2), (1, 2e-2)]
  # Six digits are kept, and sums in another order differ in the last of them.
  np.testing.assert_allclose(together[1].curve, first.curve, rtol=1e-5)
  assert together[1].metrics["acc"] == first.metrics["acc"]
  for other in (together[0], together[2]):
    assert other.curve[-1][1] != first.curve[-1][1]


def test_outcome_has_the_curve_and_the_final_scores(alone):
  _, outcome = alone
  assert [point[0] for point in outcome.curve] == [4, 8]
  assert outcome.curve[-1][2] == outcome.metrics["acc"]
  assert set(outcome.metrics["acc_by_group"]) == set(TASK.groups)
  kinds = outcome.metrics["kinds"]
  assert sum(kinds.values()) == pytest.approx(1.0, abs=1e-5)
  assert kinds["right"] == outcome.metrics["acc"]
  assert outcome.cpu_s > 0 and outcome.wall_s > 0


def test_decoding_cost_counts_the_state(alone):
  program, _ = alone
  cost = decoding_cost(program)
  # S, and three inputs of each of the convolutions of q, k and v.
  assert cost["state_floats"] == 16 * 16 + 3 * (16 + 16 + 16)
  assert cost["state_bytes"] == 4 * cost["state_floats"]
  assert cost["length"] == 10 and cost["latency_us"] > 0


@pytest.mark.parametrize(
  "mixer",
  [
    "kda",
    *(
      pytest.param(m, marks=pytest.mark.deep) for m in ("deltanet", "no_erase")
    ),
  ],
)
def test_pairs_start_from_the_same_values(mixer):
  key = jax.random.key(3)

  def values(name):
    params = init_params(build(name, SMALL, VOCAB_SIZE, True), key, True)
    return dict(jax.tree_util.tree_leaves_with_path(params))

  ours, theirs = values("gdn2"), values(mixer)
  shared = [p for p in ours if p in theirs and ours[p].shape == theirs[p].shape]
  for path in shared:
    np.testing.assert_array_equal(ours[path], theirs[path], err_msg=str(path))
  names = {jax.tree_util.keystr(p) for p in shared}
  assert {"['head']", "['key_embed']['table']"} <= names
  assert "['mixer_0']['q_proj']['kernel']" in names
  assert len(names) >= 10


def test_pairs_see_the_same_data():
  kda = dataclasses.replace(CELL, mixer="kda")
  draw = jax.jit(
    lambda: (
      CELL.draw(3, 40, 4).tokens,
      kda.draw(3, 40, 4).tokens,
      CELL.draw(4, 40, 4).tokens,
    )
  )
  ours, theirs, others = draw()
  np.testing.assert_array_equal(ours, theirs)
  assert (ours != others).any()


@pytest.mark.parametrize(
  "mixer",
  [
    "kda",
    *(
      pytest.param(m, marks=pytest.mark.deep) for m in ("gdn", "no_erase", "GK")
    ),
  ],
)
def test_models_have_as_many_parameters(mixer):
  sizes = Sizes(num_layers=2)
  goal = count_parameters(build("gdn2", sizes, VOCAB_SIZE, True), True)
  model = build(mixer, sizes, VOCAB_SIZE, True)
  assert abs(count_parameters(model, True) / goal - 1) < 0.004


def test_models_may_have_no_mlp():
  model = build("kda", Sizes(mlp_dim=0), VOCAB_SIZE, True)
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0), True))
  assert not [name for name in shapes if "mlp" in name]


@pytest.mark.deep
@pytest.mark.parametrize("mixer", ["gdn2", "A"])
def test_steps_give_the_logits_of_the_sequence(mixer):
  model = build(mixer, SMALL, VOCAB_SIZE, True)
  params = jax.jit(lambda: init_params(model, jax.random.key(0), True))()
  tokens = jnp.arange(12).reshape(1, 6, 2) * 7

  @jax.jit
  def both(params, tokens):
    whole, _ = model.apply({"params": params}, tokens)
    caches, steps = init_caches(model.config, 1, tokens.shape[1]), []
    for t in range(tokens.shape[1]):
      logits, caches = model.apply(
        {"params": params}, tokens[:, t : t + 1], caches
      )
      steps.append(logits)
    return whole, jnp.concatenate(steps, 1)

  whole, steps = both(params, tokens)
  np.testing.assert_allclose(steps, whole, atol=2e-5)


def test_queries_are_at_the_end_of_steps():
  assert CELL.queries() == 4
  token = dataclasses.replace(CELL, format="token")
  assert token.queries() is None  # markers are every other token


@pytest.mark.deep
def test_queries_of_mqar_are_anywhere():
  assert Cell(Mqar(16, 2, 64), "gdn2", SMALL, SHORT, "token").queries() is None


def test_scores_of_known_answers():
  task = SetAdd(keys=2, writes=2)
  a, b = FIRST_VALUE, FIRST_VALUE + VALUES // 2
  example = Example(
    jnp.array(
      [
        [[5, a], [5, b], [5, QUERY], [5, QUERY_SECOND]],
        [[5, a], [6, a], [6, QUERY_SECOND], [5, QUERY]],
      ]
    ),
    jnp.array([[NO_LABEL, NO_LABEL, a, b], [NO_LABEL, NO_LABEL, NONE, a]]),
    jnp.array([[0, 0, 0, 1], [0, 0, 1, 0]]),
  )
  scored = jax.jit(lambda logits: score(logits, example, task))
  labels = example.labels[:, -2:]
  perfect = jax.nn.one_hot(labels, VOCAB_SIZE) * 50
  result = scored(perfect)
  assert result["acc"] == 1 and result["loss"] < 1e-6
  assert result["kinds"]["right"] == 1
  nothing = scored(jax.nn.one_hot(jnp.full_like(labels, NONE), VOCAB_SIZE))
  assert nothing["acc"] == 0.25 and nothing["kinds"]["none"] == 0.75
  assert nothing["acc_by_group"] == {"first": 0, "second": 0.5}
  other = scored(jax.nn.one_hot(jnp.full_like(labels, b), VOCAB_SIZE))
  assert other["kinds"]["stale"] == 0.25  # the first query's own second value
  assert other["kinds"]["right"] == 0.25 and other["kinds"]["other"] == 0.5


@pytest.mark.deep
def test_scores_in_the_token_format_are_those_of_the_steps():
  token = dataclasses.replace(CELL, format="token")
  paired, spread = CELL.draw(0, 0, 16), token.draw(0, 0, 16)
  logits = jax.random.normal(jax.random.key(0), (16, 10, VOCAB_SIZE))
  at_markers = jnp.repeat(logits, 2, axis=1)
  a, b = score(logits, paired, TASK), score(at_markers, spread, TASK)
  assert int((spread.labels != NO_LABEL).sum()) == 16 * 4
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"mixer": "nope!"}, "mixer='nope!': expected one of gdn2"),
    ({"format": "pairs"}, "format='pairs': expected one of"),
    ({"task": Mqar()}, "format='paired': expected 'token' for task mqar"),
    ({"training": Training(steps=10)}, "points=12: expected a divisor"),
    ({"training": Training(batch_size=0)}, "batch_size=0: expected >= 1"),
    ({"sizes": Sizes(key_dim=4)}, "key_dim=4: expected 16 to 256"),
  ],
)
def test_bad_cells_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CELL, **change).check()


@pytest.mark.parametrize(
  ("seeds", "lrs", "message"),
  [
    ([0, 1], [1e-3, 1e-3], "seeds: got 2 and 2 rates"),
    ([1_000_000], [1e-3], "seed=1000000: expected 0 to 999999"),
    ([0], [0.0], r"lr=0.0: expected a number between"),
  ],
)
def test_bad_runs_are_refused(alone, seeds, lrs, message):
  with pytest.raises(ValueError, match=message):
    alone[0].run(seeds, lrs)


def test_names_are_ablations_or_letters():
  assert choice_of("b_only").ablation and not choice_of("kda").ablation
  assert choice_of("GE").pattern == "GE"
