"""`python -m gdn2_jax.convert` on the public hybrid model, both directions."""

import re

import numpy as np
import pytest

from tests.interop.convert import checkpoints
from tests.tiny_run import run_many

pytestmark = pytest.mark.slow

PROBE = f"--probe={checkpoints.OFFICIAL / 'io.npz'}"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  """{name: what the command printed} and the folder that they wrote to."""
  folder = tmp_path_factory.mktemp("convert")
  src = f"--src={checkpoints.OFFICIAL}"
  wrong = folder / "wrong"
  tensors, config = checkpoints.official()
  gates = [name for name in tensors if name.endswith("q_conv1d.weight")]
  tensors[gates[0]] = tensors[gates[0]][:, :, ::-1]
  checkpoints.write(wrong, (tensors, config))

  def to(name):
    return f"--out={folder / name}"

  back = [f"--src={folder / 'ours'}", to("back"), "--to=official"]
  across = ["--from=official", "--to=fla", src, to("fla")]
  commands = {
    "ours": ["--from=official", "--to=gdn2_jax", src, to("ours"), PROBE],
    "back": ["--from=gdn2_jax", *back],
    "fla": [*across, "--output_gate=silu"],
    "gate": [*across[:-1], to("no")],
    "wrong": [
      "--from=official",
      "--to=official",
      f"--src={wrong}",
      to("wrong2"),
      PROBE,
    ],
    "dialect": ["--to=official", src, to("no")],
    "set": ["--from=official", "--to=fla", src, to("no"), "--set=n_head"],
    "help": ["--help"],
  }
  results = run_many(
    "gdn2_jax.interop.convert.__main__", list(commands.values())
  )
  return dict(zip(commands, results, strict=True)), folder


def test_the_logits_of_the_public_model_come_out(done):
  results, _ = done
  assert results["ours"]["code"] == 0, results["ours"]["err"]
  last = results["ours"]["out"].splitlines()[-1]
  assert last.startswith("logits: largest error "), last
  assert float(last.split()[-1]) <= 1e-4, last


def test_the_file_comes_back_bit_for_bit(done):
  results, folder = done
  assert results["back"]["code"] == 0, results["back"]["err"]
  expected, _ = checkpoints.official()
  checkpoints.assert_same(checkpoints.read(folder / "back"), expected)


def test_a_table_says_what_was_read_and_written(done):
  results, _ = done
  lines = results["ours"]["out"].splitlines()
  assert lines[0] == (
    "official -> gdn2_jax: 4 layers of pattern 'GS', width 64, vocabulary 128, "
    "output gate silu"
  )
  rows = {}
  for line in lines[3:10]:
    part, *cells = re.split(r"\s{2,}", line)
    rows[part] = cells
  assert rows["sliding-window attention mixers"] == [
    "4",
    "8",
    "32,768",
    "float32",
  ]
  assert rows["total"] == ["61", "65", "240,004", "float32"]
  tensors, _ = checkpoints.official()
  assert sum(value.size for value in tensors.values()) == 240_004


def test_a_model_with_other_logits_fails(done):
  results, folder = done
  found = results["wrong"]
  assert found["code"] == 1
  assert "above --tolerance=0.0001" in found["err"]
  assert np.isfinite(float(found["out"].split()[-1]))
  assert (folder / "wrong2").is_dir()


def test_refusals_are_one_line(done):
  results, folder = done
  for name, match in (
    ("gate", "pass --output_gate=silu"),
    ("dialect", "--from is missing, as in --from=official"),
    ("set", "--set=n_head: expected KEY=VALUE"),
  ):
    assert results[name]["code"] == 1, name
    assert results[name]["err"].startswith("error: ")
    assert len(results[name]["err"].splitlines()) == 1
    assert match in results[name]["err"]
  assert not (folder / "no").exists()


def test_help_teaches(done):
  results, _ = done
  for word in ("--from=official --to=gdn2_jax", "--preset", "norm_eps"):
    assert word in results["help"]["out"], word
