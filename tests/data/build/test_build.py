"""Builds: what they hold, that they resume exactly, what they refuse."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from gdn2_jax.data import files
from gdn2_jax.data.build import build, recipe, shard
from gdn2_jax.data.build.inputs import find_inputs
from gdn2_jax.data.build.workers import run_tasks
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.text.corpus import is_held_out
from tests.data import parquet_files
from tests.data.packing import documents as _documents

ROOT = pathlib.Path(__file__).parents[3]
HELD_OUT = "002_00000.parquet"
SOURCE = {"kind": "fineweb_edu", "config": "local"}
SHARD_BYTES = 6000  # several shards per file
OPTIONS = {
  "tokenizer": "bytes",
  "seed": 3,
  "validation_files": (HELD_OUT,),
}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
  monkeypatch.setattr(recipe, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("parquet")
  return path, parquet_files.write_folder(path)


def _build(paths, out, *, workers=0, **changes):
  options = recipe.Options(**(OPTIONS | changes.pop("options", {})))
  return build.build_rows(
    paths, out, options, source=SOURCE, workers=workers, **changes
  )


def _content(path):
  return {
    file.relative_to(path).as_posix(): file.read_bytes()
    for file in sorted(path.rglob("*"))
    if file.is_file()
  }


def test_rows_hold_every_document_once_in_a_drawn_order(folder, tmp_path):
  path, texts = folder
  paths = find_inputs(path)
  built = _build(paths, tmp_path / "rows")
  found = packed.open_packed(tmp_path / "rows")
  train = [t for name in sorted(texts)[:2] for t in texts[name]]
  for split, expected in (("train", train), ("validation", texts[HELD_OUT])):
    documents = _documents(found, split)
    assert sorted(documents) == sorted(expected)
    assert documents != expected
    entry = found.manifest["splits"][split]
    size = sum(len(text.encode()) for text in expected)
    assert entry["documents"] == len(expected)
    assert entry["bytes"] == size
    assert entry["tokens"] == size + len(expected)
    assert entry["predicted_bytes"] == size - len(expected)
  # Whole row groups of 20 documents, 45 kB a file.
  shards = [
    found.manifest["splits"][split]["shards"] for split in packed.SPLITS
  ]
  assert shards == [6, 3]
  # The order within a shard is drawn from places, and shards keep theirs.
  places = [
    (number, row)
    for number, name in enumerate(sorted(texts)[:2])
    for row in range(len(texts[name]))
  ]
  expected = []
  for start in range(0, len(places), 20):
    expected += sorted(
      places[start : start + 20],
      key=lambda place: shard.document_key(3, f"{place[0]}:{place[1]}"),
    )
  assert _documents(found, "train") == [
    texts[sorted(texts)[number]][row] for number, row in expected
  ]
  manifest = found.manifest
  assert [entry["split"] for entry in manifest["inputs"]] == [
    "train",
    "train",
    "validation",
  ]
  for entry in manifest["inputs"]:
    assert entry["sha256"] == files.sha256_file(path / entry["name"])
  assert manifest["source"] == SOURCE
  assert manifest["bos_policy"] == "none"
  assert "one EOS after every document" in manifest["eos_policy"]
  assert built.rates.documents == len(train) + len(texts[HELD_OUT])


def test_workers_change_nothing_and_seeds_do(folder, tmp_path):
  paths = find_inputs(folder[0])
  alone = _build(paths, tmp_path / "alone")
  _build(paths, tmp_path / "two", workers=2)
  assert _content(tmp_path / "alone") == _content(tmp_path / "two")
  other = _build(paths, tmp_path / "other", options={"seed": 4})
  assert other.packed.file_hashes() != alone.packed.file_hashes()
  assert sorted(_documents(other.packed, "train")) == sorted(
    _documents(alone.packed, "train")
  )
  again = _build(paths, tmp_path / "alone")
  assert again.rates is None  # nothing was left to do
  with pytest.raises(ValueError, match=r"alone: already holds.* in seed"):
    _build(paths, tmp_path / "alone", options={"seed": 4})
  assert not (tmp_path / "alone.partial").exists()
  more = dict(paths) | {"more.jsonl": tmp_path / "more.jsonl"}
  (tmp_path / "more.jsonl").write_text('{"text": "more"}\n')
  with pytest.raises(ValueError, match=r"alone: .* in inputs"):
    _build(more, tmp_path / "alone")


_KILLED = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
from gdn2_jax.data.build import build, inputs, recipe
left = int(sys.argv[3])
replace, rename = os.replace, os.rename
def dying(function):
  def call(*arguments):
    global left
    left -= 1
    if left == 0:
      os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)
  return call
os.replace, os.rename = dying(replace), dying(rename)
recipe.SHARD_BYTES = LIMIT
build.build_rows(
  inputs.find_inputs(sys.argv[1]), sys.argv[2], recipe.Options(**OPTIONS),
  source=SOURCE, say=print,
)
""".replace("LIMIT", str(SHARD_BYTES))


