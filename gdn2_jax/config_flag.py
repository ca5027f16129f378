"""The --config flag: config files, overrides, and one-line errors.

A mistake in using the config ends in one line and exit code 1: a field that
does not exist, a value that this package or get_config() refuses, a missing
file. Any other exception from the file is a bug in it and keeps its traceback.
"""

import dataclasses
import difflib
import inspect
import pathlib
import re
import sys
import traceback
import types
import typing
from typing import Any, Literal, NoReturn

from absl import flags
from ml_collections import config_flags

from gdn2_jax import cli
from gdn2_jax.config_class import UnknownFieldError, unknown_field
from gdn2_jax.train.config import TrainConfig

# --help lists the flag with those of the program that calls define().
flags.disclaim_key_flags()

PRESETS = pathlib.Path(__file__).with_name("configs")
# A field of a Literal type is text to the flag; `validate` checks the choice.
config_flags.register_flag_parser_for_type(Literal, flags.ArgumentParser())
_MODULE = "config_file"  # name under which the file runs
_MAX_FILES = 12  # named in a message


def define() -> flags.FlagHolder:
  """Defines --config=FILE[:RECIPE], and --config.FIELD for every field."""
  holder = config_flags.DEFINE_config_file(
    "config",
    None,
    "Python file with get_config() -> TrainConfig, or the name of a config of "
    f"the package: {', '.join(preset_names())}.",
  )
  # ml_collections returns whatever get_config() returns, and the text of a
  # traceback for every error.
  flags.FLAGS[holder.name].parser = _ConfigFile()
  return holder


def preset_names() -> list[str]:
  """Names of the config files in the package, such as "baselines/kda"."""
  names = (
    file.relative_to(PRESETS).with_suffix("").as_posix()
    for file in PRESETS.rglob("*.py")
    if file.stem != "__init__"
  )
  return sorted(names, key=lambda name: (name.count("/"), name))


def load(argument: str) -> TrainConfig:
  """The TrainConfig of FILE[:RECIPE] or NAME[:RECIPE]; exits if it is wrong."""
  return _ConfigFile().parse(argument)


def read(holder: flags.FlagHolder) -> TrainConfig:
  """The TrainConfig of a parsed flag; exits if there is none."""
  if holder.value is None:
    cli.fail("--config is missing, e.g. --config=tiny_cpu; see --help")
  return holder.value


class _ConfigFile(flags.ArgumentParser):
  """Parser of FILE[:RECIPE] or NAME[:RECIPE]; exits on wrong input."""

  @typing.override
  def parse(self, argument: str) -> TrainConfig:
    path, *recipe = argument.split(":", 1)
    if path in preset_names() and not pathlib.Path(path).exists():
      path = str(PRESETS / f"{path}.py")
    if not pathlib.Path(path).is_file():
      cli.fail(f"--config={argument}: no such file; {_other_files(path)}")
    try:
      config = _get_config(argument, path, recipe)
    except Exception as e:
      _explain(e, path)
    if not isinstance(config, TrainConfig):
      cli.fail(
        f"--config={argument}: get_config() returned "
        f"{type(config).__name__}, expected TrainConfig"
      )
    _check_overrides()
    return config


def _get_config(argument: str, path: str, recipe: list[str]) -> Any:
  """Runs the file and calls its get_config()."""
  module = types.ModuleType(_MODULE)
  module.__file__ = path
  # Dataclasses and pickles of the file look their module up.
  sys.modules[_MODULE] = module
  source = pathlib.Path(path).read_bytes()
  exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
  get_config = getattr(module, "get_config", None)
  if get_config is None:
    cli.fail(f"--config={argument}: the file defines no get_config()")
  try:
    inspect.signature(get_config).bind(*recipe)
  except TypeError as e:
    cli.fail(f"--config={argument}: get_config(): {e}")
  return get_config(*recipe)


def _explain(error: Exception, path: str) -> NoReturn:
  """Exits with one line for a refusal, a traceback for a bug of the file."""
  message = _refusal(error)
  if message:
    cli.fail(f"{_place(error)}: {message}")
  # Printed here: absl would keep only the message of a ValueError. Starts at
  # the file: frames of this package do not help its author.
  trace = error.__traceback__
  while trace and trace.tb_frame.f_code.co_filename != path:
    trace = trace.tb_next
  traceback.print_exception(error.with_traceback(trace))
  sys.exit(1)


def _refusal(error: Exception) -> str | None:
  """Message of an error that is not a bug of the config file, else None."""
  if isinstance(error, UnknownFieldError):
    return str(error)
  if isinstance(error, AttributeError):
    # Reading a misspelt group: config.modle.pattern = "G".
    owner = type(error.obj)
    ours = owner.__module__.startswith("gdn2_jax.")
    if ours and dataclasses.is_dataclass(owner):
      return unknown_field(owner, error.name)
  if isinstance(error, (ValueError, OSError)) and cli.is_ours(error):
    return str(error)
  last = traceback.extract_tb(error.__traceback__)[-1]
  raised = (last.line or "").startswith("raise ")
  if isinstance(error, ValueError) and last.name == "get_config" and raised:
    return str(error)
  return None


def _place(error: Exception) -> str:
  """FILE:LINE of the innermost code in `error` outside this package."""
  frames = [
    (frame.f_code.co_filename, line)
    for frame, line in traceback.walk_tb(error.__traceback__)
    if not cli.is_our_frame(frame)
  ]
  path, line = frames[-1]
  return f"{path}:{line}"


def _other_files(path: str) -> str:
  """Hint with existing config files, for one that does not exist."""
  own = {name: name for name in preset_names() if "/" not in name}
  own |= {
    file.stem: str(file)
    for file in sorted(pathlib.Path(path).parent.glob("*.py"))
    if file.stem != "__init__"
  }
  # Those in folders are found by their last part, too. There are many: only a
  # close one is meant.
  below = {name: name for name in preset_names() if "/" in name}
  for name in [*below]:
    below.setdefault(name.rpartition("/")[2], name)
  stem = pathlib.Path(path).stem
  for sought, known, cutoff in (
    (path, below, 0.8),
    (stem, own, 0.6),
    (stem, below, 0.8),
  ):
    if near := difflib.get_close_matches(sought, known, n=1, cutoff=cutoff):
      return f"did you mean {known[near[0]]}?"
  files = [*own.values(), *(name for name in below if "/" in name)]
  return "there are " + ", ".join(files[:_MAX_FILES])


def _check_overrides() -> None:
  """Exits for a flag --config.PATH whose field does not exist."""
  for argument in flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False):
    override = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    if not override:
      continue
    owner, path = TrainConfig, "--config"
    for name in override[1].split("."):
      if not dataclasses.is_dataclass(owner):
        cli.fail(f"{path}.{name}: {path} is one value without fields")
      hints = typing.get_type_hints(owner)
      if name not in hints:
        cli.fail(unknown_field(owner, name, path))
      owner, path = hints[name], f"{path}.{name}"
