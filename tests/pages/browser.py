"""A headless Chromium, driven over a pipe with the DevTools protocol: no driver program and no package is needed."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update"),
    *("--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars"),
    # No name resolves: a page that asks for anything fails, and the request is on record all the same.
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe", "--force-color-profile=srgb"),
)
TIMEOUT = 60.0  # seconds for one answer of the browser


def find() -> str | None:
    """Returns the browser that $CHROMIUM names, or one on PATH; None if there is none."""
    named = os.environ.get("CHROMIUM")
    candidates = [named] if named else ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    return next((path for name in candidates if (path := shutil.which(name))), None)


class Browser:
    """One browser with one tab. What went wrong in the page is in `problems`, what it asked for in `requests`."""

    def __init__(self, program: str):
        self._profile = tempfile.mkdtemp(prefix="chromium_")
        # Chromium reads commands from descriptor 3 and answers on descriptor 4.
        self._process = subprocess.Popen(
            [
                *("sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null'),
                *(program, *FLAGS, f"--user-data-dir={self._profile}"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._write, self._read = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._read, False)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and returns its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        until = time.monotonic() + TIMEOUT
        while time.monotonic() < until:
            for answer in self._answers():
                if answer.get("id") == self._number:
                    assert "error" not in answer, f"{method}: {answer['error']}"
                    return answer["result"]
            time.sleep(0.002)
        raise TimeoutError(f"the browser did not answer {method} within {TIMEOUT:.0f} s")

    def _answers(self) -> list[dict[str, Any]]:
        while True:
            try:
                part = os.read(self._read, 1 << 20)
            except BlockingIOError:
                break
            assert part, "the browser has ended"
            self._buffer += part
        *whole, self._buffer = self._buffer.split(b"\0")
        answers = [json.loads(text) for text in whole]
        for answer in answers:
            self._note(answer)
        return answers

    def _note(self, answer: dict[str, Any]) -> None:
        method, params = answer.get("method"), answer.get("params", {})
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.problems.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])

    def open(self, path: Path, width: int = 1440, height: int = 900, dark: bool = False) -> None:
        """Opens a page of a file and waits until it has drawn itself."""
        self.view(width, height, dark)
        self.problems, self.requests = [], []
        self.call("Page.navigate", url=path.resolve().as_uri())
        until = time.monotonic() + TIMEOUT
        while not self.run("document.body?.dataset.ready === 'yes' || document.querySelector('[role=alert]') !== null"):
            assert time.monotonic() < until, f"{path} did not become ready: {self.problems}"
            time.sleep(0.02)
        # The page itself is the one request there may be.
        self.requests = [url for url in self.requests if url != path.resolve().as_uri()]

    def view(self, width: int, height: int, dark: bool) -> None:
        """Sets the size of the window in CSS pixels, and which colours the system prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, script: str) -> Any:
        """Returns the value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 20.0) -> bool:
        """Returns whether a condition comes true; the events of dialogs and details are delivered a little later."""
        end = time.monotonic() + seconds
        while not self.run(script):
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def point(self, x: float, y: float) -> None:
        """Moves the pointer to a place in the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Presses the left button at one place and releases it at another."""
        self.point(*start)
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=start[0], y=start[1], button="left", clickCount=1)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=end[0], y=end[1], button="left", buttons=1)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=end[0], y=end[1], button="left", clickCount=1)

    def double_click(self, x: float, y: float) -> None:
        for count in (1, 2):
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=count)

    def wheel(self, x: float, y: float, by: float, ctrl: bool = False) -> None:
        """Turns the wheel at a place, down where `by` is positive."""
        about = {"x": x, "y": y, "deltaX": 0, "deltaY": by, "modifiers": 2 if ctrl else 0}
        self.call("Input.dispatchMouseEvent", type="mouseWheel", **about)

    def press(self, key: str) -> None:
        """Presses and releases a key, such as "ArrowLeft", "Tab", "Enter" or "a"."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36}
        codes |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = codes.get(key, ord(key.upper()) if len(key) == 1 else 0)
        about = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def box(self, selector: str) -> dict[str, float]:
        """Scrolls the first element that a selector finds into view; returns its x, y, width and height there."""
        return self.box_of(f"document.querySelector({json.dumps(selector)})")

    def box_of(self, element: str) -> dict[str, float]:
        """As `box`, of the element that is the value of a JavaScript expression."""
        return self.run(
            f"(() => {{ const e = {element};"
            "e.scrollIntoView({block: 'center'});"
            "const b = e.getBoundingClientRect(); return {x: b.x, y: b.y, width: b.width, height: b.height}; })()"
        )

    def screenshot(self, path: Path, full: bool = False) -> None:
        """Writes a PNG of the window, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(answer["data"]))
