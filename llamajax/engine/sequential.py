"""The sequential strategy: one request at a time, with the lowest latency."""

import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int32

from llamajax.engine.runner import Runner
from llamajax.engine.steps import BLOCK_LEN, Drawn
from llamajax.errors import RequestError
from llamajax.ops import native
from llamajax.types import Matcher, Request, Token

# A block takes about this long: short enough to read along and to cancel, long enough to hide a dispatch.
_BLOCK_SECONDS = 0.1


class Sequential:
    """Tokens of one request, as they are drawn.

    Attributes:
      request: as it was given.
      cached_tokens: how many of the prompt's tokens the KV cache already held; known once iteration began.
      stopped: whether the answer ended by itself: by a stop token, which is not part of it, or where nothing more fits
        its constraint.
      goes_on: called before each chunk of the prompt with how many of its tokens are read; False ends the request.
    """

    def __init__(self, runner: Runner, request: Request) -> None:
        self.request = request
        self.cached_tokens = 0
        self.stopped = False
        self.goes_on: Callable[[int], bool] = lambda read: True
        self._runner = runner

    def __iter__(self) -> Iterator[Token]:
        """Draws until a stop token or the limit."""
        answer: list[int] = []
        for block in self._blocks():
            for token in block:
                with self._runner.turn:
                    if self._runner.current is self.request:
                        # The tokens before this one were read into the cache to draw it; itself it may not be there.
                        self._runner.cached_ids = [*self.request.token_ids, *answer]
                if token.id in self.request.stop_ids:
                    self.stopped = True
                    return
                answer.append(token.id)
                yield token

    def _blocks(self) -> Iterator[list[Token]]:
        """The first token alone, then blocks."""
        runner, request = self._runner, self.request
        num_logprobs = request.sampling.logprobs
        with runner.turn:
            drawn, self.cached_tokens = runner.prefill(request, self.goes_on)
        if drawn is None:
            return
        left = min(request.max_new_tokens, runner.max_seq_len - len(request.token_ids))
        if request.constraint:
            constrained = self._asking_blocks if runner.can_ask else self._masked_blocks
            yield from constrained(request.constraint.matcher(), left)
        else:
            yield runner.read(drawn, num_logprobs)
            yield from self._decoded(left - 1)

    def _decoded(self, left: int, asked: Int32[np.ndarray, "1"] | None = None) -> Iterator[list[Token]]:
        """Blocks, each computed while the one before it is read, until one ends early."""
        runner, num_steps = self._runner, 1
        pending: deque[tuple[Drawn, int]] = deque()
        while pending or left > 0:
            with runner.turn:
                self._check_turn()
                if left > 0:
                    num_steps = min(num_steps, left)
                    pending.append((runner.decode(num_steps, asked), num_steps))
                    left -= num_steps
            if len(pending) > 1 or left <= 0:
                began, (drawn, expected) = time.perf_counter(), pending.popleft()
                block = runner.read(drawn, self.request.sampling.logprobs)
                seconds = (time.perf_counter() - began) / max(len(block), 1)
                num_steps = _block_len(seconds)
                yield block
                if len(block) < expected:
                    return

    def _asking_blocks(self, matcher: Matcher, left: int) -> Iterator[list[Token]]:
        """Blocks whose steps ask the matcher themselves: a call for each token takes 1 ms longer."""
        asked = _Asked(matcher)
        block: list[Token] = []
        with native.asked(asked) as number:
            for block in self._decoded(left, number):
                yield block
        if asked.error:
            raise asked.error
        if not matcher.ended:  # the last token came without a question after it
            matcher.advance(block[-1].id)
        self.stopped = matcher.ended

    def _masked_blocks(self, matcher: Matcher, left: int) -> Iterator[list[Token]]:
        """Tokens one by one, since what may come next depends on each: their scores are computed meanwhile."""
        runner = self._runner
        with runner.turn:
            self._check_turn()
            runner.forward()
        while left > 0 and not matcher.ended:
            mask = np.frombuffer(matcher.mask(), np.int32)[None]
            left -= 1
            with runner.turn:
                self._check_turn()
                drawn = runner.draw(mask)
                if left > 0:
                    runner.forward()
            for token in runner.read(drawn, self.request.sampling.logprobs):
                if token.id not in self.request.stop_ids:
                    matcher.advance(token.id)
                yield [token]
        self.stopped = matcher.ended

    def _check_turn(self) -> None:
        if self._runner.current is not self.request:
            raise RequestError(
                "another request took the model: read a stream to its end before the next, or answer several at once "
                "with serve_requests"
            )


class _Asked:
    """A matcher that a program asks at each step, for what may follow the last token.

    Attributes:
      error: why it could not answer.
    """

    def __init__(self, matcher: Matcher) -> None:
        self.error: Exception | None = None
        self._matcher = matcher
        self._has_begun = False

    def __call__(self, token: int) -> bytes | None:
        """The mask, or None if the answer has ended or cannot go on."""
        try:
            if self._has_begun:
                self._matcher.advance(token)
            self._has_begun = True  # the first token is the prompt's last one
            return None if self._matcher.ended else self._matcher.mask()
        except Exception as error:
            self.error = error
            return None


def _block_len(seconds: float) -> int:
    """Tokens to draw at once, at least one, if each takes so many seconds."""
    return max(1, min(BLOCK_LEN, int(_BLOCK_SECONDS / max(seconds, 1e-6))))
