"""Tasks against dictionaries that replay their sequences."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.eval.synthetic import steps
from gdn2_jax.eval.synthetic.answers import KINDS, kinds_of_answers
from gdn2_jax.eval.synthetic.mqar import Mqar
from gdn2_jax.eval.synthetic.steps import NO_LABEL, NONE, as_tokens
from gdn2_jax.eval.synthetic.tasks import (
  TASKS,
  Noise,
  Overwrite,
  Recall,
  Reset,
  SetAdd,
  examples,
)

HALF = steps.FIRST_VALUE + steps.VALUES // 2


kinds = jax.jit(kinds_of_answers)
drawn = jax.jit(examples, static_argnames=("task", "size"))


def draw(task, size=32, first=0, seed=0):
  return jax.tree.map(np.asarray, drawn(task, seed, first, size))


def split(tokens, labels):
  """Steps of the context, and (key, marker, label) of the queries."""
  asked = labels != NO_LABEL
  writes = int(np.argmax(asked))
  assert asked[writes:].all() and not asked[:writes].any()
  queries = [
    (int(key), int(marker), int(label))
    for (key, marker), label in zip(
      tokens[writes:], labels[writes:], strict=True
    )
  ]
  return [tuple(map(int, step)) for step in tokens[:writes]], queries


def replay_newest(context):
  """A dictionary of the newest values, and how often each key was written."""
  held, count = {}, collections.Counter()
  for key, value in context:
    assert 0 <= key < steps.KEYS
    if value < steps.FIRST_NOISE:
      held[key] = value
      count[key] += 1
  return held, count


def each(task, size=32):
  for tokens, labels, groups in zip(*draw(task, size), strict=True):
    context, queries = split(tokens, labels)
    yield context, queries, groups[len(context) :]


@pytest.mark.parametrize("task", [Recall(), Recall(1), Recall(128)])
def test_recall(task):
  for context, queries, _ in each(task, 4):
    held, count = replay_newest(context)
    assert len(context) == len(queries) == task.pairs == len(held)
    assert set(count.values()) == {1}
    assert {key for key, _, _ in queries} == set(held)
    assert all(m == steps.QUERY and held[k] == y for k, m, y in queries)


@pytest.mark.parametrize("task", [Overwrite(), Overwrite(3, 0, 9)])
def test_overwrite(task):
  rewritten = 0
  for context, queries, groups in each(task):
    held, count = replay_newest(context)
    assert len(context) == task.writes
    assert len(queries) == len(held) == task.hot + task.cold
    for (key, _, label), group in zip(queries, groups, strict=True):
      assert held[key] == label
      if task.groups[group] == "cold":
        assert count[key] == 1
      rewritten += count[key] > 1
    assert int(groups.sum()) == task.cold
  assert rewritten


def test_set_and_add():
  task, seconds = SetAdd(), collections.Counter()
  for context, queries, groups in each(task):
    held = {}
    for key, value in context:
      if value < HALF:
        held[key] = [value, NONE]
      else:
        assert held[key][1] == NONE
        held[key][1] = value
    assert len(held) == len(queries) == task.keys
    for (key, marker, label), group in zip(queries, groups, strict=True):
      assert marker == (steps.QUERY, steps.QUERY_SECOND)[group]
      assert held[key][group] == label
      seconds[group, label == NONE] += 1
  # All three answers occur: a first attribute, a second one, and none.
  assert set(seconds) == {(0, False), (1, False), (1, True)}


def test_reset():
  task, answers = Reset(), collections.Counter()
  for context, queries, groups in each(task):
    held, resets = {}, []
    for step, (key, value) in enumerate(context):
      if value == steps.RESET:
        group = key - steps.RESET_GROUP
        resets.append((step, group))
        held = {k: v for k, v in held.items() if k // 64 != group}
      else:
        held[key] = value
    ((step, cleared),) = resets
    assert task.writes // 2 <= step < 3 * task.writes // 4
    assert len(context) == task.writes + 1 and len(queries) == task.keys
    for (key, _, label), group in zip(queries, groups, strict=True):
      assert held.get(key, NONE) == label
      assert task.groups[group] == ("kept", "cleared")[key // 64 == cleared]
      answers[task.groups[group], label == NONE] += 1
  assert answers["cleared", True] and answers["cleared", False]
  assert answers["kept", False] and not answers["kept", True]


def test_noise():
  task = Noise()
  for context, queries, _ in each(task):
    held, count = replay_newest(context)
    assert len(context) == task.steps and len(held) == task.pairs
    assert set(count.values()) == {1}
    noise = [value for _, value in context if value >= steps.FIRST_NOISE]
    assert len(noise) == task.steps - task.pairs
    assert all(held[key] == label for key, _, label in queries)


@pytest.mark.parametrize("task", [Mqar(), Mqar(256, 64), Mqar(40, 10, 64)])
def test_mqar(task):
  half, distances = task.vocab_size // 2, []
  tokens, labels, _ = draw(task, 64)
  for row, label in zip(tokens, labels, strict=True):
    pairs = row[: 2 * task.pairs].reshape(-1, 2)
    held = dict(map(tuple, pairs.tolist()))
    assert len(held) == len(set(held.values())) == task.pairs
    assert min(held) >= 1 and max(held) < half <= min(held.values())
    (at,) = np.nonzero(label != NO_LABEL)
    assert len(at) == task.pairs and (at >= 2 * task.pairs).all()
    assert {held[int(row[t])] for t in at} == set(held.values())
    assert all(held[int(row[t])] == label[t] for t in at)
    distances += at.tolist()
  # Near ones are more frequent by far.
  spread = (task.length - 2 * task.pairs) / 2
  if task.pairs < spread / 2:
    assert np.median(distances) < 2 * task.pairs + spread


@pytest.mark.parametrize("task", [*(cls() for cls in TASKS.values()), Mqar()])
def test_an_example_depends_on_seed_and_index_alone(task):
  many = draw(task, 8)
  few = draw(task, 3, first=4)
  for a, b in zip(many, few, strict=True):
    np.testing.assert_array_equal(a[4:7], b)
  assert (draw(task, 8, seed=1).tokens != many.tokens).any()
  assert len(np.unique(many.tokens.reshape(8, -1), axis=0)) == 8


def test_the_token_format_has_the_same_content():
  paired = draw(SetAdd(), 4)
  flat = jax.tree.map(np.asarray, as_tokens(paired))
  np.testing.assert_array_equal(flat.tokens.reshape(4, -1, 2), paired.tokens)
  np.testing.assert_array_equal(flat.labels[:, 1::2], paired.labels)
  np.testing.assert_array_equal(flat.groups[:, 1::2], paired.groups)
  assert (flat.labels[:, ::2] == NO_LABEL).all()


def test_kinds_of_answers():
  task = Overwrite(hot=2, cold=1, writes=8)
  example = draw(task, 1)
  context, queries = split(example.tokens[0], example.labels[0])
  values = collections.defaultdict(list)
  for key, value in context:
    values[key].append(value)
  unused = next(
    v
    for v in range(steps.FIRST_VALUE, steps.FIRST_NOISE)
    if (v not in itertools.chain(*values.values()))
  )
  seen = collections.Counter()
  for number, (key, _, label) in enumerate(queries):
    own = set(values[key])
    others = set(itertools.chain(*(values[k] for k in values if k != key)))
    candidates = {
      "right": {label},
      "stale": own - {label},
      "neighbour": others - own,
      "none": {NONE},
      "other": {unused, steps.QUERY},
    }
    for kind, answers in candidates.items():
      for answer in answers:
        given = jnp.zeros_like(example.labels)
        at = len(context) + number
        given = given.at[0, at].set(answer)
        masks = kinds(example, given)
        assert [name for name in KINDS if masks[name][0, at]] == [kind]
        seen[kind] += 1
  assert set(seen) == set(KINDS)
  context_only = np.asarray(masks["other"])[0, : len(context)]
  assert not context_only.any()


@pytest.mark.parametrize(
  ("make", "says"),
  [
    (lambda: Recall(0), r"^Recall: pairs=0: expected 1 to 128$"),
    (lambda: Recall(129), r"pairs=129: expected 1 to 128"),
    (lambda: Overwrite(8, 16, 23), r"^Overwrite: writes=23: .* >= 24$"),
    (lambda: Overwrite(100, 29), r"cold=29: expected 0 to 28"),
    (lambda: SetAdd(add=1.5), r"^SetAdd: add=1.5: expected 0 to 1$"),
    (lambda: Reset(keys=3), r"^Reset: keys=3: expected an even number$"),
    (lambda: Noise(16, 15), r"^Noise: steps=15: .* >= 16$"),
    (lambda: Mqar(length=15), r"^Mqar: length=15: expected at least 16"),
    (lambda: Mqar(vocab_size=7), r"^Mqar: vocab_size=7: expected an even"),
    (lambda: Mqar(64, 8, 16), r"^Mqar: pairs=8: expected 1 to 7"),
  ],
)
def test_what_cannot_be_drawn_is_refused(make, says):
  with pytest.raises(ValueError, match=says):
    make()
