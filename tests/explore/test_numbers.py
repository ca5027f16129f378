"""Reads, changed gates and logits against the recurrence in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.explore.changes import CHANGES, Change
from gdn2_jax.explore.reads import contributions, read_coefficients
from gdn2_jax.explore.runs import Place, make_runner
from gdn2_jax.model.lm import LM
from gdn2_jax.model.mixers import kinds, registry
from gdn2_jax.model.mixers.gdn2 import GDN2Mixer
from tests.explore.recurrence import changed, outputs
from tests.model.models import small_config
from tests.numerics import rel_rms
from tests.random_params import random_params

T = 19
TOKENS = np.random.default_rng(1).integers(0, 61, T)
# Float32 sums in another order.
BOUND = 1e-5
TRIED = {
  "tie": Change(tie=True),
  "no erase": Change(erase=0.0),
  "no write": Change(write=0.0),
  "no decay": Change(decay=0.0),
  "all": Change(tie=True, decay=0.3, erase=1.7, write=0.6),
}
PLACES = [Place(0, 1), Place(0, 2), Place(2, 3)]


@functools.cache
def runner(pattern="GS"):
  config = small_config(pattern)
  return make_runner(config, random_params(config))


@functools.cache
def run_all():
  """(logits, head) by name of the change and place, from one program."""
  every = [Place(layer, head) for layer in (0, 2) for head in range(4)]
  rows = {("as is", place): Change() for place in every}
  rows |= {(name, place): TRIED[name] for name in TRIED for place in PLACES}
  rows |= {(name, Place(0, 0)): change for name, change in CHANGES.items()}
  places = [place for _, place in rows]
  logits, heads = runner().run(TOKENS, places, list(rows.values()))
  return dict(zip(rows, zip(logits, heads, strict=True), strict=True))


def as_is():
  """Heads by place, nothing changed."""
  return {
    p: head for (name, p), (_, head) in run_all().items() if name == "as is"
  }


def test_what_a_query_reads_sums_to_the_output(rng):
  q, k, v, g, b, w = rng.normal(size=(6, T, 16))
  k /= np.linalg.norm(k, axis=1, keepdims=True)
  g, b, w = -np.abs(g), rng.uniform(0, 2, b.shape), rng.uniform(size=w.shape)
  a = read_coefficients(q, k, g, b)
  o, _ = outputs(q, k, v, g, b, w)
  assert rel_rms(a @ (w * v), o) < 1e-13
  np.testing.assert_array_equal(np.triu(a, 1), 0)
  sizes = contributions(a, v, w)
  want = np.linalg.norm(a[7, 3] * w[3] * v[3])
  np.testing.assert_allclose(np.abs(sizes[7, 3]), want, rtol=1e-13)
  assert sizes[7, 3] * a[7, 3] > 0


def test_what_a_head_of_a_model_reads_sums_to_its_output():
  for head in as_is().values():
    a = read_coefficients(head.q, head.k, head.g, head.b)
    assert rel_rms(a @ (head.w * head.v), head.o) < BOUND


def test_as_is_the_logits_are_those_of_the_model():
  config = small_config("GS")
  params = {"params": random_params(config)}
  want, _ = jax.jit(LM(config).apply)(params, jnp.asarray(TOKENS)[None])
  for place in as_is():
    logits, _ = run_all()["as is", place]
    assert rel_rms(logits, want[0]) < BOUND


@pytest.mark.parametrize("name", TRIED)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_changed_head_is_the_recurrence_with_changed_gates(name, place):
  before = as_is()
  _, head = run_all()[name, place]
  first = 2 * (place.head // 2)  # of the value heads of its key head
  own = before[place]
  pair = [before[Place(place.layer, first + i)].w for i in range(2)]
  gates = changed(own.g, own.b, pair, place.head - first, TRIED[name])
  for symbol, want in zip("gbw", gates, strict=True):
    np.testing.assert_allclose(getattr(head, symbol), want, atol=1e-6)
  o, _ = outputs(own.q, own.k, own.v, *gates)
  if name == "no write":
    assert not o.any() and not head.o.any()
    return
  assert rel_rms(head.o, o) < BOUND
  assert rel_rms(head.o, own.o) > 1e-3


class Tied(GDN2Mixer):
  """Gates of key head 0 tied, as a subclass would."""

  def gates(self, g, b, w):
    mean = (b[:, :, 0].mean(-1) + w[:, :, :2].mean((-1, -2))) / 2
    b = b.at[:, :, 0].set(mean[..., None])
    return g, b, w.at[:, :, :2].set(mean[..., None, None])


def test_all_layers_after_the_changed_one_are_included():
  registry.register("z", kinds.gdn2_kind("tied", Tied), replace=True)
  mixed = small_config("zSGS", num_layers=4)
  params = dict(runner().params)
  second = params.pop("group_1")
  params["group_0"] = params["group_0"] | {
    f"layer_{i + 2}": second[f"layer_{i}"] for i in range(2)
  }
  stacked = jax.tree.map(lambda x: x[None], params.pop("group_0"))
  params = {"params": params | {"groups": stacked}}
  want, _ = jax.jit(LM(mixed).apply)(params, jnp.asarray(TOKENS)[None])
  logits, _ = run_all()["tie", Place(0, 1)]
  assert rel_rms(logits, want[0]) < BOUND
  assert rel_rms(logits, run_all()["as is", Place(0, 1)][0]) > 1e-4


def test_every_change_of_a_page_changes_the_output():
  own = as_is()[Place(0, 0)]
  for name in list(CHANGES)[1:]:
    _, head = run_all()[name, Place(0, 0)]
    assert rel_rms(head.o, own.o) > 1e-3, name


@pytest.mark.parametrize(
  ("place", "change", "says"),
  [
    (Place(1, 0), Change(), "layer=1: expected one of 0, 2"),
    (Place(0, 4), Change(), "head=4: expected 0 to 3"),
    (Place(0, -1), Change(), "head=-1: expected 0 to 3"),
    (Place(0, 0), Change(erase=-1.0), "erase=-1.0: expected a finite factor"),
    (Place(0, 0), Change(decay=np.inf), "decay=inf: expected a finite factor"),
  ],
)
def test_wrong_places_and_factors_are_refused(place, change, says):
  with pytest.raises(ValueError, match=says):
    runner().run(TOKENS, [place], [change])


def test_a_model_without_gates_is_refused():
  config = small_config("S")
  with pytest.raises(ValueError, match="pattern='S': expected at least one"):
    make_runner(config, None)
