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
    "from gdn2_jax.config_json import from_json\n"
    "def get_config():\n  return from_json(int, '{{')\n",
    [],
    r"{file}:3: config: not valid JSON: .*",
  ),
}


# The one line after "error: ": the value of --config
ARGUMENTS = {
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
  r"--config=/no/where\.py: no such file; there are finetune, gdn2_120m, .*": (
    "/no/where.py"
  ),
  r"--config=configs: no such file; .*": "configs",
  r"--config=: no such file; .*": "",
}

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

FLAGS = [
  "--config.num_steps=7",
  "--config.data.batch_size",
  "4",
  "--noconfig.compilation_cache",
  "--config.eval.length_multiples=(1,3)",
  "--config.model.gdn2.erase_gate=channel",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Config files by name."""
  folder = tmp_path_factory.mktemp("configs")
  texts = {name: text.format() for name, (text, _, _) in REFUSED.items()}
  texts |= {name: text for name, (text, _) in BUGS.items()}
  texts["ok"] = (
    _TINY + _OPEN + "  config.model.gdn2.erase_gate = 'scalar'\n"
    "  return config\n"
  )
  for name, text in texts.items():
    (folder / f"{name}.py").write_text(text)
  return {name: folder / f"{name}.py" for name in texts}


@pytest.fixture(scope="module")
def results(files):
  """What every command line here gives, one after the other in a process."""
  plain = [f"--config={files['ok']}", "--json", "--nocompile"]
  commands = {
    name: [f"--config={files[name]}", *more]
    for name, (_, more, _) in REFUSED.items()
  }
  commands |= {m: [f"--config={value}"] for m, value in ARGUMENTS.items()}
  commands |= {name: [f"--config={files[name]}"] for name in BUGS}
  commands |= {"plain": plain, "changed": [*plain, *FLAGS]}
  found = run_many("gdn2_jax.plan", list(commands.values()))
  return dict(zip(commands, found, strict=True))


def test_mistakes_are_refused_in_one_line(files, results):
  for name, (_, _, message) in REFUSED.items():
    file = re.escape(str(files[name]))
    refused(results[name], message.format(file=file))


def test_refusals_about_the_argument(results):
  for message in ARGUMENTS:
    refused(results[message], message)


def test_a_bug_in_a_config_file_keeps_its_traceback(files, results):
  for name, (_, last) in BUGS.items():
    result = results[name]
    assert result["code"] == 1, result["err"]
    lines = result["err"].splitlines()
    assert f'File "{files[name]}", line ' in result["err"]
    assert lines[-1].startswith(last), result["err"]
    # From the file on: how it was read is not the author's concern.
    assert "config_flag" not in result["err"]


def test_flags_change_fields_of_every_kind(results):
  plain, changed = results["plain"], results["changed"]
  assert (plain["code"], changed["code"]) == (0, 0), changed["err"]
  assert '"steps": 600,' in plain["out"]
  assert '"steps": 7,' in changed["out"]
  assert '"tokens_per_step": 1024,' in changed["out"]


def test_one_line_from_the_real_processes(files):
  path = files["set_below"]
  for module in ("gdn2_jax.plan", "gdn2_jax.train"):
    done = run_module(module, f"--config={path}")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line == (
      f"error: {path}:4: GDN2Config.erase_gat: unknown field; did you mean "
      "erase_gate?"
    )


def refused(result, message):
  """Exactly one line on stderr, nothing on stdout, exit code 1."""
  assert (result["code"], result["out"]) == (1, ""), result["err"]
  assert re.fullmatch(f"error: {message}\n", result["err"]), result["err"]


def test_files_are_sought_where_the_command_runs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  hint = config_flag._other_files("configs/tiny_cpu.py")
  assert hint == "did you mean tiny_cpu?"
  (tmp_path / "mine.py").touch()
  assert "mine.py" in config_flag._other_files("nowhere.py")
  assert config_flag._other_files("mime") == "did you mean mine.py?"
  for name in ("baselines/kad", "kdaa", "configs/baselines/kda_.py"):
    hint = config_flag._other_files(name)
    assert hint == "did you mean baselines/kda?"


def test_names_reach_into_folders():
  names = config_flag.preset_names()
  assert (
    names[:2] == ["finetune", "gdn2_120m"] and "ablations/no_erase" in names
  )
  assert not [name for name in names if "__init__" in name]
  config = config_flag.load("baselines/kda:120m")
  assert (config.model.pattern, config.model.num_layers) == ("K", 12)
