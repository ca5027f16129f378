"""FineWeb-Edu: names, files, downloads and the command line."""

import dataclasses
import hashlib
import os
import shutil
import sys
import types

import pytest

from gdn2_jax.data import __main__
from gdn2_jax.data.build import build, report
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.pipeline import DataConfig, open_dataset
from gdn2_jax.data.text import fineweb_edu
from tests.data import parquet_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("fineweb")
  return path, parquet_files.write_folder(path)


@pytest.mark.parametrize(
  ("config", "place"),
  [
    ("sample-10BT", "sample/10BT"),
    ("sample-350BT", "sample/350BT"),
    ("default", "data"),
    ("CC-MAIN-2024-10", "data/CC-MAIN-2024-10"),
  ],
)
def test_folders(config, place):
  assert fineweb_edu.folder_of(config) == place


@pytest.mark.parametrize("config", ["sample-1BT", "CC-MAIN-24-10", "../x", ""])
def test_unknown_configs_are_named(config):
  with pytest.raises(ValueError, match="config="):
    fineweb_edu.folder_of(config)


def test_the_held_out_file_is_the_conventional_one():
  sample = [f"{i:03d}_00000.parquet" for i in range(14)]
  assert fineweb_edu.held_out_files(sample) == ("013_00000.parquet",)
  larger = [f"{i:03d}_{j:05d}.parquet" for i in range(14) for j in range(10)]
  assert fineweb_edu.held_out_files(larger) == ("013_00000.parquet",)
  assert fineweb_edu.held_out_files(sample[:3]) == ("002_00000.parquet",)
  dumps = ["CC-MAIN-2013-20/000_00000.parquet", "CC-MAIN-2024-10/1.parquet"]
  assert fineweb_edu.held_out_files(dumps) == (dumps[1],)
  assert fineweb_edu.held_out_files(sample[:1]) == ()


def test_local_files_of_a_folder_and_of_a_copy(tmp_path):
  for name in (
    "sample/10BT/000_00000.parquet",
    "sample/10BT/.cache/unfinished.parquet",
    "sample/100BT/000_00000.parquet",
  ):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  copy = fineweb_edu.local_files(tmp_path, "sample-10BT")
  assert copy == {
    "000_00000.parquet": tmp_path / "sample/10BT/000_00000.parquet"
  }
  assert len(fineweb_edu.local_files(tmp_path)) == 2
  with pytest.raises(ValueError, match="no parquet files"):
    fineweb_edu.local_files(tmp_path / "nowhere")


def test_what_a_download_wrote_down_is_compared(folder, tmp_path, capsys):
  path, texts = folder
  place = tmp_path / "copy" / "sample" / "10BT"
  shutil.copytree(path, place)
  records = tmp_path / "copy/.cache/huggingface/download/sample/10BT"
  records.mkdir(parents=True)
  for name in texts:
    digest = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (records / f"{name}.metadata").write_text(f"{'c' * 40}\n{digest}\n17.5\n")
  argv = ["fineweb_edu", "sample-10BT", f"--local={tmp_path / 'copy'}"]
  argv += [f"--out={tmp_path / 'rows'}", "--tokenizer=bytes", "--workers=0"]
  assert __main__.main(argv) == 0
  manifest = packed.open_packed(tmp_path / "rows").manifest
  assert manifest["source"]["revision"] == "c" * 40
  found, commit = fineweb_edu.recorded(fineweb_edu.local_files(place))
  assert (len(found), commit) == (3, "c" * 40)
  shutil.copy(place / "000_00000.parquet", place / "001_00000.parquet")
  capsys.readouterr()
  assert __main__.main([*argv[:3], f"--out={tmp_path / 'new'}", *argv[4:]]) == 2
  assert "001_00000.parquet: sha256" in capsys.readouterr().err


