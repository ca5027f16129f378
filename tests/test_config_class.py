"""Config dataclasses refuse fields they do not have, and stay dataclasses."""

import copy
import dataclasses
import inspect
import pickle
import typing

import pytest

from gdn2_jax import config_json
from gdn2_jax.config_class import (
  UnknownFieldError,
  config_class,
  unknown_field,
)
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.gdn2 import GDN2Config
from gdn2_jax.train.config import TrainConfig


@config_class
class Inner:
  """A group of fields."""

  width: int = 1
  seed: int = 0


@config_class
class Outer:
  """Two groups and a field of its own."""

  left: Inner = dataclasses.field(default_factory=Inner)
  right: Inner = dataclasses.field(default_factory=Inner)
  seed: int = 0

  @property
  def double(self) -> int:
    return 2 * self.seed


def classes(root):
  """`root` and every dataclass below it."""
  yield root
  for hint in typing.get_type_hints(root).values():
    if dataclasses.is_dataclass(hint):
      yield from classes(hint)


def one_line(error):
  (line,) = str(error.value).splitlines()
  return line


def test_the_walk_sees_the_whole_tree():
  found = {cls.__name__ for cls in classes(TrainConfig)}
  assert {"TrainConfig", "DataConfig", "EvalConfig", "GDN2Config"} <= found
  assert len(found) == 12


@pytest.mark.parametrize("cls", [*classes(TrainConfig)])
def test_every_config_refuses_a_field_it_lacks(cls):
  config = cls()
  for field in dataclasses.fields(cls):
    setattr(config, field.name, getattr(config, field.name))
    with pytest.raises(UnknownFieldError) as info:
      setattr(config, field.name + "x", 0)
    assert one_line(info) == (
      f"{cls.__name__}.{field.name}x: unknown field; did you mean {field.name}?"
    )
  assert config == cls()
  assert vars(config).keys() == {f.name for f in dataclasses.fields(cls)}


@pytest.mark.parametrize(
  ("group", "name", "message"),
  [
    ("model.gdn2", "erase_gat", "GDN2Config.erase_gat: unknown field; did you"),
    ("model.gdn2", "Erase_Gate", "did you mean erase_gate?"),
    ("", "nun_steps", "TrainConfig.nun_steps: .* did you mean num_steps?"),
    # A property, which follows from fields.
    ("model.gdn2", "value_heads", "did you mean num_value_heads?"),
    # The right name in the wrong place, or in several.
    ("", "modeldim", "did you mean model.model_dim?"),
    ("", "lr", "did you mean optimizer.lr?"),
    ("", "batch_size", "did you mean data.batch_size or eval.batch_size?"),
    ("data", "lr", "unknown field; DataConfig has source, tokenizer, seq_len"),
  ],
)
def test_an_assignment_says_what_was_meant(group, name, message):
  config = TrainConfig()
  holder = config
  for part in group.split(".") if group else ():
    holder = getattr(holder, part)
  with pytest.raises(UnknownFieldError, match=message) as info:
    setattr(holder, name, 1)
  one_line(info)
  assert config == TrainConfig()


def test_the_constructor_says_what_was_meant():
  with pytest.raises(UnknownFieldError) as info:
    Inner(widht=2, seed=1)
  assert one_line(info) == "Inner.widht: unknown field; did you mean width?"
  with pytest.raises(TypeError, match="positional"):
    Inner(2)
  assert Inner(width=2) == Inner(width=2, seed=0) != Inner()


def test_the_error_is_one_of_values_and_of_attributes():
  for kind in (AttributeError, ValueError):
    with pytest.raises(kind, match="unknown field"):
      Inner().widht = 2
  # As anywhere in Python, for a name that is read.
  assert getattr(Inner(), "widht", None) is None


def test_messages_carry_the_path_where_it_is_known():
  assert unknown_field(Outer, "widht", "--config") == (
    "--config.widht: unknown field; did you mean --config.left.width or "
    "--config.right.width?"
  )
  # A field of the object itself comes before those further down.
  assert unknown_field(Outer, "sed") == (
    "Outer.sed: unknown field; did you mean seed?"
  )
  with pytest.raises(
    ValueError,
    match=r"m\.gdn2\.erase_gat: unknown field; did"
    r" you mean m\.gdn2\.erase_gate\?",
  ):
    config_json.from_dict(ModelConfig, {"gdn2": {"erase_gat": ""}}, "m")


@pytest.mark.parametrize(
  "clone",
  [
    copy.copy,
    copy.deepcopy,
    dataclasses.replace,
    lambda config: pickle.loads(pickle.dumps(config)),
    lambda config: config_json.from_json(
      type(config), config_json.to_json(config)
    ),
  ],
  ids=["copy", "deepcopy", "replace", "pickle", "json"],
)
def test_clones_are_equal_and_refuse_as_well(clone):
  config = TrainConfig(num_steps=7)
  config.model.gdn2.erase_gate = "scalar"
  other = clone(config)
  assert other == config
  assert hash(other) == hash(config)
  other.num_steps = 8
  assert config.num_steps == 7
  with pytest.raises(UnknownFieldError):
    other.nun_steps = 8
  with pytest.raises(UnknownFieldError):
    other.model.gdn2.erase_gat = "scalar"


def test_errors_survive_a_process_boundary():
  with pytest.raises(UnknownFieldError) as info:
    Inner().widht = 2
  again = pickle.loads(pickle.dumps(info.value))
  assert (type(again), str(again)) == (UnknownFieldError, str(info.value))


def test_subclasses_have_their_fields_and_refuse_others():
  @config_class
  class Wide(GDN2Config):
    extra: int = 0

  class Same(Inner):
    pass

  wide = Wide(num_heads=2, extra=3)
  wide.extra = 4
  assert (wide.num_heads, wide.extra) == (2, 4)
  with pytest.raises(UnknownFieldError, match=r"Wide\.extr: .*mean extra\?"):
    wide.extr = 5
  with pytest.raises(UnknownFieldError, match=r"Same\.widht"):
    Same(widht=1)


def test_signature_and_help_are_those_of_a_dataclass():
  parameters = inspect.signature(ModelConfig).parameters
  assert list(parameters) == [f.name for f in dataclasses.fields(ModelConfig)]
  kinds = {parameter.kind for parameter in parameters.values()}
  assert kinds == {inspect.Parameter.KEYWORD_ONLY}
  assert repr(Inner(width=2)) == "Inner(width=2, seed=0)"
  assert Outer(seed=2).double == 4
