"""Mistakes in config files and their flags, at the real commands."""

import re

import pytest

from gdn2_jax import config_flag
from tests.tiny_run import run_many, run_module

_TINY = "from gdn2_jax.configs import tiny_cpu\ndef get_config():\n"
_OPEN = "  config = tiny_cpu.get_config()\n"

# name: (file, flags, the one line after "error: ")
REFUSED = {
  "set": (
    _TINY + _OPEN + "  config.nun_steps = 5\n  return config\n",
    [],
    r"{file}:4: TrainConfig\.nun_steps: unknown field; .* mean num_steps\?",
  ),
  "set_below": (
    _TINY + _OPEN + "  config.model.gdn2.erase_gat = 'scalar'\n",
    [],
    r"{file}:4: GDN2Config\.erase_gat: unknown field; .* erase_gate\?",
  ),
  "group": (
    _TINY + _OPEN + "  config.modle.pattern = 'G'\n",
    [],
    r"{file}:4: TrainConfig\.modle: unknown field; did you mean model\?",
  ),
  "keyword": (
    "from gdn2_jax.model.config import ModelConfig\n"
    "from gdn2_jax.train.config import TrainConfig\n"
    "MODEL = ModelConfig(patern='GS')\n",
    [],
    r"{file}:3: ModelConfig\.patern: unknown field; did you mean pattern\?",
  ),
  "flag": (
    _TINY + "  return tiny_cpu.get_config()\n",
    ["--config.modeldim=3"],
    r"--config\.modeldim: unknown field; .* --config\.model\.model_dim\?",
  ),
  "flag_below": (
    _TINY + "  return tiny_cpu.get_config()\n",
    ["--config.optimizer.lrr", "1"],
    r"--config\.optimizer\.lrr: .* did you mean --config\.optimizer\.lr\?",
  ),
  "flag_switch": (
    _TINY + "  return tiny_cpu.get_config()\n",
    ["--noconfig.compilation_cash"],
    r"--config\.compilation_cash: .* --config\.compilation_cache\?",
  ),
  "flag_of_a_value": (
    _TINY + "  return tiny_cpu.get_config()\n",
    ["--config.num_steps.x=1"],
    r"--config\.num_steps\.x: --config\.num_steps is one value without fields",
  ),
  "dict": (
    "def get_config():\n  return {{'num_steps': 3}}\n",
    ["--config.num_steps=4"],
    r"--config={file}: get_config\(\) returned dict, expected TrainConfig",
  ),
  "nothing": (
    "def get_config():\n  pass\n",
    [],
    r"--config={file}: get_config\(\) returned NoneType, expected TrainConfig",
  ),
  "no_function": (
    "def config():\n  pass\n",
    [],
    r"--config={file}: the file defines no get_config\(\)",
  ),
  "refusal_of_the_package": (
    "from gdn2_jax.train.config import config_from_json\n"
    "def get_config():\n  return config_from_json('{{')\n",
    [],
    r"{file}:3: config: not valid JSON: .*",
  ),
}