class _Hub:
  """Stands in for huggingface_hub: files of a folder, and failures."""

  def __init__(self, folder, failures=0, wrong=""):
    self.folder, self.failures, self.wrong = folder, failures, wrong
    self.revisions = set()

  def module(self):
    module = types.ModuleType("huggingface_hub")
    module.HfApi = lambda: self
    module.hf_hub_download = self.hf_hub_download
    return module

  def dataset_info(self, repository, *, revision):
    assert repository == fineweb_edu.REPOSITORY
    self._fail()
    self.revisions.add(revision)
    return types.SimpleNamespace(sha="c" * 40)

  def list_repo_tree(self, repository, *, path_in_repo, revision, **_):
    assert revision == "c" * 40
    yield types.SimpleNamespace(path=path_in_repo)  # a folder
    for path in sorted(self.folder.iterdir()):
      digest = hashlib.sha256(path.read_bytes()).hexdigest()
      if path.name == self.wrong:
        digest = "0" * 64
      yield types.SimpleNamespace(
        path=f"{path_in_repo}/{path.name}",
        size=path.stat().st_size,
        lfs=types.SimpleNamespace(sha256=digest),
      )

  def hf_hub_download(self, repository, name, *, revision, local_dir, **_):
    assert revision == "c" * 40
    self._fail()
    target = os.path.join(local_dir, name)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    return shutil.copy(self.folder / os.path.basename(name), target)

  def _fail(self):
    if self.failures:
      self.failures -= 1
      raise OSError("503 Server Error")


def _use(monkeypatch, hub):
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub.module())
  monkeypatch.setattr(fineweb_edu.time, "sleep", lambda seconds: None)


def test_download_retries_and_records_the_commit(
  folder, tmp_path, monkeypatch, capsys
):
  hub = _Hub(folder[0], failures=3)
  _use(monkeypatch, hub)
  argv = ["fineweb_edu", "sample-10BT", f"--out={tmp_path / 'rows'}"]
  argv += [f"--download_dir={tmp_path / 'files'}", "--tokenizer=bytes"]
  argv += ["--max_files=2", "--workers=0"]
  assert __main__.main(argv) == 0
  printed = capsys.readouterr()
  assert "try 3 of 5: OSError: 503 Server Error; again in 8 s" in printed.err
  assert hub.revisions == {fineweb_edu.REVISION}
  manifest = packed.open_packed(tmp_path / "rows").manifest
  assert manifest["source"]["revision"] == "c" * 40
  assert manifest["source"]["config"] == "sample-10BT"
  assert [entry["name"] for entry in manifest["inputs"]] == [
    "000_00000.parquet",
    "002_00000.parquet",  # the last of all files is the one held out
  ]
  assert (tmp_path / "files/sample/10BT/000_00000.parquet").is_file()


def test_a_download_that_is_not_what_the_repository_says(
  folder, tmp_path, monkeypatch, capsys
):
  _use(monkeypatch, _Hub(folder[0], wrong="001_00000.parquet"))
  argv = ["fineweb_edu", "sample-10BT", f"--out={tmp_path / 'rows'}"]
  argv += [f"--download_dir={tmp_path / 'files'}", "--tokenizer=bytes"]
  assert __main__.main([*argv, "--workers=0"]) == 2
  error = capsys.readouterr().err
  assert "001_00000.parquet: sha256" in error
  assert not (tmp_path / "rows").exists()


def test_without_a_network_it_says_how_to_bring_the_files(
  folder, tmp_path, monkeypatch, capsys
):
  _use(monkeypatch, _Hub(folder[0], failures=99))
  argv = ["fineweb_edu", "CC-MAIN-2024-10", f"--out={tmp_path / 'rows'}"]
  assert __main__.main(argv) == 2
  error = capsys.readouterr().err
  for part in (
    "cannot be fetched (OSError: 503 Server Error)",
    "https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu/tree/"
    f"{fineweb_edu.REVISION}/data/CC-MAIN-2024-10",
    "--local=FOLDER",
  ):
    assert part in error
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  assert __main__.main(argv) == 2
  assert "pip install 'gdn2-jax[data]'" in capsys.readouterr().err


def test_a_program_error_is_not_taken_for_the_network(monkeypatch):
  def broken():
    raise TypeError("wrong argument")

  with pytest.raises(TypeError):
    fineweb_edu._patiently(broken, "default", "main", print)


