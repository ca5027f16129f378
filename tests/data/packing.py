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
    recipe.Inputs({path.name: path}, {"kind": "text"}),
    out,
    recipe.Options(**{"tokenizer": "bytes"} | options),
  ).packed


def borders(offsets):
  """All borders of documents in a split, from 0 on."""
  return np.append(0, offsets.within(0, int(offsets.starts[-1])))


def documents(found, split):
  """Texts of a split, in order."""
  parts = np.split(found.tokens[split][:], borders(found.offsets[split])[1:-1])
  return [found.tokenizer.decode(part) for part in parts if len(part)]
