"""What schedules learned, kept with a model from one call to the next."""

import copy
import threading
from collections.abc import Callable, Hashable

from .adaptive import AdaptiveSchedule


class ScheduleStore:
    """Schedules by the conditions that they were learned under. Calls of several threads each work on a copy."""

    def __init__(self):
        self._lock, self._known = threading.Lock(), {}

    def borrow(self, key: Hashable, make: Callable[[], AdaptiveSchedule]) -> AdaptiveSchedule:
        """A copy of what was learned under these conditions, or a new schedule.

        Args:
            key (`Hashable`): The conditions.
            make (`Callable`): Makes a new one.
        """
        with self._lock:
            return copy.deepcopy(self._known[key]) if key in self._known else make()

    def give_back(self, key: Hashable, schedule: AdaptiveSchedule) -> None:
        """Keeps what a call learned. Of calls at the same time the last one's is kept."""
        with self._lock:
            self._known[key] = schedule

    def __reduce__(self):
        # A copy of a model, or a model in another process, learns anew.
        return ScheduleStore, ()
