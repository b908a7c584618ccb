"""A headless Chromium on a pipe: the DevTools protocol as JSON ended by NUL, with nothing but the standard library."""

from __future__ import annotations

import base64
import json
import os
import re
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def pictures_in(folder: Path) -> Path:
    """Where pictures go: `make pictures` says docs/img, else the test's own folder."""
    return ROOT / named if (named := os.environ.get("TTS_DOCS_IMAGES")) else folder


CONTRASTS = """(() => {
  const parse = text => [...text.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const over = ([r, g, b, a], below) => [r, g, b].map((one, i) => a * one + (1 - a) * below[i]);
  const light = rgb => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (one, other) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  const background = one => {
    const below = one === document.documentElement ? [255, 255, 255] : background(one.parentElement);
    return over(parse(getComputedStyle(one).backgroundColor), below);
  };
  const opacity = one => one ? Number(getComputedStyle(one).opacity) * opacity(one.parentElement) : 1;
  const found = [];
  for (const one of document.body.querySelectorAll("*")) {
    const own = [...one.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim());
    const part = one.placeholder && !one.value ? "::placeholder" : null;
    if (!(own || part || one.value) || !one.checkVisibility()) continue;
    if (one.matches("svg *, option, script, :disabled, [type=range], [type=checkbox]")) continue;
    const [r, g, b, a] = parse(getComputedStyle(one, part).color), below = background(one);
    const text = over([r, g, b, a * opacity(one)], below);
    found.push([one.tagName + (one.id && "#" + one.id) + (part || ""), ratio(light(text), light(below))]);
  }
  return found;
})()"""
"""How far each text on a page is from what is behind it, as WCAG counts: [element, ratio]."""


class Page:
    """A tab with a file, or the page of a server, open in it.

    Attributes
    ----------
    complaints : list of str
        Exceptions and errors on the console, dialogs, and requests but for the page and what is in it or below it.
    """

    def __init__(self, program: str, page: Path | str, profile: Path) -> None:
        read_commands, self._write = os.pipe()
        self._read, write_events = os.pipe()
        options = f"--headless=new --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={profile}"
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" {options} about:blank 3<&{read_commands} 4>&{write_events}', program],
            pass_fds=(read_commands, write_events),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_events)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=1280, height=800, deviceScaleFactor=1, mobile=False)
        self.url = page if isinstance(page, str) else page.as_uri()
        self.call("Page.navigate", url=self.url)
        self.wait("document.readyState === 'complete'")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]
            self._event(reply)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], 120)
            chunk = os.read(self._read, 1 << 16) if ready else b""
            assert chunk, "the browser does not answer"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _event(self, event: dict[str, Any]) -> None:
        method, params = event.get("method", ""), event.get("params", {})
        if method in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening"):
            self.complaints.append(f"{method}: {params}")
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith((self.url, "data:")):
            self.complaints.append(f"request: {params['request']['url']}")

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + 60
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """Click in the middle of an element, as a mouse does."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{found}.scrollIntoView({{block: 'center'}})")
        x, y = self.evaluate(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({found}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        self.click(selector)
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key that has a name, such as an arrow or Tab."""
        codes = {
            "Tab": 9,
            "Enter": 13,
            "End": 35,
            "Home": 36,
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
        }
        text = {"text": "\r"} if key == "Enter" else {}  # without it a button is not pressed
        for kind, more in (("keyDown", text), ("keyUp", {})):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **more)

    def emulate(self, scheme: str, width: int = 1280, height: int = 800) -> None:
        """Have the page drawn for those who prefer this colour scheme, without motion, in a window of this size."""
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def assert_readable(self, scheme: str) -> None:
        """The page is as bright or dark as is wanted, and each text stands out from what is behind it."""
        found = self.evaluate(CONTRASTS)
        assert len(found) > 10
        faint = [(name, round(ratio, 2)) for name, ratio in found if ratio < 4.5]
        assert not faint, faint
        colours = self.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.documentElement))")
        behind, text = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in colours)
        assert (behind > 0.9 and text < 0.1) if scheme == "light" else (behind < 0.1 and text > 0.9)

    def named(self) -> dict[str, list[str]]:
        """The names that a screen reader has for what is on the page, by role."""
        names: dict[str, list[str]] = {}
        for node in self.call("Accessibility.getFullAXTree")["nodes"]:
            if not node["ignored"]:
                names.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
        return names

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
