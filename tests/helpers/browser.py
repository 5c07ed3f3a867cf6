"""A headless chromium for tests, spoken to through pipes in the DevTools protocol: nothing to install beside
the browser.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
        if (found := shutil.which(name))
    ),
    None,
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"
    " --remote-debugging-pipe"
).split()


class Browser:
    """One page. Scripts are evaluated in it; `see` waits until one gives something true."""

    def __init__(self, profile: Path, width: int = 1200, height: int = 900, dark: bool = False):
        ours, theirs = os.pipe(), os.pipe()  # it reads what we write into `ours`
        line = f'exec "$0" "$@" 3<&{ours[0]} 4>&{theirs[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", line, CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(ours[0], theirs[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self.into, self.out, self.buffer, self.number = ours[1], theirs[0], b"", 0
        self.session: str | None = None
        self.said: list[str] = []  # exceptions, console errors and dialogs of the page
        self.open()
        self.resize(width, height)
        self.media(dark)

    def open(self) -> str:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        return target

    @contextmanager
    def tab(self, address: str) -> Iterator[None]:
        """A second page, spoken to in place of the first until it is closed."""
        first, self.session = self.session, None
        target = self.open()
        self.go(address)
        try:
            yield
        finally:
            self.session = None
            self.send("Target.closeTarget", targetId=target)
            self.session = first

    def media(self, dark: bool = False, kind: str = "") -> None:
        """kind: print, or the screen."""
        self.send(
            "Emulation.setEmulatedMedia",
            media=kind,
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )

    def send(self, method: str, **params: Any) -> dict:
        self.number += 1
        asked = {"id": self.number, "method": method, "params": params}
        if self.session:
            asked["sessionId"] = self.session
        os.write(self.into, json.dumps(asked).encode() + b"\0")
        while True:
            found = self.receive(60)
            if found.get("id") == self.number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']['message']}")
                return found["result"]

    def receive(self, seconds: float) -> dict:
        until = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            if not select.select([self.out], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError("the browser says nothing")
            some = os.read(self.out, 1 << 20)
            if not some:
                raise RuntimeError("the browser ended")
            self.buffer += some
        text, _, self.buffer = self.buffer.partition(b"\0")
        found = json.loads(text)
        if found.get("method") == "Runtime.exceptionThrown":
            self.said.append(json.dumps(found["params"]["exceptionDetails"])[:600])
        elif found.get("method") == "Page.javascriptDialogOpening":
            self.said.append("a dialog: " + found["params"]["message"])
        elif found.get("method") == "Log.entryAdded" and found["params"]["entry"]["level"] == "error":
            entry = found["params"]["entry"]
            if entry["source"] != "network":  # a refusal that the page shows as a sentence
                self.said.append(entry["text"])
        return found

    def go(self, address: str) -> None:
        self.send("Page.navigate", url=address)

    def resize(self, width: int, height: int = 900) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        found = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(
                found["exceptionDetails"]
                .get("exception", {})
                .get("description", str(found["exceptionDetails"]))
            )
        return found["result"].get("value")

    def see(self, script: str, seconds: float = 60) -> Any:
        until = time.monotonic() + seconds
        while True:
            try:
                if found := self.run(
                    f"(async () => {{ const x = await ({script}); return x instanceof Node ? true : x; }})()"
                ):
                    return found
            except RuntimeError as error:  # the page is being replaced
                if "Cannot read properties of null" not in str(error) and "context" not in str(error).lower():
                    raise
            if time.monotonic() > until:
                raise AssertionError(
                    f"never seen: {script}\npage: {self.run('document.body.innerText')[-3000:]}\n{self.said}"
                )
            time.sleep(0.15)

    def press(self, text: str) -> None:
        """The button or link of this text, once it can be pressed."""
        find = (
            "[...document.querySelectorAll('button, a, summary, label.button')].find(x =>"
            f" x.textContent.trim() === {json.dumps(text)} && !x.disabled && x.checkVisibility())"
        )
        self.see(f"!!{find}")
        self.run(f"{find}.click()")

    def write(self, label: str, text: str) -> None:
        """Into the field of this label, as if typed."""
        find = (
            "document.getElementById([...document.querySelectorAll('label')].find(x => x.textContent.trim()"
            f" === {json.dumps(label)} && x.checkVisibility())?.htmlFor)"
        )
        self.see(f"!!{find}")
        self.run(
            f"(() => {{ const x = {find}; x.focus(); x.value = {json.dumps(text)};x.dispatchEvent(new"
            " Event('input', {bubbles: true})); x.dispatchEvent(new Event('change', {bubbles: true}));"
            " })()"
        )

    def key(self, key: str, code: int, shift: bool = False) -> None:
        how = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        typed = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **how, **typed)
        self.send("Input.dispatchKeyEvent", type="keyUp", **how)

    def type(self, text: str) -> None:
        """As from a keyboard, where the focus is."""
        self.send("Input.insertText", text=text)

    def picture(self, path: Path, whole: bool = True) -> None:
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.into)
        os.close(self.out)
