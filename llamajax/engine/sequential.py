"""The sequential strategy: one request at a time, with the lowest latency."""

import time
from collections.abc import Callable, Iterator

from llamajax.engine.runner import Runner
from llamajax.engine.steps import BLOCK_LEN, Drawn
from llamajax.errors import RequestError
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
        """The first token alone, then blocks, each computed while the one before it is read."""
        runner, request = self._runner, self.request
        num_logprobs = request.sampling.logprobs
        with runner.turn:
            drawn, self.cached_tokens = runner.prefill(request, self.goes_on)
        if drawn is None:
            return
        left = min(request.max_new_tokens, runner.max_seq_len - len(request.token_ids))
        if request.constraint:
            yield from self._constrained_blocks(request.constraint.matcher(), left)
            return
        yield runner.read(drawn, num_logprobs)
        left -= 1
        num_steps = 1
        pending: list[Drawn] = []
        while pending or left > 0:
            with runner.turn:
                self._check_turn()
                if left > 0:
                    num_steps = min(num_steps, left)
                    pending.append(runner.decode(num_steps))
                    left -= num_steps
            if len(pending) > 1 or left <= 0:
                began = time.perf_counter()
                block = runner.read(pending.pop(0), num_logprobs)
                seconds = (time.perf_counter() - began) / max(len(block), 1)
                num_steps = _block_len(seconds, BLOCK_LEN)
                yield block

    def _constrained_blocks(self, matcher: Matcher, left: int) -> Iterator[list[Token]]:
        """Tokens one by one, since what may come next depends on each: their scores are computed meanwhile.

        Inside of a string it stays the same. After some tokens for which it did, a block of a quarter as many is drawn
        at once, and what the block has after a change is drawn again.
        """
        runner, request = self._runner, self.request
        mask, same, seconds, scored = runner.free_mask(1), 0, 0.0, False
        matcher.fill(mask[0])
        while left > 0:
            began, num_steps = time.perf_counter(), _block_len(seconds, min(same // 4, left))
            with runner.turn:
                self._check_turn()
                if num_steps == 1 and not scored:
                    runner.forward()
                drawn = runner.draw(mask) if num_steps == 1 else runner.decode(num_steps, mask)
                scored = num_steps == 1 and left > 1 and _block_len(seconds, (same + 1) // 4) == 1
                if scored:
                    runner.forward()
            block = runner.read(drawn, request.sampling.logprobs)
            seconds = (time.perf_counter() - began) / num_steps
            for number, token in enumerate(block, 1):
                left -= 1
                if token.id not in request.stop_ids:
                    matcher.advance(token.id)
                yield [token]
                if matcher.ended:
                    self.stopped = True
                    return
                if left == 0:
                    return
                before = mask.copy()
                matcher.fill(mask[0])
                same = same + 1 if (mask == before).all() else 0
                if not same:
                    if number < len(block):
                        with runner.turn:
                            self._check_turn()
                            runner.drop(token.id, [it.id for it in block[number:]], left)
                    break

    def _check_turn(self) -> None:
        if self._runner.current is not self.request:
            raise RequestError(
                "another request took the model: read a stream to its end before the next, or answer several at once "
                "with serve_requests"
            )


def _block_len(seconds: float, longest: int) -> int:
    """Tokens to draw at once, at least one, if each takes so many seconds."""
    return max(1, min(longest, BLOCK_LEN, int(_BLOCK_SECONDS / max(seconds, 1e-6))))
