"""Which request is next: a bounded queue, first come first served, and a limited number of slots. Needs no jax."""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any, Literal, Protocol

from llamajax.errors import QueueFullError
from llamajax.types import FinishReason, Matcher, Request, Token


class Listener(Protocol):
    """Receives a request's tokens. The engine calls it, and it must not block."""

    def begin(self, num_cached: int) -> None:
        """Prefill of its prompt begins; so many of its tokens are in the cache already."""

    def token(self, token: Token) -> bool:
        """One more token. False: no more are wanted, since the answer has ended by its text."""

    def end(self, reason: FinishReason, error: Exception | None) -> None:
        """The answer has ended; called exactly once."""


@dataclass(eq=False)
class Job:
    """A request on its way through the engine.

    Attributes:
      num_cached: tokens of its prompt that are in the cache already, in whole pages.
      num_shared: how many of them running jobs have, too.
      plan: the chunks in which the other tokens are prefilled; prompts of one plan can be prefilled together.
      matcher: follows the answer if it must fit a constraint.
      num_matched: how many of the answer's tokens the matcher knows.
      error: why the matcher could not answer a step on the device.
      deadline: on the monotonic clock, in seconds; None is never.
      limit: tokens that it may draw, in all.
      drawn: tokens that were delivered to its listener.
      left: tokens still to draw when the blocks dispatched so far are done.
      position: positions of the cache that the blocks dispatched so far may take.
      saved: its row on the host, if it has to wait again.
      tried_at: where it was when it was last tried alone, for want of memory.
      queue_time: seconds that it has waited for its prefill to begin.
    """

    request: Request
    listener: Listener
    plan: tuple[int, ...]
    limit: int
    deadline: float | None = None
    matcher: Matcher | None = None
    num_matched: int = 0
    error: Exception | None = None
    num_cached: int = 0
    num_shared: int = 0
    cancelled: bool = False
    state: Literal["new", "waiting", "prefilling", "running", "ended"] = "new"
    drawn: int = 0
    left: int = 0
    position: int = 0
    saved: Any = None
    tried_at: int | None = None
    _has_begun: bool = False
    _made: float = field(default_factory=time.perf_counter)
    _admitted: float | None = None

    def admit(self) -> None:
        """Its prompt is going to be prefilled."""
        self.state, self._admitted = "prefilling", self._admitted or time.perf_counter()

    def begin(self) -> None:
        """Says to the listener how much of its prompt is cached, when its prefill begins."""
        if not self._has_begun:
            self._has_begun = True
            self.listener.begin(self.num_cached)

    def advance(self, token_id: int) -> None:
        """Advances the matcher by the answer's next token. Raises what the matcher raises."""
        assert self.matcher
        self.num_matched += 1
        self.matcher.advance(token_id)

    @property
    def has_ended(self) -> bool:
        """Whether nothing may follow the tokens that were delivered. Raises what its matcher raised."""
        if not self.matcher or self.num_matched != self.drawn:  # it may know more, from steps on the device
            return False
        if self.error:
            raise self.error
        return self.matcher.ended

    @property
    def queue_time(self) -> float:
        return (self._admitted or time.perf_counter()) - self._made

    def cancel(self) -> None:
        """Ends it at the next step. May be called from any thread."""
        self.cancelled = True

    @property
    def given_up(self) -> FinishReason | None:
        """Why the job should end early, if it should: it is cancelled or late."""
        if self.cancelled:
            return "cancelled"
        return "timeout" if self.deadline is not None and time.monotonic() >= self.deadline else None


