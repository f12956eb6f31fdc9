"""Chromium without a screen, told what to do through a pipe (the DevTools protocol), for reading pages of TensorBoard.

with Browser(folder) as browser:
    browser.open("http://127.0.0.1:6006/#scalars")
    browser.text()
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

Found = TypeVar("Found")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# TensorBoard is made of web components, whose insides are hidden from document.body.innerText
_TEXT = """(() => {
  const words = [];
  const walk = (node) => {
    if (node.nodeType === Node.TEXT_NODE) { if (node.data.trim()) words.push(node.data.trim()); return; }
    if (node.nodeType === Node.ELEMENT_NODE) {
      if (['STYLE', 'SCRIPT', 'TEMPLATE'].includes(node.tagName)) return;
      if (getComputedStyle(node).display === 'none') return;
    }
    if (node.shadowRoot) walk(node.shadowRoot);
    if (node.tagName === 'IFRAME' && node.contentDocument) walk(node.contentDocument.body);
    node.childNodes.forEach(walk);
  };
  walk(document.body);
  return words.join('\\n');
})()"""

_FIND = """((selector) => {
  const found = [];
  const walk = (root) => {
    root.querySelectorAll(selector).forEach((each) => found.push(each));
    root.querySelectorAll('*').forEach((each) => {
      if (each.shadowRoot) walk(each.shadowRoot);
      if (each.tagName === 'IFRAME' && each.contentDocument) walk(each.contentDocument);
    });
  };
  walk(document);
  return found;
})"""


class Browser:
    """One page, ``size`` pixels wide and high. Its errors are in ``folder``."""

    def __init__(self, folder: Path, size: tuple[int, int] = (1600, 1100)) -> None:
        self._folder, self._size = folder, size
        self._open = ExitStack()
        self._number, self._rest = 0, b""

    def __enter__(self) -> Self:
        to_chromium, self._write = os.pipe()
        self._read, from_chromium = os.pipe()
        flags = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--enable-unsafe-swiftshader")
        flags += (f"--window-size={self._size[0]},{self._size[1]}", f"--user-data-dir={self._folder / 'profile'}")
        # a shell puts the two ends where Chromium looks for them
        line = f'exec "$@" 3<&{to_chromium} 4>&{from_chromium}'
        words = ["bash", "-c", line, "chromium", str(CHROMIUM), *flags, "--remote-debugging-pipe", "about:blank"]
        log = self._open.enter_context((self._folder / "chromium.log").open("w"))
        self._process = subprocess.Popen(words, pass_fds=(to_chromium, from_chromium), stderr=log, stdout=log)
        os.close(to_chromium)
        os.close(from_chromium)
        targets = self._ask("Target.getTargets")["targetInfos"]
        page = next(each["targetId"] for each in targets if each["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)
        self._open.close()

    def open(self, url: str) -> None:
        """Go there; a page that differs in what follows # alone is loaded anew as well."""
        self._tell("Page.navigate", url="about:blank")
        self._tell("Page.navigate", url=url)

    def text(self) -> str:
        """All words on the page."""
        return str(self.run(_TEXT) or "")

    def count(self, selector: str, width: int) -> int:
        """Elements that a CSS selector finds in any one web component, and that are so many pixels wide."""
        wide = f"(each) => each.getBoundingClientRect().width >= {width}"
        return int(self.run(f"{_FIND}({json.dumps(selector)}).filter({wide}).length") or 0)

    def run(self, code: str) -> Any:
        """The value of JavaScript."""
        answer = self._tell("Runtime.evaluate", expression=code, returnByValue=True)
        return answer["result"].get("value")

    @staticmethod
    def until(what: Callable[[], Found], seconds: float = 30) -> Found:
        """The first value that is true; the last one when time is over."""
        end = time.monotonic() + seconds
        while not (value := what()) and time.monotonic() < end:
            time.sleep(0.3)
        return value

    def picture(self, file: Path) -> None:
        """A screenshot."""
        file.write_bytes(base64.b64decode(self._tell("Page.captureScreenshot", format="png")["data"]))

    def _tell(self, method: str, **values: Any) -> Any:
        return self._ask(method, self._session, **values)

    def _ask(self, method: str, session: str = "", **values: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": values}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self, seconds: float = 60) -> Any:
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], seconds)[0]:
                raise TimeoutError(f"chromium says nothing for {seconds} seconds")
            self._rest += os.read(self._read, 1 << 20)
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
