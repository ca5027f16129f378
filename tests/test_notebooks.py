"""Every notebook runs top to bottom, and is committed the way it ran."""

import ast
import pathlib
import sys

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from tests.faults.child import environment
from tests.tiny_run import make_run

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The longest first: with several workers none is idle at the end.
LONG = ("03_editing_a_memory", "06_your_own_mixer", "04_capacity")
MAX_BYTES = 500_000
MAX_DEFINITION = 10  # lines


def uses_run(path):
  """Whether the model of GDN2_RUN changes what the notebook shows."""
  return "GDN2_RUN" in path.read_text()


def each(paths):
  return pytest.mark.parametrize("path", paths, ids=[p.stem for p in paths])


every_notebook = each(NOTEBOOKS)
longest_first = each(
  sorted(NOTEBOOKS, key=lambda path: (path.stem not in LONG, path.stem))
)


class ThisInterpreter(KernelSpecManager):
  """Runs notebooks with our own Python, whatever kernels are installed."""

  def get_kernel_spec(self, kernel_name):
    command = [sys.executable, "-m", "ipykernel_launcher"]
    return KernelSpec(
      argv=[*command, "-f", "{connection_file}"],
      display_name=kernel_name,
      language="python",
    )


def execute(path, run):
  """The notebook with fresh outputs; raises on the first error in a cell.

  It runs outside the clone, as a downloaded file would.
  """
  notebook = nbformat.read(path, as_version=4)
  client = NotebookClient(
    notebook,
    km=AsyncKernelManager(kernel_spec_manager=ThisInterpreter()),
    timeout=600,  # of a cell; machines of continuous integration are shared
    resources={"metadata": {"path": str(run.parent)}},
  )
  # The default for a manager of ours is to leave kernel and sockets open.
  clone = {"PYTHONPATH": str(ROOT)}  # an installation may be another's
  client.execute(
    env=environment() | clone | {"GDN2_RUN": str(run)}, cleanup_kc=True
  )
  return notebook


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
  """What a cell shows; consecutive prints may arrive in several pieces."""
  return {
    kind
    for output in cell.outputs
    for kind in output.get("data", {output.get("name"): None})
  }


def printed(notebook):
  return "".join(
    output.text
    for cell in code_cells(notebook)
    for output in cell.outputs
    if output.output_type == "stream"
  )


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
  """A workdir with random parameters in place of trained ones."""
  return make_run(tmp_path_factory.mktemp("stand_in"))


def test_there_are_notebooks():
  assert [path.stem[:2] for path in NOTEBOOKS] == [
    f"{i:02}" for i in range(1, len(NOTEBOOKS) + 1)
  ]
  assert {path.stem for path in NOTEBOOKS} >= set(LONG)


def test_the_page_of_notebooks_lists_each():
  page = (ROOT / "docs" / "notebook.md").read_text()
  assert [p.name for p in NOTEBOOKS if p.name not in page] == []


@pytest.mark.slow
@longest_first
def test_shows_what_is_committed_and_names_an_untrained_model(path, tmp_path):
  fresh = execute(path, tmp_path / "missing")
  assert ("UNTRAINED" in printed(fresh)) == uses_run(path)
  committed = nbformat.read(path, as_version=4)
  for ran, kept in zip(code_cells(fresh), code_cells(committed), strict=True):
    assert kinds(ran) == kinds(kept), kept.source


@pytest.mark.deep
@each([path for path in NOTEBOOKS if uses_run(path)])
def test_runs_on_the_model_of_a_workdir(path, stand_in):
  fresh = execute(path, stand_in)
  assert "UNTRAINED" not in printed(fresh)
  assert "step 3" in printed(fresh)


@every_notebook
def test_is_committed_with_outputs_and_without_noise(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert path.stat().st_size < MAX_BYTES
  assert set(notebook.metadata) <= {"kernelspec"}
  outputs = [o for cell in code_cells(notebook) for o in cell.outputs]
  assert any("image/png" in o.get("data", {}) for o in outputs)
  for output in outputs:
    assert output.output_type != "error"
    assert output.get("name") != "stderr"
    assert output.get("execution_count") is None
  for cell in notebook.cells:
    assert not cell.metadata
    assert cell.get("execution_count") is None


@every_notebook
def test_long_definitions_live_in_the_package(path):
  for cell in code_cells(nbformat.read(path, as_version=4)):
    plain = [
      "pass" if line.startswith("%") else line
      for line in cell.source.splitlines()
    ]
    for node in ast.walk(ast.parse("\n".join(plain))):
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        assert node.end_lineno - node.lineno < MAX_DEFINITION, node.name
