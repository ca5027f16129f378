"""Runs an exported model as people would who have no gdn2_jax."""

import contextlib
import importlib.abc
import io
import json
import pathlib
import sys


class Blocked(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ("gdn2_jax", "flax", "optax", "orbax"):
      raise ModuleNotFoundError(f"{name} is blocked")


def called(run, *argv):
  """[exit, printed] of run.py on a command line."""
  out, code = io.StringIO(), 0
  sys.argv = ["run.py", *argv]
  with contextlib.redirect_stdout(out):
    try:
      run.main()
    except SystemExit as e:
      code = e.code
  return [code, out.getvalue()]


def main(folder, prompts, results):
  sys.path.insert(0, folder)
  import numpy as np
  import run

  prompts = json.loads(prompts)
  model = run.load(folder)
  found = {}
  for size in (1, len(prompts)):
    state = model.init_state(size)
    logits, state = model.prefill(prompts[:size], state)
    found[f"prefill_{size}"] = logits
    given = state
    logits, state = model.decode(np.arange(size), state)
    found[f"decode_{size}"] = logits
    assert all(x.is_deleted() for x in given.values()), "not donated"
    for name, value in state.items():
      found[f"{name}_{size}"] = value
  np.savez(pathlib.Path(results) / "found.npz", **found)
  text = {
    "generated": model.generate(prompts, 5),
    "empty": called(run, "--prompt="),
    "outside": called(run, "--tokens=1,999"),
    "modules": [name for name in sys.modules if name.startswith("gdn2_jax")],
  }
  run.load = lambda folder: model  # another one would compile again
  ids = ",".join(map(str, prompts[0]))
  text["tokens"] = called(run, f"--tokens={ids}", "--max_new_tokens=5")
  model.params["final_norm.weight"] *= np.nan
  text["nan"] = called(run, "--tokens=1,2", "--max_new_tokens=5")
  (pathlib.Path(results) / "found.json").write_text(json.dumps(text))


if __name__ == "__main__":
  sys.meta_path.insert(0, Blocked())
  main(*sys.argv[1:])
