"""Writes the checkpoint that later versions must be able to go on from.

    python -m tests.train.checkpoint.make_golden 0.1.0

makes golden/VERSION.tar.xz here: a checkpoint after two steps, the two batches
that come next, and the losses they gave. Run it once for a release, and
never again for the same one.
"""

import json
import pathlib
import sys
import tarfile
import tempfile

import jax
import numpy as np

from gdn2_jax.config_json import from_dict
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM
from gdn2_jax.model.mixers.attention import AttentionConfig
from gdn2_jax.model.mixers.gdn2 import GDN2Config
from gdn2_jax.sharding import MeshConfig, make_mesh, use_mesh
from gdn2_jax.train.checkpoint.manager import Checkpointer
from gdn2_jax.train.checkpoint.meta import make_meta, read_meta
from gdn2_jax.train.checkpoint.resume import resume
from gdn2_jax.train.config import TrainConfig
from gdn2_jax.train.state import init_state, plan_state
from gdn2_jax.train.step import make_train_step

FOLDER = pathlib.Path(__file__).parent / "golden"
SAVED, STEPS = 2, 4


def golden_config() -> TrainConfig:
  config = TrainConfig(
    model=ModelConfig(
      vocab_size=48,
      model_dim=16,
      num_layers=2,
      pattern="GS",
      mlp_dim=16,
      gdn2=GDN2Config(
        num_heads=1, key_dim=16, value_dim=16, implementation="reference"
      ),
      attention=AttentionConfig(num_heads=2, head_dim=8, window=4),
      dtype="float32",
      loss_chunk=16,
      scan_layers=False,
    ),
    num_steps=STEPS,
  )
  config.data.seq_len, config.data.batch_size = 12, 2
  config.optimizer.lr, config.optimizer.final_lr = 1e-2, 1e-3
  return config


def make_batches() -> list[dict[str, np.ndarray]]:
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 48, (STEPS, 2, 13)).astype(np.int32)
  return [
    {
      "inputs": row[:, :-1],
      "targets": row[:, 1:],
      "segment_ids": np.repeat([[1] * 7 + [2] * 5], 2, 0).astype(np.int32),
      "loss_mask": np.ones((2, 12), np.float32),
    }
    for row in tokens
  ]


def go_on(folder: pathlib.Path, batches) -> list[dict[str, float]]:
  """Steps on the batches, from the checkpoint there or from the seed.

  Saves after the first `SAVED` of them where there was none.
  """
  have = list((folder / "checkpoints").glob("[0-9]*"))
  config = golden_config()
  if have:
    saved = read_meta(folder / "checkpoints", int(have[0].name))
    config = from_dict(TrainConfig, saved["config"], "config")
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  with use_mesh(mesh):
    model = LM(config.model)
    plan = plan_state(model, config.optimizer, config.num_steps, mesh)
    step = make_train_step(config, model, plan, mesh)
    saver = Checkpointer(folder / "checkpoints", config.checkpoint)
    meta = make_meta(config, "golden", {}, plan.abstract)
    found = resume(saver, plan.abstract, meta)
    state = found[0] if found else init_state(model, plan, config.seed)
    rows = []
    for number, batch in enumerate(batches, 1):
      state, metrics = step(state, batch)
      rows.append({n: float(metrics[n]) for n in ("loss", "grad_norm", "lr")})
      if not found and number == SAVED:
        saver.save(number, state, meta)
    saver.close()
  return rows


def main(version: str) -> None:
  path = FOLDER / f"{version}.tar.xz"
  if path.exists():
    sys.exit(f"{path} exists; a released version does not change")
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    batches = make_batches()
    rows = go_on(folder, batches)
    (folder / "expected.json").write_text(json.dumps(rows[SAVED:], indent=2))
    for number, batch in enumerate(batches[SAVED:]):
      np.savez_compressed(folder / f"batch-{number}.npz", **batch)
    with tarfile.open(path, "w:xz") as archive:
      for entry in sorted(folder.iterdir()):
        archive.add(entry, entry.name)


if __name__ == "__main__":
  main(sys.argv[1])
