"""FineWeb-Edu as a TFDS dataset of ArrayRecord files.

Reads parquet files that are already on disk and writes ArrayRecord files, so
neither the network nor TensorFlow is needed. `as_data_source` then reads any
document by its number:

  paths = fineweb_edu.local_files(FOLDER)
  builder = tfds_builder.prepare(paths, DATA_DIR)
  builder.as_data_source(split="train")[17]["text"]

`data.source=tfds:DATA_DIR/fine_web_edu/local/1.4.0` trains on it. `tfds.load`
needs TensorFlow.
"""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow
import tensorflow_datasets as tfds

from gdn2_jax import files
from gdn2_jax.data.text import fineweb_edu, readers

_DESCRIPTION = """
Educational web pages: the part of FineWeb that a classifier scored 3 or more.
The last file, or 013_00000.parquet, is the validation split.
"""
_CITATION = (
  "FineWeb-Edu, HuggingFaceFW, ODC-By 1.0; pages under CommonCrawl's terms."
)


class FineWebEdu(tfds.core.GeneratorBasedBuilder):
  """Parquet files as ArrayRecords of the ten columns.

  Args:
    paths: name -> parquet file; only needed where the dataset is not there.
  """

  VERSION = tfds.core.Version("1.4.0")
  RELEASE_NOTES = {"1.4.0": "Follows the numbers of the dataset's releases."}  # noqa: RUF012
  BUILDER_CONFIGS = [  # noqa: RUF012
    tfds.core.BuilderConfig(name=name, description=text)
    for name, text in (
      ("sample-10BT", "10B tokens of GPT-2, drawn from all dumps"),
      ("sample-100BT", "100B tokens"),
      ("sample-350BT", "350B tokens"),
      ("local", "whatever parquet files the folder holds"),
    )
  ]

  # Nothing is downloaded. Looked up by TFDS, this would need a package that it
  # does not declare.
  url_infos = {}  # noqa: RUF012

  def __init__(
    self,
    *,
    paths: Mapping[str, str | os.PathLike[str]] | None = None,
    **kwargs: Any,
  ):
    self._paths = {n: pathlib.Path(path) for n, path in (paths or {}).items()}
    super().__init__(file_format="array_record", **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    kinds = {"float64": np.float64, "int64": np.int64}
    features = {
      name: tfds.features.Scalar(dtype=kinds[kind])
      if kind in kinds
      else tfds.features.Text()
      for name, kind in fineweb_edu.COLUMNS
    }
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(features),
      description=_DESCRIPTION,
      homepage=f"https://huggingface.co/datasets/{fineweb_edu.REPOSITORY}",
      citation=_CITATION,
      disable_shuffling=True,  # the seed of a run shuffles
      metadata=tfds.core.MetadataDict(),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager  # nothing is downloaded
    paths = self._paths
    held_out = fineweb_edu.held_out_files(list(paths))
    if not held_out:
      raise ValueError(
        f"paths={list(paths)}: expected two files or more, as one of them is"
        " held out"
      )
    self.info.metadata["inputs"] = {
      name: files.sha256_file(path) for name, path in paths.items()
    }
    split = {
      "train": [p for name, p in paths.items() if name not in held_out],
      "validation": [paths[name] for name in held_out],
    }
    return {
      name: self._generate_examples(members) for name, members in split.items()
    }

  def _generate_examples(
    self, paths: list[pathlib.Path]
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    key = 0
    for path in paths:
      for record in _records(path):
        yield key, record
        key += 1


def check_config(config: str) -> None:
  """Refuses an unknown configuration."""
  known = [entry.name for entry in FineWebEdu.BUILDER_CONFIGS]
  if config not in known:
    raise ValueError(f"config={config!r}: expected one of {', '.join(known)}")


def prepare(
  paths: Mapping[str, str | os.PathLike[str]],
  data_dir: str | os.PathLike[str],
  *,
  config: str = "local",
) -> FineWebEdu:
  """Builds the dataset from parquet files, unless it is there.

  Args:
    paths: name -> file, see `fineweb_edu.local_files`.
    data_dir: folder of TFDS; gets fine_web_edu/CONFIG/VERSION/.
    config: sample-10BT, sample-100BT, sample-350BT or local.

  Raises:
    ValueError: for an unknown config, or naming a file that cannot be read.
  """
  check_config(config)
  builder = FineWebEdu(config=config, data_dir=os.fspath(data_dir), paths=paths)
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
  )
  return builder


def _records(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  names = [name for name, _ in fineweb_edu.COLUMNS]
  with readers.open_parquet(str(path)) as file:
    if missing := set(names) - set(file.schema_arrow.names):
      raise ValueError(f"{path}: no columns {', '.join(sorted(missing))}")
    for index in range(file.metadata.num_row_groups):
      try:
        group = file.read_row_group(index, columns=names)
        columns = [
          _values(group.column(name), kind)
          for name, kind in fineweb_edu.COLUMNS
        ]
      except Exception as error:  # pyarrow has no common base class
        raise ValueError(f"{path}: row group {index}: {error}") from error
      for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _values(column: Any, kind: str) -> list[Any]:
  if kind != "string":
    return [value or 0 for value in column.to_pylist()]
  # As bytes: one text that is not UTF-8 would refuse the whole group.
  raw = column.cast(pyarrow.large_binary()).to_pylist()
  return [readers.decode(value or b"")[0] for value in raw]
