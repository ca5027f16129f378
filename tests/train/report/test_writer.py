"""Throughput, the loss curve, versions."""

import struct
import sys

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from gdn2_jax.train.report import writer as writer_lib
from gdn2_jax.train.report.plot import plot_loss, trailing_mean
from gdn2_jax.train.report.report import Progress
from gdn2_jax.train.report.throughput import Throughput, peak_flops


def test_probe_names_a_workdir_it_cannot_make(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"--workdir=.*/file/run: cannot write"):
    writer_lib.probe(tmp_path / "file" / "run")
  writer_lib.probe(tmp_path / "run")
  assert not list((tmp_path / "run").iterdir())


def test_versions_name_what_produced_the_numbers():
  versions = writer_lib.versions()
  assert versions["jax"] == jax.__version__
  assert versions["device"] == f"{jax.device_count()} x cpu"


def test_throughput_counts_steps_and_restarts():
  times = iter([0.0, 2.0, 10.0, 11.0, 11.0])
  rates = Throughput(100, 6e6, jax.devices()[:2], clock=lambda: next(times))
  rates.restart(0)
  assert rates.read(4) == pytest.approx(
    {"tokens_per_s": 200.0, "step_s": 0.5, "tflops_per_device": 6e-4}
  )
  rates.restart(4)  # 8 seconds of something else
  assert rates.read(5)["tokens_per_s"] == pytest.approx(100.0)


def test_peak_is_known_by_the_longest_prefix():
  assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
  assert peak_flops("NVIDIA H100 PCIe") == 756e12
  assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
  assert peak_flops("cpu") is None


def test_a_terminal_gets_a_bar_and_lines_around_it(monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  lines = []
  progress = Progress(2, 9, lines.append)
  progress.step(3)
  progress.row(3, {"loss": 1.5, "tokens_per_s": 2000.0})
  progress.say("during")
  progress.close()
  progress.say("after")
  out, err = capsys.readouterr()
  assert (out, lines) == ("during\n", ["after"])
  assert "3/9" in err and "loss=1.5000, tokens/s=2,000" in err


def test_trailing_mean():
  values = np.float64([3, 1, 4, 1, 5, 9])
  want = [3, 2, 8 / 3, 2, 10 / 3, 5]
  np.testing.assert_allclose(trailing_mean(values, 3), want)
  np.testing.assert_allclose(trailing_mean(values, 1), values)


@pytest.mark.parametrize(("points", "window"), [(60, 5), (500, 10)])
def test_noise_of_single_steps_is_averaged_out(
  tmp_path, monkeypatch, points, window
):
  """The thick line is smooth, and its label states the window."""
  figures = []
  monkeypatch.setattr(Figure, "savefig", lambda f, path: figures.append(f))
  rows = [
    {"step": 10 * n, "kind": "train", "loss": 4.0 + 0.5 * (-1) ** n}
    for n in range(points)
  ]
  plot_loss(tmp_path / "loss.png", rows)
  raw, mean = figures[0].axes[0].lines
  assert np.ptp(raw.get_ydata()) == 1.0
  assert np.ptp(mean.get_ydata()[window:]) <= 1.0 / window
  assert f"mean of the last {window} of them" in mean.get_label()


def test_plot_is_a_png_with_or_without_points(tmp_path):
  rows = [
    {"step": step, "kind": "train", "loss": 8 / step} for step in range(1, 50)
  ]
  rows.append({"step": 3, "kind": "train", "loss": None})
  rows.append({"step": 49, "kind": "final", "loss_1x": 1.0})
  for name, points in (("full", rows), ("empty", [])):
    path = tmp_path / f"{name}.png"
    plot_loss(path, points, {"unigram": 5.0, "bigram": 3.0})
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">2I", header[16:]) == (1200, 675)
