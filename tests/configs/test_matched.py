"""Baselines and ablations: equal parameters, equal states, valid configs.

Counted from shapes alone, through the token scan, which is traced fastest.
"""

import functools
import importlib
import pathlib

import pytest

from gdn2_jax.config_json import from_json, to_json
from gdn2_jax.configs.baselines import RECIPES
from gdn2_jax.model.accounting import count_parameters
from gdn2_jax.model.matching import (
  TOLERANCE,
  check_states,
  layer_states,
  matched_mlp_dim,
)
from gdn2_jax.model.mixers.registry import kinds_of
from gdn2_jax.train.config import TrainConfig, preflight, validate
from tests.model.models import small_config
from tests.tiny_run import run_many

ROOT = pathlib.Path(__file__).parents[2]


def names_in(folder):
  files = sorted((ROOT / "configs" / folder).glob("*.py"))
  return [f"{folder}/{f.stem}" for f in files if f.stem != "__init__"]


NAMES = [*names_in("baselines"), *names_in("ablations")]
# The GDN-2 that a recipe is matched to.
MAIN = {
  "30m": "gdn2_30m",
  "120m": "gdn2_120m",
  "1p3b": "gdn2_1p3b",
  "30m_swa": "gdn2_30m",
  "120m_swa": "gdn2_120m",
  "1p3b_swa": "gdn2_swa_1p3b",
}


def module(name):
  return importlib.import_module(f"gdn2_jax.configs.{name.replace('/', '.')}")


def model_of(name, *recipe):
  """The model of a config, counted without chunks and kernels."""
  model = module(name).get_config(*recipe).model
  for layer in (model.gdn2, model.mamba2, model.mamba3):
    layer.implementation = "reference"
  model.attention.implementation = "xla"
  return model


@functools.cache
def blocks(name, *recipe):
  return count_parameters(model_of(name, *recipe)).blocks


def reference(name, recipe):
  """(name, recipe) of the model that a config is matched to."""
  if name == "baselines/gdn2":
    return (MAIN[recipe],)
  return "baselines/gdn2", recipe


def cases():
  """All of the grid; two mixers at the smallest size are quick."""
  quick = ("baselines/kda", "baselines/mamba2")
  for name in NAMES:
    for recipe in RECIPES:
      is_quick = name in quick and recipe == "30m"
      marks = () if is_quick else pytest.mark.deep
      yield pytest.param(name, recipe, marks=marks)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_valid_and_has_the_states_of_gdn2(name):
  for recipe in RECIPES:
    config = module(name).get_config(recipe)
    validate(config)
    preflight(config, 1)
    assert from_json(TrainConfig, to_json(config)) == config
    found, expected = (
      layer_states(model)
      for model in (config.model, model_of(*reference(name, recipe)))
    )
    assert expected
    assert found == (set() if name == "baselines/softmax" else expected)
    assert config.model.mlp_dim % 8 == 0
    _, _, is_hybrid = recipe.partition("_")
    assert config.model.pattern.endswith("S") == bool(is_hybrid)


@pytest.mark.parametrize(("name", "recipe"), list(cases()))
def test_blocks_have_the_parameters_of_gdn2(name, recipe):
  """The width is that which the solver finds: a change of a mixer shows."""
  ours, theirs = blocks(name, recipe), blocks(*reference(name, recipe))
  assert abs(ours / theirs - 1) <= TOLERANCE
  if ours != theirs:
    model, other = model_of(name, recipe), model_of(*reference(name, recipe))
    assert model.mlp_dim == matched_mlp_dim(model, other)


@pytest.mark.parametrize("recipe", RECIPES)
def test_everything_but_the_model_is_the_recipe_of_gdn2(recipe):
  main = module(MAIN[recipe]).get_config()
  for name in NAMES:
    config = module(name).get_config(recipe)
    for field in ("vocab_size", "model_dim", "num_layers", "dtype"):
      assert getattr(config.model, field) == getattr(main.model, field)
    config.model = main.model
    assert config == main


