"""`gdn2 explore`: a page of a run, and refusals in one line."""

import pytest

from tests.tiny_run import make_run, run_many

pytestmark = pytest.mark.slow


def test_a_page_of_a_run_and_what_is_refused(tmp_path):
  run = make_run(tmp_path)
  out = tmp_path / "page.html"
  text = tmp_path / "text.txt"
  text.write_text("Two lines\nof text.")
  binary = tmp_path / "binary.txt"
  binary.write_bytes(b"\xff\xfe")
  good = [f"--workdir={run}", f"--out={out}"]
  refused = {
    "--workdir is missing": [f"--out={out}"],
    "--out is missing, e.g.": [f"--workdir={run}"],
    "no folder": [f"--workdir={run}", f"--out={tmp_path}/no/a.html"],
    "a folder, expected a file": [f"--workdir={run}", f"--out={tmp_path}"],
    "--text is empty": [*good, "--text="],
    "--text and --file: expected one": [*good, "--text=ab", f"--file={text}"],
    "not UTF-8": [*good, f"--file={binary}"],
    "No such file": [*good, f"--file={tmp_path}/none.txt"],
    "--layers=a: expected numbers": [*good, "--layers=a"],
    "layer=7: expected one of 0": [*good, "--layers=7"],
    "text='a': 1 tokens, expected": [*good, "--text=a"],
    "no such directory": [f"--workdir={tmp_path}/none", f"--out={out}"],
    "unexpected argument": [*good, "text=ab"],
  }
  argv = [*good, f"--file={text}", "--max_tokens=16"]
  done = run_many("gdn2_jax.explore.__main__", [*refused.values(), argv])
  for says, result in zip(refused, done, strict=False):
    assert result["code"] == 1, says
    assert result["err"].startswith("error: ") and says in result["err"]
    assert result["err"].count("\n") == 1, says
  made = done[-1]
  assert made["code"] == 0, made["err"]
  assert made["out"].startswith(f"{out}: ")
  assert "16 tokens, layers 0, heads 0, 11 changes" in made["out"]
  assert "The text is cut to 16 of 18 tokens." in made["out"]
  assert "Gate explorer: run, step 3" in out.read_text()
