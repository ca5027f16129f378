"""Flags of the server, checked before a model is loaded."""

import ipaddress
import pathlib
import secrets

from absl import flags

from gdn2_jax.serve.limits import Limits

_DEFAULTS = Limits()
_TEXTS = {
  "max_prompt_tokens": "Tokens of one prompt, >= 1.",
  "max_output_tokens": "Tokens of one answer, >= 1.",
  "max_body_bytes": "Bytes of the body of a request, >= 1.",
  "max_concurrent": "Answers that run or wait together, >= 1; beyond, 429.",
  "request_timeout": "Seconds for a request and its whole answer, > 0.",
  "stop_timeout": "Seconds that requests get to finish after a signal, >= 0.",
  "max_sessions": "Sessions kept, the least recently used go; 0 refuses them.",
}
HOST = flags.DEFINE_string(
  "host",
  "127.0.0.1",
  "Address to listen at; one that other machines reach needs a token.",
)
PORT = flags.DEFINE_integer("port", 8000, "Port; 0 takes a free one.")
SLOTS = flags.DEFINE_integer(
  "slots", 8, "Rows: answers that are decoded together, >= 1."
)
PIECE = flags.DEFINE_integer(
  "prefill_piece",
  512,
  "Tokens of a prompt that are read between two decoding steps, >= 1; fewer "
  "hold up other answers for less long.",
)
NAME = flags.DEFINE_string(
  "served_name", None, "Name of the model for clients; default: the folder's."
)
_TOKEN_FILE = flags.DEFINE_string(
  "token_file",
  None,
  "File with the token that clients must send; without it one is made and "
  "printed where a token is needed.",
)
_ALLOWED_HOSTS = flags.DEFINE_list(
  "allowed_hosts",
  [],
  "Names in the header Host that are let in, beside this machine's own, while "
  "listening at a loopback address.",
)
for _name, _text in _TEXTS.items():
  _default = getattr(_DEFAULTS, _name)
  _define = (
    flags.DEFINE_float if isinstance(_default, float) else flags.DEFINE_integer
  )
  _define(_name, _default, _text)

_LEAST_TOKEN = 16  # characters


def read_limits() -> Limits:
  """Limits from the flags.

  Raises:
    ValueError: a flag outside its range.
  """
  for flag in (SLOTS, PIECE):
    if flag.value < 1:
      raise ValueError(f"--{flag.name}={flag.value}: expected a number > 0")
  if not 0 <= PORT.value < 1 << 16:
    raise ValueError(f"--port={PORT.value}: expected 0 to 65535")
  return Limits(**{name: flags.FLAGS[name].value for name in _TEXTS})


def is_loopback(host: str) -> bool:
  """True for addresses that only this machine reaches."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


def read_token() -> tuple[str | None, bool]:
  """Token that clients must send, None for none; True if it is new.

  Raises:
    ValueError: no such file, or one that holds no token.
  """
  if _TOKEN_FILE.value is None:
    if is_loopback(HOST.value):
      return None, False
    return secrets.token_urlsafe(32), True
  where = f"--token_file={_TOKEN_FILE.value}"
  try:
    token = pathlib.Path(_TOKEN_FILE.value).read_text("ascii").strip()
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, "strerror", None) or "not ASCII"
    raise ValueError(f"{where}: expected a file with a token: {reason}") from (
      None
    )
  if len(token) < _LEAST_TOKEN or not token.isprintable() or " " in token:
    raise ValueError(
      f"{where}: expected one line of at least {_LEAST_TOKEN} characters "
      "without spaces"
    )
  return token, False


def allowed_hosts() -> frozenset[str] | None:
  """Names that the header Host may have; None allows all."""
  if not is_loopback(HOST.value):
    return None
  host = f"[{HOST.value}]" if ":" in HOST.value else HOST.value
  own = {"localhost", "127.0.0.1", "[::1]", host}
  return frozenset(own | set(_ALLOWED_HOSTS.value))