def test_the_main_configs_are_in_the_grid():
  for recipe in ("30m_swa", "120m_swa", "1p3b", "1p3b_swa"):
    main = module(MAIN[recipe]).get_config()
    assert module("baselines/gdn2").get_config(recipe) == main


@pytest.mark.parametrize("name", NAMES)
def test_docstring_states_claim_cost_and_command(name):
  for word in ("Claim:", "Cost:", f"--config=configs/{name}.py:"):
    assert word in module(name).__doc__
  assert module(name).get_config() == module(name).get_config("30m")
  with pytest.raises(ValueError, match="recipe '7b': expected one of 30m, "):
    module(name).get_config("7b")


def test_ablations_change_one_setting():
  plain = module("baselines/gdn2").get_config().model
  seen = set()
  for name in names_in("ablations"):
    model = module(name).get_config().model
    fields = vars(plain.gdn2)
    (changed,) = [k for k in fields if getattr(model.gdn2, k) != fields[k]]
    seen.add((changed, getattr(model.gdn2, changed)))
    model.gdn2, model.mlp_dim = plain.gdn2, plain.mlp_dim
    assert model == plain
  assert len(seen) == len(names_in("ablations"))


def test_the_solver_refuses_what_does_not_match():
  config, other = small_config("K"), small_config("G")
  other.gdn2.key_dim = 32
  with pytest.raises(ValueError, match=r"'K': recurrent states of \[1536\]"):
    check_states(config, other)
  # 3 x 32 x 2 parameters a column, 8 columns a step, of about 20,000 blocks.
  with pytest.raises(ValueError, match="no mlp_dim that is a multiple of 8"):
    matched_mlp_dim(config, small_config("G"), tolerance=1e-4)
  width = matched_mlp_dim(config, small_config("G"), multiples=(1,))
  config.mlp_dim = width
  count, target = (
    count_parameters(c).blocks for c in (config, small_config("G"))
  )
  assert abs(count - target) <= TOLERANCE * target
  # Softmax attention has no recurrent state to compare.
  check_states(small_config("S"), other)


def test_kinds_say_what_states_and_gates_they_have():
  config = small_config("G")
  kinds = kinds_of("GKDEMNSA")
  config.mamba2.inner_dim, config.mamba2.state_dim = 128, 16
  states = {k: kind.state_floats(config) for k, kind in kinds.items()}
  assert states == dict.fromkeys("GKDE", 4 * 16 * 24) | {
    "M": 128 * 16,
    "N": 64 * 16,
    "S": 0,
    "A": 0,
  }
  fused = {k: kind.has_fused_gates(config) for k, kind in kinds.items()}
  known = {"G": True, "K": True, "D": True, "E": False}
  known |= {"M": False, "N": False, "S": None, "A": None}
  assert fused == known
  config.gdn2.write_gate = "scalar"
  assert kinds_of("G")["G"].has_fused_gates(config) is False


@pytest.mark.slow
def test_command_lines_compare_and_refuse():
  good, absent, recipe, both = run_many(
    "gdn2_jax.plan",
    [
      ["--compare=baselines/gdn2,configs/ablations/no_decay.py:30m_swa"],
      ["--compare=baselines/kad"],
      ["--compare=baselines/kda:7b"],
      ["--compare=baselines/kda", "--config=tiny_cpu"],
    ],
  )
  header, _, first, second = good["out"].splitlines()
  assert "block parameters" in header
  assert "+0.00%" in first and "27,329,568" in first and "yes" in first
  assert "GS" in second and "no |" in second
  assert absent["err"] == (
    "error: --config=baselines/kad: no such file; did you mean baselines/kda?\n"
  )
  assert "recipe '7b': expected one of 30m, 120m" in recipe["err"]
  assert (
    both["err"] == "error: --compare and --config: expected one of the two\n"
  )
  assert [r["code"] for r in (good, absent, recipe, both)] == [0, 1, 1, 1]
