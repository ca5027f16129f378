"""Parquet files of FineWeb-Edu's shape, written from the embedded text."""

import functools

import pyarrow
import pyarrow.parquet as parquet

from gdn2_jax.data.text import corpus, fineweb_edu


@functools.cache
def texts():
  """Some hundred texts of 100 to 1,500 characters."""
  whole = "\n\n".join(d.text for d in corpus.read_corpus("snapshot").documents)
  found, start = [], 0
  while start < len(whole):
    size = 100 + (37 * len(found)) ** 2 % 1400
    found.append(whole[start : start + size])
    start += size
  return found


def table(documents, **columns):
  """The ten columns; `columns` replaces some."""
  count = len(documents)
  values = {
    "text": documents,
    "id": [f"<urn:uuid:{i:08d}>" for i in range(count)],
    "dump": ["CC-MAIN-2024-10"] * count,
    "url": [f"https://example.org/{i}" for i in range(count)],
    "file_path": ["s3://commoncrawl/crawl-data/x.warc.gz"] * count,
    "language": ["en"] * count,
    "language_score": [0.5 + i / 1024 for i in range(count)],
    "token_count": list(range(count)),
    "score": [3.25] * count,
    "int_score": [3] * count,
  } | columns
  kinds = {
    "string": pyarrow.string(),
    "float64": pyarrow.float64(),
    "int64": pyarrow.int64(),
  }
  arrays = []
  for name, kind in fineweb_edu.COLUMNS:
    array = pyarrow.array(
      [v.encode() if isinstance(v, str) else v for v in values[name]]
      if kind == "string"
      else values[name],
      pyarrow.binary() if kind == "string" else kinds[kind],
    )
    # Unchecked, as a careless writer would: the bytes need not be UTF-8.
    arrays.append(array.view(kinds[kind]) if kind == "string" else array)
  return pyarrow.table(arrays, names=[name for name, _ in fineweb_edu.COLUMNS])


def write(path, documents, *, group=20, **columns):
  """Writes one file with page checksums."""
  path.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(
    table(documents, **columns),
    path,
    row_group_size=group,
    write_page_checksum=True,
    compression="zstd",
  )


def write_folder(folder, files=3, each=60):
  """Files 000_00000.parquet and so on.

  Returns:
    name -> its texts.
  """
  found = {}
  for number in range(files):
    name = f"{number:03d}_00000.parquet"
    found[name] = texts()[number * each : (number + 1) * each]
    assert len(found[name]) == each
    write(folder / name, found[name])
  return found