def refused(result, message):
  """Exactly one line on stderr, nothing on stdout, exit code 1."""
  assert (result["code"], result["out"]) == (1, ""), result["err"]
  assert re.fullmatch(f"error: {message}\n", result["err"]), result["err"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("configs")
  for name, (text, _, _) in REFUSED.items():
    (folder / f"{name}.py").write_text(text.format())
  return folder


def test_mistakes_are_refused_in_one_line(files):
  commands = [
    [f"--config={files / name}.py", *more]
    for name, (_, more, _) in REFUSED.items()
  ]
  results = run_many("gdn2_jax.plan", commands)
  for (name, (_, _, message)), result in zip(
    REFUSED.items(), results, strict=True
  ):
    file = re.escape(str(files / f"{name}.py"))
    refused(result, message.format(file=file))


def test_refusals_about_the_argument():
  commands = {
    r"configs/gdn2_1p3b\.py:\d+: recipe 'scrip': expected one of .*": (
      "configs/gdn2_1p3b.py:scrip"
    ),
    r"configs/gdn2_swa_1p3b\.py:\d+: recipe 'scrip': expected one of .*": (
      "configs/gdn2_swa_1p3b.py:scrip"
    ),
    r".*/gdn2_1p3b\.py:\d+: recipe 'scrip': .*": "gdn2_1p3b:scrip",
    r"--config=configs/tiny_cpu\.py:x: get_config\(\): too many .*": (
      "configs/tiny_cpu.py:x"
    ),
    r"--config=configs/tinycpu\.py: no such file; did you mean "
    r"configs/tiny_cpu\.py\?": "configs/tinycpu.py",
    r"--config=tiny_cup: no such file; did you mean tiny_cpu\?": "tiny_cup",
    r"--config=/no/where\.py: no such file; there are gdn2_120m, .*": (
      "/no/where.py"
    ),
    r"--config=configs: no such file; .*": "configs",
    r"--config=: no such file; .*": "",
  }
  results = run_many(
    "gdn2_jax.plan", [[f"--config={v}"] for v in commands.values()]
  )
  for message, result in zip(commands, results, strict=True):
    refused(result, message)


def test_files_are_sought_where_the_command_runs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  hint = config_flag._other_files("configs/tiny_cpu.py")
  assert hint == "did you mean tiny_cpu?"
  (tmp_path / "mine.py").touch()
  assert "mine.py" in config_flag._other_files("nowhere.py")
  assert config_flag._other_files("mime") == "did you mean mine.py?"


def test_one_line_from_the_real_processes(files):
  for module in ("gdn2_jax.plan", "gdn2_jax.train"):
    done = run_module(module, f"--config={files / 'set_below.py'}")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line == (
      f"error: {files / 'set_below.py'}:4: GDN2Config.erase_gat: unknown "
      "field; did you mean erase_gate?"
    )


# name: (file, last line of the traceback)
BUGS = {
  "conversion": (
    "def get_config():\n  return int('x')\n",
    "ValueError: invalid literal for int() with base 10: 'x'",
  ),
  "attribute": (
    _TINY + "  return tiny_cpu.get_cfg()\n",
    "AttributeError: module 'gdn2_jax.configs.tiny_cpu' has no attribute",
  ),
  "type": (
    "def get_config():\n  return 1 + 'x'\n",
    "TypeError: unsupported operand type(s) for +: 'int' and 'str'",
  ),
  "file": (
    "def get_config():\n  return open('/no/where')\n",
    "FileNotFoundError: [Errno 2] No such file or directory: '/no/where'",
  ),
  "helper": (
    "def size():\n  raise ValueError('odd')\ndef get_config():\n"
    "  return size()\n",
    "ValueError: odd",
  ),
  "syntax": ("def get_config()\n", "SyntaxError: expected ':'"),
}


def test_a_bug_in_a_config_file_keeps_its_traceback(tmp_path):
  for name, (text, _) in BUGS.items():
    (tmp_path / f"{name}.py").write_text(text)
  commands = [[f"--config={tmp_path / name}.py"] for name in BUGS]
  results = run_many("gdn2_jax.plan", commands)
  for (name, (_, last)), result in zip(BUGS.items(), results, strict=True):
    assert result["code"] == 1, result["err"]
    lines = result["err"].splitlines()
    assert f'File "{tmp_path / name}.py", line ' in result["err"]
    assert lines[-1].startswith(last), result["err"]
    # From the file on: how it was read is not the author's concern.
    assert "config_flag" not in result["err"]


def test_flags_change_fields_of_every_kind(tmp_path):
  path = tmp_path / "ok.py"
  path.write_text(
    _TINY + _OPEN + "  config.model.gdn2.erase_gate = 'scalar'\n"
    "  return config\n"
  )
  base = [f"--config={path}", "--json", "--nocompile"]
  commands = [
    base,
    [
      *base,
      "--config.num_steps=7",
      "--config.data.batch_size",
      "4",
      "--noconfig.compilation_cache",
      "--config.eval.length_multiples=(1,3)",
      "--config.model.gdn2.erase_gate=channel",
    ],
  ]
  plain, changed = run_many("gdn2_jax.plan", commands)
  assert (plain["code"], changed["code"]) == (0, 0), changed["err"]
  assert '"steps": 600,' in plain["out"]
  assert '"steps": 7,' in changed["out"]
  assert '"tokens_per_step": 1024,' in changed["out"]
