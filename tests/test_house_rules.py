"""Who may import whom, how long a file may be, and what no file contains."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "gdn2_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400

# What layers may import that build, time and compile the others' programs.
WHOLE_PROGRAMS = {
  "typing",
  "sharding",
  "pallas",
  "triton",
  "ops",
  "model",
  "train",
  "data",
}
# layer: layers it may import. Data flows one way; what is absent is forbidden.
ALLOWED = {
  "typing": set(),
  "config_class": set(),
  "config_json": {"config_class"},
  "config_flag": {"cli", "config_class", "train"},
  "sharding": {"config_class"},
  "cli": set(),
  "ops": {"typing", "pallas", "triton"},
  "pallas": {"typing"},
  "triton": {"typing"},
  "model": {"typing", "config_class", "ops"},
  "data": {"config_class"},
  "weights": {"typing", "config_json", "sharding", "model", "data"},
  "inference": {
    "typing",
    "config_json",
    "sharding",
    "ops",
    "model",
    "weights",
  },
  "export": {"ops", "model", "inference", "weights"},
  "analysis": {"typing", "ops", "model"},
  "eval": {"typing", "config_class", "sharding", "model", "data"},
  "train": {
    "typing",
    "config_class",
    "config_json",
    "sharding",
    "model",
    "data",
    "eval",
    "inference",
  },
  "convert": {"model", "data", "weights", "train"},
  "faults": {"sharding", "model", "train"},
  "bench": WHOLE_PROGRAMS | {"analysis", "inference"},
  "aot": WHOLE_PROGRAMS,
}
# Entry points stand above all layers and are imported by nobody.
ENTRY_POINTS = {"generate", "launch", "plan"}


def layer_of(path: pathlib.Path) -> str:
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  return parts[0]


def is_entry_point(path: pathlib.Path) -> bool:
  return path.name == "__main__.py" or layer_of(path) in ENTRY_POINTS


def imports_of(path: pathlib.Path) -> set[str]:
  """Every module that a file imports, at any depth of its code."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def name_of(path: pathlib.Path) -> str:
  return str(path.relative_to(ROOT))


def test_the_walk_sees_the_package():
  layers = {layer_of(path) for path in FILES}
  assert set(ALLOWED) <= layers
  assert "jax" in imports_of(PACKAGE / "ops" / "gdn2_reference.py")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path):
  layer = layer_of(path)
  if layer == "__init__":
    return  # the public names, resolved lazily
  for module in imports_of(path):
    parts = module.split(".")
    if parts[0] != "gdn2_jax" or len(parts) == 1:
      continue
    target = parts[1]
    assert target not in ENTRY_POINTS, f"{module} is an entry point"
    assert "__main__" not in parts, f"{module} is an entry point"
    if not is_entry_point(path) and target != layer:
      assert target in ALLOWED[layer], f"{layer} may not import {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_layers_stay_free_of_foreign_libraries(path):
  roots = {module.split(".")[0] for module in imports_of(path)}
  layer = layer_of(path)
  if layer == "ops":
    assert not roots & {"flax", "ml_collections", "absl", "optax"}
  if layer == "data":
    assert not roots & {"jax", "flax", "optax"}
  if layer != "data":
    assert "pickle" not in roots


@pytest.mark.parametrize(
  "path", [*FILES, *sorted((ROOT / "tests").rglob("*.py"))], ids=name_of
)
def test_files_are_short_and_plain(path):
  text = path.read_text()
  assert text.isascii()
  assert len(text.splitlines()) <= MAX_LINES
  assert path.name not in ("utils.py", "helpers.py", "misc.py")
  if path != pathlib.Path(__file__):
    assert "nan_to_num" not in text
