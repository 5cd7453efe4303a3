"""A headless Chromium for tests, driven by its DevTools protocol."""

import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium")
SECONDS = 60


class Tab:
    """One page of a browser.

    Attributes:
      complaints: exceptions, and what went to the console or was refused.
    """

    def __init__(self, socket: Any) -> None:
        self._socket, self._count = socket, 0
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command, and returns its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        self._socket.send(json.dumps(message))
        while (answer := self._receive()).get("id") != self._count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        answer = json.loads(self._socket.recv(timeout=SECONDS))
        method = answer.get("method", "")
        if method in ("Runtime.exceptionThrown", "Log.entryAdded") or (
            method == "Runtime.consoleAPICalled"
        ):
            self.complaints.append(json.dumps(answer["params"]))
        return answer

    def open(self, page: Path, width: int, dark: bool = False) -> None:
        """Loads a file in a window of some width."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        answer = self.call(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key pressed and released."""
        fields = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **fields, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **fields)


@contextlib.contextmanager
def tab() -> Iterator[Tab]:
    """A tab of a fresh browser, which ends with the context."""
    from websockets.sync.client import connect

    assert PROGRAM is not None
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        options += ["--remote-debugging-port=0", f"--user-data-dir={profile}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([PROGRAM, *options, "about:blank"], **quiet) as browser:
            try:
                port = _port(browser, Path(profile, "DevToolsActivePort"))
                with connect(_page(port), max_size=None, proxy=None) as socket:
                    yield Tab(socket)
            finally:
                browser.terminate()
                browser.wait(SECONDS)


def _port(browser: subprocess.Popen[bytes], file: Path) -> int:
    """The port that the browser has written down."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and browser.poll() is None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(file.read_text().splitlines()[0])
        time.sleep(0.05)
    raise RuntimeError(f"chromium has not started: exit code {browser.poll()}")


def _page(port: int) -> str:
    """The address of the browser's first tab."""
    from urllib.request import ProxyHandler, build_opener

    with build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{port}/json") as reply:
        [found] = [one for one in json.load(reply) if one["type"] == "page"]
    return found["webSocketDebuggerUrl"]