@dataclass
class Scheduler:
    """Jobs wait, are prefilled in groups, run, and end.

    A job enters its next place before it leaves the last one: an interrupt between may leave it in two, never in none.

    Attributes:
      num_slots: jobs that may be in prefill or running at once.
      max_waiting: jobs that may wait.
      rows: the running jobs by their row on the device; None where a row is free.
      prefilling: the group whose prompts are being prefilled.
      num_ended: jobs that have ended so far.
    """

    num_slots: int
    max_waiting: int
    rows: list[Job | None] = field(default_factory=list)
    prefilling: list[Job] = field(default_factory=list)
    num_ended: int = 0
    _waiting: deque[Job] = field(default_factory=deque)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether another job would get neither a slot nor a place in the queue."""
        return self.num_jobs >= self.num_slots + self.max_waiting

    @property
    def num_admitted(self) -> int:
        """How many jobs have a slot."""
        return len(self.prefilling) + len(self.running)

    @property
    def num_jobs(self) -> int:
        """How many jobs have not ended."""
        return len(self._waiting) + self.num_admitted

    @property
    def running(self) -> list[Job]:
        return [job for job in self.rows if job is not None]

    def __iter__(self) -> Iterator[Job]:
        """All jobs that have not ended, oldest first in each state."""
        return iter([*self.running, *self.prefilling, *self._waiting])

    def submit(self, job: Job) -> None:
        """Raises QueueFullError if the queue is full."""
        assert job.state == "new"
        if self.is_full:
            raise QueueFullError(f"{self.max_waiting} requests wait already: try again later")
        self._waiting.append(job)
        job.state = "waiting"

    def admit(self, most: int, group_len: int) -> list[Job]:
        """The next group to prefill: the first that wait, at most `most`, of one plan, as long as slots are free.

        If at most half a group waits, one prompt alone: a padded group costs as much as a full one.
        """
        assert not self.prefilling
        first = islice(self._waiting, min(most, self.num_slots - self.num_admitted))
        group = list(takewhile(lambda job: _chunks(job) == _chunks(self._waiting[0]), first))
        if 2 * len(group) <= group_len:
            group = group[:1]
        self.prefilling = group.copy()  # the group itself keeps its places when one of them ends
        for job in group:
            self._waiting.remove(job)
            job.admit()
        return group

    def first(self, number: int) -> list[Job]:
        """The first so many jobs that wait."""
        return list(islice(self._waiting, number))

    @property
    def next(self) -> Job | None:
        """The first job that waits."""
        return self._waiting[0] if self._waiting else None

    @property
    def latest(self) -> list[Job]:
        """The jobs that got a slot last: the group in prefill, or else one that runs."""
        return self.prefilling or [max(self.running, key=lambda job: job._admitted or 0)]

    def put_back(self, jobs: Iterable[Job]) -> None:
        """Takes the slots of these jobs; they wait again, before all others."""
        for job in sorted(jobs, key=lambda job: job._admitted or 0, reverse=True):
            self._waiting.appendleft(job)
            if job.state == "running":
                self.rows[self.rows.index(job)] = None
            else:
                self.prefilling.remove(job)
            job.state = "waiting"

    def withdraw(self, job: Job) -> None:
        """Removes a waiting job, to be submitted again."""
        job.state = "new"
        self._waiting.remove(job)

    def free_rows(self) -> list[int]:
        """A free row for each job in prefill. There must be enough."""
        free = [row for row, job in enumerate(self.rows) if job is None][: len(self.prefilling)]
        assert len(free) == len(self.prefilling)
        return free

    def place(self) -> None:
        """Gives the jobs whose prefill is complete the free rows."""
        for row, job in zip(self.free_rows(), self.prefilling, strict=True):
            self.rows[row], job.state = job, "running"
        self.prefilling = []

    def move(self, kept: Sequence[int]) -> None:
        """Reorders the rows: for each new place, the row that moves there; -1 for a new one."""
        self.rows = [None if row < 0 else self.rows[row] for row in kept]

    def end(self, job: Job, reason: FinishReason, error: Exception | None = None) -> int | None:
        """Removes a job, wherever it is, and ends it.

        Returns the row that the job leaves.
        """
        row = None
        state, job.state = job.state, "ended"
        match state:
            case "waiting":
                self._waiting.remove(job)
            case "prefilling":
                self.prefilling.remove(job)
            case "running":
                row = self.rows.index(job)
                self.rows[row] = None
            case _:
                raise AssertionError(f"a {state} job cannot end")
        self._notify_end(job, reason, error)
        return row

    def cancel_all(self, error: Exception | None) -> None:
        """Ends all jobs, also those that an interrupt has left in two places."""
        jobs = dict.fromkeys(self)
        self.rows, self.prefilling = [], []
        self._waiting.clear()
        for job in jobs:
            job.state = "ended"
            self._notify_end(job, "cancelled", error)

    def _notify_end(self, job: Job, reason: FinishReason, error: Exception | None) -> None:
        """Calls the `end` of a job's listener. Logs the listener's own errors."""
        self.num_ended += 1
        try:
            job.listener.end(reason, error)
        except Exception:
            # There is no caller to raise the error to, and the other requests must go on.
            logging.getLogger(__name__).exception("the listener of a request failed as its answer ended")

    def check(self) -> None:
        """Asserts what always holds: a job has one place, its state names it, and slots are not exceeded."""
        jobs = list(self)
        assert len(jobs) == len(set(map(id, jobs)))
        assert self.num_admitted <= self.num_slots
        assert self.num_jobs <= self.num_slots + self.max_waiting
        assert {job.state for job in self.running} <= {"running"}
        assert {job.state for job in self.prefilling} <= {"prefilling"}
        assert {job.state for job in self._waiting} <= {"waiting"}


def _chunks(job: Job) -> tuple[int, tuple[int, ...]]:
    """Where a prompt's chunks begin, and how long they are."""
    return job.num_cached, job.plan
