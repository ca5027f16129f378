"""What XLA makes of the 1.3B model's training step on eight devices.

The collectives below are those of the versions in constraints.txt. A change
of the model, of the sharding rules or of JAX may move them: look at what
changed (`compiled.as_text()`), and if it is meant, copy the counts that the
failure prints into COLLECTIVES.
"""

import collections
import importlib
import re

import pytest

from gdn2_jax.plan import compiled_step

pytestmark = pytest.mark.slow

GIB = 2**30

# Mesh (fsdp, tensor) to operations of the program, loop bodies counted once.
# On the CPU a gradient's reduce-scatter is an all-reduce and a slice.
COLLECTIVES = {
  (8, 1): {"all-gather": 25, "all-reduce": 6, "all-to-all": 2},
  (4, 2): {"all-gather": 26, "all-reduce": 19, "all-to-all": 2},
}
_COLLECTIVE = re.compile(
  r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
  r"|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)


def compile_1p3b(fsdp: int, tensor: int):
  """The preset with one row a device and microbatch, as a loop over layers.

  What a loop repeats is counted once, and recomputing its layers leaves little
  memory beside what a dropped constraint would take.
  """
  config = importlib.import_module("gdn2_jax.configs.gdn2_1p3b").get_config()
  config.model.remat, config.model.scan_unroll = "full", 1
  config.mesh.fsdp, config.mesh.tensor = fsdp, tensor
  config.grad_accum = config.data.batch_size // fsdp
  return compiled_step(config, 8)[0]


def test_the_count_sees_collectives():
  text = """
  %a.1 = f32[8]{0} all-gather(%p), dimensions={0}
  %b = (f32[], f32[]) all-reduce-start(%x, %y), to_apply=%add
  %c = (f32[], f32[]) all-reduce-done(%b)
  """
  assert _COLLECTIVE.findall(text) == ["all-gather", "all-reduce"]


@pytest.mark.parametrize("mesh", COLLECTIVES)
def test_the_1p3b_step_keeps_its_memory_and_its_traffic(mesh, capfd):
  compiled = compile_1p3b(*mesh)
  # XLA logs to the file descriptor, not to sys.stderr.
  log = capfd.readouterr().err
  assert "rematerialization" not in log.lower(), log

  memory = compiled.memory_analysis()
  # A gradient of 0.7 GiB, the same again of the microbatch, 18 residual
  # streams of one row; without its constraints the step needs 16 GiB.
  assert memory.temp_size_in_bytes < 4 * GIB
  # Parameters and two moments in float32, an eighth each.
  assert 2 * GIB < memory.argument_size_in_bytes < 2.2 * GIB

  text = compiled.as_text()
  counted = dict(collections.Counter(_COLLECTIVE.findall(text)))
  assert counted == COLLECTIVES[mesh], counted
  # The embedding's gradient: 16 bits stagnate at tokens that come often.
  assert set(re.findall(r" = (\w+)\[\S* scatter\(", text)) == {"f32"}
