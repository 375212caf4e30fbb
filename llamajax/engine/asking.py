"""A constraint that the device's steps ask for themselves, where one request runs alone.

With a mask from the host, a call for each token takes 1 ms longer.
"""

from contextlib import ExitStack

import numpy as np
from jaxtyping import Int32

from llamajax.engine.scheduler import Job
from llamajax.ops import native


class Asking:
    """The job whose masks the steps ask for.

    Attributes:
      job: whose they are; None if nobody is asked.
    """

    def __init__(self) -> None:
        self.job: Job | None = None
        self._number = np.zeros(1, np.int32)
        self._registered = ExitStack()

    def begin(self, job: Job) -> Int32[np.ndarray, "1"]:
        """The number by which steps ask for a job's masks. Its matcher must know all that was drawn the first time."""
        if self.job is not job:
            self.end()
            self._number = self._registered.enter_context(native.asked(_Asked(job)))
            self.job = job
        return self._number

    def end(self) -> None:
        """Answers no more questions, which ends a block that is running."""
        self.job = None
        self._registered.close()


class _Asked:
    """A job that a program asks, at each step, which tokens may follow the last one."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._next = job.num_matched  # which token it will be asked about; 0 is the prompt's last one

    def __call__(self, token: int) -> bytes | None:
        """The mask, or None if the answer has ended or cannot go on."""
        job = self._job
        assert job.matcher
        try:
            if self._next > job.num_matched:
                job.advance(token)
            self._next += 1
            return None if job.matcher.ended else job.matcher.mask()
        except Exception as error:
            job.error = error
            return None
