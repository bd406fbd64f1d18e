"""Lets several threads compute in turns, so that none slows another down, and gives each a clock of its own.

Two decoders that run at once on one machine compete for it, and their speeds say nothing. Here one thread computes at
a time: the one whose clock shows the least. A clock runs only while its owner computes. So all clocks advance
together, and each shows the time that its owner would need alone.

Knows threads and time. Knows nothing of models.
"""

import threading
import time


class Cancelled(Exception):
    """Raised in the threads of a cancelled race."""


class Turns:
    """Turns of some threads, each named by a number.

    Args:
        count (`int`): How many threads take part.
        pause (`float`, *optional*, defaults to 0): Seconds to wait after each turn, when nobody computes.

    Attributes:
        seconds (`list[float]`): The clocks.
        is_cancelled (`bool`): Whether [`cancel`] was called.
    """

    def __init__(self, count: int, pause: float = 0.0):
        self.pause, self.seconds, self.is_cancelled = pause, [0.0] * count, False
        self._changed = threading.Condition()
        self._holder: int | None = None
        self._racing = set(range(count))
        self._since = 0.0

    def take(self, number: int) -> None:
        """Waits for the turn of a thread, and starts its clock.

        Raises:
            Cancelled: [`cancel`] was called.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.is_cancelled or self._next() == number)
            if self.is_cancelled:
                raise Cancelled
            self._holder = number
        self._since = time.perf_counter()

    def stop_clock(self, number: int) -> float:
        """Stops the clock of the thread whose turn it is, and returns what it shows. The turn goes on."""
        self.seconds[number] += time.perf_counter() - self._since
        return self.seconds[number]

    def pass_on(self, number: int) -> None:
        """Ends a turn after the pause, and waits for the next one. The clock was stopped before.

        Raises:
            Cancelled: [`cancel`] was called.
        """
        with self._changed:
            if self.pause:
                self._changed.wait_for(lambda: self.is_cancelled, timeout=self.pause)
            self._holder = None
            self._changed.notify_all()
        self.take(number)

    def leave(self, number: int) -> None:
        """Ends the part of a thread in the race. Others need not wait for it any more."""
        with self._changed:
            self._racing.discard(number)
            if self._holder == number:
                self._holder = None
            self._changed.notify_all()

    def cancel(self) -> None:
        """Ends the race: each thread gets [`Cancelled`] when it asks for a turn. Any thread may call this."""
        with self._changed:
            self.is_cancelled = True
            self._changed.notify_all()

    def _next(self) -> int | None:
        """Whose turn it is; `None` while a turn lasts."""
        if self._holder is not None:
            return None
        return min(self._racing, key=self.seconds.__getitem__, default=None)
