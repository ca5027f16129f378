"""Loss reports, and their text tables."""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionLoss:
  """Mean loss of targets at positions [start, stop) of their documents."""

  start: int
  stop: int
  nats_per_token: float
  tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossReport:
  """Held-out loss of one predictor.

  Attributes:
    name: row label in the table.
    nats_per_token: mean of -ln p(target) over the scored targets.
    bits_per_byte: the same loss per UTF-8 byte of the text, comparable between
      tokenizers.
    tokens: number of scored targets.
    seq_len: tokens per row, the longest possible context.
    by_position: loss by position in the document; may be empty.
  """

  name: str
  nats_per_token: float
  bits_per_byte: float
  tokens: int
  seq_len: int
  by_position: tuple[PositionLoss, ...] = ()

  @property
  def perplexity(self) -> float:
    """exp(nats per token); inf beyond the range of floats."""
    try:
      return math.exp(self.nats_per_token)
    except OverflowError:
      return math.inf

  def to_json(self) -> dict:
    """Returns all fields and the perplexity as JSON values."""
    return dataclasses.asdict(self) | {"perplexity": self.perplexity}


def make_report(
  name: str,
  *,
  nats: float,
  tokens: int,
  seq_len: int,
  bytes_per_token: float,
  by_position: tuple[PositionLoss, ...] = (),
) -> LossReport:
  """Makes a report from summed nats over `tokens` scored targets."""
  if tokens < 1:
    raise ValueError(
      f"{name}: no target to score (tokens={tokens}); the validation split "
      f"has no unmasked target in rows of seq_len={seq_len}"
    )
  if not bytes_per_token > 0:
    raise ValueError(
      f"bytes_per_token: expected a positive number, got {bytes_per_token}"
    )
  mean = nats / tokens
  return LossReport(
    name=name,
    nats_per_token=mean,
    bits_per_byte=mean / math.log(2) / bytes_per_token,
    tokens=tokens,
    seq_len=seq_len,
    by_position=by_position,
  )


def format_table(reports: Sequence[LossReport]) -> str:
  """Formats reports as an aligned text table, one row each."""
  header = ("", "nats/token", "bits/byte", "perplexity", "tokens")
  rows = [
    (
      report.name,
      f"{report.nats_per_token:.4f}",
      f"{report.bits_per_byte:.4f}",
      f"{report.perplexity:,.2f}",
      f"{report.tokens:,}",
    )
    for report in reports
  ]
  return _align(header, rows)


def format_positions(report: LossReport) -> str:
  """Formats the loss by position in the document as a text table."""
  header = ("position", "nats/token", "tokens")
  rows = [
    (
      f"{bucket.start:,}-{bucket.stop - 1:,}",
      f"{bucket.nats_per_token:.4f}",
      f"{bucket.tokens:,}",
    )
    for bucket in report.by_position
  ]
  return _align(header, rows)


def _align(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  """Left-aligns the first column, right-aligns the others, adds a rule."""
  widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
  lines = [
    "  ".join(
      [cells[0].ljust(widths[0])]
      + [cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True)]
    ).rstrip()
    for cells in [header, *rows]
  ]
  lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
  return "\n".join(lines)
