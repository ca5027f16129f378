r"""Runs the exported model in this folder with JAX alone, without gdn2_jax.

  python run.py --tokens=1,2,3 --max_new_tokens=32
  python run.py --prompt="Return the" --max_new_tokens=32

or, from Python,

  import run
  model = run.load(".")
  model.generate([[1, 2, 3], [4]], max_new_tokens=8)

Needs jax, safetensors and flatbuffers; tokenizers for --prompt. Generation is
greedy: the programs give logits, choosing from them is up to you.
"""

import argparse
import hashlib
import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors import safe_open


def load(folder="."):
  """Loads a folder after comparing every file with manifest.json.

  Raises:
    ValueError: a file is missing, damaged or altered.
  """
  return Model(pathlib.Path(folder))


class Model:
  """Programs and parameters; a state is a dict of arrays.

  Attributes:
    spec: program.json.
    params: arrays by name, as the programs take them.
  """

  def __init__(self, folder):
    self._folder = folder
    self._files = _verify(folder)
    self.spec = json.loads((folder / "program.json").read_text("utf-8"))
    if self.spec["format"] != "gdn2_jax-program":
      raise ValueError(f"program.json: format={self.spec['format']!r}")
    if self.spec["format_version"] != 1:
      raise ValueError(f"program.json: {self.spec['format_version']=}")
    self.params = self._read_params()
    # Donated: the state of a call is overwritten by the one it returns.
    self._prefill = jax.jit(self._program("prefill"), donate_argnums=3)
    self._decode = jax.jit(self._program("decode"), donate_argnums=2)

  def init_state(self, batch_size):
    """State of sequences that have read no tokens."""
    state = {}
    for leaf in self.spec["state"]:
      shape = [batch_size if d == "b" else d for d in leaf["shape"]]
      state[leaf["name"]] = jnp.full(shape, leaf["initial"], leaf["dtype"])
    return state

  def prefill(self, prompts, state):
    """Reads prompts, of any lengths >= 1, continuing from `state`.

    Args:
      prompts: B lists of token ids.
      state: of B sequences; donated, use the returned one.

    Returns:
      float32 logits [B, VOCAB] after each last token, and the new state.
    """
    self._check(prompts)
    size = self.spec["chunk_size"]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    chunks = -(-int(lengths.max()) // size)
    tokens = np.zeros((len(prompts), chunks * size), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
      row[: len(prompt)] = prompt
    logits = None
    for start in range(0, chunks * size, size):
      here = np.clip(lengths - start, 0, size)
      piece = tokens[:, start : start + size]
      new, state = self._prefill(self.params, piece, here, state)
      # A prompt that ended in an earlier chunk has no logits in this one.
      old = new if logits is None else logits
      logits = jnp.where((here > 0)[:, None], new, old)
    return logits, state

  def decode(self, token, state):
    """Reads one token per sequence; arguments and results as `prefill`."""
    return self._decode(self.params, np.asarray(token, np.int32), state)

  def generate(self, prompts, max_new_tokens, stop_id=None):
    """Continues prompts greedily; a list ends before the first `stop_id`.

    Raises:
      ValueError: a bad prompt, or logits that are not finite.
    """
    longest = max(map(len, prompts)) + max_new_tokens
    if self.spec["max_length"] and longest > self.spec["max_length"]:
      raise ValueError(
        f"prompt and new tokens: {longest}, the programs were exported for "
        f"max_length={self.spec['max_length']}"
      )
    logits, state = self.prefill(prompts, self.init_state(len(prompts)))
    found, done = [], np.zeros(len(prompts), bool)
    for step in range(max_new_tokens):
      token, best = jax.device_get(
        (jnp.argmax(logits, axis=-1), jnp.max(logits, axis=-1))
      )
      self._check_finite(best, done, step)
      found.append(token)
      if stop_id is not None:
        done |= token == stop_id
      if done.all() or step == max_new_tokens - 1:
        break
      logits, state = self.decode(token, state)
    rows = np.array(found).T.tolist()
    return [r[: r.index(stop_id)] if stop_id in r else r for r in rows]

  def _check(self, prompts):
    for i, prompt in enumerate(prompts):
      if not len(prompt):
        raise ValueError(f"prompts[{i}]: expected at least one token, got none")
      if min(prompt) < 0 or max(prompt) >= self.spec["vocab_size"]:
        raise ValueError(
          f"prompts[{i}]: expected ids in [0, {self.spec['vocab_size']})"
        )

  def _check_finite(self, best, done, step):
    """Refuses unfinished rows whose largest logit is not finite."""
    failed = np.flatnonzero(~done & ~np.isfinite(best))
    if failed.size:
      bad = [n for n, x in self.params.items() if not jnp.isfinite(x).all()]
      raise ValueError(
        f"prompts[{failed[0]}]: non-finite logits at index {step} of the "
        "chosen tokens: params with NaN or infinity: "
        + (", ".join(bad[:3]) or "none")
      )

  def _program(self, name):
    data = (self._folder / self.spec[name]["file"]).read_bytes()
    return export.deserialize(bytearray(data)).call

  def _read_params(self):
    files, where = {}, {}
    for name in self._files:
      if name.endswith(".safetensors"):
        files[name] = safe_open(self._folder / name, framework="np")
        where |= dict.fromkeys(files[name].keys(), files[name])
    params = {}
    for leaf in self.spec["params"]:
      parts = [where[name].get_tensor(name) for name in leaf["tensors"]]
      value = np.stack(parts) if leaf["stacked"] else parts[0]
      params[leaf["name"]] = jnp.asarray(value)
    return params


def _verify(folder):
  """Compares the files with manifest.json; returns their names."""
  listed = json.loads((folder / "manifest.json").read_text("utf-8"))["files"]
  for name, spec in listed.items():
    if os.path.basename(name) != name:
      raise ValueError(f"manifest.json: {name!r} is not a plain file name")
    if not (folder / name).is_file():
      raise ValueError(f"{folder / name}: missing, manifest.json lists it")
    digest = hashlib.sha256()
    with open(folder / name, "rb") as file:
      while block := file.read(1 << 20):
        digest.update(block)
    if digest.hexdigest() != spec["sha256"]:
      raise ValueError(f"{folder / name}: damaged or altered (SHA-256)")
  missing = {"program.json", "prefill.jax", "decode.jax"} - set(listed)
  if missing:
    raise ValueError(f"manifest.json: {min(missing)} is not listed")
  return list(listed)


def _tokenizer(folder):
  """(encode, decode) of tokenizer.json."""
  text = (folder / "tokenizer.json").read_text("utf-8")
  kind = json.loads(text).get("format")
  if kind == "gdn2-bytes-tokenizer":

    def decode(ids):
      return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    return lambda prompt: list(prompt.encode()), decode
  if kind is not None:
    raise ValueError(f"tokenizer.json: {kind}: encode yourself, pass --tokens")
  from tokenizers import Tokenizer

  backend = Tokenizer.from_str(text)
  backend.no_truncation()
  backend.no_padding()
  backend.encode_special_tokens = True
  return (
    lambda prompt: backend.encode(prompt, add_special_tokens=False).ids,
    backend.decode,
  )


def main():
  """Entry point."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--tokens", help="token ids, as in 1,2,3")
  parser.add_argument("--prompt", help="text; needs a tokenizer.json")
  parser.add_argument("--max_new_tokens", type=int, default=32)
  args = parser.parse_args()
  folder = pathlib.Path(__file__).resolve().parent
  if (args.tokens is None) == (args.prompt is None) or args.max_new_tokens < 1:
    parser.error("pass --tokens or --prompt, and --max_new_tokens >= 1")
  try:
    model = load(folder)
    if args.tokens is not None:
      ids = [int(token) for token in args.tokens.split(",")]
      (new,) = model.generate([ids], args.max_new_tokens)
      print(",".join(map(str, new)))
    else:
      encode, decode = _tokenizer(folder)
      stop = model.spec["eos_id"]
      (new,) = model.generate([encode(args.prompt)], args.max_new_tokens, stop)
      print(args.prompt + decode(new))
  except (ValueError, OSError) as e:
    sys.exit(f"error: {e}")


if __name__ == "__main__":
  main()
