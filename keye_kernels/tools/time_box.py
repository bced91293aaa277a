"""A limit of time for a command that works through a list: estimates decide what still fits."""

import time
from collections.abc import Callable

# Until this much time has passed, the estimates count more than the first measurements
TRUSTED_SECONDS = 20.0


class TimeBox:
    """Counts from its creation. `seconds` None is no limit.

    Estimates are corrected by what earlier work took: on a machine that is twice as slow, they are doubled.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock = seconds, clock
        self.start = clock()
        self.estimated = self.taken = TRUSTED_SECONDS

    @property
    def elapsed(self) -> float:
        return self.clock() - self.start

    @property
    def is_over(self) -> bool:
        return self.seconds is not None and self.elapsed >= self.seconds

    def fits(self, estimate: float) -> bool:
        """Whether work with this estimate, in seconds, would end within the limit."""
        return self.seconds is None or self.elapsed + estimate * self.taken / self.estimated <= self.seconds

    def record(self, estimate: float, taken: float) -> None:
        """What work with this estimate took."""
        self.estimated += estimate
        self.taken += taken
