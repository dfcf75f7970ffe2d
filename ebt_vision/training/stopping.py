"""Stop training between two updates on SIGINT (Ctrl-C) and SIGTERM (what schedulers send)."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME_REQUEST = 2.0  # seconds; under torchrun one Ctrl-C arrives twice: from the terminal and from torchrun


class TrainingInterrupted(KeyboardInterrupt):
    """A signal stopped the training between two updates, after a checkpoint was written; `signal` is its number."""

    def __init__(self, number: int):
        self.signal = number
        super().__init__(f"interrupted by {signal.Signals(number).name}")


class StopRequest:
    """A context that records SIGINT and SIGTERM instead of stopping at once.

    A second signal, at least two seconds after the first, acts at once, as outside the context. Signals that the process
    ignores stay ignored. Outside the main thread Python installs no handlers, so nothing is recorded.
    """

    def __init__(self, message: str = "") -> None:
        """Write `message` to stderr when the first signal arrives."""
        self.signal: int | None = None
        self._message, self._time = message, 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._time = number, time.monotonic()
            if self._message:  # print is not allowed in a handler that interrupts a print
                os.write(2, f"{self._message}\n".encode())
        elif time.monotonic() - self._time >= _SAME_REQUEST:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
