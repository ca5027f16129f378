"""A mixer from outside of the package, through everything that a run does."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import gdn2_jax
from gdn2_jax import MixerKind, register_mixer
from gdn2_jax.inference.sampling import Sampler
from gdn2_jax.model import layers
from gdn2_jax.model.lm import LM, init_cache
from gdn2_jax.model.mixers.registry import read_options
from gdn2_jax.ops.segments import segment_starts
from gdn2_jax.plan import plan
from gdn2_jax.sharding import MeshConfig
from gdn2_jax.train.checkpoint import load_run
from gdn2_jax.train.checkpoint.meta import committed_steps
from gdn2_jax.train.loop import train
from tests.faults.tiny import tiny_config
from tests.numerics import FLOAT32_BOUND, rel_rms

OPTIONS = {"average.half_life": 4.0}


class Average(nn.Module):
  """Moving average of every channel, m <- a m + (1 - a) W x; y = m W_o."""

  half_life: float
  dtype: str = "float32"
  param_dtype: str = "float32"

  @nn.compact
  def __call__(self, x, segment_ids=None, cache=None):
    D, types = x.shape[-1], (self.dtype, self.param_dtype)
    init = layers.fan_in_uniform()
    u = layers.Linear((D,), ("embed", "mlp"), init, False, *types)(x)
    start = nn.initializers.constant(np.log(2) / self.half_life)
    a = jnp.exp(-layers.parameter(self, "rate", start, ("mlp",), (D,)))[None]
    if segment_ids is None:
      segment_ids = jnp.ones(x.shape[:2], jnp.int32)

    def step(m, token):
      u, restart, valid = token
      m = jnp.where(restart[:, None], 0.0, m)
      m = jnp.where(valid[:, None], a * m + (1 - a) * u, m)
      return m, m

    first = jnp.zeros((x.shape[0], D), jnp.float32) if cache is None else cache
    tokens = (u, segment_starts(segment_ids), segment_ids != 0)
    m, every = jax.lax.scan(
      step, first, jax.tree.map(lambda a: a.swapaxes(0, 1), tokens)
    )
    out = layers.Linear((D,), ("mlp", "embed"), init, False, *types)
    return out(every.swapaxes(0, 1)), None if cache is None else m


def make(config, **fields):
  (half_life,) = read_options(config, OPTIONS).values()
  return Average(half_life, **fields)


KIND = MixerKind(
  name="moving average",
  make=make,
  init_cache=lambda config, batch_size, _: jnp.zeros(
    (batch_size, config.model_dim), jnp.float32
  ),
  state_floats=lambda config: config.model_dim,
  options=OPTIONS,
)


def own_config(cache_dir):
  config = tiny_config(str(cache_dir), num_steps=4)
  config.mesh = MeshConfig(fsdp=2, tensor=2, data=2)
  config.model.pattern = "e"
  config.model.num_layers = 1
  config.model.options = ("average.half_life=8",)
  config.checkpoint.every_steps = 2
  return config


@pytest.fixture(scope="module", autouse=True)
def registered():
  register_mixer("e", KIND, replace=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(config, workdir) of four steps of training."""
  folder = tmp_path_factory.mktemp("own")
  config = own_config(folder / "cache")
  train(config, folder / "run", say=lambda line: None)
  return config, folder / "run"


@pytest.mark.slow
def test_training_resumes_bit_for_bit(run, tmp_path):
  config, workdir = run
  assert 2 in committed_steps(workdir / "checkpoints")
  shutil.copytree(workdir, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
  train(config, tmp_path / "run", say=lambda line: None)
  a, b = (load_run(folder, 4).params for folder in (workdir, tmp_path / "run"))
  jax.tree.map(np.testing.assert_array_equal, a, b)
  before = load_run(workdir, 2).params
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, a, before)
  assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_saved_loaded_and_generated_with_and_without_a_cache(run, tmp_path):
  config, workdir = run
  params = load_run(workdir).params
  gdn2_jax.save_model(tmp_path / "model", params, config.model)
  model = gdn2_jax.load_model(tmp_path / "model")
  assert model.config == config.model
  prompt, new = [5, 7, 11], 5
  (got,) = gdn2_jax.generate(
    model.params,
    model.config,
    [prompt],
    new,
    rng=jax.random.key(0),
    sampler=Sampler(temperature=0.0),
  )
  ids = list(prompt)
  apply = jax.jit(LM(model.config).apply)
  for _ in range(new):
    row = jnp.asarray([ids + [0] * (len(prompt) + new - len(ids))])
    logits, _ = apply({"params": model.params}, row)
    ids.append(int(logits[0, len(ids) - 1].argmax()))
  assert got == ids[len(prompt) :]


@pytest.mark.slow
def test_a_cache_carries_documents_and_padding(run):
  config, workdir = run
  params, lm = load_run(workdir).params, LM(config.model)
  tokens = jax.random.randint(jax.random.key(1), (1, 12), 0, 259)
  ids = jnp.asarray([[1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 2]])
  apply = jax.jit(lm.apply)
  want, _ = apply({"params": params}, tokens, ids)
  alone, _ = apply({"params": params}, tokens[:, 5:])
  assert rel_rms(want[:, 5:], alone) <= FLOAT32_BOUND
  cache = init_cache(config.model, 1)
  _, cache = apply({"params": params}, tokens[:, :10], ids[:, :10], cache)
  got, _ = apply({"params": params}, tokens[:, 10:], None, cache)
  assert rel_rms(got, want[:, 10:]) <= FLOAT32_BOUND


@pytest.mark.slow
def test_the_plan_counts_it(run):
  config, _ = run
  figures = plan(config, 8, compile_step=False)
  d, mlp = config.model.model_dim, config.model.mlp_dim
  layer = 2 * d * d + d + 3 * d * mlp + 2 * d
  assert figures["parameters"]["blocks"] == layer
  assert figures["state_bytes_per_sequence"]["moving average"] == d * 4


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (("average.half_life",), "'average.half_life': expected 'name=value'"),
    (("average.half_life=x",), "average.half_life='x': expected a number"),
    (
      ("half_life=4",),
      "'half_life' is no setting of the mixers in pattern='e'",
    ),
    (("average.half_life=4",) * 2, "'average.half_life' is given twice"),
  ],
)
def test_wrong_options_are_refused(options, message, tmp_path):
  model = dataclasses.replace(own_config(tmp_path).model, options=options)
  with pytest.raises(ValueError, match=r"model\.options=") as error:
    model.validate()
  assert message in str(error.value) and "\n" not in str(error.value)


def test_options_have_the_types_of_their_defaults():
  config = dataclasses.make_dataclass("Config", ["options"])(
    ("a=3", "b=0.5", "c=true", "d=x=y")
  )
  found = read_options(config, {"a": 1, "b": 1.0, "c": False, "d": "", "e": 2})
  assert found == {"a": 3, "b": 0.5, "c": True, "d": "x=y", "e": 2}
  assert type(found["a"]) is int


def test_letters_are_not_taken_twice():
  with pytest.raises(ValueError, match="'G': in use, for Gated DeltaNet-2"):
    register_mixer("G", KIND, replace=True)
  with pytest.raises(ValueError, match="'e': in use, for moving average"):
    register_mixer("e", KIND)