def _run_killed(folder, out, moment):
  program = _KILLED.replace("OPTIONS", repr(OPTIONS), 1)
  program = program.replace("SOURCE", repr(SOURCE), 1)
  return subprocess.run(
    [sys.executable, "-c", program, str(folder), str(out), str(moment)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


def test_killed_builds_go_on_and_end_with_the_same_bytes(folder, tmp_path):
  path, _ = folder
  _build(find_inputs(path), tmp_path / "straight")
  out = tmp_path / "killed"
  lines, kills = [], 0
  for moment in itertools.cycle((1, 2, 4, 7, 3, 8, 5)):
    done = _run_killed(path, out, moment)
    lines += done.stdout.splitlines()
    if done.returncode == 0:
      break
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    kills += 1
  assert kills > 6
  assert _content(out) == _content(tmp_path / "straight")
  assert list(tmp_path.glob(".*")) == []
  resumed = [int(n.split()[1]) for n in lines if n.startswith("resuming")]
  assert resumed == sorted(resumed)  # finished shards are never lost
  assert len(set(resumed)) > 2


def test_a_kill_after_the_rename_leaves_a_whole_folder(folder, tmp_path):
  paths = find_inputs(folder[0])
  out = tmp_path / "rows"
  _build(paths, out)
  expected = _content(out)
  for name in ("records/a.json", "plan.json", "lock"):
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).touch()
  assert len(_documents(packed.open_packed(out), "train")) == 120
  assert _build(paths, out).rates is None
  assert _content(out) == expected


def test_a_killed_command_takes_its_workers_along(tmp_path):
  path = tmp_path / "text.jsonl"
  with open(path, "w") as file:
    for text in parquet_files.texts() * 60:
      file.write(json.dumps({"text": text}) + "\n")
  out = tmp_path / "rows"
  command = [sys.executable, "-m", "gdn2_jax.data", "text", str(path)]
  command += [f"--out={out}", "--tokenizer=bytes", "--workers=1"]
  running = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  children = pathlib.Path(f"/proc/{running.pid}/task/{running.pid}/children")
  deadline = time.monotonic() + 60
  while not (workers := children.read_text().split()):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  with pytest.raises(ValueError, match="another build is at work here"):
    build.build_rows(
      {"text.jsonl": path},
      out,
      recipe.Options(tokenizer="bytes"),
      source=SOURCE,
    )
  running.kill()
  running.wait()
  while any(_is_alive(worker) for worker in workers):
    assert time.monotonic() < deadline
    time.sleep(0.05)


def _is_alive(pid):
  try:
    state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
  except (FileNotFoundError, ProcessLookupError):
    return False
  return state.split()[0] != "Z"  # nobody may be there to reap it


def test_an_unfinished_build_of_other_data_is_kept(folder, tmp_path):
  path, _ = folder
  out = tmp_path / "rows"
  assert _run_killed(path, out, 12).returncode == -signal.SIGKILL
  with pytest.raises(ValueError, match=r"rows.partial: an unfinished .* seed"):
    _build(find_inputs(path), out, options={"seed": 4})
  records = out.with_name("rows.partial") / "records"
  assert len(list(records.glob("*.json"))) > 0


@pytest.mark.parametrize("kind", ["tokens", "offsets"])
@pytest.mark.parametrize("is_there", [True, False])
def test_damaged_shards_are_made_again(folder, tmp_path, kind, is_there):
  paths = find_inputs(folder[0])
  _build(paths, tmp_path / "straight")
  out = tmp_path / "rows"
  assert _run_killed(folder[0], out, 12).returncode == -signal.SIGKILL
  damaged = tmp_path / "rows.partial" / packed.shard_name("train", 0, kind)
  data = bytearray(damaged.read_bytes())
  data[16] ^= 4
  damaged.write_bytes(data)
  if not is_there:
    damaged.unlink()
  made = _build(paths, out).rates.documents
  assert 20 <= made < 180
  assert _content(out) == _content(tmp_path / "straight")


def test_a_dead_worker_is_an_error_not_a_wait():
  started = time.monotonic()
  with pytest.raises(RuntimeError, match="a worker process died"):
    list(run_tasks(os._exit, [9], (), 1))
  assert time.monotonic() - started < 30


def test_odd_documents_are_counted(tmp_path):
  long = "many words of text " * 60_000
  texts = ["plain", "", None, b"a\xff\xfeb", "nul\0here", long, ""]
  parquet_files.write(tmp_path / "in" / "a.parquet", texts)
  paths = find_inputs(tmp_path / "in")
  options = {"validation_files": (), "validation_fraction": 0.0}
  built = _build(paths, tmp_path / "rows", options=options)
  entry = built.packed.manifest["splits"]["train"]
  counts = {name: entry[name] for name in shard.COUNTS[:5]}
  assert counts == {
    "documents": 4,
    "empty_documents": 3,
    "invalid_utf8_documents": 1,
    "nul_documents": 1,
    "long_documents": 1,
  }
  documents = _documents(built.packed, "train")
  assert sorted(documents) == sorted(["plain", "a\ufffdb", "nul\0here", long])


def test_a_fraction_is_held_out_by_text(folder, tmp_path):
  path, texts = folder
  options = {"validation_files": (), "validation_fraction": 0.3}
  built = _build(find_inputs(path), tmp_path / "rows", options=options)
  expected = {
    text
    for documents in texts.values()
    for text in documents
    if is_held_out(files.sha256_bytes(text.encode()), 0.3)
  }
  assert set(_documents(built.packed, "validation")) == expected
  assert 0.15 * 180 < len(expected) < 0.45 * 180
  assert built.packed.manifest["validation"] == {"fraction": 0.3}


def test_bad_files_stop_the_build_or_are_left_out(folder, tmp_path):
  _, texts = folder
  where = tmp_path / "in"
  parquet_files.write_folder(where)
  paths = find_inputs(where)
  whole = (where / "000_00000.parquet").read_bytes()
  (where / "000_00000.parquet").write_bytes(whole[: len(whole) // 2])
  second = where / "001_00000.parquet"
  damaged = bytearray(second.read_bytes())
  damaged[400] ^= 0x55
  second.write_bytes(damaged)
  with pytest.raises(ValueError, match=r"000_00000.parquet: .*skip_bad_shards"):
    _build(paths, tmp_path / "rows")
  said = []
  built = _build(
    paths, tmp_path / "rows", options={"skip_bad": True}, say=said.append
  )
  manifest = built.packed.manifest
  assert [e["path"] for e in manifest["skipped"]] == ["000_00000.parquet"]
  (bad,) = manifest["bad_parts"]
  assert (bad["path"], bad["documents"]) == ("001_00000.parquet", 20)
  assert sorted(_documents(built.packed, "train")) == sorted(
    texts["001_00000.parquet"][20:]
  )
  assert len(said) == 2 and all("left out" in line for line in said)
  assert "row group 0" in said[1]


def test_checksums_are_compared(folder, tmp_path):
  paths = find_inputs(folder[0])
  right = {name: files.sha256_file(path) for name, path in paths.items()}
  wrong = right | {"001_00000.parquet": "0" * 64}
  with pytest.raises(
    ValueError, match=r"001_00000.parquet: sha256 .* expected"
  ):
    _build(paths, tmp_path / "rows", checksums=wrong)
  _build(paths, tmp_path / "rows", checksums=right)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"validation_files": ("9*",)}, "validation_files='9*': none of the 3"),
    ({"validation_files": ("*",)}, "nothing is left to train on"),
    ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
    ({"shard_tokens": 0}, "shard_tokens=0"),
    ({"seed": -1}, "seed=-1"),
    ({"tokenizer": "bpe-3"}, "tokenizer='bpe-3'"),
  ],
)
def test_bad_options_are_named_and_leave_nothing(
  folder, tmp_path, options, message
):
  with pytest.raises(ValueError) as refused:
    _build(find_inputs(folder[0]), tmp_path / "rows", options=options)
  assert message in str(refused.value)
  assert list(tmp_path.iterdir()) == []


def test_nothing_to_train_on_is_refused(tmp_path):
  (tmp_path / "a.txt").touch()
  options = {"validation_files": (), "validation_fraction": 0.0}
  with pytest.raises(ValueError, match="no training text in 1 files"):
    _build(find_inputs(tmp_path), tmp_path / "rows", options=options)
