"""How often somebody may do something: requests, and guesses of a password."""

import ipaddress
import math
import threading
from collections import OrderedDict
from dataclasses import dataclass, fields

from palm_rlhf.feedback.refusals import FeedbackError

MOST_KEYS = 20_000  # whose times are remembered; the one that was used longest ago is forgotten first


class RateLimit:
    """At most `most` uses in `seconds`, for each key by itself; they may come all at once.

    This is the generic cell rate algorithm (ITU-T I.371): of each key only the time is kept at which all of its uses
    are paid off, at one use in seconds / most.
    """

    def __init__(self, most: int, seconds: float):
        self.seconds, self.interval = seconds, seconds / most
        self._paid_off: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def use(self, key: str, now: float) -> float:
        """Count a use, and return 0; or count nothing, and return the seconds until there may be one."""
        with self._lock:
            paid_off = max(self._paid_off.get(key, now), now) + self.interval
            wait = paid_off - now - self.seconds
            if wait > 1e-9 * self.seconds:
                return wait
            self._paid_off[key] = paid_off
            self._paid_off.move_to_end(key)
            if len(self._paid_off) > MOST_KEYS:
                self._paid_off.popitem(last=False)
            return 0.0

    def give_back(self, key: str) -> None:
        """Take back a use that was counted."""
        with self._lock:
            if key in self._paid_off:
                self._paid_off[key] -= self.interval


@dataclass(frozen=True)
class SiteLimits:
    """How much of a site one person, or one address, may use.

    Args:
        requests_per_minute: Requests of one person.
        guesses_per_name_and_address: Wrong passwords for one name from one address, in ten minutes.
        guesses_per_address: Wrong passwords and invitations from one address, in ten minutes.
        guesses_per_name: Wrong passwords for one name from all addresses, in an hour.
        max_body: Bytes of the body of a request.
        body_timeout: Seconds in which a body has to arrive.
    """

    requests_per_minute: int = 1200
    guesses_per_name_and_address: int = 10
    guesses_per_address: int = 100
    guesses_per_name: int = 100
    max_body: int = 2**18
    body_timeout: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"got {field.name}={getattr(self, field.name)}, expected more than 0")


class Throttle:
    """The counts of a running site, in memory: they start anew with the process."""

    def __init__(self, limits: SiteLimits):
        self.requests = RateLimit(limits.requests_per_minute, 60)
        self.guesses = {
            "name and address": RateLimit(limits.guesses_per_name_and_address, 600),
            "address": RateLimit(limits.guesses_per_address, 600),
            "name": RateLimit(limits.guesses_per_name, 3600),
        }

    def count_request(self, person_id: str, now: float) -> None:
        """Count a request of a person; FeedbackError with status 429 where there were too many."""
        if wait := self.requests.use(person_id, now):
            seconds = math.ceil(wait)
            raise FeedbackError(
                "you send requests faster than anybody can read: wait for {seconds} seconds",
                429,
                retry_after=seconds,
                seconds=seconds,
            )

    def count_guess(self, name: str | None, address: str, now: float) -> None:
        """Count a guess of a password, or of an invitation where `name` is None, before it is looked at.

        Raises FeedbackError with status 429 where there were too many, whether or not there is somebody of that name.
        """
        keys = self._keys(name, address)
        for done, (kind, key) in enumerate(keys):
            if wait := self.guesses[kind].use(key, now):
                for other, counted in keys[:done]:
                    self.guesses[other].give_back(counted)
                seconds = math.ceil(wait)
                raise FeedbackError(
                    "there were too many wrong guesses: wait for {seconds} seconds",
                    429,
                    retry_after=seconds,
                    seconds=seconds,
                )

    def forgive_guess(self, name: str | None, address: str) -> None:
        """Take back the count of a guess that was right."""
        for kind, key in self._keys(name, address):
            self.guesses[kind].give_back(key)

    @staticmethod
    def _keys(name: str | None, address: str) -> list[tuple[str, str]]:
        network = network_of(address)
        if name is None:
            return [("address", network)]
        return [("name and address", f"{network} {name}"), ("address", network), ("name", name)]


def network_of(address: str) -> str:
    """Return the network by which an address is counted: the address itself, or the /64 that an IPv6 client has."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else str(found)