def test_parquet_to_rows_to_batches(folder, tmp_path, capsys):
  path, texts = folder
  out = tmp_path / "rows"
  argv = ["fineweb_edu", f"--local={path}", f"--out={out}", "--workers=0"]
  argv += ["--tokenizer=bpe-300", "--shard_tokens=20000"]
  assert __main__.main(argv) == 0
  printed = capsys.readouterr()
  for part in (
    "documents/s",
    "tokens/s",
    "held out: 002_00000.parquet",
    "--config.model.vocab_size=300 or more; the next multiple of 128 is 384",
    "train row 0:",
  ):
    assert part in printed.out, part
  assert "tokenize" in printed.err and "shuffle" in printed.err
  assert __main__.main(argv) == 0
  assert "already complete" in capsys.readouterr().out
  assert __main__.main(["inspect", str(out), "--split=validation"]) == 0
  assert "all sizes and hashes match" in capsys.readouterr().out
  dataset = open_dataset(
    DataConfig(source=str(out), tokenizer="bpe-300", seq_len=64, batch_size=4)
  )
  batches = dataset.train_batches(start_step=3)
  assert next(batches)["inputs"].shape == (4, 64)
  batches.close()
  held_out = "".join(texts["002_00000.parquet"])
  tokens = dataset.validation_tokens()
  decoded = dataset.tokenizer.decode(tokens[: len(tokens)])
  assert sorted(decoded) == sorted(held_out)
  shard = out / "train-00001.tokens.bin"
  data = bytearray(shard.read_bytes())
  data[10] ^= 1
  shard.write_bytes(data)
  assert __main__.main(["inspect", str(out)]) == 2
  assert "train-00001.tokens.bin: sha256" in capsys.readouterr().err
  shard.unlink()
  assert __main__.main(["inspect", str(out)]) == 2
  assert "train-00001.tokens.bin: missing" in capsys.readouterr().err


def test_projection_goes_by_bytes(capsys):
  rates = build.Rates(
    documents=1000,
    tokens=1_000_000,
    bytes=4_700_000,
    cpu_seconds=4.0,
    tokenize_seconds=9.0,
    shuffle_seconds=2.0,
    all_bytes=9_400_000,  # half of it was tokenised by an earlier run
  )
  report.print_rates(rates, 2)
  printed = capsys.readouterr().out
  assert "111 documents/s, 111,111 tokens/s, 0.52 MB/s" in printed
  assert "CPU: 250 documents, 250,000 tokens, 1.18 MB" in printed
  # 1e10 tokens of 4.7 bytes at (9 / 4.7e6 + 2 / 9.4e6) seconds a byte.
  assert "sample-10BT takes 27.8 hours, 11.1 hours of CPU" in printed
  assert "sample-100BT takes 277.8 hours" in printed
  report.print_rates(dataclasses.replace(rates, tokenize_seconds=1.0), 2)
  assert "at this rate" not in capsys.readouterr().out


def test_checksums_file(folder, tmp_path, capsys):
  path, _ = folder
  sums = tmp_path / "SHA256SUMS"
  lines = [
    f"{hashlib.sha256(file.read_bytes()).hexdigest()}  ./{file.name}"
    for file in sorted(path.iterdir())
  ]
  argv = ["fineweb_edu", f"--local={path}", f"--out={tmp_path / 'rows'}"]
  argv += ["--tokenizer=bytes", "--workers=0", f"--checksums={sums}"]
  sums.write_text("\n".join(lines[:2]))
  assert __main__.main(argv) == 2
  assert "no line for 002_00000.parquet" in capsys.readouterr().err
  sums.write_text("\n".join([*lines[:2], "f" * 64 + lines[2][64:]]))
  assert __main__.main(argv) == 2
  assert "002_00000.parquet: sha256" in capsys.readouterr().err
  sums.write_text("\n".join(lines))
  assert __main__.main(argv) == 0


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["fineweb_edu"], "config: expected one of sample-10BT"),
    (["fineweb_edu", "sample-1BT"], "config='sample-1BT'"),
    (["fineweb_edu", "--local=/nowhere"], "no parquet files"),
    (["fineweb_edu", "--local=.", "--max_files=0"], "max_files=0"),
    (["fineweb_edu", "--local={}", "--workers=-1"], "workers=-1"),
  ],
)
def test_bad_values_are_named(folder, tmp_path, capsys, argv, message):
  argv = [word.format(folder[0]) for word in argv]
  assert __main__.main([*argv, f"--out={tmp_path / 'rows'}"]) == 2
  assert message in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == []
