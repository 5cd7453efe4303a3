"""The progress line of a training, or of a count."""

import sys
import time


class Line:
    """Progress on stderr: one line that is rewritten on a terminal, else one a log.

    Attributes:
      live: whether the line is rewritten, so that it may be refreshed often.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self.live = enabled and sys.stderr.isatty()
        self._open = False

    def put(self, text: str, final: bool) -> None:
        """Print; `final` marks a text that a log file should have too."""
        if self.live:
            # Erase to the end of the line: the text before may have been longer.
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
            self._open = True
        elif self._enabled and final:
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._open:
            print(file=sys.stderr, flush=True)
            self._open = False


class Progress:
    """How far a count is: a line a second on a terminal, else one a minute."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = name, total
        self._line = Line(True)
        self._began = self._shown = time.perf_counter()

    def __call__(self, done: int) -> None:
        """Say that `done` of the total are done, where it is time to."""
        now = time.perf_counter()
        if now - self._shown < (1 if self._line.live else 60):
            return
        self._shown = now
        left = duration((self._total - done) * (now - self._began) / done)
        self._line.put(f"{self._name} {done}/{self._total}  {left} left", True)

    def end(self) -> None:
        """Leave the line."""
        self._line.end()


def duration(seconds: float) -> str:
    """1h02m, 1m45s, 45s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
