"""The adaptive schedules of a model, kept from one call to the next."""

import copy
import threading
from collections.abc import Callable, Hashable

from .adaptive import AdaptiveSchedule


class ScheduleStore:
    """Schedules by the conditions under which they learned. Calls of several threads each work on a copy."""

    def __init__(self):
        self._lock, self._known = threading.Lock(), {}

    def borrow(self, key: Hashable, make: Callable[[], AdaptiveSchedule]) -> AdaptiveSchedule:
        """A copy of the schedule for the conditions `key`, or a new one from `make`."""
        with self._lock:
            return copy.deepcopy(self._known[key]) if key in self._known else make()

    def give_back(self, key: Hashable, schedule: AdaptiveSchedule) -> None:
        """Keeps the schedule of a call. Of concurrent calls, the last one's is kept."""
        with self._lock:
            self._known[key] = schedule

    def __reduce__(self):
        # A copy of a model, or the model in another process, starts with new schedules.
        return ScheduleStore, ()
