"""Command `gdn2`: index of all commands.

  gdn2 train       train a language model; the same command resumes it
  gdn2 generate    continue a prompt with a trained model
  gdn2 chat        talk with a trained model, line by line
  gdn2 serve       answer requests over HTTP, as OpenAI's completions
  gdn2 eval        loss on held-out text, needles, recall, lm-eval's tasks
  gdn2 explore     page of gates, states and changed gates over a text
  gdn2 plan        parameters, memory and FLOPs of a config, before it runs
  gdn2 data        pack text or FineWeb-Edu into rows for training
  gdn2 export      publish a run as one folder, with programs if wanted
  gdn2 convert     read and write weights of other programs
  gdn2 launch      start and restart several processes of one run
  gdn2 replicate   compare mixers on small tasks, with seeds and claims
  gdn2 bench       time the op, the GPU kernels and serving
  gdn2 aot         compile the GPU kernels for an H100, without one

`gdn2 COMMAND --help` explains a command; `python -m gdn2_jax.COMMAND` is the
same. `gdn2 --version` prints versions. Start with

  gdn2 train --config=tiny_cpu --workdir=runs/tiny
  gdn2 generate --workdir=runs/tiny --prompt="Return the"
"""

import re
import runpy
import sys
from importlib import metadata

from gdn2_jax import __version__, cli

COMMANDS = tuple(re.findall(r"^  gdn2 (\w+)   ", __doc__, re.MULTILINE))


def main() -> None:
  """Runs the command that the first argument names."""
  if sys.argv[1:] == ["--version"]:
    print(f"gdn2-jax {__version__}, jax {metadata.version('jax')}")
    return
  command = cli.take_command(COMMANDS, __doc__)
  # As python -m does, so that a command sees itself as __main__.
  runpy.run_module(f"gdn2_jax.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
