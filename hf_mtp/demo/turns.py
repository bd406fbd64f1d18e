"""Lets several decoders compute in turns, so that none slows another down, and gives each a clock of its own.

Two decoders that run at once on one machine compete for it, and their speeds say nothing. Here one computes at a time:
the one whose clock shows the least. A clock runs only while its owner computes. So all clocks advance together, and
each shows the time that its owner would need alone.

The decoders are greenlets: calls that can be left in the middle and continued, in one thread. With a thread for each,
OpenMP would give each one helpers. Once there are more of them than cores, GNU's OpenMP lets them sleep between two
operations instead of spinning, and waking them takes long.

Knows calls and time. Knows nothing of models.
"""

import threading
import time
from collections.abc import Callable


class Turns:
    """Turns of some decoders, each named by a number.

    Args:
        count (`int`): How many decoders take part.
        pause (`float`, *optional*, defaults to 0): Seconds to wait after each turn, when nobody computes.

    Attributes:
        seconds (`list[float]`): The clocks.
    """

    def __init__(self, count: int, pause: float = 0.0):
        self.pause, self.seconds = pause, [0.0] * count
        self._cancelled = threading.Event()
        self._since, self._parent = 0.0, None

    def run(self, decoders: list[Callable[[], None]]) -> None:
        """Runs decoders in their turns, until all have ended or [`cancel`] is called.

        Args:
            decoders (`list[Callable]`): The decoders, in the order of their clocks.

        Raises:
            Exception: A decoder raised it. The others were ended.
        """
        from greenlet import getcurrent, greenlet  # of the extra `demo`, without which this module can be imported

        self._parent = getcurrent()
        racing = {number: greenlet(decoder) for number, decoder in enumerate(decoders)}
        try:
            while racing and not self._cancelled.is_set():
                number = min(racing, key=self.seconds.__getitem__)
                self._since = time.perf_counter()
                racing[number].switch()
                if racing[number].dead:
                    del racing[number]
                elif self.pause:
                    self._cancelled.wait(self.pause)
        finally:
            for decoder in racing.values():
                decoder.throw()  # raises GreenletExit where the decoder was left, so that it cleans up

    def stop_clock(self, number: int) -> float:
        """Stops the clock of the decoder whose turn it is, and returns what it shows. The turn goes on."""
        self.seconds[number] += time.perf_counter() - self._since
        return self.seconds[number]

    def end(self) -> None:
        """Ends a turn, and returns when the next one begins. The clock was stopped before."""
        self._parent.switch()

    def cancel(self) -> None:
        """Ends the race after the current pass. Any thread may call this."""
        self._cancelled.set()
