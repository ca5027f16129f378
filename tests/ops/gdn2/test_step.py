"""One token at a time, and the op under JAX's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gdn2_jax.ops.gdn2 import xla_step
from gdn2_jax.ops.gdn2.api import gdn2, gdn2_step, select_implementation
from tests import numerics

IMPLEMENTATIONS = ("reference", "xla")


def make_mesh(shape, names):
  auto = (jax.sharding.AxisType.Auto,) * len(shape)
  return jax.make_mesh(shape, names, axis_types=auto)


def arrays_of(case, *names):
  return tuple(jnp.asarray(case[n]) for n in names or numerics.INPUTS)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value_heads", [1, 2])
def test_a_step_is_a_sequence_of_one(implementation, value_heads, rng):
  case = numerics.make_case(rng, B=2, T=1, value_heads=value_heads)

  def step(inputs, state, segment_ids, scale):
    o, state = gdn2_step(
      *(x[:, 0] for x in inputs),
      state,
      scale=scale,
      implementation=implementation,
    )
    return o[:, None], state

  numerics.assert_close(numerics.evaluate(step, case), numerics.oracle(case))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_steps_equal_the_sequence(implementation, rng):
  case = numerics.make_case(rng, T=40, dtype=jnp.bfloat16, g=(-1.0, 0.0))
  inputs = arrays_of(case)
  whole = numerics.evaluate(numerics.op(implementation), case, gradients=False)
  step = jax.jit(gdn2_step, static_argnames="implementation", donate_argnums=6)
  state, outputs = jnp.array(case["initial_state"]), []
  for t in range(40):
    given = state
    o, state = step(
      *(x[:, t] for x in inputs), state, implementation=implementation
    )
    assert given.is_deleted()  # the state is updated in place
    outputs.append(o)
  assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
  numerics.assert_close(
    {"final_state": state}, {"final_state": whole["final_state"]}
  )
  # Float32 sums in another order may round to the neighbouring bfloat16.
  error = numerics.rel_rms(jnp.stack(outputs, axis=1), whole["o"])
  assert error < 2**-8


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_of_the_states_of_many_layers(implementation, rng):
  case = numerics.make_case(rng, B=2, T=1, value_heads=2)
  token = tuple(x[:, 0] for x in arrays_of(case))
  state = jnp.asarray(case["initial_state"])
  o, new = gdn2_step(*token, state, implementation=implementation)
  states = jnp.stack([state, 2 * state, 3 * state])
  step = jax.jit(gdn2_step, static_argnames="implementation")
  for layer in (0, jnp.int32(0)):
    got, after = step(
      *token, states, layer=layer, implementation=implementation
    )
    numerics.assert_close(
      {"o": got, "final_state": after[0]}, {"o": o, "final_state": new}
    )
    np.testing.assert_array_equal(after[1:], states[1:])


def test_rows_one_by_one_where_the_states_outgrow_the_cache(rng, monkeypatch):
  case = numerics.make_case(rng, B=3, T=1, value_heads=2)
  token = tuple(x[:, 0] for x in arrays_of(case))
  state = jnp.asarray(case["initial_state"])
  together = gdn2_step(*token, state, implementation="xla")
  monkeypatch.setattr(xla_step, "_CACHE_BYTES", 0)
  rows = gdn2_step(*token, state, implementation="xla")
  for x, y in zip(rows, together, strict=True):
    assert numerics.rel_rms(x, y) < numerics.FLOAT32_BOUND


@pytest.mark.slow
def test_vmap_equals_a_loop(rng):
  cases = [numerics.make_case(rng, B=1, T=10) for _ in range(2)]
  stacked = [jnp.stack(x) for x in zip(*map(arrays_of, cases), strict=True)]

  def loss(*inputs):
    o, state = gdn2(*inputs, implementation="xla")
    return jnp.sum(jnp.sin(o)) + jnp.sum(state**2)

  gradient = jax.grad(loss, argnums=tuple(range(6)))
  together = jax.jit(jax.vmap(gradient))(*stacked)
  for i, case in enumerate(cases):
    alone = jax.jit(gradient)(*arrays_of(case))
    for name, many, one in zip(
      numerics.GRADIENTS, together, alone, strict=False
    ):
      assert numerics.rel_rms(many[i], one) < numerics.FLOAT32_BOUND, name


@pytest.mark.slow
def test_remat_changes_nothing(rng):
  inputs = arrays_of(numerics.make_case(rng, T=10))

  def loss(*inputs):
    return jnp.sum(jnp.sin(gdn2(*inputs, implementation="xla")[0]))

  plain = jax.jit(jax.grad(loss, argnums=3))(*inputs)
  remat = jax.jit(jax.grad(jax.checkpoint(loss), argnums=3))(*inputs)
  np.testing.assert_array_equal(plain, remat)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("given_state", [False, True])
def test_shard_map_over_batch_and_heads(implementation, given_state, rng):
  case = numerics.make_case(rng, B=2, T=10, H=2, value_heads=2)
  inputs = arrays_of(case)
  # One state for all rows: replicated over the batch axis of the mesh.
  state = jnp.asarray(case["initial_state"][:1])
  mesh = make_mesh((2, 2), ("data", "heads"))

  def call(state, *inputs):
    o, final = gdn2(
      *inputs,
      state=jnp.tile(state, (inputs[0].shape[0], 1, 1, 1))
      if given_state
      else None,
      implementation=implementation,
    )
    return o, final

  tokens, heads = P("data", None, "heads", None), P(None, "heads")
  sharded = jax.shard_map(
    call,
    mesh=mesh,
    in_specs=(heads, *(6 * [tokens])),
    out_specs=(tokens, P("data", "heads")),
  )

  def gradient(call):
    def loss(state, *inputs):
      o, final = call(state, *inputs)
      return jnp.sum(jnp.sin(o)) + jnp.sum(final**2)

    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(7))))

  value, grads = gradient(sharded)(state, *inputs)
  expected, expected_grads = gradient(call)(state, *inputs)
  assert abs(value - expected) < 1e-5 * abs(expected)
  for x, y in zip(grads, expected_grads, strict=True):
    assert numerics.rel_rms(x, y) < numerics.FLOAT32_BOUND


def test_a_replicated_input_gets_the_sum_of_its_gradients(rng):
  case = numerics.make_case(rng, B=2, T=10)
  q, k, *rest = arrays_of(case)
  k = k[:1]  # one k for all rows
  mesh = make_mesh((2,), ("data",))

  def loss_of(call):
    return jax.jit(jax.grad(lambda k: jnp.sum(jnp.sin(call(k, q, *rest)))))

  sharded = jax.shard_map(
    lambda k, q, *rest: gdn2(q, k, *rest, implementation="xla")[0],
    mesh=mesh,
    in_specs=(P(), *(5 * [P("data")])),
    out_specs=P("data"),
  )

  def whole(k, q, *rest):
    k = jnp.tile(k, (2, 1, 1, 1))
    return gdn2(q, k, *rest, implementation="xla")[0]

  dk, expected = loss_of(sharded)(k), loss_of(whole)(k)
  assert numerics.rel_rms(dk, expected) < numerics.FLOAT32_BOUND


@pytest.mark.slow
def test_backward_memory_grows_with_states_per_chunk_only(rng):
  def temporaries(T):
    shape = jax.ShapeDtypeStruct((1, T, 2, 32), jnp.float32)

    def loss(*inputs):
      return jnp.sum(gdn2(*inputs, implementation="xla")[0] ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=tuple(range(6))))
    compiled = gradient.lower(*(6 * [shape])).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  per_token_head = (temporaries(2048) - temporaries(1024)) / (1024 * 2)
  # A state for every 16 tokens, and a few arrays of the size of the inputs.
  assert per_token_head <= 4 * (32 * 32 / 16 + 8 * 32)


def test_the_choice_can_be_asked(rng):
  case = numerics.make_case(rng)
  inputs = arrays_of(case)
  chosen = select_implementation()
  assert chosen in IMPLEMENTATIONS
  default, _ = jax.jit(gdn2)(*inputs)
  named, _ = jax.jit(gdn2, static_argnames="implementation")(
    *inputs, implementation=chosen
  )
  np.testing.assert_array_equal(default, named)
