"""How much of a batch is left, in tokens: what a line costs, and when an answer may end. Knows no clock."""

from collections import Counter, deque
from itertools import accumulate

# Costs of prefilling a token, and of a decode step, over that of a token in a step of many; with the native kernels.
_READ = 0.4
_STEP = 5.0
_BYTES_PER_TOKEN = 4


class Pace:
    """How fast work is done lately: in the second half of the time since the first look.

    The first part is slower: programs are compiled, and few requests run.
    """

    def __init__(self) -> None:
        self._looks: deque[tuple[float, float]] = deque()
        self._began: float | None = None

    def look(self, now: float, done: float) -> float:
        """What is done in a second.

        Args:
          now: of any clock, in seconds.
          done: so far.
        """
        self._began = now if self._began is None else self._began
        self._looks.append((now, done))
        while len(self._looks) > 1 and self._looks[1][0] <= (self._began + now) / 2:
            self._looks.popleft()
        since, done_before = self._looks[0]
        return (done - done_before) / (now - since) if now > since else 0.0


class Work:
    """What requests have cost and will cost. Their unit is the cost of one generated token, in a step of many.

    How long the answers will be is estimated from those so far, the unfinished ones too (Kaplan and Meier 1958): an
    answer of n tokens ends there as often as others of n tokens did. If none has ended by itself, each takes all that
    it may.

    Attributes:
      num_slots: how many are answered at the same time.
      done: of all requests so far.
      tokens: generated so far.
    """

    def __init__(self, num_slots: int = 32) -> None:
        self.num_slots = num_slots
        self.done = 0.0
        self.tokens = 0
        self._went_on: Counter[int] = Counter()  # answers that had a token more, by how many they had before
        self._ended: Counter[int] = Counter()  # answers that ended by themselves, by how many tokens they have
        self._waiting: Counter[int] = Counter()  # by the most tokens that an answer may take
        self._waiting_bytes = 0
        self._requests: dict[int, tuple[int, int]] = {}  # the most tokens, and bytes of the prompt
        self._drawn: dict[int, int] = {}

    def add(self, index: int, limit: int, num_bytes: int) -> None:
        """A request: the most tokens of its answer, and how long its line is."""
        self._requests[index] = limit, num_bytes
        self._waiting[limit] += 1
        self._waiting_bytes += num_bytes

    def token(self, index: int) -> None:
        """One more token of its answer; the first says that its prefill is complete."""
        if index not in self._drawn:
            self._begin(index)
        self._went_on[self._drawn[index]] += 1
        self._drawn[index] += 1
        self.tokens += 1
        self.done += 1 + _STEP / len(self._drawn)

    def end(self, index: int, *, by_itself: bool) -> None:
        """Its answer is whole; `by_itself` is before the most tokens that it may take."""
        if index not in self._drawn:
            self._begin(index)
        self._ended[self._drawn[index]] += by_itself
        del self._requests[index], self._drawn[index]

    @property
    def left(self) -> float:
        """Of the requests that have not ended."""
        # The share of answers that reach n tokens, and its sums: the mean length of those cut at n.
        chances = [self._chance_to_go_on(n) for n in range(len(self._went_on))]
        shares = list(accumulate(chances, float.__mul__, initial=1.0))
        means = list(accumulate(shares[1:], initial=0.0))
        # Answers longer than any so far go on as the longer half did.
        longer = [n for n in self._went_on if 2 * n >= len(chances)]
        ended, went_on = (sum(counts[n] for n in longer) for counts in (self._ended, self._went_on))
        chance = went_on / (went_on + ended) if longer else 1.0

        def expected(limit: int, drawn: int = 0) -> float:
            known = min(limit, len(chances))
            beyond = limit - known
            tail = beyond if chance == 1 else chance * (1 - chance**beyond) / (1 - chance)
            return (means[known] - means[drawn] + shares[known] * tail) / shares[drawn] if shares[drawn] else 0.0

        waiting = {limit: expected(limit) for limit in self._waiting}
        running = [expected(self._requests[index][0], drawn) for index, drawn in self._drawn.items()]
        tokens = sum(self._waiting[limit] * length for limit, length in waiting.items()) + sum(running)
        num_steps = max([tokens / self.num_slots, *waiting.values(), *running])
        return tokens + num_steps * _STEP + self._waiting_bytes / _BYTES_PER_TOKEN * _READ

    def _begin(self, index: int) -> None:
        limit, num_bytes = self._requests[index]
        self._waiting[limit] -= 1
        if not self._waiting[limit]:
            del self._waiting[limit]
        self._waiting_bytes -= num_bytes
        self.done += num_bytes / _BYTES_PER_TOKEN * _READ
        self._drawn[index] = 0

    def _chance_to_go_on(self, num_tokens: int) -> float:
        return self._went_on[num_tokens] / (self._went_on[num_tokens] + self._ended[num_tokens])
