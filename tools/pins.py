r"""Compares results that a refactoring must leave bit-identical.

  .venv/bin/python tools/pins.py --record=build/pins.json     # before
  .venv/bin/python tools/pins.py --check=build/pins.json      # after

Trains `tiny_cpu` for 20 steps with every layer pattern and on several meshes,
builds a packed folder, exports, converts there and back, samples, saves a
session, and runs every GDN-2 kernel in the interpreter; each through the
command line or the public op, so that nothing here knows where code lives.
Bits depend on the machine, on jax and on its threads: record and check on one
machine. About six minutes on two cores; `--only=train` runs one part.
"""

import argparse
import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
MESHES = {
  "1 device": (1, {}),
  "data 2 fsdp 2 tensor 2": (8, {"data": 2, "fsdp": 2, "tensor": 2}),
  "context 2": (2, {"data": 1, "context": 2}),
}
OFFICIAL = ROOT / "tests" / "model" / "official_hybrid_tiny"
VECTORS = ROOT / "tests" / "vectors"


def run(module: str, *argv: str, devices: int = 1) -> str:
  """Standard output of `python -m module argv...`; raises where it fails."""
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "MPLBACKEND": "Agg",
  }
  done = subprocess.run(
    [sys.executable, "-m", module, *map(str, argv)],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    sys.exit(f"{module} {' '.join(map(str, argv))}:\n{done.stderr[-3000:]}")
  return done.stdout


def sha256(*paths: pathlib.Path) -> str:
  """One hash of several files, in this order."""
  total = hashlib.sha256()
  for path in paths:
    total.update(path.read_bytes())
  return total.hexdigest()[:16]


def pin_training(folder: pathlib.Path) -> dict[str, str]:
  """Losses of 20 steps and digests of the state, by pattern and mesh."""
  pins = {}
  for pattern in ("GS", "G", "A"):
    for mesh, (devices, axes) in MESHES.items():
      workdir = folder / f"{pattern} {mesh}"
      run(
        "gdn2_jax.train",
        "--config=configs/tiny_cpu.py",
        f"--workdir={workdir}",
        f"--config.model.pattern={pattern}",
        "--config.num_steps=20",
        "--config.log_every=1",
        "--config.eval.batches=1",
        *(f"--config.mesh.{axis}={n}" for axis, n in axes.items()),
        devices=devices,
      )
      lines = (workdir / "metrics.jsonl").read_text().splitlines()
      rows = [json.loads(line) for line in lines]
      losses = [row["loss"] for row in rows if "loss" in row]
      assert len(losses) == 20, losses
      meta = next((workdir / "checkpoints").glob("20/**/metadata"))
      digests = json.loads(meta.read_text())["digests"]
      pins[f"train {pattern}, {mesh}: losses"] = repr(losses)
      pins[f"train {pattern}, {mesh}: state"] = hashlib.sha256(
        json.dumps(digests, sort_keys=True).encode()
      ).hexdigest()[:16]
  return pins


def pin_files(folder: pathlib.Path) -> dict[str, str]:
  """Hashes of a packed folder, weights, conversions, a session and tokens."""
  packed, workdir = folder / "packed", folder / "run"
  documents = folder / "documents.jsonl"
  paragraphs = (ROOT / "LICENSE").read_text().split("\n\n") * 20
  lines = [json.dumps({"text": f"{i} {t}"}) for i, t in enumerate(paragraphs)]
  documents.write_text("\n".join(lines))
  build = ("text", documents, f"--out={packed}", "--tokenizer=bytes")
  run("gdn2_jax.data", *build)
  arrays = sorted(p for p in packed.rglob("*") if p.suffix != ".json")
  pins = {"packed folder": sha256(*(p for p in arrays if p.is_file()))}
  run(
    "gdn2_jax.train",
    "--config=configs/tiny_cpu.py",
    f"--workdir={workdir}",
    "--config.num_steps=20",
    "--config.log_every=1",
    f"--config.data.source={packed}",
    "--config.data.tokenizer=bytes",
  )
  rows = (workdir / "metrics.jsonl").read_text().splitlines()
  losses = [json.loads(row).get("loss") for row in rows]
  pins["train on the packed folder: losses"] = repr(losses)
  weights = "model.safetensors"
  run("gdn2_jax.export", f"--workdir={workdir}", f"--out={folder / 'out'}")
  pins["exported weights"] = sha256(folder / "out" / weights)
  sample = ("--prompt=Return the", "--max_new_tokens=40", "--seed=3")
  generate = f"--model={folder / 'out'}"
  pins["sampled text"] = run("gdn2_jax.generate", generate, *sample)
  session = folder / "talk.safetensors"
  run("gdn2_jax.generate", generate, f"--session={session}", *sample)
  pins["session"] = sha256(session)
  src, dialects = OFFICIAL, ("official", "gdn2_jax", "official")
  for source, target in itertools.pairwise(dialects):
    out = folder / f"{source} to {target}"
    run(
      "gdn2_jax.convert",
      f"--from={source}",
      f"--to={target}",
      f"--src={src}",
      f"--out={out}",
    )
    pins[f"converted, {source} to {target}"] = sha256(out / weights)
    src = out
  return pins


_KERNELS = """
import hashlib, json
import jax, jax.numpy as jnp, numpy as np
from gdn2_jax import gdn2, gdn2_step
from gdn2_jax.kernels import target
from gdn2_jax.ops.gdn2.fused_gates import Projections, gdn2_fused_gates

PINS, OPTIONS = {}, {"implementation": "mosaic_gpu"}
rng = np.random.default_rng(0)


def note(name, function, *args):
  with target.use("interpret"):
    tree = jax.block_until_ready(jax.jit(function)(*args))
  leaves = [np.asarray(x, np.float32).tobytes() for x in jax.tree.leaves(tree)]
  PINS[name] = hashlib.sha256(b"".join(leaves)).hexdigest()[:16]


def note_with_gradients(name, function, *args):
  def both(*args):
    out, vjp = jax.vjp(function, *args)
    return out, vjp(jax.tree.map(jnp.ones_like, out))

  note(name, both, *args)


def draw(*shape, scale=1.0, dtype=jnp.bfloat16):
  return jnp.asarray(rng.normal(size=shape) * scale, dtype)


ids = jnp.asarray(np.repeat([1, 0, 2], [60, 10, 80])[None], jnp.int32)
for K, V, dtype in ((128, 64, jnp.bfloat16), (64, 128, jnp.float16)):
  B, T, H = 1, 150, 1
  q, k = (draw(B, T, H, K, scale=K**-0.5, dtype=dtype) for _ in "qk")
  v = draw(B, T, H, V, dtype=dtype)
  g = -jnp.abs(draw(B, T, H, K, dtype=jnp.float32))
  b = jax.nn.sigmoid(draw(B, T, H, K, dtype=dtype))
  w = jax.nn.sigmoid(draw(B, T, H, V, dtype=dtype))
  state = draw(B, H, K, V, dtype=jnp.float32)

  def op(*inputs):
    *inputs, state = inputs
    return gdn2(*inputs, state=state, segment_ids=ids, **OPTIONS)

  def layer(*inputs):
    *inputs, state = inputs
    p = Projections(*inputs)
    return gdn2_fused_gates(p, state=state, segment_ids=ids, **OPTIONS)

  def step(*inputs):
    return gdn2_step(*inputs, **OPTIONS)

  note_with_gradients(f"kernels {K} x {V}", op, q, k, v, g, b, w, state)
  gates = (g.astype(dtype), b, w, jnp.zeros((H,)), g[0, 0], state)
  note_with_gradients(f"kernels with gates {K} x {V}", layer, q, k, v, *gates)
  token = [a[:, 0] for a in (q, k, v, g, b, w)]
  note(f"step {K} x {V}", step, *token, state)
print(json.dumps(PINS))
"""


def pin_kernels(folder: pathlib.Path) -> dict[str, str]:
  """Hashes of what the kernels give in the interpreter."""
  script = folder / "kernels.py"
  script.write_text(_KERNELS)
  done = subprocess.run(
    [sys.executable, script],
    cwd=ROOT,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": "8",
      "PYTHONPATH": str(ROOT),
    },
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    sys.exit(done.stderr[-3000:])
  return json.loads(done.stdout.splitlines()[-1])


PARTS = {"train": pin_training, "files": pin_files, "kernels": pin_kernels}


def main() -> None:
  """Records or checks the pins."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--record", metavar="FILE", type=pathlib.Path)
  parser.add_argument("--check", metavar="FILE", type=pathlib.Path)
  parser.add_argument("--only", choices=PARTS)
  args = parser.parse_args()
  if bool(args.record) == bool(args.check):
    parser.error("expected --record=FILE or --check=FILE")
  pins = {}
  for name, part in PARTS.items():
    if args.only in (None, name):
      print(f"{name} ...", file=sys.stderr, flush=True)
      with tempfile.TemporaryDirectory() as folder:
        pins |= part(pathlib.Path(folder))
  if args.record:
    args.record.parent.mkdir(parents=True, exist_ok=True)
    args.record.write_text(json.dumps(pins, indent=2) + "\n")
    print(f"{len(pins)} pins recorded in {args.record}")
    return
  expected = json.loads(args.check.read_text())
  moved = [name for name in pins if pins[name] != expected.get(name)]
  for name in moved:
    print(f"{name}: {expected.get(name)} -> {pins[name]}")
  print(f"{len(pins) - len(moved)} of {len(pins)} pins hold")
  sys.exit(bool(moved))


if __name__ == "__main__":
  main()
