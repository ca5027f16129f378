"""Logits of a converted model, compared with logits of the other program."""

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from gdn2_jax.interop.convert.opened import open_model
from gdn2_jax.interop.convert.options import Options
from gdn2_jax.interop.convert.tensors import in_dtype
from gdn2_jax.interop.names import DIALECTS
from gdn2_jax.interop.tree import unflatten_params
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM


@dataclasses.dataclass(frozen=True)
class Probe:
  """Tokens [B, T] and float32 logits [B, T, VOCAB] of a model."""

  input_ids: np.ndarray
  logits: np.ndarray


@dataclasses.dataclass(frozen=True)
class ProbeError:
  """Distance of logits from those expected."""

  largest: float  # absolute difference
  relative: float  # largest difference over the largest expected logit
  rms: float  # root mean square of the differences over that of the logits

  def exceeds(self, tolerance: float) -> bool:
    """True where either relative error is above `tolerance`, or NaN."""
    return not (self.rms <= tolerance and self.relative <= tolerance)

  def __str__(self) -> str:
    return (
      f"logits: largest error {self.largest:.3g} ({self.relative:.3g} of the "
      f"largest logit), relative RMS error {self.rms:.3g}"
    )


def read_probe(path: str | os.PathLike) -> Probe:
  """Reads an .npz with the arrays input_ids and logits; never a pickle."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"--probe={path}: no such file")
  try:
    # NumPy leaves a file open that it could not read.
    with open(path, "rb") as data, np.load(data, allow_pickle=False) as file:
      ids, logits = file["input_ids"], file["logits"]
  except Exception as e:  # zipfile, zlib and NumPy raise many types
    raise ValueError(f"--probe={path}: {type(e).__name__}: {e}") from e
  problem = ""
  if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
    found = f"{ids.dtype}{list(ids.shape)}"
    problem = f"input_ids {found}, expected integers [B, T]"
  elif logits.ndim != 3 or logits.shape[:2] != ids.shape:
    expected = [*ids.shape, "VOCAB"]
    problem = f"logits {list(logits.shape)}, expected {expected}"
  elif not np.issubdtype(logits.dtype, np.floating):
    problem = f"logits are {logits.dtype}, expected floats"
  elif not np.isfinite(logits.astype(np.float32)).all():
    problem = "logits that are not finite"
  if problem:
    raise ValueError(f"--probe={path}: {problem}")
  return Probe(ids, logits.astype(np.float32))


def check_probe(probe: Probe, config: ModelConfig) -> None:
  """Refuses a probe of a model of another vocabulary."""
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
  """Reads the folder that a conversion wrote, and runs it in float32."""
  stated = output_gate if target in DIALECTS else None
  opened = open_model(pathlib.Path(out), target, Options(output_gate=stated))
  config = dataclasses.replace(opened.config, dtype="float32", remat="none")
  tensors = in_dtype(opened.tensors, config.param_dtype, config)
  params = unflatten_params(tensors, config)
  run = jax.jit(LM(config).apply)
  with jax.default_matmul_precision("highest"):
    rows = [
      run({"params": params}, jnp.asarray(row[None], jnp.int32))[0][0]
      for row in probe.input_ids
    ]
  expected = probe.logits.astype(np.float64)
  difference = np.stack([np.asarray(row) for row in rows]) - expected
  largest = float(np.abs(difference).max())
  scale = float(np.abs(expected).max()) or 1.0
  rms = float(np.sqrt(np.mean(expected**2))) or 1.0
  return ProbeError(
    largest=largest,
    relative=largest / scale,
    rms=float(np.sqrt(np.mean(difference**2))) / rms,
  )
