"""Thread that owns the device and decodes all requests."""

import dataclasses
import queue
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax

from gdn2_jax.inference.batching import Batcher, Completion
from gdn2_jax.inference.rows import fork
from gdn2_jax.inference.sampling import GREEDY, Sampler
from gdn2_jax.inference.state import bucket
from gdn2_jax.interop.folder import Model
from gdn2_jax.serve.conversation import Conversation
from gdn2_jax.serve.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class Ended:
  """Last event of a job.

  Attributes:
    error: None, or the reason of an early end.
    complete: True if the document ended, False at the limit of tokens.
    conversation: with `Job.keep`, the conversation after it.
  """

  error: BaseException | None = None
  complete: bool = False
  conversation: Conversation | None = None


@dataclasses.dataclass(eq=False, kw_only=True)
class Job:
  """One answer to compute.

  Attributes:
    prompt: ids; with those pending in the conversation at least one.
    max_tokens: tokens at most, >= 1.
    sampler: distribution of the draws.
    seed, choice: the n-th answer to a prompt has its own draws.
    conversation: text that the prompt continues.
    keep: True asks for the conversation after it.
    emit: gets lists of new tokens, then one `Ended`; called by the worker.
  """

  prompt: list[int]
  max_tokens: int
  sampler: Sampler
  seed: int
  choice: int
  conversation: Conversation
  keep: bool
  emit: Callable[[Any], None]
  asked: float = dataclasses.field(default_factory=time.monotonic)
  cancelled: bool = False
  completion: Completion | None = None
  seen: bool = False

  def cancel(self) -> None:
    """Ends the job before the next step; any thread may call it."""
    self.cancelled = True
    if self.completion is not None:
      self.completion.cancel()


class Worker:
  """Decodes jobs in a thread; everything on the device happens there.

  Args:
    model: model with a tokenizer.
    metrics: gets tokens and times.
    num_slots: answers that are decoded together, >= 1.
    prefill_piece: tokens of a prompt read between two decoding steps, >= 1.
    max_length: tokens of a prompt and its answer together.
    note: gets lines about what is compiled.

  Attributes:
    ready: True once all programs are compiled.
    error: None, or the error that ended the thread.
  """

  def __init__(
    self,
    model: Model,
    metrics: Metrics,
    *,
    num_slots: int,
    prefill_piece: int,
    max_length: int,
    note: Callable[[str], Any] = lambda line: None,
  ):
    self.ready, self.error = False, None
    self._tokenizer, self._metrics = model.tokenizer, metrics
    self._piece, self._max_length, self._note = prefill_piece, max_length, note
    self._make_batcher = lambda: Batcher(
      model.params,
      model.config,
      num_slots,
      max_length=max_length,
      prefill_piece=prefill_piece,
    )
    self._num_slots = num_slots
    self._batcher: Batcher | None = None
    self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    self._jobs: list[Job] = []
    self._thread = threading.Thread(
      target=self._main, name="gdn2-worker", daemon=True
    )

  @property
  def running(self) -> int:
    """Answers that have a row."""
    return self._batcher.active if self._batcher and self.ready else 0

  def start(self) -> None:
    """Starts the thread, which first compiles."""
    self._thread.start()

  def submit(self, job: Job) -> None:
    """Hands over a job; any thread may call it."""
    self._queue.put(job)

  def stop(self, timeout: float) -> bool:
    """Ends the thread; False if it is still busy after so many seconds."""
    self._queue.put(None)
    self._thread.join(timeout)
    return not self._thread.is_alive()

  def _main(self):
    try:
      self._batcher = self._make_batcher()
      self._warm_up()
      self.ready = True
      while self._take():
        self._step()
    except BaseException as error:
      traceback.print_exc()
      self.error = error
    finally:
      self.ready = False
      error = self.error or RuntimeError("the server has stopped")
      for job in self._jobs:
        job.emit(Ended(error))
      while not self._queue.empty():
        if (job := self._queue.get()) is not None:
          job.emit(Ended(error))

  def _warm_up(self):
    """Compiles what any request may need, by requests of all sizes."""
    longest = min(self._piece, self._max_length - 2)
    sizes = [bucket(1, longest)]
    while sizes[-1] < longest:
      sizes.append(bucket(sizes[-1] + 1, longest))
    self._note(
      "compiling: reading "
      + ", ".join(map(str, sizes))
      + f" tokens of a prompt, decoding {self._num_slots} rows"
    )
    start = time.monotonic()
    options = {"rng": jax.random.key(0), "sampler": self._known(GREEDY)}
    options |= {"stop_ids": [self._tokenizer.eos_id], "keep_state": True}
    jobs = [self._batcher.submit([0] * (n + 1), 1, **options) for n in sizes]
    self._batcher.run()
    state = jobs[0].state
    if state is not None:
      self._batcher.submit([0], 1, state=fork(state, 1), **options)
      self._batcher.run()
    self._note(f"compiled or loaded in {time.monotonic() - start:.1f} s")

  def _known(self, sampler):
    """The sampler, for ids of the tokenizer alone."""
    return dataclasses.replace(sampler, vocab_size=self._tokenizer.vocab_size)

  def _take(self) -> bool:
    """Begins all jobs that came; waits for one if there is nothing to do."""
    while True:
      try:
        job = self._queue.get(block=not self._jobs)
      except queue.Empty:
        return True
      if job is None:
        return False
      self._begin(job)

  def _begin(self, job):
    before = job.conversation
    if job.cancelled:
      job.emit(Ended())
      return
    rng = jax.random.key(job.seed)
    if job.choice:
      rng = jax.random.fold_in(rng, job.choice)
    try:
      job.completion = self._batcher.submit(
        [*before.pending, *job.prompt],
        job.max_tokens,
        rng=rng,
        sampler=self._known(job.sampler),
        stop_ids=[self._tokenizer.eos_id],
        # A copy: the session stays as it is until the answer is complete.
        state=None if before.state is None else fork(before.state, 1),
        index=before.draws,
        on_tokens=lambda ids: self._on_tokens(job, ids),
        keep_state=job.keep,
      )
    except ValueError as error:
      job.emit(Ended(error))
      return
    self._jobs.append(job)
    if job.cancelled:
      job.completion.cancel()

  def _on_tokens(self, job, ids):
    if len(job.completion.tokens) == len(ids):
      self._metrics.first(time.monotonic() - job.asked)
    self._metrics.tokens(len(ids))
    job.emit(list(ids))
    return job.cancelled

  def _step(self):
    try:
      self._batcher.step()
    except Exception as error:
      # Of the start of one request, which ended; any other ends the server.
      if not any(job.completion.error is error for job in self._jobs):
        raise
    for job in self._jobs:
      if not job.seen and job.completion.begun is not None:
        job.seen = True
        self._metrics.queued(job.completion.begun - job.asked)
    ended = [job for job in self._jobs if job.completion.done]
    self._jobs = [job for job in self._jobs if not job.completion.done]
    for job in ended:
      job.emit(self._ended(job))

  def _ended(self, job) -> Ended:
    done = job.completion
    if done.error is not None:
      return Ended(done.error)
    complete = len(done.tokens) < job.max_tokens and not job.cancelled
    after = None
    if job.keep and done.state is not None and not job.cancelled:
      after = job.conversation.followed_by(
        [*job.prompt, *done.tokens],
        state=done.state,
        # The end of a document is not part of a continued text.
        pending=() if complete else (done.pending,),
        draws=done.index,
        seed=job.seed,
      )
    return Ended(complete=complete, conversation=after)
