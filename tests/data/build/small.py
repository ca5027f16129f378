"""Builds of three small parquet files in several shards each."""

from gdn2_jax.data.build import build, recipe

HELD_OUT = "002_00000.parquet"
SOURCE = {"kind": "fineweb_edu", "config": "local"}
SHARD_BYTES = 6000  # several shards per file
OPTIONS = {
  "tokenizer": "bytes",
  "seed": 3,
  "validation_files": (HELD_OUT,),
}


def build_small(paths, out, *, checksums=None, **changes):
  """Builds with `OPTIONS`, changed as told."""
  options = recipe.Options(**(OPTIONS | changes.pop("options", {})))
  inputs = recipe.Inputs(paths, SOURCE, checksums=checksums or {})
  return build.build_rows(inputs, out, options, **changes)


def content(path):
  """Bytes of all files of a folder, by name."""
  return {
    file.relative_to(path).as_posix(): file.read_bytes()
    for file in sorted(path.rglob("*"))
    if file.is_file()
  }
