"""Flags of programs that write text: session, length, sampling, seed."""

import os
import pathlib

from absl import flags

from gdn2_jax.inference.sampling import Sampler

SESSION = flags.DEFINE_string(
  "session",
  None,
  "File of a conversation: continued if it exists, else made; replaced after "
  "every text that was generated.",
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 128, "Tokens of one generated text at most, >= 1."
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.8, "Below 1 sharpens, above 1 flattens; 0 is --greedy."
)
_TOP_K = flags.DEFINE_integer(
  "top_k", 0, "Draw among this many most probable tokens only; 0 = all."
)
_TOP_P = flags.DEFINE_float(
  "top_p",
  0.95,
  "Draw among the most probable tokens that together reach this probability "
  "only; 1 = all.",
)
_GREEDY = flags.DEFINE_bool(
  "greedy", False, "Always take the most probable token."
)
SEED = flags.DEFINE_integer(
  "seed",
  None,
  "Seed of the draws, 0 to 2**32 - 1; by default that of the session, or 0.",
)


def check_text_flags() -> Sampler:
  """Refuses bad values before anything is loaded; returns the sampler.

  Raises:
    ValueError: a flag outside its range, or a --session that could not be read
      or written in the end.
  """
  if SESSION.value is not None:
    check_file(f"--session={SESSION.value}", SESSION.value)
  if MAX_NEW_TOKENS.value < 1:
    raise ValueError(f"--max_new_tokens={MAX_NEW_TOKENS.value}: expected >= 1")
  if SEED.value is not None:
    check_seed(f"--seed={SEED.value}", SEED.value)
  return Sampler(
    temperature=0.0 if _GREEDY.value else _TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
  )


def check_seed(where: str, seed: int) -> None:
  """Raises ValueError unless `seed` fits 32 bits; `where` begins the line."""
  if not 0 <= seed < 2**32:
    raise ValueError(f"{where}: expected 0 to 2**32 - 1")


def check_file(where: str, file: str) -> None:
  """Raises ValueError if a file cannot be written; `where` begins the line."""
  path = pathlib.Path(file)
  if not file or path.is_dir():
    raise ValueError(f"{where}: expected a file")
  folder = path.absolute().parent
  if not folder.is_dir():
    raise ValueError(f"{where}: no such folder: {path.parent}")
  if not os.access(folder, os.W_OK):
    raise ValueError(f"{where}: cannot write to {path.parent}")
