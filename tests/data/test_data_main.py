"""The command line: what it builds, shows and refuses."""

import pytest

from gdn2_jax.data import __main__
from gdn2_jax.data.packed.folder import open_packed
from gdn2_jax.data.pipeline import DataConfig, open_dataset


@pytest.fixture
def folder(tmp_path, capsys):
  path = tmp_path / "packed"
  argv = ["snapshot", f"--out={path}", "--tokenizer=bpe-300", "--seed=1"]
  assert __main__.main(argv) == 0
  capsys.readouterr()
  return path


def test_build_prints_counts_and_a_row(tmp_path, capsys):
  text = tmp_path / "text.jsonl"
  text.write_text(
    "".join(f'{{"text": "document {i:02d}"}}\n' for i in range(30))
  )
  out = tmp_path / "packed"
  argv = ["text", str(text), f"--out={out}", "--tokenizer=bytes"]
  assert __main__.main([*argv, "--workers=0"]) == 0
  printed = capsys.readouterr()
  assert "tokenize" in printed.err
  entry = open_packed(out).manifest["splits"]["train"]
  counts = f"train: {entry['documents']} documents (0 empty ones left out)"
  assert counts in printed.out
  assert f"{entry['tokens']} tokens, 1.000 bytes/token" in printed.out
  assert "segment 1: 12 tokens, ends here" in printed.out


def test_folder_is_a_data_source(folder, tmp_path):
  config = DataConfig(source=str(folder), tokenizer="bpe-300", seq_len=32)
  assert open_dataset(config).packed.manifest["seed"] == 1


def test_inspect_shows_borders(folder, capsys):
  argv = ["inspect", str(folder), "--split=validation", "--row=1", "--len=4096"]
  assert __main__.main(argv) == 0
  printed = capsys.readouterr().out
  assert "all sizes and hashes match" in printed
  assert "validation row 1: " in printed
  assert "ends here -----" in printed
  packed = open_packed(folder)
  start = packed.tokens["validation"][4096:4120]
  assert packed.tokenizer.decode(start) in printed


def test_inspect_refuses_damage(folder, capsys):
  with open(folder / "train-00000.tokens.bin", "r+b") as file:
    file.seek(100)
    file.write(b"\xff")
  assert __main__.main(["inspect", str(folder)]) == 2
  assert "train-00000.tokens.bin: sha256" in capsys.readouterr().err


def test_inspect_refuses_a_row(folder, capsys):
  for row in (-1, 10**6):
    assert __main__.main(["inspect", str(folder), f"--row={row}"]) == 2
    assert f"row={row}: the train split has" in capsys.readouterr().err


@pytest.mark.parametrize(
  "argv",
  [
    [],
    ["unknown"],
    ["snapshot"],
    ["snapshot", "--out=X", "junk"],
    ["snapshot", "--out=X", "--tokeniser=bytes"],
    ["snapshot", "--out=X", "--tok=bytes"],
    ["snapshot", "--out=X", "--row=3"],
    ["inspect", "X", "--out=Y"],
    ["inspect", "X", "junk"],
    ["inspect", "X", "--split=test"],
    ["inspect", "X", "--row=first"],
  ],
)
def test_unknown_flags_and_stray_words_are_refused(argv, capsys, monkeypatch):
  monkeypatch.setattr(__main__, "_pack", None)
  monkeypatch.setattr(__main__, "_inspect", None)
  with pytest.raises(SystemExit) as refused:
    __main__.main(argv)
  assert refused.value.code == 2
  assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["snapshot", "--tokenizer=bpe-1"], "tokenizer='bpe-1'"),
    (["text", "missing.txt"], "source='missing.txt'"),
  ],
)
def test_bad_values_leave_no_folder(tmp_path, capsys, argv, message):
  assert __main__.main([*argv, f"--out={tmp_path / 'packed'}"]) == 2
  assert message in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == []
