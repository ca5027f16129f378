r"""Continues a prompt with a trained model, printing the text as it comes.

  python -m gdn2_jax.generate --workdir=runs/tiny --prompt="Return the"
  python -m gdn2_jax.generate --workdir=runs/tiny --prompt="def " --greedy
  python -m gdn2_jax.generate --workdir=runs/tiny --prompt="Return the" \
    --temperature=0.7 --top_k=50 --top_p=0.9 --max_new_tokens=400 --seed=3

The workdir is that of `python -m gdn2_jax.train`; --step picks one of its
checkpoints, by default the newest. The text ends at the end of a document or
after --max_new_tokens. The same flags give the same text. Speed is reported
on standard error. Exit status: 0 done, 1 refused (the reason is on standard
error).
"""

import dataclasses
import pathlib
import sys
import time

import jax
from absl import flags

from gdn2_jax import cli
from gdn2_jax.inference import Sampler, TextStream, stream
from gdn2_jax.ops import self_check
from gdn2_jax.train.checkpoint import Run, load_run

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 128, "Tokens to add at most, >= 1."
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.8, "Below 1 sharpens, above 1 flattens; 0 is --greedy."
)
_TOP_K = flags.DEFINE_integer(
  "top_k", 0, "Draw among so many most probable tokens only; 0 = all."
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
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws, 0 to 2**32 - 1.")
_STEP = flags.DEFINE_integer(
  "step", None, "Which checkpoint; by default the newest."
)
_SELF_CHECK = cli.define_self_check()

_TOKENS_PER_DISPATCH = 8


def main(argv: list[str]) -> None:
  """Entry point: checks the command line, loads the run, streams text."""
  cli.refuse_positional(argv, '--prompt="Return the"')
  self_check.enable(_SELF_CHECK.value)
  with cli.one_line_errors():
    sampler = _sampler()
    run = load_run(_WORKDIR.value, _STEP.value)
    sampler = dataclasses.replace(sampler, vocab_size=run.tokenizer.vocab_size)
    _use_compilation_cache()
    ids = run.tokenizer.encode(_PROMPT.value)
    tokens = stream(
      run.params,
      run.config.model,
      ids,
      _MAX_NEW_TOKENS.value,
      rng=jax.random.key(_SEED.value),
      sampler=sampler,
      stop_ids=(run.tokenizer.eos_id,),
      tokens_per_dispatch=_TOKENS_PER_DISPATCH,
    )
  _print(run, _PROMPT.value, tokens, len(ids))


def _sampler() -> Sampler:
  """The sampler of the flags, after checking what costs nothing to check."""
  if not _WORKDIR.value:
    raise ValueError("--workdir is missing, e.g. --workdir=runs/tiny")
  if not _PROMPT.value:
    raise ValueError('--prompt is missing or empty, e.g. --prompt="Return the"')
  if _MAX_NEW_TOKENS.value < 1:
    raise ValueError(f"--max_new_tokens={_MAX_NEW_TOKENS.value}: expected >= 1")
  if not 0 <= _SEED.value < 2**32:
    raise ValueError(f"--seed={_SEED.value}: expected 0 to 2**32 - 1")
  return Sampler(
    temperature=0.0 if _GREEDY.value else _TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
  )


def _use_compilation_cache() -> None:
  """Compiles into the cache that training made, if it made one."""
  cache = pathlib.Path(_WORKDIR.value) / ".jax_cache"
  if cache.is_dir():
    jax.config.update("jax_compilation_cache_dir", str(cache.absolute()))


def _print(run: Run, prompt: str, tokens, prompt_tokens: int) -> None:
  """Prints prompt and continuation, then the speed on standard error."""
  print(prompt, end="", flush=True)
  text = TextStream(run.tokenizer.decode)
  start, times = time.perf_counter(), []
  try:
    for token in tokens:
      times.append(time.perf_counter() - start)
      print(text.push(token), end="", flush=True)
  except KeyboardInterrupt:
    pass  # enough read: end the text here, and still say how fast it was
  print(text.flush(), flush=True)

  report = f"step {run.step}, {prompt_tokens} prompt tokens"
  if times:
    report += f", first token after {times[0]:.2f} s with compilation"
  # The first dispatch of the decoder compiles it: measure from its last token.
  warm = 1 + _TOKENS_PER_DISPATCH
  if len(times) > warm:
    speed = (len(times) - warm) / (times[-1] - times[warm - 1])
    report += f", then {speed:.1f} tokens/s"
  print(f"[{report}, {len(times)} tokens]", file=sys.stderr)


if __name__ == "__main__":
  cli.run(main, __doc__)
