"""FineWeb-Edu: names, files, downloads and the command line."""

import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from gdn2_jax.data import __main__
from gdn2_jax.data.build import build, report
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.pipeline import DataConfig, open_dataset
from gdn2_jax.data.text import fineweb_edu
from tests import hub_server
from tests.data import parquet_files

ROOT = pathlib.Path(__file__).parents[3]


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


def _command(hub_url, tmp_path, *more, **env):
  """The exit status and standard error of a build that downloads."""
  argv = ["fineweb_edu", "sample-10BT", f"--out={tmp_path / 'rows'}"]
  argv += [f"--download_dir={tmp_path / 'files'}", "--tokenizer=bytes"]
  # The library reads its address when it is imported.
  done = subprocess.run(
    [sys.executable, "-m", "gdn2_jax.data", *argv, "--workers=0", *more],
    env=os.environ | {"HF_ENDPOINT": hub_url, "NO_PROXY": "*"} | env,
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  return done.returncode, done.stderr


def test_a_download_retries_resumes_and_records_the_commit(folder, tmp_path):
  with hub_server.serve(folder[0], "sample/10BT") as hub:
    hub.failures = 2
    code, error = _command(hub.url, tmp_path, "--max_files=2")
    assert code == 0, error
    assert hub.failures == 0
    names = ["000_00000.parquet", "002_00000.parquet"]
    sizes = [len(hub.files[f"sample/10BT/{n}"]) for n in names]
    assert hub.served == sum(sizes)
    manifest = packed.open_packed(tmp_path / "rows").manifest
    assert manifest["source"]["revision"] == hub_server.COMMIT
    assert manifest["source"]["config"] == "sample-10BT"
    # The last of all files is the one held out.
    assert [entry["name"] for entry in manifest["inputs"]] == names
    assert (tmp_path / "files/sample/10BT/000_00000.parquet").is_file()
    # Only what is not there is fetched; what comes is compared.
    hub.wrong = "001_00000.parquet"
    out = f"--out={tmp_path / 'all'}"
    code, error = _command(hub.url, tmp_path, out)
    assert code == 2
    assert "001_00000.parquet: sha256" in error
    missing = len(hub.files["sample/10BT/001_00000.parquet"])
    assert hub.served == sum(sizes) + missing
    assert not (tmp_path / "all").exists()


def test_without_a_network_it_says_how_to_bring_the_files(tmp_path):
  code, error = _command("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
  assert code == 2
  for part in (
    "cannot be fetched (OfflineModeIsEnabled: ",
    "https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu/tree/"
    f"{fineweb_edu.REVISION}/sample/10BT",
    "--local=FOLDER",
  ):
    assert part in error
  assert len(error.splitlines()) == 1
  # What an earlier download left is not taken for the whole.
  (tmp_path / "files/sample/10BT").mkdir(parents=True)
  (tmp_path / "files/sample/10BT/000_00000.parquet").touch()
  code, error = _command("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
  assert code == 2 and "cannot be fetched" in error


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ConnectionError, match=r"pip install 'gdn2-jax\[data\]'"):
    fineweb_edu.download("default", tmp_path)


def test_parquet_to_rows_to_batches(folder, tmp_path, capsys):
  path, texts = folder
  out = tmp_path / "rows"
  argv = ["fineweb_edu", f"--local={path}", f"--out={out}", "--workers=0"]
  argv += ["--tokenizer=bpe-300", "--shard_tokens=5000"]
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
  assert "tokenize" in printed.err
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
    seconds=9.0,
  )
  report.print_rates(rates, 2)
  printed = capsys.readouterr().out
  assert "111 documents/s, 111,111 tokens/s, 0.52 MB/s" in printed
  assert "CPU: 250 documents/s, 250,000 tokens/s, 1.18 MB/s" in printed
  # 1e10 tokens of 4.7 bytes at 9 / 4.7e6 seconds a byte.
  assert "sample-10BT takes 25.0 hours, 11.1 hours of CPU" in printed
  assert "sample-100BT takes 250.0 hours" in printed
  report.print_rates(dataclasses.replace(rates, seconds=1.0), 2)
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
    (["fineweb_edu"], "config='': expected one of sample-10BT"),
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
