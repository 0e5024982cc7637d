"""The order in which replies are admitted: clients share the machine equally, however much each of them asks for."""

from collections import Counter, deque
from collections.abc import Iterator

from palm_rlhf.serving.generation import Generation

SAMPLED_WEIGHT = 2  # of a sampled token; a token of a prompt that is read counts 1


class FairQueue:
    """The replies that wait. The next one is the first of the client that the fewest tokens have been computed for.

    The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). A client that
    was away starts at the count of the client that has least, so that nobody saves up turns. A client that is alone has
    all turns.
    """

    def __init__(self):
        self._waiting: dict[str, deque[Generation]] = {}
        self._open: Counter[str] = Counter()  # replies of each client that wait or run
        self._num_computed: dict[str, int] = {}  # tokens computed for each client

    def __len__(self) -> int:
        return sum(map(len, list(self._waiting.values())))  # a copy, since other threads call this

    def __iter__(self) -> Iterator[Generation]:
        for waiting in list(self._waiting.values()):
            yield from list(waiting)

    def __contains__(self, generation: Generation) -> bool:
        return generation in self._waiting.get(generation.request.client, ())

    def enter(self, generation: Generation) -> None:
        """Add a new reply behind the others of its client."""
        client = generation.request.client
        if client not in self._open:
            least = min((self._num_computed[other] for other in self._open), default=None)
            if least is None:
                self._num_computed.clear()
            else:  # a client that is away and has less would start at `least` anyway: it need not be remembered
                kept = {other: had for other, had in self._num_computed.items() if other in self._open or had > least}
                self._num_computed = kept
            self._num_computed.setdefault(client, least or 0)
        self._open[client] += 1
        self._waiting.setdefault(client, deque()).append(generation)

    def put_back(self, generation: Generation) -> None:
        """Let a reply that ran wait again, before the others of its client."""
        self._waiting.setdefault(generation.request.client, deque()).appendleft(generation)

    def remove(self, generation: Generation) -> None:
        """Remove a reply that waits no longer."""
        waiting = self._waiting[generation.request.client]
        waiting.remove(generation)
        if not waiting:
            del self._waiting[generation.request.client]

    def leave(self, generation: Generation) -> None:
        """Forget a reply that has ended."""
        client = generation.request.client
        self._open[client] -= 1
        if not self._open[client]:
            del self._open[client]

    def charge(self, generation: Generation, num_tokens: int) -> None:
        """Count tokens that were computed for a reply."""
        self._num_computed[generation.request.client] += num_tokens

    def computed_for(self, generation: Generation) -> int:
        """Return the tokens that were computed for a reply's client."""
        return self._num_computed[generation.request.client]

    def next(self) -> Generation | None:
        """Return the reply to be admitted next, of those that are not paused; None where there is none.

        Of two clients with equal counts, the reply that came first is next.
        """
        ready = (next((one for one in waiting if not one.paused), None) for waiting in self._waiting.values())
        return min(filter(None, ready), key=lambda one: (self.computed_for(one), one.submitted), default=None)
