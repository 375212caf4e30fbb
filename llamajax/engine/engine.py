"""The slot engine: many requests at once on one device, block by block.

Each step ends requests that were cancelled, prefills a chunk of the next prompts, dispatches a block of decoding for
all running requests, and delivers the block before it meanwhile. Knows token ids; knows nothing of text or threads.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Int32

from llamajax import checks
from llamajax.engine.asking import Asking
from llamajax.engine.batch import GROUP_LEN, NO_PROMPTS, Batch, Needs, Prompts, Size
from llamajax.engine.contiguous import ContiguousBatch
from llamajax.engine.memory import is_out_of_memory
from llamajax.engine.paged import PagedBatch
from llamajax.engine.runner import CHUNKS, Runner, chunk_lens
from llamajax.engine.scheduler import Job, Listener, Scheduler
from llamajax.engine.steps import BLOCK_LEN, Drawn
from llamajax.errors import DeviceMemoryError, PromptTooLongError
from llamajax.ops import PAGE_LEN
from llamajax.types import FinishReason, Request

# How long a block of decoding may take: short enough to read along and to cancel, long enough to hide the dispatch of
# the next block.
BLOCK_SECONDS = 0.1
# Tokens of a block during prefill: short, so that a new request gets its first token soon.
SHORT_BLOCK_LEN = 2
# The longest chunk of a prompt while others run, where a prompt's bits do not depend on its chunks: four of these take
# half a second on an old CPU.
SHORT_CHUNK_LEN = 128
# Tokens of a block while requests wait for a slot: one that becomes free early stays empty until the block's end.
FULL_BLOCK_LEN = 4


class Engine:
    """Runs up to `num_slots` requests at once, and lets `max_waiting` more wait.

    Attributes:
      scheduler: which requests wait, and which run.
    """

    def __init__(
        self, runner: Runner, *, num_slots: int, max_waiting: int = 1024, prefix_bytes: int | None = None
    ) -> None:
        """Keeps at most `prefix_bytes` of ended prompts for others that begin alike; by default a share of memory."""
        num_slots = checks.integer("slots", num_slots, 1)
        self.scheduler = Scheduler(num_slots, checks.integer("max_waiting", max_waiting, 1))
        self._runner = runner
        if prefix_bytes is not None:
            prefix_bytes = checks.integer("prefix_cache", prefix_bytes, 0)
        self._batch = make_batch(runner, num_slots, prefix_bytes)
        self._failed_at = -1  # how many jobs had ended when memory ran out
        self._prompts: Prompts | None = None
        self._group: list[Job] = []  # the jobs of these prompts
        # Blocks that the device works on, with the job of each row.
        self._pending: deque[tuple[Drawn, dict[int, Job]]] = deque()
        self._asking = Asking()
        self._step_seconds = BLOCK_SECONDS  # the first block has one token
        self._delivered = 0.0

    @property
    def shares_prompts(self) -> bool:
        """Whether prompts that begin alike share their first pages."""
        return self._batch.shares

    @property
    def num_positions(self) -> int:
        """Positions of the cache that sequences with a slot take now."""
        scheduler = self.scheduler
        return sum(job.position for job in scheduler.running) + sum(
            len(job.request.token_ids) for job in scheduler.prefilling
        )

    def job(self, request: Request, listener: Listener, deadline: float | None = None) -> Job:
        """Checks a request, and makes a job of it that can be submitted.

        Raises PromptTooLongError if the prompt leaves no room for an answer, RequestError for what is invalid.
        """
        self._runner.check(request)
        length = len(request.token_ids)
        plan, longest = chunk_lens(length), min(self._runner.max_seq_len, self._batch.longest)
        if length >= longest or self._runner.bucket(sum(plan)) > self._batch.longest:
            raise PromptTooLongError(
                f"the prompt has {length} tokens, and the memory of {self._runner.device} has room for {longest}, with "
                "the answer: shorten the prompt, or take a smaller model or dtype"
            )
        limit = min(request.max_new_tokens, longest - length)
        matcher = request.constraint.matcher() if request.constraint else None
        return Job(request, listener, plan, limit, deadline, matcher)

    def step(self) -> bool:
        """Does one round. Returns False if nothing is left to do.

        An error of one request ends that request; an error of the device ends all. If the device's memory runs out,
        those that came last wait until there is room.
        """
        if not self._pending:  # the device begins now
            self._delivered = time.monotonic()
        try:
            try:
                self._go_on()
            except Exception as error:
                if not is_out_of_memory(error) or (self.scheduler.running and self._batch.is_lost):
                    raise
                self._give_way()
        except Exception as error:
            self.abort(error)
        return bool(self._pending) or self.scheduler.num_jobs > 0

    def abort(self, error: Exception | None = None) -> None:
        """Ends all requests and forgets what is on the device."""
        self._batch.clear()
        self._prompts = None
        self._pending.clear()
        self._asking.end()
        self.scheduler.cancel_all(error)

    def num_prefilled(self, job: Job) -> int | None:
        """How many of a job's prompt tokens are prefilled; None if there is no prefill to come."""
        if job.state == "prefilling" and self._prompts:
            return self._prompts.num_prefilled if self._prompts.chunks_left else None
        return 0 if job.state == "new" and not job.saved else None

    def compile(self, max_len: int, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compiles all programs for requests of up to this many tokens in all.

        Any thread may call it while requests run: it touches no array on the device.

        Args:
          max_len: a request's tokens, prompt and answer together.
          progress: called with how many programs are compiled, of how many, before the first and after each.
        """
        programs = [*self._batch.programs(max_len), *self._runner.scorings()]
        # With pages they are few. Without, those of all lengths would take gigabytes of the host's memory.
        compile = self._runner.compile if self._runner.paged else self._runner.prepare
        progress(0, len(programs))
        for number, program in enumerate(programs, 1):
            compile(program)
            progress(number, len(programs))

    def _go_on(self) -> None:
        for job in self.scheduler:
            if reason := job.given_up:
                self._end(job, reason)
        self._prefill()
        dispatched = self._decode()
        while len(self._pending) > dispatched:
            self._deliver()
        if not self.scheduler.num_jobs:
            self._batch.expect_all_memory()

    def _prefill(self) -> None:
        """Prefills a chunk of the present group, or of the next one. Jobs whose prompts are complete begin to run."""
        scheduler = self.scheduler
        if self._prompts and not self._prompts.chunks_left and scheduler.prefilling:
            self._run_group()
        if not scheduler.prefilling:  # or all jobs of the group were cancelled
            self._drop_prompts()
            self._group = self._next_group()
            if not self._group:
                return
            if saved := self._group[0].saved:
                self._fit()
                for row in scheduler.free_rows():  # none, if running jobs need the memory
                    self._batch.restore(saved, row)
                    self._group[0].saved = None
                scheduler.place()
                return
            requests, limits = zip(*((job.request, job.limit) for job in self._group), strict=True)
            self._prompts = self._batch.prompts(
                requests, limits, num_cached=self._group[0].num_cached, longest_chunk=self._longest_chunk
            )
            for job in self._group:
                job.begin()
        assert self._prompts is not None
        drawn = self._batch.prefill(self._prompts)
        if self._prompts.chunks_left:
            if not scheduler.running:  # the device would otherwise be given all chunks at once
                jax.block_until_ready(drawn)
            return
        # One that was put back after its first token will not get it again.
        self._pending.append((drawn, {place: job for place, job in self._prefilling.items() if not job.drawn}))
        if scheduler.running:  # else whoever comes during this prefill has a row from the start
            self._run_group()

    def _next_group(self) -> list[Job]:
        """The next prompts to prefill. One that begins like another waits until that one is prefilled."""
        if self.scheduler.num_admitted == self.scheduler.num_slots:
            return []
        self._find_cached()
        return self.scheduler.admit(min(self._most_to_admit(), self._num_different()), GROUP_LEN)

    def _find_cached(self) -> None:
        """How much of the next prompts the cache has."""
        for job in self.scheduler.first(GROUP_LEN):
            if not job.saved:
                job.num_cached, job.num_shared = self._batch.find_cached(job.request.token_ids)
                job.plan = chunk_lens(len(job.request.token_ids), job.num_cached, self._longest_chunk)

    @property
    def _longest_chunk(self) -> int:
        """The longest chunk of a prompt: those that run wait until the device has prefilled it."""
        return SHORT_CHUNK_LEN if self.scheduler.running and self._runner.paged else CHUNKS[-1]

    def _num_different(self) -> int:
        """How many that wait have no whole page in common that is still to be prefilled."""
        if not self.shares_prompts:
            return GROUP_LEN
        found = set[tuple[int, ...]]()
        for number, job in enumerate(self.scheduler.first(GROUP_LEN)):
            page = tuple(job.request.token_ids[job.num_cached : job.num_cached + PAGE_LEN])
            if len(page) == PAGE_LEN and page in found:
                return number
            found.add(page)
        return GROUP_LEN

    @property
    def _prefilling(self) -> dict[int, Job]:
        """The jobs whose prompts are being prefilled, by their place in the group."""
        return {place: job for place, job in enumerate(self._group) if job.state == "prefilling"}

    def _run_group(self) -> None:
        """Moves jobs whose prompts are complete into rows: they begin to run."""
        scheduler, prompts = self.scheduler, self._prompts
        assert prompts is not None
        self._fit()
        if not scheduler.prefilling:  # the others need the memory
            return
        for job in scheduler.prefilling:
            job.position, job.left = len(job.request.token_ids), job.limit - 1
            if job.matcher:  # its first token is not drawn yet
                job.position, job.left = job.position - 1, job.limit
        self._batch.insert(prompts, list(self._prefilling), scheduler.free_rows())
        scheduler.place()
        self._drop_prompts()

    def _drop_prompts(self) -> None:
        if self._prompts:
            self._batch.drop(self._prompts)
        self._prompts = None

    def _decode(self) -> bool:
        """Dispatches a block, unless nothing is left to draw."""
        asked = self._begin_to_ask()
        running = self._drawing
        if not running:
            return False
        constrained = asked is None and any(job.matcher for job in running.values())
        num_steps = 1 if constrained else self._block_len(max(job.left for job in running.values()))
        self._fit(num_steps)
        self._batch.reserve(self._needs(num_steps).rows)
        running = self._drawing  # the rows may have moved
        rows = list(running)
        drawn = self._draw_constrained(running) if constrained else self._batch.decode(rows, num_steps, asked)
        self._pending.append((drawn, running))
        for job in running.values():
            job.position += min(num_steps, job.left)
            job.left -= min(num_steps, job.left)
        return True

    @property
    def _drawing(self) -> dict[int, Job]:
        """The jobs that have tokens to draw, by their rows."""
        return {row: job for row, job in enumerate(self.scheduler.rows) if job is not None and job.left > 0}

    def _begin_to_ask(self) -> Int32[np.ndarray, "1"] | None:
        """The number by which steps ask for masks, if the only running job has a constraint."""
        running = list(self._drawing.values())
        job = running[0] if len(running) == 1 and running[0].matcher and self._runner.can_ask else None
        if self._asking.job is not job:
            self._deliver_all()  # the matcher has to know all that was drawn
        return self._asking.begin(job) if job and job.state == "running" else None

    def _draw_constrained(self, running: dict[int, Job]) -> Drawn:
        """Dispatches one token. The host finds the masks while the device computes the scores."""
        self._batch.forward(list(running))
        while self._pending:
            self._deliver()
        mask = self._runner.free_mask(self._batch.num_rows)
        for row, job in running.items():
            if job.matcher and job.state == "running":
                try:
                    mask[row] = np.frombuffer(job.matcher.mask(), np.int32)
                except Exception as error:
                    self._end(job, "cancelled", error)
        return self._batch.draw(mask)

    def _block_len(self, left: int) -> int:
        scheduler = self.scheduler
        waits = scheduler.num_waiting > 0
        prefills = scheduler.prefilling or (waits and scheduler.num_admitted < scheduler.num_slots)
        longest = min(SHORT_BLOCK_LEN if prefills else FULL_BLOCK_LEN if waits else BLOCK_LEN, left)
        return max(1, min(longest, int(BLOCK_SECONDS / max(self._step_seconds, 1e-6))))

    def _deliver(self) -> None:
        """Waits for the oldest block, and delivers its tokens to their listeners."""
        drawn, by_row = self._pending[0]
        wants_logprobs = any(job.request.sampling.logprobs is not None for job in by_row.values())
        block = self._runner.to_host(drawn, wants_logprobs)
        self._pending.popleft()  # not before it is here: the host may have no memory for it
        now = time.monotonic()
        num_steps = int((block.tokens >= 0).any(axis=0).sum())
        if num_steps and self._pending:
            self._step_seconds = (now - self._delivered) / num_steps
        self._delivered = now
        for row, job in by_row.items():
            if job.state == "ended":
                continue
            try:
                self._hand_over(job, block, row)
            except Exception as error:
                self._end(job, "cancelled", error)

    def _deliver_all(self) -> None:
        while self._pending:
            self._deliver()
        self._asking.end()

    def _hand_over(self, job: Job, block: Drawn, row: int) -> None:
        # The steps of a block that is on its way advance the matcher by the last token.
        steps_advance = self._asking.job is job and any(job in by_row.values() for _, by_row in self._pending)
        for token in self._runner.tokens(block, row, job.request.sampling.logprobs):
            if token.id in job.request.stop_ids:
                self._end(job, "stop")
                return
            job.drawn += 1
            if not job.listener.token(token):
                self._end(job, "stop")
                return
            if job.matcher and job.num_matched < job.drawn and not steps_advance:
                job.advance(token.id)
        if job.has_ended or job.drawn == job.limit:
            self._end(job, "stop" if job.has_ended else "length")

    def _end(self, job: Job, reason: FinishReason, error: Exception | None = None) -> None:
        if self._asking.job is job:
            self._asking.end()
        row = self.scheduler.end(job, reason, error)
        if row is not None:
            self._batch.leave(row, draws=job.left > 0)

    def _fit(self, num_steps: int = 0) -> None:
        """Gives the batch a row for each job that has a slot or will get one, with room for so many tokens more. If
        there is none, those that came last wait again.

        Jobs that wait count, too: to grow from size to size copies the rows each time, and loads more programs.
        """
        scheduler, batch = self.scheduler, self._batch
        while not batch.fits(self._needs(num_steps)) and scheduler.num_admitted > 1:
            for row in self._put_back(scheduler.latest):
                batch.leave(row, draws=True)
        for kept in batch.fit(self._needs(num_steps)):
            scheduler.move(kept)

    def _needs(self, num_steps: int = 0) -> Needs:
        """Of those that have a slot, for so many tokens more."""
        scheduler = self.scheduler
        running = {row: job for row, job in enumerate(scheduler.rows) if job is not None}
        rows = {row: job.position + min(num_steps, job.left) for row, job in running.items()}
        prefilling = {job: _first_len(job) for job in scheduler.prefilling}
        new = [num_positions for job, num_positions in prefilling.items() if job.saved]
        return Needs(
            rows,
            new,
            max([0, *rows.values(), *prefilling.values()]),
            self._prompts.size if self._prompts else NO_PROMPTS,
            min(scheduler.num_jobs, scheduler.num_slots),
            max(scheduler.num_admitted, 1),
            self._size(scheduler.next) if scheduler.next else NO_PROMPTS,
        )

    def _most_to_admit(self) -> int:
        """How many of those that wait there is memory for now: a group, one or none. Ends one that can never run."""
        scheduler, batch, job = self.scheduler, self._batch, self.scheduler.next
        if job is None:
            return 0
        # Memory ran out, and nobody has ended since: what failed would only fail again.
        is_short = self._failed_at == scheduler.num_ended
        if is_short and scheduler.running:
            return 0
        needs = self._needs()
        longest = max(needs.longest, _first_len(job))

        def is_room(number: int) -> bool:
            admitted = min(scheduler.num_admitted + number, scheduler.num_slots)
            new = [_first_len(job) - (0 if job.saved else job.num_shared) for job in scheduler.first(number)]
            size = self._size(job, number)
            return batch.can_admit(Needs(needs.rows, new, longest, size, num_wanted=admitted, num_needed=admitted))

        for number in (1,) if job.saved or is_short else (GROUP_LEN, 1):
            if is_room(number):
                return number
        if scheduler.running:
            return 0
        batch.clear()  # idle rows
        self._find_cached()
        if not is_room(1):  # what it learned may be too little: the first of them is tried alone
            return int(self._try_again(job))
        return 1

    def _try_again(self, job: Job) -> bool:
        """Whether a job that had no room alone is tried once more. If it was already, it ends."""
        if job.tried_at == job.position:
            message = f"the memory of {self._runner.device} has no room for this request: make it shorter"
            self._end(job, "cancelled", DeviceMemoryError(message))
            return False
        job.tried_at = job.position
        return True

    def _size(self, job: Job, number: int = 1) -> Size:
        """Of so many prompts like a job's that waits."""
        return NO_PROMPTS if job.saved else (number, _first_len(job), job.plan[0])

    def _put_back(self, jobs: Sequence[Job]) -> list[int]:
        """Lets jobs wait again: their rows, which are returned, are saved; prompts will be prefilled anew."""
        running = {row: job for row, job in enumerate(self.scheduler.rows) if job is not None and job in jobs}
        if running:
            saved = self._batch.save({row: job.position for row, job in running.items()})
            for job, rows in zip(running.values(), saved, strict=True):
                job.saved = rows
        if len(running) < len(jobs):
            self._drop_prompts()
            for _, by_row in self._pending:  # first tokens that are drawn anew
                for place, job in list(by_row.items()):
                    if job in jobs and job.state == "prefilling" and not job.saved:
                        del by_row[place]
        self.scheduler.put_back(jobs)
        return list(running)

    def _give_way(self) -> None:
        """After the device's memory ran out: prompts in prefill, or else all that runs, wait until there is room."""
        scheduler, batch = self.scheduler, self._batch
        if not batch.expect_less_memory():
            self._failed_at = scheduler.num_ended
            if len(scheduler.prefilling) == 1 and not scheduler.running:
                [job] = scheduler.prefilling
                self._try_again(job)
        if scheduler.prefilling and (batch.can_go_on or not scheduler.running):
            self._put_back(scheduler.prefilling)
        else:
            self._put_back([*scheduler.running, *scheduler.prefilling])
        if not scheduler.running:  # idle rows may have been destroyed
            self._drop_prompts()
            batch.clear()
            scheduler.rows = []


def make_batch(runner: Runner, max_rows: int, prefix_bytes: int | None = None) -> Batch:
    """A batch of so many rows, which keeps so many bytes of ended prompts; by default a share of the memory."""
    return PagedBatch(runner, max_rows, prefix_bytes) if runner.paged else ContiguousBatch(runner, max_rows)


def _first_len(job: Job) -> int:
    """Positions that a waiting job needs: those of its prompt, or, if it was saved, those after its next block."""
    return job.position + min(BLOCK_LEN, job.left) if job.saved else job.num_cached + sum(job.plan)
