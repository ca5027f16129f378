"""`python -m gdn2_jax.bench serve`: cost of a token against context and batch.

Compares GDN-2, the hybrid and a softmax transformer of the same size in the
same code: time of a token, tokens per second and memory, and the time to read
prompts. Each model's decoding is checked against a pass over the whole sequence
before it is timed.
"""

import math
import pathlib
from typing import Any

import jax
from absl import flags

from gdn2_jax.bench import timing
from gdn2_jax.bench.results import Column, environment, text_table, write_json

SECTIONS = ("decode", "prefill", "constancy")
_NAMES = ("GDN-2", "hybrid", "softmax")
_PRESETS = ("tiny", "nano", "small", "120M", "1.3B")
_KILO = 1024
# Flags that the result lists.
_OPTIONS = (
  *("preset", "constancy_preset", "dtype", "models", "sections", "chunk"),
  *("rounds", "prefill_seconds", "most_gb", "price_per_hour", "rehearse"),
  *("lengths", "batches", "constancy_lengths"),
)

_COLUMNS = (
  Column("model", "model"),
  Column("batch", "batch"),
  Column("context", "context"),
  Column("ms", "ms", ".3f"),
  Column("min", "ms_min", ".3f"),
  Column("max", "ms_max", ".3f"),
  Column("tokens/s", "tokens_per_s", ".1f"),
  Column("temp MB", "temp_bytes", ".2f", 1e-6),
  Column("state MB", "state_bytes", ".3f", 1e-6),
  Column("floor ms", "floor_ms", ".3f"),
  Column("of floor", "floor_share", ".0%"),
  Column("process MB", "process_bytes", ".0f", 1e-6),
  Column("USD/M tokens", "usd_per_million_tokens", ".4g"),
)

METHOD = {
  "decode": "One token per row and greedy choice of the next, in a compiled "
  "program that owns the state. The state is filled with noise as if `length` "
  "tokens had been read: every slot of a cache in use, positions set, back to "
  "`length` before every round. Median of rounds in which models take turns.",
  "floor": "Time to copy, in the same rounds, as many bytes as the step must "
  "move: weights read once, recurrent states read and written, keys and values "
  "that the query sees read and one written. Half of the bytes are read and "
  "half written, by a memcpy on a CPU.",
  "prefill": "Prompts of one row of random tokens, really read, by chunks.",
  "constancy": "Prompts really read; then the states after every length take "
  "turns in every round.",
  "state_bytes": "Of a cache made for `length` tokens, all rows.",
  "temp_bytes": "Temporaries of the compiled program.",
}


def define_flags() -> None:
  """Defines the flags that no other benchmark has."""
  flags.DEFINE_enum(
    "preset",
    None,
    _PRESETS,
    "serve: size of the models; default: small, on a GPU 1.3B",
  )
  flags.DEFINE_enum(
    "dtype",
    None,
    ("float32", "bfloat16"),
    "serve: dtype of weights and activations; default: float32, on a GPU "
    "bfloat16",
  )
  flags.DEFINE_list("models", list(_NAMES), "serve: models to compare")
  flags.DEFINE_list("sections", list(SECTIONS), "serve: measurements to make")
  flags.DEFINE_list(
    "lengths",
    ["1K", "2K", "4K", "8K", "16K", "32K", "64K", "128K"],
    "serve: tokens of context before the timed token",
  )
  flags.DEFINE_list("batches", ["1", "8"], "serve: batch sizes of decoding")
  flags.DEFINE_list(
    "constancy_lengths",
    ["1K", "2K", "4K", "8K", "16K", "32K", "64K", "128K", "256K"],
    "serve: prompt tokens read before decoding, in the section constancy",
  )
  flags.DEFINE_enum(
    "constancy_preset",
    "nano",
    _PRESETS,
    "serve: size of the models of the section constancy",
  )
  flags.DEFINE_integer("chunk", 512, "serve: tokens of a prompt per call")
  flags.DEFINE_float("prefill_seconds", 60.0, "serve: time limit of one prompt")
  flags.DEFINE_float(
    "most_gb",
    None,
    "serve: limit of weights and state in GB; default: 4, on a GPU 60",
  )
  flags.DEFINE_float(
    "price_per_hour",
    None,
    "serve: price of the device in USD; adds the cost of a million tokens",
  )
  flags.DEFINE_string("plot", None, "serve: PNG file to draw")


