"""Names of mixers and ablations, and the models of the suite they stand for."""

import dataclasses
from typing import Any

from gdn2_jax.config_class import config_class
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.attention import AttentionConfig
from gdn2_jax.model.mixers.gdn2_config import GDN2Config
from gdn2_jax.model.mixers.registry import kind_of


@dataclasses.dataclass(frozen=True)
class MixerChoice:
  """Mixer of a model of the suite.

  Attributes:
    pattern: Letters of the layers, repeated, as in ModelConfig.
    changes: Fields of config.gdn2 that differ from the suite's.
    ablation: Difference from Gated DeltaNet-2; "" for a mixer of its own.
  """

  pattern: str
  changes: dict[str, Any] = dataclasses.field(default_factory=dict)
  ablation: str = ""


MIXERS: dict[str, MixerChoice] = {
  "gdn2": MixerChoice("G"),
  "kda": MixerChoice("K"),
  "gdn": MixerChoice("D"),
  "deltanet": MixerChoice("E"),
  "mamba2": MixerChoice("M"),
  "mamba3": MixerChoice("N"),
  "softmax": MixerChoice("A"),
  "no_erase": MixerChoice("G", {"erase_gate": "off"}, "nothing is erased"),
  # Table 5 averages a gate over channels, so that all parameters stay.
  "b_only": MixerChoice(
    "G", {"write_gate": "scalar"}, "write gate averaged over channels"
  ),
  "w_only": MixerChoice(
    "G", {"erase_gate": "scalar"}, "erase gate averaged over channels"
  ),
  "tied": MixerChoice("G", {"gates": "tied"}, "one gate for erase and write"),
  "erase_0_2": MixerChoice(
    "G", {"negative_eigenvalues": True}, "erase gate in [0, 2]"
  ),
  "scalar_decay": MixerChoice("G", {"decay": "scalar"}, "one decay per head"),
  "no_decay": MixerChoice("G", {"decay": "none"}, "no decay"),
}


@config_class
class Sizes:
  """Size and start of the models of the suite, the same for every mixer.

  Attributes:
    model_dim: Width D of the residual stream.
    num_layers: Layers, a multiple of the pattern's letters.
    num_heads: Heads H of every recurrent mixer.
    key_dim: Key channels K of a head.
    value_dim: Value channels V of a head; the state has H K V numbers.
    mlp_dim: Hidden width of the MLP beside "gdn2"; other mixers get the width
      with which their models have as many parameters. 0: no MLP.
    decay_init: As in GDN2Config. "paper" forgets within a few tokens, which
      hides all differences on short rows.
    conv_init: As in GDN2Config.
    implementation: As in GDN2Config. On a CPU "reference" is as fast as "xla"
      at these sizes, and compiles faster.
  """

  model_dim: int = 64
  num_layers: int = 1
  num_heads: int = 1
  key_dim: int = 16
  value_dim: int = 16
  mlp_dim: int = 64
  decay_init: str = "long"
  conv_init: str = "current"
  implementation: str = ""


def choice_of(name: str) -> MixerChoice:
  """The mixer of a name of MIXERS, or of a pattern of registered letters."""
  choice = MIXERS.get(name)
  try:
    choice = choice or MixerChoice(name)
    for letter in choice.pattern:
      kind_of(letter)
  except ValueError as e:
    raise ValueError(
      f"mixer={name!r}: expected one of {', '.join(MIXERS)}, or a pattern of"
      f" registered letters: {e}"
    ) from None
  if not choice.pattern:
    raise ValueError("mixer='': expected a name or a pattern of letters")
  return choice


def model_config(name: str, sizes: Sizes, vocab_size: int) -> ModelConfig:
  """Config of the mixers of a named model, checked.

  Raises:
    ValueError: The name or a size is wrong.
  """
  choice = choice_of(name)
  settings = {
    "decay_init": sizes.decay_init,
    "conv_init": sizes.conv_init,
    "implementation": sizes.implementation,
  }
  config = ModelConfig(
    vocab_size=vocab_size,
    model_dim=sizes.model_dim,
    num_layers=sizes.num_layers,
    pattern=choice.pattern,
    mlp_dim=max(1, sizes.mlp_dim),
    gdn2=GDN2Config(
      num_heads=sizes.num_heads,
      key_dim=sizes.key_dim,
      value_dim=sizes.value_dim,
      **(settings | choice.changes),
    ),
    attention=AttentionConfig(
      num_heads=sizes.num_heads, head_dim=sizes.key_dim
    ),
    dtype="float32",
  )
  # Mixers with a config of their own have a state of the same size.
  for field in ("mamba2", "mamba3"):
    own = getattr(config, field, None)
    if own is not None:
      changes = {
        "inner_dim": sizes.num_heads * sizes.value_dim,
        "head_dim": sizes.value_dim,
        "state_dim": sizes.key_dim,
        # Mamba-3 has no convolution.
        **{k: v for k, v in settings.items() if hasattr(own, k)},
      }
      changed = dataclasses.replace(own, **changes)
      config = dataclasses.replace(config, **{field: changed})
  config.validate("sizes")
  return config
