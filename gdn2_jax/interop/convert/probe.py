"""Logits of a converted model beside logits that are known to be right."""

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from gdn2_jax.interop.convert.options import OURS, Options
from gdn2_jax.interop.convert.run import open_model
from gdn2_jax.interop.convert.tensors import in_dtype
from gdn2_jax.interop.tree import unflatten_params
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM


@dataclasses.dataclass(frozen=True)
class Probe:
  """Tokens and what a model answers to them.

  Attributes:
    input_ids: tokens [B, T].
    logits: [B, T, VOCAB], float32.
  """

  input_ids: np.ndarray
  logits: np.ndarray


@dataclasses.dataclass(frozen=True)
class ProbeError:
  """How far logits are from those expected.

  Attributes:
    largest: absolute difference.
    relative: largest difference over the largest expected logit.
    rms: root mean square of the differences over that of the logits.
  """

  largest: float
  relative: float
  rms: float

  def exceeds(self, tolerance: float) -> bool:
    """Whether either relative error is above; NaN is above everything."""
    return not (self.rms <= tolerance and self.relative <= tolerance)

  def __str__(self) -> str:
    return (
      f"logits: largest error {self.largest:.3g} ({self.relative:.3g} of the "
      f"largest logit), relative RMS error {self.rms:.3g}"
    )


def read_probe(path: str | os.PathLike) -> Probe:
  """Reads an .npz with the arrays input_ids and logits; never a pickle.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not such a file.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"--probe={path}: no such file")
  try:
    # NumPy leaves a file open that it could not read.
    with open(path, "rb") as data, np.load(data, allow_pickle=False) as file:
      ids, logits = file["input_ids"], file["logits"]
  except Exception as e:  # zipfile, zlib and NumPy raise what they like
    raise ValueError(f"--probe={path}: {type(e).__name__}: {e}") from e
  if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
    raise ValueError(
      f"--probe={path}: input_ids {ids.dtype}{list(ids.shape)}, expected "
      "integers [B, T]"
    )
  if logits.ndim != 3 or logits.shape[:2] != ids.shape:
    raise ValueError(
      f"--probe={path}: logits {list(logits.shape)}, expected "
      f"{[*ids.shape, 'VOCAB']}"
    )
  if not np.issubdtype(logits.dtype, np.floating):
    raise ValueError(f"--probe={path}: logits are {logits.dtype}")
  logits = logits.astype(np.float32)
  if not np.isfinite(logits).all():
    raise ValueError(f"--probe={path}: logits that are not finite")
  return Probe(ids, logits)


def check_probe(probe: Probe, config: ModelConfig) -> None:
  """Refuses a probe of a model of another vocabulary.

  Raises:
    ValueError: it is.
  """
  if probe.logits.shape[-1] != config.vocab_size:
    raise ValueError(
      f"--probe: logits of {probe.logits.shape[-1]} tokens, the model has "
      f"{config.vocab_size}"
    )
  low, high = int(probe.input_ids.min()), int(probe.input_ids.max())
  if low < 0 or high >= config.vocab_size:
    raise ValueError(
      f"--probe: input_ids from {low} to {high}, expected 0 to "
      f"{config.vocab_size - 1}"
    )


def run_probe(
  out: str | os.PathLike, target: str, probe: Probe, output_gate: str
) -> ProbeError:
  """Reads what a conversion wrote, and runs it in float32.

  Args:
    out: folder of the conversion.
    target: its dialect.
    probe: tokens and logits.
    output_gate: of the model.

  Raises:
    ValueError: the probe is of another model.
  """
  stated = None if target == OURS else output_gate
  opened = open_model(pathlib.Path(out), target, Options(output_gate=stated))
  config = dataclasses.replace(opened.config, dtype="float32", remat="none")
  check_probe(probe, config)
  tensors = in_dtype(opened.tensors, config.param_dtype)
  params = unflatten_params(tensors, config)
  with jax.default_matmul_precision("highest"):
    logits = _logits(config, params, probe.input_ids)
  return _compare(logits, probe.logits)


def _logits(config: ModelConfig, params, input_ids) -> np.ndarray:
  run = jax.jit(LM(config).apply)
  rows = [
    run({"params": params}, jnp.asarray(row[None], jnp.int32))[0][0]
    for row in input_ids
  ]
  return np.stack([np.asarray(row) for row in rows])


def _compare(found: np.ndarray, expected: np.ndarray) -> ProbeError:
  difference = found.astype(np.float64) - expected
  scale = float(np.abs(expected).max()) or 1.0
  rms = float(np.sqrt(np.mean(expected.astype(np.float64) ** 2))) or 1.0
  largest = float(np.abs(difference).max())
  return ProbeError(
    largest=largest,
    relative=largest / scale,
    rms=float(np.sqrt(np.mean(difference**2))) / rms,
  )