def main(values: Any) -> None:
  """Runs the benchmark, prints its tables, writes JSON and plot."""
  options = read_options(values)
  if values.one_core and not values.rehearse:
    timing.use_one_core()
  result = run(options)
  print(table(result))
  if values.json:
    write_json(pathlib.Path(values.json), result)
  if values.plot:
    from gdn2_jax.bench.serve import plot as serve_plot

    pathlib.Path(values.plot).parent.mkdir(parents=True, exist_ok=True)
    serve_plot.draw(result).savefig(values.plot)


def read_options(values: Any) -> dict[str, Any]:
  """Validated flags as numbers; tiny ones in a rehearsal."""
  options = {name: getattr(values, name) for name in _OPTIONS}
  for name in ("chunk", "prefill_seconds", "most_gb", "price_per_hour"):
    value = options[name]
    if value is not None and not (value > 0 and math.isfinite(value)):
      raise ValueError(f"--{name}={value}: expected a positive number")
  for name, known in (("models", _NAMES), ("sections", SECTIONS)):
    options[name] = _among(name, options[name], known)
  for name in ("lengths", "batches", "constancy_lengths"):
    options[name] = sorted({_count(name, x) for x in options[name]})
    if not options[name]:
      raise ValueError(f"--{name}: expected at least one number")
  if options["rehearse"]:
    options |= {"preset": "tiny", "constancy_preset": "tiny", "chunk": 16}
    options |= {"lengths": [32, 64], "constancy_lengths": [32, 64]}
    options |= {"batches": [1, 2], "rounds": 2}
  for name, section in (
    ("lengths", "prefill"),
    ("constancy_lengths", "constancy"),
  ):
    for length in options[name]:
      chunk = min(length, options["chunk"])
      if section in options["sections"] and length % chunk:
        raise ValueError(
          f"--{name}={length}: expected a multiple of --chunk={chunk}, by which"
          " prompts are read"
        )
  return options


def run(options: dict[str, Any]) -> dict[str, Any]:
  """All measurements as JSON values; ValueError if a model is wrong."""
  # Not at the top: the other benchmarks run where flax is not installed.
  import flax

  from gdn2_jax.bench.serve import time as serve_time

  o = dict(options)
  on_cpu = jax.default_backend() == "cpu"
  o["preset"] = o["preset"] or ("small" if on_cpu else "1.3B")
  o["dtype"] = o["dtype"] or ("float32" if on_cpu else "bfloat16")
  o["most_gb"] = o["most_gb"] or (4.0 if on_cpu else 60.0)
  result = environment() | {"flax": flax.__version__}
  result |= {"options": o, "method": METHOD, "models": {}, "rows": []}
  rows, rounds, chunk = result["rows"], o["rounds"], o["chunk"]
  if {"decode", "prefill"} & set(o["sections"]):
    subjects = _subjects(result, o["preset"], o["models"])
    if "decode" in o["sections"]:
      rows += serve_time.decode(
        subjects, o["lengths"], o["batches"], rounds, 1e9 * o["most_gb"]
      )
    if "prefill" in o["sections"]:
      seconds = o["prefill_seconds"]
      rows += serve_time.prefill(
        subjects, o["lengths"], min(3, rounds), chunk, seconds
      )
    del subjects  # frees the parameters
  if "constancy" in o["sections"]:
    names = [name for name in o["models"] if name != "softmax"]
    subjects = _subjects(result, o["constancy_preset"], names)
    rows += serve_time.constancy(
      subjects, o["constancy_lengths"], rounds, chunk
    )
  if o["price_per_hour"] is not None:  # of a device that does nothing else
    price_of_million_s = 1e6 * o["price_per_hour"] / 3600
    for row in rows:
      if "tokens_per_s" in row:
        cost = price_of_million_s / row["tokens_per_s"]
        row["usd_per_million_tokens"] = cost
  return result


