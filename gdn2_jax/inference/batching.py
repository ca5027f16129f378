"""Continuous batching: requests that come and go are decoded together."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gdn2_jax.inference.checks import NonFiniteError, require_count
from gdn2_jax.inference.decode import (
  TOKENS_PER_DISPATCH,
  Rows,
  decode,
  for_loop,
  pad_stops,
)
from gdn2_jax.inference.request import Reading, Request
from gdn2_jax.inference.rows import put, take
from gdn2_jax.inference.sampling import GREEDY, Sampler, row_samplers
from gdn2_jax.inference.state import CHUNK_SIZE, State, init_state
from gdn2_jax.model.config import ModelConfig

_put_in_place = jax.jit(put, donate_argnums=0)


@dataclasses.dataclass(eq=False)
class Completion:
  """Result of one request of a `Batcher`, filled while it is decoded.

  Attributes:
    tokens: ids chosen so far, without the stop id that ended them.
    done: True once the request has ended.
    error: None, or the reason of an early end: a `NonFiniteError` for logits
      that are not finite, or the exception of its start. Then it has no state.
    state: with keep_state, once done: state of one sequence, which has read the
      prompt and all tokens chosen but the last.
    pending: with `state`: the last token chosen, with which a continuation
      begins. None if no token was chosen.
    index: with `state`: tokens chosen, a stop id included.
    begun: `time.monotonic()` at which it got a slot; None while it waits.
  """

  request: Request = dataclasses.field(repr=False)
  on_tokens: Callable[[list[int]], Any] | None = None
  keep_state: bool = False
  tokens: list[int] = dataclasses.field(default_factory=list)
  done: bool = False
  error: BaseException | None = None
  state: State | None = dataclasses.field(default=None, repr=False)
  pending: int | None = None
  index: int = 0
  begun: float | None = None
  cancelled: bool = False

  def cancel(self) -> None:
    """Ends the request before the next step, with the tokens it has."""
    self.cancelled = True


class Batcher:
  """Decodes requests in a fixed number of slots, the rows of one state.

  A request waits for a free slot, is read into it, and leaves it when it ends.
  One compiled program decodes all slots, for any settings of the requests in
  them. A request's tokens depend on the request alone: neither on the requests
  beside it nor on when it came. One without finite logits ends with its own
  `error`, and the others continue.

    batcher = Batcher(params, config, 8)
    completion = batcher.submit(prompt, 100, rng=jax.random.key(0))
    batcher.run()  # or batcher.step(), as often as it returns True
    completion.tokens

  Prompts are read in pieces between decoding steps, so that a long one does not
  hold up the others: a step reads about `prefill_piece` tokens of the prompts,
  which take turns, and then decodes.

  One thread calls `step` or `run`; any may submit and cancel meanwhile.

  Args:
    params: unboxed parameters of LM(config). With scan_layers and
      scan_unroll=0 the batcher keeps a second copy of the layers' parameters.
    config: model config.
    num_slots: requests that are decoded together, >= 1. Time per step and
      memory are those of a batch of num_slots rows, even if few are taken.
    max_length: tokens of a request, prompt and new ones together; needed by
      models with full attention alone.
    tokens_per_dispatch: >= 1; does not change the tokens.
    prefill_piece: tokens of a prompt read at a time, >= 1. A smaller one holds
      up others for less long, and takes longer in all. The default reads as
      `generate` does, bit for bit; others differ by rounding.
  """

  def __init__(
    self,
    params: Any,
    config: ModelConfig,
    num_slots: int,
    *,
    max_length: int | None = None,
    tokens_per_dispatch: int = TOKENS_PER_DISPATCH,
    prefill_piece: int = CHUNK_SIZE,
  ):
    require_count("num_slots", num_slots)
    require_count("tokens_per_dispatch", tokens_per_dispatch)
    require_count("prefill_piece", prefill_piece)
    self._params = params
    self._loop_params = for_loop(params, config)
    self._state = init_state(config, num_slots, max_length)
    self._size = tokens_per_dispatch
    self._piece = prefill_piece
    # Prompts that are being read, by slot, in the order of their turns.
    self._readings: dict[int, Reading] = {}
    self._waiting = collections.deque()
    self._deliveries = collections.deque()
    self._slots: list[Completion | None] = [None] * num_slots
    self._keys = [jax.random.key(0)[None]] * num_slots
    none = np.zeros((num_slots,), np.int32)
    self._rows = Rows(
      token=none.copy(),
      index=none.copy(),
      limit=none.copy(),
      done=np.ones((num_slots,), bool),
      key=jnp.concatenate(self._keys),
      stops=None,  # gathered from the slots at every step, as the samplers
      sampler=None,
    )

  @property
  def active(self) -> int:
    """Requests in slots, those whose prompt is being read included."""
    return sum(completion is not None for completion in self._slots)

  @property
  def waiting(self) -> int:
    """Requests that wait for a free slot."""
    return len(self._waiting)

  def submit(
    self,
    prompt: Any,  # list of ids, checked by name
    max_new_tokens: int,
    *,
    rng: Array,
    sampler: Sampler = Sampler(),  # noqa: B008, frozen
    stop_ids: Any = (),
    state: State | None = None,
    index: int = 0,
    on_tokens: Callable[[list[int]], Any] | None = None,
    keep_state: bool = False,
  ) -> Completion:
    """Requests the tokens that `generate` gives for [prompt].

    Args:
      prompt: non-empty token ids.
      max_new_tokens: >= 1.
      rng: one typed key.
      sampler: temperature, top_k and top_p.
      stop_ids: tokens that end the request.
      state: state of one sequence, which the prompt continues; donated.
      index: n of the first token.
      on_tokens: called in `step` with the new ids as they come; returning True
        ends the request there.
      keep_state: True gives the completion its final state.

    Raises:
      ValueError: as `generate`, at the call.
    """
    request = Request(
      self._state.config,
      [prompt],
      max_new_tokens,
      rng,
      sampler,
      stop_ids,
      state,
      index,
      self._state.max_length,
    )
    if state is not None and state.max_length != self._state.max_length:
      raise ValueError(
        f"state: expected one made with max_length={self._state.max_length}, "
        f"as the slots are, got {state.max_length}"
      )
    if rng.dtype != self._rows.key.dtype:
      raise ValueError(
        f"rng: expected a key of the default kind {self._rows.key.dtype}, got "
        f"{rng.dtype}"
      )
    completion = Completion(request, on_tokens, keep_state, index=index)
    self._waiting.append(completion)
    return completion

  def run(self) -> None:
    """Steps until nothing is left to do."""
    while self.step():
      pass

  def step(self) -> bool:
    """Reads pieces of prompts, chooses tokens for all, calls `on_tokens`.

    Ends early when a request does, so that its slot is soon taken again.
    Raises nothing for a request without finite logits: see its `error`.

    Returns:
      True while a request is active or waiting.
    """
    self._release()
    self._admit()
    filled = self._read()
    if self.active > len(self._readings):
      taken = [used and used.request for used in self._slots]
      # A free slot is a row that is done, and greedy: drawing costs more.
      samplers = [r.sampler if r else GREEDY for r in taken]
      self._rows = self._rows.replace(
        stops=pad_stops([r.stop_ids if r else [] for r in taken]),
        sampler=row_samplers(samplers, self._state.config.vocab_size),
      )
      new, failures, self._state, self._rows = decode(
        self._params,
        self._state,
        self._rows,
        # The first token of a request comes alone, as soon as can be.
        count=1 if filled else self._size,
        size=self._size,
        pause=True,
        loop_params=self._loop_params,
      )
      for completion, ids in zip(self._slots, new, strict=True):
        if completion and ids:
          completion.tokens += ids
          self._deliveries.append((completion, ids))
      for slot, failure in failures.items():
        self._slots[slot].error = NonFiniteError("prompts", {0: failure})
      self._release()
    # Last: a callback that raises loses nothing.
    while self._deliveries:
      completion, ids = self._deliveries.popleft()
      if completion.on_tokens and completion.on_tokens(ids):
        completion.cancel()
    return bool(self.active or self._waiting)

  def _admit(self) -> None:
    """Gives free slots to waiting requests, in the order of their arrival."""
    for completion in [c for c in self._waiting.copy() if c.cancelled]:
      self._waiting.remove(completion)
      completion.done = True
    for slot, used in enumerate(self._slots):
      if used is None and self._waiting:
        completion = self._waiting.popleft()
        with self._ends_if_it_fails(slot, completion):
          self._readings[slot] = Reading(completion.request, self._piece)
          self._slots[slot] = completion
          completion.begun = time.monotonic()

  def _read(self) -> bool:
    """Reads about one piece of prompts in turns; True if one was completed."""
    room, filled = self._piece, False
    while self._readings and room > 0:
      slot, reading = next(iter(self._readings.items()))
      with self._ends_if_it_fails(slot, self._slots[slot]):
        # A prompt of one token takes time as well: its row is written.
        room -= max(1, reading.advance(self._params))
        del self._readings[slot]
        if reading.left:
          self._readings[slot] = reading  # behind the others
        else:
          self._fill(slot, *reading.end())
          filled = True
    return filled

  @contextlib.contextmanager
  def _ends_if_it_fails(self, slot, completion):
    try:
      yield
    except BaseException as error:
      completion.error = error
      completion.done = True  # or its caller would wait for ever
      self._readings.pop(slot, None)
      self._slots[slot] = None
      raise

  def _fill(self, slot, state, rows):
    self._state = _put_in_place(self._state, np.asarray([slot]), state)
    self._keys[slot] = rows.key
    for name in ("token", "index", "limit", "done"):
      getattr(self._rows, name)[slot] = getattr(rows, name)[0]
    self._rows = self._rows.replace(key=jnp.concatenate(self._keys))

  def _release(self) -> None:
    """Frees the slots of requests that ended or were cancelled."""
    for slot, completion in enumerate(self._slots):
      if completion is None:
        continue
      reads = slot in self._readings
      ended = self._rows.done[slot] and not reads
      if not (ended or completion.cancelled):
        continue
      if reads:
        del self._readings[slot]  # cancelled: it has no state to keep
      elif completion.keep_state and completion.error is None:
        completion.state = take(self._state, [slot])
        completion.pending = int(self._rows.token[slot])
        completion.index = int(self._rows.index[slot])
      completion.done = True
      self._rows.done[slot] = True
      self._slots[slot] = None
