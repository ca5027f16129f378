"""Every parameter of every mixer starts as its initialisation says, by name.

Each expectation maps a parameter to numbers that are uniform on [0, 1] if it is
drawn as stated, whose mean, deviation and ends are then tested. A parameter
without an expectation fails.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.attention import AttentionConfig
from gdn2_jax.model.mixers.gdn2 import GDN2Config
from gdn2_jax.model.mixers.registry import kind_of

D, LAYERS, TAPS = 64, 2, 4
H, K, HV, V = 64, 16, 128, 24
HQ, HKV, C = 32, 16, 16  # of attention

# Initial ranges of A and dt, spelled out here.
DECAYS = {
  "paper": ((1.0, 16.0), (1e-3, 1e-1)),
  "long": ((1.0, 1.5), (1e-3, 1e-2)),
}


def symmetric(limit):
  """Uniform on (-limit, limit)."""
  return lambda x: (x / limit + 1) / 2


def xavier(fan_in, fan_out):
  return symmetric(2**-2.5 * math.sqrt(6 / (fan_in + fan_out)))


def a_log(low, high):
  return lambda x: (np.exp(x) - low) / (high - low)


def dt_bias(low, high):
  """log(dt) is uniform; softplus of the bias is dt."""
  return lambda x: np.log(np.log1p(np.exp(x)) / low) / math.log(high / low)


def all_equal(value):
  return float(value)


def conv(start):
  shift = np.zeros((TAPS, 1, 1))
  shift[-1] = start == "current"  # of the newest token
  return lambda x: symmetric(TAPS**-0.5)(x - shift)


def of_gdn2(letter, decay="paper", start="uniform"):
  """Expectations of a layer G, K, D or E."""
  found = {
    "q_proj.kernel": xavier(D, H * K),
    "k_proj.kernel": xavier(D, H * K),
    "v_proj.kernel": xavier(D, HV * V),
    "q_conv": conv(start),
    "k_conv": conv(start),
    "v_conv": conv(start),
    "g_down.kernel": xavier(D, V),
    "g_up.kernel": xavier(V, HV * V),
    "g_up.bias": all_equal(0),
    "o_norm": all_equal(1),
    "o_proj.kernel": xavier(HV * V, D),
  }
  if letter == "G":
    found["b_proj.kernel"] = xavier(D, H * K)
    found["w_proj.kernel"] = xavier(D, HV * V)
  else:
    found["beta_proj.kernel"] = xavier(D, H)
  a, dt = DECAYS[decay]
  if letter != "E":
    found |= {"A_log": a_log(*a), "dt_bias": dt_bias(*dt)}
  if letter == "D":
    found["a_proj.kernel"] = xavier(D, H)
  elif letter != "E":
    found["f_down.kernel"] = xavier(D, V)
    found["f_up.kernel"] = xavier(V, H * K)
  return found


def of_attention():
  return {
    "q_proj.kernel": symmetric(D**-0.5),
    "k_proj.kernel": symmetric(D**-0.5),
    "v_proj.kernel": symmetric(D**-0.5),
    "o_proj.kernel": symmetric((HQ * C * 2 * LAYERS) ** -0.5),
  }


def initial(letter, **gdn2):
  """Parameters of a fresh layer, by dotted name."""
  config = ModelConfig(
    model_dim=D,
    num_layers=LAYERS,
    pattern=letter,
    gdn2=GDN2Config(
      num_heads=H,
      num_value_heads=HV,
      key_dim=K,
      value_dim=V,
      conv_width=TAPS,
      implementation="reference",
      **gdn2,
    ),
    attention=AttentionConfig(
      num_heads=HQ, num_kv_heads=HKV, head_dim=C, implementation="xla"
    ),
  )
  config.validate()
  mixer = kind_of(letter).make(config, dtype="float32", param_dtype="float32")
  x = jnp.zeros((1, 1, D))
  # Only the initializers are compiled: the outputs of the layer are not used.
  make = jax.jit(lambda key: mixer.init(key, x)["params"])
  leaves = jax.tree.leaves_with_path(nn.unbox(make(jax.random.key(0))))
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(
      leaf, np.float64
    )
    for path, leaf in leaves
  }


def check(found, expected):
  assert found.keys() == expected.keys()
  for name, values in found.items():
    if isinstance(expected[name], float):
      assert (values == expected[name]).all(), name
    else:
      check_uniform(name, expected[name](values))


def check_uniform(name, u):
  """Five standard errors; the ends at a probability of exp(-12)."""
  n, slack = u.size, 1e-4  # float32, through a logarithm
  deviation = 12**-0.5
  assert u.min() >= -slack and u.max() <= 1 + slack, name
  assert u.min() <= 12 / n and u.max() >= 1 - 12 / n, name
  assert abs(u.mean() - 0.5) <= 5 * deviation / n**0.5, name
  # The standard error of a uniform variable's deviation: kurtosis 1.8.
  assert abs(u.std() / deviation - 1) <= 5 * (0.8 / (4 * n)) ** 0.5, name


def some_quick(letters, quick):
  """Parameters of a test, deep but for some."""
  return [
    pytest.param(x, marks=() if x in quick else pytest.mark.deep)
    for x in letters
  ]


@pytest.mark.parametrize("letter", some_quick("GKDE", "GD"))
def test_recurrent_layers(letter):
  check(initial(letter), of_gdn2(letter))


@pytest.mark.parametrize("letter", some_quick("SA", "S"))
def test_attention(letter):
  check(initial(letter), of_attention())


@pytest.mark.deep
@pytest.mark.parametrize("letter", "GKD")
def test_long_memory_and_convolutions_on_the_current_token(letter):
  found = initial(letter, decay_init="long", conv_init="current")
  check(found, of_gdn2(letter, "long", "current"))
  half_life = np.log(2) / np.median(
    np.exp(found["A_log"])[:, None]
    * np.log1p(np.exp(found["dt_bias"].reshape(H, -1)))
  )
  assert 150 < half_life < 200


@pytest.mark.deep
def test_scalar_gates_of_their_own():
  found = initial("G", erase_gate="head", write_gate="head")
  check(
    found,
    of_gdn2("G")
    | {"b_proj.kernel": xavier(D, H), "w_proj.kernel": xavier(D, HV)},
  )
  off = of_gdn2("G")
  del off["b_proj.kernel"]
  check(initial("G", erase_gate="off"), off)


def test_wrong_moments_are_found():
  """The checks tell a normal, a scaled and a shifted start from the stated."""
  rng = np.random.default_rng(0)
  uniform = rng.uniform(0, 1, 4096)
  check_uniform("right", uniform)
  for wrong in (
    rng.normal(0.5, 12**-0.5, 4096),
    0.9 * uniform + 0.05,
    1.1 * uniform,
    uniform + 0.01,
    uniform**1.2,
  ):
    with pytest.raises(AssertionError, match="wrong"):
      check_uniform("wrong", wrong)
