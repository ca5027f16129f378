r"""Serves a trained model over HTTP, in the shape of OpenAI's completions.

  gdn2 serve --workdir=runs/tiny
  gdn2 serve --model=models/published --port=9000 --slots=16
  gdn2 serve --workdir=runs/tiny --host=0.0.0.0 --token_file=token

  curl http://127.0.0.1:8000/v1/completions \
    -H 'Content-Type: application/json' \
    -d '{"prompt": "Return the", "max_tokens": 40, "temperature": 0.7}'

Needs pip install 'gdn2-jax[serve]'. These are base models, which continue text:
there is no chat template. The fields are prompt (a text, token ids, or a list
of them), max_tokens, temperature, top_p, top_k, seed, n, stop, stream,
stream_options and session; one that is unknown or not offered is refused by
name. Other routes: GET /v1/models, /health and /metrics, DELETE
/v1/sessions/ID.

A session is a text that goes on: "session": "new" begins one, the response
tells its id, and later requests with this id send only what is new. The state
that is kept is as large after a million tokens as after one.

--slots answers are decoded together; more wait, up to --max_concurrent. A long
prompt is read --prefill_piece tokens at a time between decoding steps. With a
seed an answer is the same alone and among others.

The server listens at 127.0.0.1 for this machine alone. At any other --host
clients must send "Authorization: Bearer TOKEN": that of --token_file, or one
that is made and printed at the start. The traffic is not encrypted.

"compiling" is printed before programs are compiled, and "ready at http://..."
after; they are kept where `gdn2 chat` keeps them, so the next start is quick.
One line per request goes to standard error, without any text of it.

SIGTERM or Ctrl-C refuses new requests and lets the others finish, for
--stop_timeout seconds; a second one ends the process at once.

Exit status: 0 stopped by a signal; 1 refused, or an error of the device;
128 + number for a second signal; 130 Ctrl-C before the server listens.
"""

import asyncio
import os
import pathlib
import sys

from absl import flags

from gdn2_jax import cli
from gdn2_jax.inference.command.programs import use_cache
from gdn2_jax.kernels import self_check
from gdn2_jax.serve import flags as serve_flags
from gdn2_jax.serve.conversation import Sessions
from gdn2_jax.train.checkpoint import open_model as opening
from gdn2_jax.train.checkpoint.open_model import check_flags, open_model

flags.adopt_module_key_flags(opening)  # so that --help lists them
flags.adopt_module_key_flags(serve_flags)
_SELF_CHECK = cli.define_self_check()
_PATIENCE = 10.0  # seconds for a step of the worker to end


def main(argv: list[str]) -> None:
  """Entry point: loads the model, answers requests until a signal."""
  cli.refuse_positional(argv, "--workdir=runs/tiny")
  self_check.enable(_SELF_CHECK.value)
  try:
    with cli.one_line_errors():
      code = _serve()
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    code = 130
  sys.exit(code)


def _note(line: str) -> None:
  print(f"[{line}]", file=sys.stderr, flush=True)


def _serve() -> int:
  check_flags()
  limits = serve_flags.read_limits()
  token, is_new = serve_flags.read_token()
  try:
    from gdn2_jax.serve.http import app, process, service
    from gdn2_jax.serve.metrics import Metrics
    from gdn2_jax.serve.worker import Worker
  except ModuleNotFoundError as error:
    raise ValueError(
      f"no {error.name}: pip install 'gdn2-jax[serve]'"
    ) from None
  listener = process.bind(serve_flags.HOST.value, serve_flags.PORT.value)
  if reason := use_cache(flags.FLAGS.workdir):
    _note(reason)
  name, model = open_model()
  folder = pathlib.Path(flags.FLAGS.workdir or flags.FLAGS.model)
  served = serve_flags.NAME.value or folder.absolute().name
  _note(f"{served}, {name}")
  metrics = Metrics()
  worker = Worker(
    model,
    metrics,
    num_slots=serve_flags.SLOTS.value,
    prefill_piece=serve_flags.PIECE.value,
    max_length=limits.max_length,
    note=_note,
  )
  guard = app.make_app(
    service.Service(
      model_name=served,
      tokenizer=model.tokenizer,
      worker=worker,
      limits=limits,
      metrics=metrics,
      sessions=Sessions(limits.max_sessions),
    ),
    token=token,
    hosts=serve_flags.allowed_hosts(),
  )
  if is_new:
    _note(f"token: {token}")
  code = asyncio.run(process.serve(guard, worker, limits, listener, _note))
  if not worker.stop(_PATIENCE):
    os._exit(code)  # it compiles, which nothing can interrupt
  return code


if __name__ == "__main__":
  cli.run(main, __doc__)
