"""README.md of a published model: front matter for hubs, text for people."""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping

from gdn2_jax.interop.tree import param_specs
from gdn2_jax.model.accounting import state_bytes
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import has_growing_cache
from gdn2_jax.model.mixers.registry import kinds_of

_TAGS = ("gated-deltanet-2", "linear-attention")
_LIBRARIES = {  # tags of their own
  "gdn2_jax": ("jax", "flax"),
  "transformers": ("pytorch", "custom_code"),
}
PAPER = "https://arxiv.org/abs/2605.22791"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
  """Facts about a model that only its publisher knows.

  Attributes:
    name: heading of the card; "" takes the name of the folder.
    license: identifier as hubs spell it ("apache-2.0"), "" for none.
    description: a paragraph.
    tags: tags for hubs, after our own.
    facts: rows of a table, e.g. {"training steps": "600"}.
  """

  name: str = ""
  license: str = ""
  description: str = ""
  tags: tuple[str, ...] = ()
  facts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def render_card(
  card: Card,
  config: ModelConfig,
  *,
  name: str,
  files: Collection[str] = (),
  library: str = "gdn2_jax",
) -> str:
  """Markdown of a README.md for a folder and its files.

  Args:
    card: Facts that only the publisher knows.
    config: Config of the model.
    name: Heading, unless the card has one.
    files: Names of the files.
    library: Library that opens the folder, "gdn2_jax" or "transformers".
  """
  has_tokenizer = "tokenizer.json" in files
  parts = [
    _front_matter(card, library),
    f"# {_line(card.name or name)}",
    card.description.strip(),
    _about(config),
    "\n".join(_table({**_sizes(config), **card.facts})),
  ]
  if library == "transformers":
    parts.append(_usage_transformers(has_tokenizer))
    return _joined(parts)
  parts.append(_usage(config, has_tokenizer))
  if "run.py" in files:
    parts.append(_alone(has_tokenizer))
  parts.append(_INTEGRITY)
  return _joined(parts)


def _joined(parts: list[str]) -> str:
  return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(card: Card, library: str) -> str:
  lines = ["---"]
  if card.license:
    lines.append(f"license: {json.dumps(card.license)}")
  lines += [
    f"library_name: {library}",
    "pipeline_tag: text-generation",
    "tags:",
  ]
  tags = dict.fromkeys((*_TAGS, *_LIBRARIES[library], *card.tags))
  # JSON strings are YAML strings, whatever they hold.
  lines += [f"- {json.dumps(tag)}" for tag in tags]
  return "\n".join([*lines, "---"])


def _about(config: ModelConfig) -> str:
  kinds = kinds_of(config.pattern).items()
  mixers = " and ".join(f"{kind.name} ({letter})" for letter, kind in kinds)
  return (
    f"A causal language model of {config.num_layers} layers with the pattern "
    f"`{config.pattern}`: {mixers}. Gated DeltaNet-2 is described in "
    f"<{PAPER}>."
  )


def _sizes(config: ModelConfig) -> dict[str, str]:
  specs = param_specs(config)
  sizes = {name: math.prod(spec.shape) for name, spec in specs.items()}
  blocks = sum(n for name, n in sizes.items() if name.startswith("layers."))
  found = {
    "parameters": f"{sum(sizes.values()):,}",
    "of these in the layers": f"{blocks:,}",
    "vocabulary": f"{config.vocab_size:,}",
    "width": f"{config.model_dim:,}",
    "dtype of parameters, of activations": (
      f"{config.param_dtype}, {config.dtype}"
    ),
  }
  if not has_growing_cache(config):
    state = sum(state_bytes(config).values())
    found["memory per sequence, whatever its length"] = f"{state:,} bytes"
  return found


def _table(rows: Mapping[str, str]) -> list[str]:
  return ["| | |", "|---|---|"] + [
    f"| {_line(str(key))} | {_line(str(value))} |"
    for key, value in rows.items()
  ]


def _line(text: str) -> str:
  """Text on one line, with escaped table separators."""
  return " ".join(text.split()).replace("|", "\\|")


def _usage(config: ModelConfig, has_tokenizer: bool) -> str:
  prompt = 'model.tokenizer.encode("Once upon")' if has_tokenizer else "[1, 2]"
  shown = (
    "print(model.tokenizer.decode(ids))" if has_tokenizer else "print(ids)"
  )
  return f"""## Use

With `gdn2_jax`:

```python
import jax
from gdn2_jax import generate, load_model

model = load_model(".")  # this folder
prompt = {prompt}
rng = jax.random.key(0)
(ids,) = generate(model.params, model.config, [prompt], 32, rng=rng)
{shown}
```"""


def _usage_transformers(has_tokenizer: bool) -> str:
  load = """\
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"""
  if not has_tokenizer:
    return f"""## Use

With torch and `transformers`:

```python
import torch
from transformers import AutoModelForCausalLM

folder = "."  # this folder
{load}
ids = model.generate(torch.tensor([[1, 2]]), max_new_tokens=32)
print(ids[0].tolist())
```

{_CODE_NOTE}"""
  return f"""## Use

With torch and `transformers`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
{load}
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Once upon", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```

{_CODE_NOTE}"""


_CODE_NOTE = """\
The model is computed by the Python files of this folder: `trust_remote_code`
runs them, so read them first, or trust who published them. They come from
`gdn2_jax`, which reads this folder back with `python -m gdn2_jax.convert
--from=hf --to=gdn2_jax`."""


def _alone(has_tokenizer: bool) -> str:
  more, example = "", "--tokens=1,2,3"
  if has_tokenizer:
    more, example = " tokenizers", '--prompt="Once upon"'
  return f"""\
With JAX alone, without `gdn2_jax`: `program.json` describes the programs
`prefill.jax` and `decode.jax`, and `run.py` runs them.

    pip install jax safetensors flatbuffers{more}
    python run.py {example} --max_new_tokens=32"""


_INTEGRITY = """\
`manifest.json` has the size and SHA-256 of every other file except this one;
loading compares them."""
