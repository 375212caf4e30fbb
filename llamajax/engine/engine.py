"""The slot engine: many requests at once on one device, block by block.

Each step ends the requests that nobody waits for, reads a chunk of the prompts that are next, lets the device decode
a block for all that run, and meanwhile delivers the block before it. Knows token ids; knows nothing of text or
threads.
"""

import time
from collections import deque
from collections.abc import Callable

from llamajax import checks
from llamajax.engine.batch import GROUP_LEN, Batch, Prompts
from llamajax.engine.runner import Runner, chunk_lens
from llamajax.engine.scheduler import Job, Listener, Scheduler
from llamajax.engine.steps import BLOCK_LEN, Drawn
from llamajax.types import FinishReason, Request

# Of a block: short enough to read along and to cancel, long enough to hide the dispatch of the next.
BLOCK_SECONDS = 0.1
# While prompts are read: short blocks, so that a new request gets its first token soon.
SHORT_BLOCK_LEN = 2
# While requests wait for a slot: a slot that becomes free early stays empty until the block's end.
FULL_BLOCK_LEN = 4


class Engine:
    """Runs up to `num_slots` requests at once, and lets `max_waiting` more wait.

    Attributes:
      scheduler: who waits and who runs.
    """

    def __init__(self, runner: Runner, *, num_slots: int, max_waiting: int = 1024) -> None:
        num_slots = checks.integer("slots", num_slots, 1)
        self.scheduler = Scheduler(num_slots, checks.integer("max_waiting", max_waiting, 1))
        self._runner = runner
        self._batch = Batch(runner, num_slots)
        self._prompts: Prompts | None = None
        self._group: list[Job] = []  # whose prompts they are
        # Blocks that the device works on, with the job of each row.
        self._pending: deque[tuple[Drawn, dict[int, Job]]] = deque()
        self._step_seconds = 0.0
        self._delivered = 0.0

    @property
    def num_positions(self) -> int:
        """Positions that the sequences that have a slot take at present."""
        scheduler = self.scheduler
        return sum(job.position for job in scheduler.running) + sum(
            len(job.request.token_ids) for job in scheduler.reading
        )

    def job(self, request: Request, listener: Listener, deadline: float | None = None) -> Job:
        """A request made ready to be submitted.

        Raises PromptTooLongError if the prompt leaves no room for an answer, RequestError for what is invalid.
        """
        self._runner.check(request)
        length = len(request.token_ids)
        limit = min(request.max_new_tokens, self._runner.max_seq_len - length)
        matcher = request.constraint.matcher() if request.constraint else None
        return Job(request, listener, chunk_lens(length), limit, deadline, matcher)

    def step(self) -> bool:
        """One round. False if there is nothing left to do.

        What goes wrong with one request ends that one; what goes wrong on the device ends all there are.
        """
        try:
            for job in self.scheduler:
                if reason := job.given_up:
                    self._end(job, reason)
            self._read_prompts()
            dispatched = self._decode()
            while len(self._pending) > dispatched:
                self._deliver(*self._pending.popleft())
        except Exception as error:
            self.abort(error)
        return bool(self._pending) or self.scheduler.num_jobs > 0

    def abort(self, error: Exception | None = None) -> None:
        """Ends all requests and forgets what is on the device."""
        self._batch.clear()
        self._prompts = None
        self._pending.clear()
        for job in self.scheduler:
            self.scheduler.end(job, "cancelled", error)
        self.scheduler.rows = []

    def compile(self, max_len: int, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compiles all programs for requests of up to this many tokens in all.

        Any thread may call it while requests run: it touches no array on the device.

        Args:
          max_len: a request's tokens, prompt and answer together.
          progress: called with how many programs are compiled, of how many, before the first and after each.
        """
        programs = [*self._batch.programs(max_len), *self._runner.scorings()]
        progress(0, len(programs))
        for number, program in enumerate(programs, 1):
            self._runner.prepare(program)
            progress(number, len(programs))

    def _read_prompts(self) -> None:
        """A chunk of the group that is being read, or of the next one. Those that are read begin to run."""
        scheduler = self.scheduler
        if self._prompts and not self._prompts.left:
            self._run_group()
        if not scheduler.reading:  # or all that were being read were given up
            self._prompts = None
            self._group = list(scheduler.admit(GROUP_LEN))
            if not self._group:
                return
            requests, limits = zip(*((job.request, job.limit) for job in self._group), strict=True)
            self._prompts = self._batch.prompts(requests, limits)
        assert self._prompts is not None
        drawn = self._batch.read(self._prompts)
        if self._prompts.left:
            return
        self._pending.append((drawn, self._readers()))
        if scheduler.running:  # else whoever comes while the prompts are read has a row from the start
            self._run_group()

    def _readers(self) -> dict[int, Job]:
        """Whose prompts are being read, by their place in the group."""
        return {place: job for place, job in enumerate(self._group) if job.state == "reading"}

    def _run_group(self) -> None:
        """Those whose prompts are read begin to run."""
        scheduler, prompts, self._prompts = self.scheduler, self._prompts, None
        if not scheduler.reading:
            return
        assert prompts is not None
        for job in scheduler.reading:
            job.position, job.left = len(job.request.token_ids), job.limit - 1
            if job.matcher:  # its first token is not drawn yet
                job.position, job.left = job.position - 1, job.limit
        self._fit(max(sum(job.plan) for job in scheduler.reading))
        self._batch.insert(prompts, list(self._readers()), scheduler.place())

    def _decode(self) -> bool:
        """Dispatches a block, unless nothing is left to draw."""
        running = {row: job for row, job in enumerate(self.scheduler.rows) if job is not None and job.left > 0}
        if not running:
            return False
        constrained = any(job.matcher for job in running.values())
        num_steps = 1 if constrained else self._block_len(max(job.left for job in running.values()))
        self._fit(max(job.position + min(num_steps, job.left) for job in running.values()))
        # The rows may have moved.
        running = {row: job for row, job in enumerate(self.scheduler.rows) if job is not None and job.left > 0}
        drawn = self._draw_constrained() if constrained else self._batch.decode(num_steps)
        self._pending.append((drawn, running))
        for job in running.values():
            job.position += min(num_steps, job.left)
            job.left -= min(num_steps, job.left)
        return True

    def _draw_constrained(self) -> Drawn:
        """Dispatches one token. What may come next is found while the device computes the scores."""
        self._batch.forward()
        while self._pending:
            self._deliver(*self._pending.popleft())
        mask = self._runner.free_mask(self._batch.num_rows)
        for row, job in enumerate(self.scheduler.rows):
            if job is not None and job.matcher and job.left > 0:
                try:
                    job.matcher.fill(mask[row])
                except Exception as error:
                    self._end(job, "cancelled", error)
        return self._batch.draw(mask)

    def _block_len(self, left: int) -> int:
        scheduler = self.scheduler
        waits = scheduler.num_waiting > 0
        reads = scheduler.reading or (waits and scheduler.num_admitted < scheduler.num_slots)
        longest = min(SHORT_BLOCK_LEN if reads else FULL_BLOCK_LEN if waits else BLOCK_LEN, left)
        return max(1, min(longest, int(BLOCK_SECONDS / max(self._step_seconds, 1e-6))))

    def _deliver(self, drawn: Drawn, owners: dict[int, Job]) -> None:
        """Waits for a block, and hands its tokens to those they are for."""
        wants_logprobs = any(job.request.sampling.logprobs is not None for job in owners.values())
        block = self._runner.to_host(drawn, wants_logprobs)
        now = time.monotonic()
        num_steps = int((block.tokens >= 0).any(axis=0).sum())
        if num_steps and self._pending:
            self._step_seconds = (now - self._delivered) / num_steps
        self._delivered = now
        for row, job in owners.items():
            if job.state == "ended":
                continue
            try:
                self._hand_over(job, block, row)
            except Exception as error:
                self._end(job, "cancelled", error)

    def _hand_over(self, job: Job, block: Drawn, row: int) -> None:
        for token in self._runner.tokens(block, row, job.request.sampling.logprobs):
            if token.id in job.request.stop_ids:
                self._end(job, "stop")
                return
            job.drawn += 1
            ended = not job.listener.token(token)
            if job.matcher and not ended:
                job.matcher.advance(token.id)
                ended = job.matcher.ended
            if ended or job.drawn == job.limit:
                self._end(job, "stop" if ended else "length")
                return

    def _end(self, job: Job, reason: FinishReason, error: Exception | None = None) -> None:
        row = self.scheduler.end(job, reason, error)
        if row is not None and job.left > 0:
            self._batch.stop(row)

    def _fit(self, num_positions: int) -> None:
        """Gives the batch a row for each job that has a slot or will get one, with room for so many positions.

        Jobs that wait count, too: to grow from size to size copies the caches each time, and loads more programs.
        """
        scheduler, batch = self.scheduler, self._batch
        num_jobs = min(scheduler.num_jobs, scheduler.num_slots)
        num_rows, length = batch.fitting(num_jobs, max([num_positions, *(job.position for job in scheduler.running)]))
        if not scheduler.running and (num_rows, length) != (batch.num_rows, batch.length):
            batch.start(num_rows, length)
            scheduler.resize(num_rows)
        while batch.length != length:
            batch.approach(length)
        while batch.num_rows != num_rows:
            batch.take(scheduler.resize(batch.next_size(num_rows)))
