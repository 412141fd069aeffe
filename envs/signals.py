"""Signals, so that a run ends in order whenever one comes."""

import contextlib
import signal
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

# Slurm can send SIGUSR1 before the time is up; Windows knows neither that nor an alarm
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
ALARM = getattr(signal, "SIGALRM", None)
AGAIN = 1.0  # s after which a signal that has not ended the program is raised once more


class Interrupted(BaseException):
    """One of SIGNALS, raised wherever the program happens to be."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Signals:
    """The first signal raises Interrupted, later ones must not cut short what it began. While signals are held, it is
    only noted, and raised when they are let in again.

    Python prints and drops an exception that is raised in a destructor or in a library's callback, and some libraries
    drop all that they meet. So the signal is raised again after a second, until the program is on its way out."""

    def __init__(self) -> None:
        self.came: int | None = None
        self.held = False

    def catch(self) -> None:
        """From now on signals come here, and are held; only in the main thread."""
        self.came, self.held = None, True
        for s in SIGNALS:
            signal.signal(s, self._arrived)
        if ALARM is not None:
            signal.signal(ALARM, self._again)
        self.tell, sys.unraisablehook = sys.unraisablehook, self._dropped

    def leave(self) -> None:
        """From now on a signal ends the process at once."""
        self._alarm(0)
        for s in (*SIGNALS, *([] if ALARM is None else [ALARM])):
            signal.signal(s, signal.SIG_DFL)
        sys.unraisablehook = self.tell
        self.came, self.held = None, False

    def let(self) -> None:
        """No longer held: raises Interrupted if a signal came meanwhile."""
        self.held = False
        if self.came is not None:
            self._interrupt()

    def _arrived(self, signum: int, frame: types.FrameType | None) -> None:
        if self.came is None:
            self.came = signum
            if not self.held:
                self._interrupt()

    def _dropped(self, what: Any) -> None:
        if not isinstance(what.exc_value, Interrupted):
            self.tell(what)

    def _again(self, signum: int, frame: types.FrameType | None) -> None:
        if self.came is not None and not self.held:
            self._interrupt()

    def _interrupt(self) -> None:
        self._alarm(AGAIN)
        raise Interrupted(self.came)

    def _alarm(self, seconds: float) -> None:
        if ALARM is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds)


signals = Signals()


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """No signal interrupts meanwhile; in a notebook, whose Ctrl-C does not come to `signals`, it is ignored."""
    signals.held = True
    main = threading.current_thread() is threading.main_thread()
    notebook = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if notebook:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signals.held = False
        if notebook:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.let()
