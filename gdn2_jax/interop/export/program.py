"""Prefill and decode as programs that need JAX alone.

  prefill(params, tokens [b, C], lengths [b], state) -> (logits, state)
  decode(params, token [b], state) -> (logits, state)

for any batch size b, in StableHLO as `jax.export` serialises it. params and
state are dicts of arrays whose names, shapes and dtypes are in program.json;
the weights themselves stay in their safetensors. The ops are those of XLA: what
the GPU kernels compile to has no form that another version of JAX must accept.
"""

import copy
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export, lax

import gdn2_jax
from gdn2_jax.inference.state import State, advance, init_state, read_chunk
from gdn2_jax.interop.tree import (
  leaf_sources,
  leaves_by_path,
  nested,
  param_specs,
)
from gdn2_jax.kernels import target
from gdn2_jax.model.config import ModelConfig

FORMAT = "gdn2_jax-program"
FORMAT_VERSION = 1
CHUNK_SIZE = 128
PLATFORMS = ("cpu", "cuda")
SPEC, PREFILL, DECODE = "program.json", "prefill.jax", "decode.jax"
RUN = "run.py"

_BACKENDS = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}


def export_programs(
  config: ModelConfig,
  *,
  chunk_size: int = CHUNK_SIZE,
  platforms: Sequence[str] = PLATFORMS,
  max_length: int | None = None,
  eos_id: int | None = None,
) -> dict[str, bytes]:
  """Traces prefill and decode of a model; compiles nothing.

  Args:
    config: model config; its ops are exported with implementation="xla".
    chunk_size: tokens C that one call of prefill takes per row, a power of two
      from 16.
    platforms: platforms to export for, of "cpu", "cuda", "rocm", "tpu".
    max_length: tokens that a sequence may have, for patterns that need it.
    eos_id: end-of-sequence id of the tokenizer, stored in program.json.

  Returns:
    Contents of prefill.jax, decode.jax, program.json and run.py by name.

  Raises:
    ValueError: a chunk size, platform or config of another kind.
  """
  check_request(chunk_size, platforms)
  platforms = tuple(dict.fromkeys(platforms))
  config = copy.deepcopy(config)
  # The same model on ops that every device and JAX version has.
  for mixer in (config.gdn2, config.mamba2, config.mamba3, config.attention):
    mixer.implementation = "xla"
  config.remat, config.scan_unroll = "none", 1
  config.validate()
  (b,) = export.symbolic_shape("b")
  empty = init_state(config, 1, max_length)
  double = jax.eval_shape(lambda: init_state(config, 2, max_length))
  described = _describe_params(config), _describe_state(empty, double)
  params, state = (
    {
      leaf["name"]: jax.ShapeDtypeStruct(
        [b if size == "b" else size for size in leaf["shape"]], leaf["dtype"]
      )
      for leaf in leaves
    }
    for leaves in described
  )
  tokens = jax.ShapeDtypeStruct((b, chunk_size), jnp.int32)
  row = jax.ShapeDtypeStruct((b,), jnp.int32)

  def trees(params, leaves):
    params = {tuple(name.split(".")): x for name, x in params.items()}
    leaves = [leaves[name] for name in state]
    return nested(params), jax.tree.unflatten(jax.tree.structure(empty), leaves)

  def prefill(params, tokens, lengths, state):
    none = jnp.zeros((tokens.shape[0], config.vocab_size), jnp.float32)
    params, state = trees(params, state)
    logits, new = read_chunk(params, tokens, lengths, state, none)
    return logits, leaves_by_path(new, ".")

  def decode(params, token, state):
    params, state = trees(params, state)
    logits, new = advance(params, token, state)
    return logits, leaves_by_path(new, ".")

  serialise = functools.partial(_serialise, platforms=platforms)
  spec = {
    "format": FORMAT,
    "format_version": FORMAT_VERSION,
    "library_version": gdn2_jax.__version__,
    "jax_version": jax.__version__,
    "platforms": platforms,
    "vocab_size": config.vocab_size,
    "chunk_size": chunk_size,
    "max_length": max_length,
    "eos_id": eos_id,
    "params": described[0],
    "state": described[1],
    "prefill": {
      "file": PREFILL,
      "arguments": [
        "params",
        f"tokens int32[b, {chunk_size}]",
        f"lengths int32[b], 0 to {chunk_size}",
        "state",
      ],
      "results": [
        f"logits float32[b, {config.vocab_size}], 0 where the length is 0",
        "state",
      ],
    },
    "decode": {
      "file": DECODE,
      "arguments": ["params", "token int32[b]", "state"],
      "results": [f"logits float32[b, {config.vocab_size}]", "state"],
    },
  }
  return {
    PREFILL: serialise(prefill, params, tokens, row, state),
    DECODE: serialise(decode, params, row, state),
    SPEC: (json.dumps(spec, indent=2) + "\n").encode(),
    RUN: pathlib.Path(__file__).with_name(RUN).read_bytes(),
  }


def check_request(chunk_size: int, platforms: Sequence[str]) -> None:
  """Raises ValueError for values that `export_programs` does not take."""
  if chunk_size < 16 or chunk_size & (chunk_size - 1):
    raise ValueError(
      f"chunk_size={chunk_size}: expected a power of two, 16 or more"
    )
  if not platforms or set(platforms) - set(_BACKENDS):
    raise ValueError(
      f"platforms={','.join(platforms)}: expected some of "
      + ", ".join(_BACKENDS)
    )


def _serialise(f: Callable[..., Any], *args: Any, platforms) -> bytes:
  backends = {name: _BACKENDS[name] for name in platforms}

  def traced(backend, *args):
    with target.use(backend):
      return f(*args)

  def program(*args):
    if len(set(backends.values())) == 1:
      return traced(next(iter(backends.values())), *args)
    # Each platform gets the sums in the pieces that suit it.
    branches = {
      name: functools.partial(traced, backend)
      for name, backend in backends.items()
    }
    return lax.platform_dependent(*args, **branches)

  program.__name__ = f.__name__
  return bytes(
    export.export(jax.jit(program), platforms=platforms)(*args).serialize()
  )


def _describe_params(config: ModelConfig) -> list[dict[str, Any]]:
  specs = param_specs(config)
  return [
    {
      "name": ".".join(leaf.path),
      "shape": (len(leaf.names),) * leaf.stacked + specs[leaf.names[0]].shape,
      "dtype": str(specs[leaf.names[0]].dtype),
      "tensors": leaf.names,
      "stacked": leaf.stacked,
    }
    for leaf in leaf_sources(config)
  ]


def _describe_state(empty: State, double: Any) -> list[dict[str, Any]]:
  """Names, shapes with "b", dtypes, and the number each leaf starts from."""
  found, two = [], leaves_by_path(double, ".")
  for name, value in leaves_by_path(jax.device_get(empty), ".").items():
    initial = value.flat[0].item()
    assert (value == initial).all(), name
    # The axis of the batch is the one whose size follows it.
    sizes = zip(value.shape, two[name].shape, strict=True)
    shape = [n if n == m else "b" for n, m in sizes]
    found.append(
      {
        "name": name,
        "shape": shape,
        "batch_axis": shape.index("b"),
        "dtype": str(value.dtype),
        "initial": initial,
      }
    )
  return found