def _subjects(result, preset, names):
  """Models of a preset, checked and described in the result."""
  from gdn2_jax.bench.serve import models as serve_models
  from gdn2_jax.bench.serve import time as serve_time
  from gdn2_jax.model.accounting import count_parameters

  configs = serve_models.make_configs(
    serve_models.PRESETS[preset], result["options"]["dtype"], tuple(names)
  )
  subjects = []
  for name, config in configs.items():
    params = serve_models.random_params(config)
    subject = serve_time.Subject(name=name, config=config, params=params)
    error, bound = serve_time.check(subject), serve_time.BOUNDS[config.dtype]
    if not error <= bound:
      raise ValueError(
        f"{name}: decoding differs from one pass by {error:.1e}, more than "
        f"{bound:.0e}; nothing is timed"
      )
    result["models"].setdefault(preset, {})[name] = {
      "parameters": count_parameters(config).total,
      "pattern": config.pattern,
      "layers": config.num_layers,
      "dim": config.model_dim,
      "mlp_dim": config.mlp_dim,
      "window": config.attention.window if _has_window(config) else None,
      "error": error,
    }
    subjects.append(subject)
  return subjects


def _has_window(config: Any) -> bool:
  """True if some layers keep the keys and values of a window."""
  from gdn2_jax.model.lm import init_cache
  from gdn2_jax.model.mixers.kv_cache import RingCache

  cache = jax.eval_shape(lambda: init_cache(config, 1, 1))
  return any(isinstance(part, RingCache) for part in cache)


def table(result: dict[str, Any]) -> str:
  """Results as text for the terminal."""
  lines = [f"{result['device']} ({result['cpu']}), {result['clock']}"]
  if result["options"]["rehearse"]:
    lines.append("REHEARSAL: tiny models; the times mean nothing")
  for preset, models in result["models"].items():
    for name, m in models.items():
      window = f", window {m['window']}" if m["window"] else ""
      lines.append(
        f"{preset} {name}: {m['parameters']:,} parameters, {m['layers']} layers"
        f" {m['pattern']!r}, width {m['dim']}, MLP {m['mlp_dim']}{window}; "
        f"error {m['error']:.1e}"
      )
  heads = {
    "decode": "decoding, a token of every row",
    "prefill": "reading a prompt of one row",
    "constancy": "decoding one row after prompts that were really read",
  }
  priced = result["options"]["price_per_hour"] is not None
  columns = _COLUMNS if priced else _COLUMNS[:-1]
  for section, head in heads.items():
    rows = [
      row | {"context": _context(row["length"])}
      for row in result["rows"]
      if row["section"] == section
    ]
    if rows:
      lines += ["", head, *text_table(rows, columns)]
  return "\n".join(lines)


def _context(length):
  return f"{length // _KILO}K" if length % _KILO == 0 else str(length)


def _among(name, values, known):
  for value in values:
    if value not in known:
      raise ValueError(f"--{name}={value}: expected one of {', '.join(known)}")
  if not values:
    raise ValueError(f"--{name}: expected some of {', '.join(known)}")
  return [value for value in known if value in values]


def _count(name, text):
  """Number in a text such as 4096 or 4K."""
  number, kilo = (text[:-1], _KILO) if text[-1:] in "kK" else (text, 1)
  if not number.isascii() or not number.isdigit() or int(number) < 1:
    raise ValueError(f"--{name}={text}: expected numbers such as 8 or 4K")
  return int(number) * kilo
