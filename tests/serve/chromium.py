"""Chromium without a window, driven over its debugging pipe: JSON messages that end with a zero byte."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time

PATH = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def _pipe():
    """Both ends above 9, out of the way of those that the shell below makes."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return moved


class Page:
    """One page. errors: what it wrote to its console as errors, and what it threw. requests: all URLs it asked for."""

    def __init__(self, url, width=1100, height=1200):
        self._profile = tempfile.mkdtemp()
        (to_read, self._to), (self._from, to_write) = _pipe(), _pipe()

        flags = "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-background-networking remote-debugging-pipe"
        command = [PATH, *(f"--{option}" for option in flags.split()), f"--user-data-dir={self._profile}", "about:blank"]
        # A shell puts the pipes' ends where they are looked for, 3 and 4: Python would have to fork for it, which JAX forbids.
        placed = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", *command]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(placed, pass_fds=(to_read, to_write), **quiet)
        os.close(to_read), os.close(to_write)
        self._unread, self._number, self._session = b"", 0, None
        self.errors, self.requests = [], []
        targets = self._ask("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self._ask(f"{domain}.enable")
        self.resize(width, height)
        self._ask("Page.navigate", url=url)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._process.kill()
        self._process.wait()
        os.close(self._to), os.close(self._from)
        shutil.rmtree(self._profile, ignore_errors=True)

    def value(self, script):
        """What an expression gives; promises are waited for."""
        answer = self._ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script, seconds=60):
        """Until an expression gives something true, which it returns."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if value := self.value(script):
                return value
            time.sleep(0.1)
        raise AssertionError(
            f"not within {seconds} s: {script}; errors: {self.errors}; {self.value('document.body.innerText')}"
        )

    def press(self, key, text=""):
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS.get(key, 0), **more)

    def type(self, text):
        self._ask("Input.insertText", text=text)

    def resize(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._ask("Emulation.setDeviceMetricsOverride", **metrics)

    def screenshot(self, file):
        file.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"]))

    def _ask(self, method, **params):
        self._number += 1
        session = {} if self._session is None else {"sessionId": self._session}
        message = {"id": self._number, "method": method, "params": params, **session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer.get("method"), answer.get("params", {}))

    def _note(self, method, params):
        if method == "Runtime.exceptionThrown" or (method == "Log.entryAdded" and params["entry"]["level"] == "error"):
            self.errors.append(params)
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def _read(self):
        while b"\0" not in self._unread:
            part = os.read(self._from, 1 << 16)
            assert part, "chromium has ended"
            self._unread += part
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)


KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowRight": 39}
