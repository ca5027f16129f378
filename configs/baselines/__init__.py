"""Baselines with the parameters, the state and the recipe of GDN-2.

Every file takes a size, "30m", "120m" or "1p3b", and with "_swa" the hybrid, in
which sliding-window attention alternates with the mixer:

  python -m gdn2_jax.plan --config=baselines/kda:120m_swa

Width, layers, data, optimizer and steps are those of configs/gdn2_30m.py,
gdn2_120m.py and gdn2_1p3b.py. The MLPs are as wide as makes the blocks of a
recurrent model as large as those of the recurrent GDN-2 of the size, and those
of a hybrid as large as those of the hybrid, within 0.3 %
(`gdn2_jax.model.matching`, which tests/configs run).
"""

import importlib

from gdn2_jax.train.config import TrainConfig

# File of the recurrent and of the hybrid GDN-2.
_SIZES = {
  "30m": ("gdn2_30m", "gdn2_30m"),
  "120m": ("gdn2_120m", "gdn2_120m"),
  "1p3b": ("gdn2_1p3b", "gdn2_swa_1p3b"),
}
RECIPES = tuple(size + end for end in ("", "_swa") for size in _SIZES)


def sized(
  recipe: str, pattern: str, mlp_dims: tuple[int, ...], *, hybrid: str = ""
) -> TrainConfig:
  """A size's config with other mixers.

  Args:
    recipe: One of RECIPES.
    pattern: Letter of the mixer.
    mlp_dims: MLP widths in the order of RECIPES.
    hybrid: Pattern of the recipes with "_swa"; by default the letter and "S".

  Raises:
    ValueError: There is no such recipe.
  """
  if recipe not in RECIPES:
    raise ValueError(f"recipe {recipe!r}: expected one of {', '.join(RECIPES)}")
  size, _, is_hybrid = recipe.partition("_")
  name = _SIZES[size][bool(is_hybrid)]
  config = importlib.import_module(f"gdn2_jax.configs.{name}").get_config()
  config.model.pattern = (hybrid or pattern + "S") if is_hybrid else pattern
  config.model.mlp_dim = mlp_dims[RECIPES.index(recipe)]
  return config


def state_floats(config: TrainConfig) -> int:
  """Numbers in the state of one GDN-2 layer, H K V, for layers of others."""
  c = config.model.gdn2
  return c.value_heads * c.key_dim * c.value_dim
