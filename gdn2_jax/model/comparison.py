"""Comparison of models: parameters, states and operations side by side."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gdn2_jax.model.accounting import (
  count_parameters,
  forward_flops_per_token,
  state_bytes,
  train_flops_per_token,
)
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import has_growing_cache
from gdn2_jax.model.mixers.registry import kinds_of

_COLUMNS = (
  "model",
  "pattern",
  "mlp_dim",
  "block parameters",
  "difference",
  "parameters",
  "state numbers",
  "state of a sequence",
  "GFLOP forward",
  "GFLOP train",
  "gates fused",
)


def compare(models: Mapping[str, tuple[ModelConfig, int]]) -> list[dict]:
  """Figures of models for a comparison on equal footing.

  Args:
    models: (config, tokens of a row) by name. FLOPs, and the state of layers
      that keep every token, are those at that length.

  Returns:
    One JSON-ready dict for each model, in order. "difference" is relative to
    the blocks of the first model; "state_floats" are the numbers in all
    recurrent states of a sequence, "state_bytes" all of its caches, keys and
    values and convolution tails included; "gates_fused" is True if the GPU
    kernels compute the gates of all layers that have some, False if not, None
    without such layers.
  """
  rows: list[dict[str, Any]] = []
  for name, (config, seq_len) in models.items():
    count = count_parameters(config)
    kinds = kinds_of(config.pattern)
    fused = [kind.has_fused_gates(config) for kind in kinds.values()]
    known = [x for x in fused if x is not None]
    states = {x: kind.state_floats(config) for x, kind in kinds.items()}
    first = rows[0]["parameters"]["blocks"] if rows else count.blocks
    rows.append(
      {
        "name": name,
        "pattern": config.pattern,
        "mlp_dim": config.mlp_dim,
        "parameters": dataclasses.asdict(count) | {"total": count.total},
        "difference": count.blocks / first - 1,
        "state_floats": config.num_groups
        * sum(states[x] for x in config.pattern),
        "state_floats_per_layer": states,
        "state_bytes": sum(state_bytes(config, seq_len).values()),
        "state_grows": has_growing_cache(config),
        "seq_len": seq_len,
        "flops_per_token": {
          "forward": forward_flops_per_token(config, seq_len),
          "train": train_flops_per_token(config, seq_len),
        },
        "gates_fused": all(known) if known else None,
      }
    )
  return rows


def format_comparison(rows: list[dict]) -> str:
  """The figures as a Markdown table."""
  cells = [_COLUMNS, *map(_cells, rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  rule = tuple(
    "-" * (width - (i > 0)) + ":" * (i > 0) for i, width in enumerate(widths)
  )
  lines = [
    "| "
    + " | ".join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    + " |"
    for row in (cells[0], rule, *cells[1:])
  ]
  lengths = {row["seq_len"] for row in rows}
  if len(lengths) > 1:
    told = ", ".join(f"{row['name']} {row['seq_len']:,}" for row in rows)
    lines += ["", f"FLOPs are those of rows of different lengths: {told}"]
  return "\n".join(lines)


def _cells(row: dict) -> tuple[str, ...]:
  parameters, flops = row["parameters"], row["flops_per_token"]
  state = f"{row['state_bytes'] / 1e6:,.2f} MB"
  if row["state_grows"]:
    state += f" at {row['seq_len']:,}"
  fused = {True: "yes", False: "no", None: "-"}[row["gates_fused"]]
  return (
    row["name"],
    row["pattern"],
    f"{row['mlp_dim']:,}",
    f"{parameters['blocks']:,}",
    f"{row['difference']:+.2%}",
    f"{parameters['total']:,}",
    f"{row['state_floats']:,}",
    state,
    f"{flops['forward'] / 1e9:.4f}",
    f"{flops['train'] / 1e9:.4f}",
    fused,
  )
