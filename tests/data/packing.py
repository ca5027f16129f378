"""Packed folders of given texts, and their documents."""

import json

import numpy as np

from gdn2_jax.data.build import build, recipe


def write_lines(path, texts):
  """A .jsonl file with one document per text."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
  return path


def pack(texts, out, **options):
  """Packs texts, with bytes as ids unless told otherwise."""
  path = write_lines(out.with_name(f"{out.name}-text") / "texts.jsonl", texts)
  return build.build_rows(
    {path.name: path},
    out,
    recipe.Options(**{"tokenizer": "bytes"} | options),
    source={"kind": "text"},
  ).packed


def documents(found, split):
  """Texts of a split, in order."""
  offsets = np.asarray(found.offsets[split])
  parts = np.split(np.asarray(found.tokens[split]), offsets[1:-1])
  return [found.tokenizer.decode(part) for part in parts if len(part)]
