"""Probes: files that are none, and what counts as the same logits."""

import io

import numpy as np
import pytest

from gdn2_jax.interop.convert.probe import (
  Probe,
  ProbeError,
  check_probe,
  read_probe,
)
from gdn2_jax.interop.convert.run import convert
from gdn2_jax.model.config import ModelConfig
from tests.interop.convert import checkpoints


def npz(**arrays):
  data = io.BytesIO()
  np.savez(data, **arrays)
  return data.getvalue()


IDS, LOGITS = np.zeros((1, 3), np.int32), np.zeros((1, 3, 128), np.float32)


@pytest.mark.parametrize(
  ("data", "match"),
  [
    (b"PK\x03\x04 not really", "BadZipFile"),
    (npz(input_ids=IDS), "logits is not a file in the archive"),
    (npz(input_ids=LOGITS, logits=LOGITS), "input_ids float32[1, 3, 128], ex"),
    (npz(input_ids=IDS, logits=LOGITS[:, :2]), "logits [1, 2, 128], expected"),
    (npz(input_ids=IDS, logits=LOGITS * np.nan), "logits that are not finite"),
    (npz(input_ids=np.array([[{}]]), logits=LOGITS), "allow_pickle=False"),
  ],
)
def test_probes_that_are_none(tmp_path, data, match):
  path = tmp_path / "io.npz"
  path.write_bytes(data)
  with pytest.raises(ValueError) as e:
    read_probe(path)
  assert match in str(e.value)


def test_probes_of_other_models():
  config = ModelConfig(vocab_size=128)
  check_probe(Probe(IDS, LOGITS), config)
  for probe, match in (
    (Probe(IDS, LOGITS[..., :100]), "logits of 100 tokens, the model has 128"),
    (Probe(IDS + 128, LOGITS), "input_ids from 128 to 128, expected 0 to 127"),
  ):
    with pytest.raises(ValueError, match=match):
      check_probe(probe, config)


def test_nothing_is_written_where_the_probe_does_not_fit(tmp_path):
  probe = Probe(IDS, LOGITS[..., :100])
  with pytest.raises(ValueError, match="logits of 100 tokens"):
    convert(
      checkpoints.OFFICIAL,
      tmp_path / "out",
      source="official",
      target="gdn2_jax",
      probe=probe,
    )
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("rms", "relative", "exceeds"),
  [
    (1e-5, 1e-5, False),
    (1e-3, 1e-5, True),
    (1e-5, 1e-3, True),
    (np.nan, 1e-5, True),
    (1e-5, np.nan, True),
  ],
)
def test_either_error_is_enough(rms, relative, exceeds):
  error = ProbeError(largest=0.0, relative=relative, rms=rms)
  assert error.exceeds(1e-4) == exceeds
