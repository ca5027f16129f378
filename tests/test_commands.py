"""The command `gdn2`, its index, and --help of the commands."""

import importlib.util
import re
import subprocess
import sys

import pytest

from gdn2_jax import __main__ as gdn2
from gdn2_jax import __version__, cli
from gdn2_jax.config_class import choices, field_texts
from gdn2_jax.train.config import TrainConfig, describe_fields
from tests.tiny_run import ROOT


def run(*argv):
  return subprocess.run(
    [sys.executable, "-m", *argv],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_every_command_of_the_index_exists():
  assert {"train", "generate", "eval", "convert"} <= set(gdn2.COMMANDS)
  for name in gdn2.COMMANDS:
    assert importlib.util.find_spec(f"gdn2_jax.{name}"), name


def test_the_index_is_the_help(capsys, monkeypatch):
  for argv in ([], ["--help"], ["-h"]):
    monkeypatch.setattr(sys, "argv", ["gdn2", *argv])
    with pytest.raises(SystemExit) as e:
      gdn2.main()
    assert e.value.code == 0
    assert "gdn2 train " in capsys.readouterr().out


def test_a_misspelt_command_is_one_line(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["gdn2", "trian"])
  with pytest.raises(SystemExit) as e:
    gdn2.main()
  assert e.value.code == 1
  expected = "error: trian: no such command; did you mean train?\n"
  assert capsys.readouterr().err == expected


def test_a_default_command_takes_flags(monkeypatch):
  monkeypatch.setattr(sys, "argv", ["eval", "--workdir=x"])
  assert cli.take_command(("loss", "table"), "index", default="loss") == "loss"
  monkeypatch.setattr(sys, "argv", ["eval", "table", "--layout=4"])
  assert cli.take_command(("loss", "table"), "index", default="loss") == "table"
  assert sys.argv == ["eval", "--layout=4"]


def test_help_explains_every_field_and_exits_with_0():
  done = run("gdn2_jax", "train", "--help")
  assert done.returncode == 0, done.stderr
  for line in describe_fields(TrainConfig()):
    assert line.strip() in done.stdout
  version = run("gdn2_jax", "--version")
  assert version.stdout.startswith(f"gdn2-jax {__version__}, jax ")


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--confg=a"], "Unknown command line flag 'confg'. Did you mean: config"),
    (["config=tiny_cpu"], "unexpected argument 'config=tiny_cpu'; flags start"),
  ],
)
def test_wrong_flags_are_one_line(argv, message):
  done = run("gdn2_jax", "plan", *argv)
  assert done.returncode == 1
  assert re.fullmatch(rf"error: {re.escape(message)}.*\n", done.stderr)


def test_choices_are_named_in_the_texts_or_listed():
  text = "\n".join(describe_fields(TrainConfig()))
  assert "one of 'none', 'dots', 'full'" in text
  assert "one of 'decoupled', 'tied'" in text
  assert choices(TrainConfig) == {}
  assert field_texts(TrainConfig)["seed"].startswith("seed of")
