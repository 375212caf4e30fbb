"""The sequential strategy: one request at a time, with the lowest latency."""

import time
from collections.abc import Iterator

from llamajax.engine.runner import Runner
from llamajax.engine.steps import BLOCK_LEN, Drawn
from llamajax.types import Request, Token

# A block takes about this long: short enough to read along and to cancel, long enough to hide a dispatch.
_BLOCK_SECONDS = 0.05


class Sequential:
    """Tokens of one request, as they are drawn.

    Attributes:
      request: as it was given.
      cached_tokens: how many of the prompt's tokens the KV cache already held; known once iteration began.
      stopped: whether a stop token ended the answer, which is not part of it.
    """

    def __init__(self, runner: Runner, request: Request) -> None:
        self.request = request
        self.cached_tokens = 0
        self.stopped = False
        self._runner = runner

    def __iter__(self) -> Iterator[Token]:
        """Draws until a stop token or the limit. One block is always computed ahead of the one that is read."""
        runner, request = self._runner, self.request
        drawn: Drawn | None
        drawn, self.cached_tokens = runner.prefill(request)
        max_new_tokens = min(request.max_new_tokens, runner.max_seq_len - len(request.token_ids))
        answer: list[int] = []
        asked = num_steps = 1
        while drawn is not None:
            ahead = runner.decode(num_steps) if asked < max_new_tokens else None
            asked += num_steps
            began = time.perf_counter()
            tokens = runner.read(drawn)
            if answer and tokens:
                seconds = (time.perf_counter() - began) / len(tokens)
                num_steps = max(1, min(BLOCK_LEN, int(_BLOCK_SECONDS / max(seconds, 1e-6))))
            for token in tokens:
                # The tokens before this one were read into the cache to draw it; itself it may not be there yet.
                runner.cached_ids = [*request.token_ids, *answer]
                if token.id in request.stop_ids:
                    self.stopped = True
                    return
                answer.append(token.id)
                yield token
            drawn = ahead
