"""Checkpoints that somebody prepared are refused before they can do harm."""

import contextlib
import json
import os
import pickle
import resource
import shutil

import pytest

from gdn2_jax.train.checkpoint import load_run
from gdn2_jax.train.checkpoint.meta import CheckpointError, seal
from tests import tiny_run

pytestmark = [
  pytest.mark.usefixtures("frozen_heap"),
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
  return tiny_run.make_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def workdir(good, tmp_path):
  shutil.copytree(good, tmp_path / "run")
  return tmp_path / "run"


@contextlib.contextmanager
def little_memory(mb: int = 200):
  """Fails if the peak of this process grows by more."""
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  yield
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert (after - before) / 1024 < mb


def edit_meta(workdir, edit):
  path = workdir / "checkpoints" / "3" / "meta" / "metadata"
  meta = json.loads(path.read_text())
  del meta["sha256"]
  edit(meta)
  path.write_text(json.dumps(seal(meta)))


def refused(workdir, message):
  with little_memory(), pytest.raises(CheckpointError, match=message):
    load_run(workdir)


def test_the_run_itself_is_fine(workdir):
  assert load_run(workdir).step == 3


def huge_model(meta):
  """The meta data agrees with itself: 2^52 embedding weights."""
  meta["config"]["model"]["vocab_size"] = 1 << 48
  for path, spec in meta["tree"].items():
    if path.startswith("params/"):
      spec[0] = [1 << 48 if size == 259 else size for size in spec[0]]


def huge_shape(meta):
  meta["tree"]["params/embedding"] = [[1 << 40, 16], "float32"]


def object_array(meta):
  meta["tree"]["optimizer/step"] = [[], "object"]


def many_layers(meta):
  meta["config"]["model"]["num_layers"] = 10**12


def extra_array(meta):
  meta["tree"]["params/../../../outside"] = [[4], "float32"]


def extra_field(meta):
  meta["config"]["model"]["loader"] = "os.system"


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (huge_model, "claim to hold arrays"),
    (huge_shape, "claim to hold arrays"),
    (object_array, "lacks fields"),
    (many_layers, "layers"),
    (extra_array, "does not fit its own config"),
    (lambda meta: meta.update(tree={}), "does not fit its own config"),
  ],
)
def test_sizes_and_names_in_the_meta_data(workdir, edit, message):
  edit_meta(workdir, edit)
  refused(workdir, message)


def test_fields_that_no_config_has(workdir):
  edit_meta(workdir, extra_field)
  with pytest.raises(ValueError, match="loader: unknown field"):
    load_run(workdir)


def test_huge_or_nested_meta_data(workdir):
  path = workdir / "checkpoints" / "3" / "meta" / "metadata"
  path.write_text("[" * 100_000)
  refused(workdir, "unreadable meta data")
  with open(path, "wb") as file:
    file.truncate(1 << 40)  # sparse: takes no space, a terabyte to read
  refused(workdir, "bytes of JSON, expected at most")


def test_array_metadata_of_another_shape(workdir):
  """Orbax compares with the shapes we ask for, not the other way round."""
  path = workdir / "checkpoints" / "3" / "params" / "_METADATA"
  text = path.read_text()
  assert "embedding" in text
  path.write_text(text.replace("embedding", "../embedding"))
  refused(workdir, "unreadable|not what was saved")


class Payload:
  """Creates a file when it is unpickled."""

  def __init__(self, path):
    self._path = path

  def __reduce__(self):
    return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("place", ["", "params", "params/d"])
@pytest.mark.parametrize("name", ["state.pkl", "weights.pt", "data.PICKLE"])
def test_pickles_are_never_opened(workdir, tmp_path, place, name):
  bait = tmp_path / "bait"
  path = workdir / "checkpoints" / "3" / place / name
  path.write_bytes(pickle.dumps(Payload(bait)))
  refused(workdir, "may run code|not part of a checkpoint")
  assert not bait.exists()
  pickle.loads(path.read_bytes())
  assert bait.exists()  # the payload would have worked


def test_pickle_in_place_of_json(workdir, tmp_path):
  bait = tmp_path / "bait"
  path = workdir / "checkpoints" / "3" / "meta" / "metadata"
  path.write_bytes(pickle.dumps(Payload(bait)))
  refused(workdir, "unreadable meta data")
  assert not bait.exists()


def test_links_are_not_followed(workdir, tmp_path):
  step = workdir / "checkpoints" / "3"
  secret = tmp_path / "secret"
  secret.write_text("do not read")
  (step / "params" / "d" / "link").symlink_to(secret)
  refused(workdir, "a link or a special file")
  (step / "params" / "d" / "link").unlink()
  shutil.move(step / "params", tmp_path / "params")
  (step / "params").symlink_to(tmp_path / "params")
  refused(workdir, "a link")


def test_a_step_that_is_a_link(workdir, tmp_path):
  step = workdir / "checkpoints" / "3"
  shutil.move(step, tmp_path / "3")
  step.symlink_to(tmp_path / "3")
  refused(workdir, "a link, not a directory")


def test_a_pipe_does_not_block(workdir):
  os.mkfifo(workdir / "checkpoints" / "3" / "params" / "pipe")
  refused(workdir, "a link or a special file")


def test_unknown_entries(workdir):
  (workdir / "checkpoints" / "3" / "loader.py").write_text("raise SystemExit")
  refused(workdir, "not part of a checkpoint")


def test_fifo_as_meta_data_does_not_block(workdir):
  path = workdir / "checkpoints" / "3" / "meta" / "metadata"
  path.unlink()
  os.mkfifo(path)
  refused(workdir, "metadata: not a regular file")
