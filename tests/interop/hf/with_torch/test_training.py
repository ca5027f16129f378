"""Loss of labels and gradients, compared with JAX; a trained run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from gdn2_jax.interop.hf import moves
from gdn2_jax.interop.tree import flatten_params
from gdn2_jax.model.lm import LM
from gdn2_jax.train.checkpoint import load_run
from tests.interop.hf.with_torch.models import (
  TOLERANCE,
  Pair,
  error,
  export,
  load,
  make_pair,
  random_ids,
  torch_logits,
)
from tests.model.models import small_config
from tests.random_params import random_params
from tests.tiny_run import make_run, run_many


def jax_loss(config, params, ids):
  """Mean loss of the next tokens."""
  losses = LM(config).apply(
    {"params": params}, ids[:, :-1], ids[:, 1:], method="token_losses"
  )
  return losses.mean()


def torch_gradients(model, ids):
  """Loss, and gradients by name."""
  model.zero_grad()
  with torch.enable_grad():
    loss = model(ids, labels=ids).loss
    loss.backward()
  grads = {n: p.grad.numpy() for n, p in model.named_parameters()}
  return loss.item(), grads


def check(pattern):
  pair = make_pair(pattern)
  ids = random_ids(2, 21)
  with jax.default_matmul_precision("highest"):
    loss, grads = jax.value_and_grad(jax_loss, argnums=1)(
      pair.config, pair.params, jnp.asarray(ids, jnp.int32)
    )
  found, theirs = torch_gradients(pair.torch, torch.tensor(ids))
  assert abs(found - float(loss)) <= 1e-5 * float(loss)
  ours = flatten_params(grads, pair.config)
  assert len(theirs) == len(ours)
  worst = 0.0
  for move in moves(pair.config):
    wanted = move.layout.pack(*(ours[name] for name in move.ours))
    worst = max(worst, error(theirs[move.theirs], np.asarray(wanted)))
  assert worst <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [*"GKEMNA", "DS"])
def test_gradients_are_those_of_jax(pattern):
  check(pattern)


def test_labels_of_minus_100_do_not_count():
  pair = make_pair("DS")
  ids = torch.tensor(random_ids(1, 12))
  labels = ids.clone()
  labels[:, :6] = -100
  loss = pair.torch(ids, labels=labels).loss
  logits = pair.torch(ids).logits[0, 5:-1]
  expected = torch.nn.functional.cross_entropy(logits, ids[0, 6:])
  torch.testing.assert_close(loss, expected)


def test_checkpointed_layers_have_the_same_gradients():
  pair = make_pair("DS")
  ids = torch.tensor(random_ids(1, 9))
  model = load(pair.folder).train()
  _, plain = torch_gradients(model, ids)
  model.activation_checkpointing_enable()
  _, again = torch_gradients(model, ids)
  assert all(error(again[n], plain[n]) <= 1e-6 for n in plain)


@pytest.mark.slow
def test_a_trained_model_is_the_same_after_its_conversion():
  config = small_config("G", num_layers=1, vocab_size=260)
  params = random_params(config)
  optimizer = optax.adam(1e-2)
  ids = jnp.asarray(random_ids(4, 24), jnp.int32)

  @jax.jit
  def step(params, state):
    loss, grads = jax.value_and_grad(jax_loss, argnums=1)(config, params, ids)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, loss

  state, losses = optimizer.init(params), []
  for _ in range(5):
    params, state, loss = step(params, state)
    losses.append(float(loss))
  assert losses[-1] < losses[0]
  pair = export(config, params)
  found = torch_logits(pair.torch, np.asarray(ids))
  assert error(found, pair.logits(np.asarray(ids))) <= TOLERANCE


@pytest.mark.slow
def test_a_run_is_converted_by_the_command(tmp_path):
  workdir = make_run(tmp_path)
  argv = ["--from=gdn2_jax", "--to=hf", f"--src={workdir}"]
  (done,) = run_many(
    "gdn2_jax.interop.convert.__main__", [[*argv, f"--out={tmp_path}/hf"]]
  )
  assert done["code"] == 0, done["err"]
  assert "note: checkpoint of step 3" in done["out"]
  run = load_run(workdir)
  pair = Pair(run.config.model, run.params, tmp_path, load(tmp_path / "hf"))
  ids = random_ids(2, 24)
  assert error(torch_logits(pair.torch, ids), pair.logits(ids)) <= TOLERANCE


def test_torch_trains_it_further():
  pair = make_pair("DS")
  model = load(pair.folder).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
  ids, losses = torch.tensor(random_ids(2, 16)), []
  with torch.enable_grad():
    for _ in range(5):
      loss = model(ids, labels=ids).loss
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()
      losses.append(loss.item())
  assert losses[-1] < losses[0] and np.isfinite(losses).all()
