"""Layers, sizes and words: rules that hold for every file of the package.

Each test walks all files and names every violation at once.
"""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "gdn2_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# A link to the folder beside the package, which a walk does not follow.
FILES += sorted((PACKAGE / "configs").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_LINES = 400
MAX_FILES = 12  # of a folder's own

# layer: layers it may import beside itself. Data flows one way; what is absent
# is forbidden. CONTRIBUTING.md prints this table.
ALLOWED = {
  "typing": "",
  "files": "",
  "kernels": "files",
  "config_class": "",
  "config_json": "config_class",
  "sharding": "config_class",
  "cli": "",
  "config_flag": "cli config_class train",
  "configs": "model data eval train",
  "pallas": "typing kernels",
  "triton": "typing",
  "ops": "typing kernels pallas triton",
  "model": "typing config_class ops",
  "nnx": "typing model",
  "data": "files config_class",
  "interop": "typing files config_json sharding model data",
  "inference": "typing files config_json sharding ops model interop",
  "analysis": "typing ops model",
  "explore": "typing files data interop model analysis train",
  "eval": "typing files config_class sharding ops model data interop inference "
  "analysis",
  "train": "typing files config_class config_json sharding model data interop "
  "inference analysis eval",
  "chat": "cli interop inference",
  "serve": "interop inference",
  "interop.convert": "files interop model data train",
  "interop.export": "kernels interop ops model inference",
  "bench": "typing kernels sharding pallas triton ops model data train "
  "inference analysis",
  "replicate": "files eval train",
  "aot": "typing kernels sharding pallas triton ops model data train inference",
}
# Entry points stand above all layers and are imported by nobody.
ENTRY_POINTS = {"convert", "export", "generate", "launch", "plan"}


def layer_of(module: str) -> str:
  """The layer of a dotted module below gdn2_jax; the longest that fits."""
  parts = module.split(".")
  two = ".".join(parts[:2])
  return two if two in ALLOWED else parts[0]


def module_of(path: pathlib.Path) -> str:
  """Dotted name below gdn2_jax, "" for the package itself."""
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  return ".".join(part for part in parts if part != "__init__")


def is_entry_point(module: str) -> bool:
  return module.endswith("__main__") or module.split(".")[0] in ENTRY_POINTS


def imports_of(path: pathlib.Path, *, top_level: bool = False) -> set[str]:
  """Modules that a file imports, at any depth of its code or at its top."""
  tree = ast.parse(path.read_text())
  found = set()
  for node in tree.body if top_level else ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def name_of(path: pathlib.Path) -> str:
  return str(path.relative_to(ROOT))


def test_the_walk_sees_the_package():
  layers = {layer_of(module_of(path)) for path in FILES}
  assert set(ALLOWED) <= layers
  assert "jax" in imports_of(PACKAGE / "ops" / "gdn2" / "reference.py")


def test_imports_point_one_way():
  wrong = []
  for path in FILES:
    module = module_of(path)
    layer = layer_of(module)
    if not module:
      continue  # the public names, resolved lazily
    for name in imports_of(path):
      package, _, imported = name.partition(".")
      if package != "gdn2_jax" or not imported:
        continue
      target = layer_of(imported)
      if is_entry_point(module):
        continue
      if is_entry_point(imported):
        wrong.append(f"{name_of(path)}: {name} is an entry point")
      elif target not in (layer, *ALLOWED[layer].split()):
        wrong.append(f"{name_of(path)}: {layer} may not import {name}")
  assert not wrong, "\n".join(wrong)


def test_no_import_circle():
  modules = {module_of(path): path for path in FILES}
  below = {}
  for module, path in modules.items():
    below[module] = set()
    for name in imports_of(path, top_level=True):
      imported = name.removeprefix("gdn2_jax.")
      if imported != name:
        home = imported if imported in modules else imported.rpartition(".")[0]
        below[module].add(home)
  done, open_path = set(), []

  def visit(module):
    assert module not in open_path, " -> ".join([*open_path, module])
    if module in done or module not in below:
      return
    open_path.append(module)
    for other in sorted(below[module] - {module}):
      visit(other)
    done.add(open_path.pop())

  for module in sorted(below):
    visit(module)


def test_contributing_prints_the_layers():
  text = (ROOT / "CONTRIBUTING.md").read_text()
  for layer, allowed in ALLOWED.items():
    assert f"| {layer} | {allowed} |" in text, f"{layer}: {allowed}"


def test_layers_stay_free_of_foreign_libraries():
  forbidden = {
    "ops": {"flax", "ml_collections", "absl", "optax", "pickle"},
    "data": {"jax", "flax", "optax"},
  }
  for path in FILES:
    roots = {module.split(".")[0] for module in imports_of(path)}
    bad = forbidden.get(layer_of(module_of(path)), {"pickle"})
    assert not roots & bad, f"{name_of(path)} imports {roots & bad}"


def test_files_are_short_and_plain():
  wrong = []
  for path in [*FILES, *TESTS]:
    text = path.read_text()
    if not text.isascii():
      wrong.append(f"{name_of(path)}: not ASCII")
    if len(text.splitlines()) > MAX_LINES:
      wrong.append(f"{name_of(path)}: longer than {MAX_LINES} lines")
    if path.name in ("utils.py", "helpers.py", "misc.py"):
      wrong.append(f"{name_of(path)}: name the file by what it holds")
    if path != pathlib.Path(__file__) and "nan_to_num" in text:
      wrong.append(f"{name_of(path)}: nan_to_num hides wrong numbers")
  assert not wrong, "\n".join(wrong)


def test_folders_are_small():
  for folder in {path.parent for path in FILES}:
    own = list(folder.glob("*.py"))
    assert len(own) <= MAX_FILES, f"{name_of(folder)}: {len(own)} files"


def test_module_docstrings_are_no_riddles():
  riddle = re.compile(r'"""(What|Which|Where|Whether|Who|How|Those|That) ')
  found = [name_of(p) for p in FILES if riddle.match(p.read_text())]
  assert not found, found
