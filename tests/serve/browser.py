"""A headless Chromium, told what to do over two pipes by its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from patience import PATIENCE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

# Of every text that is seen: its colour on what is behind it, and the ratio that WCAG 2.2 asks for.
CONTRAST = """
(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((x) => x / 255)
    .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = numbers(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
    if (["SCRIPT", "STYLE", "title"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const drawn = element instanceof SVGElement ? style.fill : style.color;
    const [one, other] = [light(numbers(drawn)), light(ground(element))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    const large = parseFloat(style.fontSize) >= 24;
    const told = walker.currentNode.textContent.trim().slice(0, 40);
    found.push([told, ratio, large ? 3 : 4.5, element.tagName]);
  }
  return found;
})()
"""

# What is wrong with a page's structure: one sentence each.
STRUCTURE = """
(() => {
  const found = [];
  const all = (where) => [...document.querySelectorAll(where)];
  const named = (x) => (x.getAttribute("aria-label") || (x.getAttribute("aria-labelledby") || "")
    .split(" ").filter(Boolean).map((id) => document.getElementById(id).textContent).join(" "))
    .trim();
  if (!document.documentElement.lang || !document.title) found.push("no language or no title");
  if (!/width=device-width/.test(all("meta[name=viewport]").map((x) => x.content).join()))
    found.push("no viewport that follows the device");
  if (all("main").length !== 1 || all("h1").length !== 1) found.push("not one main, one h1");
  let before = 0;
  for (const x of all("h1, h2, h3, h4, h5, h6")) {
    const level = Number(x.tagName[1]);
    if (level > before + 1) found.push(`h${level} behind h${before}: ${x.textContent}`);
    if (!x.textContent.trim()) found.push(`an empty h${level}`);
    before = level;
  }
  const ids = all("[id]").map((x) => x.id);
  if (new Set(ids).size !== ids.length) found.push("an id twice");
  for (const x of all("svg, img")) {
    const drawn = x.getAttribute("role") === "img" && named(x);
    if (!drawn && !x.alt && x.getAttribute("aria-hidden") !== "true")
      found.push(`a picture without words: ${x.outerHTML.slice(0, 80)}`);
  }
  for (const x of all("figure")) if (!x.querySelector("figcaption")) found.push("a bare figure");
  for (const x of all("table")) {
    const told = x.caption ? x.caption.textContent : "no caption";
    if (!x.caption) found.push("a table without a caption");
    if (!x.querySelector("thead th[scope=col]")) found.push(`no heads of columns: ${told}`);
    if (x.querySelector("th:not([scope])")) found.push(`a head of neither: ${told}`);
    for (const row of x.tBodies[0].rows)
      if (!row.querySelector("th[scope=row]")) found.push(`a row without a head: ${told}`);
    for (const head of x.querySelectorAll("th"))
      if (!head.textContent.trim()) found.push(`an empty head: ${told}`);
  }
  const marks = all("section[aria-labelledby], section[aria-label], nav, [role=region]").map(
    (x) => `${x.tagName === "NAV" ? "nav" : "region"} ${named(x)}`);
  for (const x of new Set(marks))
    if (marks.filter((y) => y === x).length > 1 || x.endsWith(" ")) found.push(`twice: ${x}`);
  for (const x of all("ul, ol"))
    if ([...x.children].some((y) => y.tagName !== "LI")) found.push("a list of other than items");
  for (const x of all("dl > div"))
    if (!x.querySelector("dt") || !x.querySelector("dd")) found.push("a term without a meaning");
  const outside = [...document.body.children].filter(
    (x) => !x.matches("header, nav, main, footer, section, script, .skip") && x.innerText.trim());
  for (const x of outside) found.push(`text outside of landmarks: ${x.innerText.slice(0, 40)}`);
  return found;
})()
"""


class Browser:
    """One page."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out, self._number = into, out, 0
        self._rest, self.events = b"", []  # type: bytes, list[dict[str, Any]]
        self._session = ""
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        attached = self.tell("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for name in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.tell(f"{name}.enable")

    def tell(self, method: str, **params: Any) -> Any:
        """Send a command, and return its result; what happens meanwhile goes to `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + PATIENCE
        while True:
            got = self._read(end)
            if got.get("id") != self._number:
                self.events.append(got)
                continue
            assert "error" not in got, got
            return got["result"]

    def _read(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._out], [], [], max(0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._out, 1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        first, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(first)
        return found

    def value(self, code: str) -> Any:
        """Return what a piece of JavaScript gives."""
        got = self.tell("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def until(self, code: str) -> Any:
        """Wait until a piece of JavaScript gives something true."""
        end = time.monotonic() + PATIENCE
        while not (found := self.value(code)):
            assert time.monotonic() < end, f"{code} did not come true"
            time.sleep(0.02)
        return found

    def open(self, url: str, *, scheme: str = "light") -> None:
        """Open a page under a colour scheme, and wait until it is there."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.tell("Emulation.setEmulatedMedia", features=features)
        self.value("window.before = true")
        self.tell("Page.navigate", url=url)
        there = f"document.readyState === 'complete' && location.href === {json.dumps(url)}"
        self.until(f"!window.before && {there}")

    def size(self, width: int, height: int) -> None:
        """Give the window another size, in CSS pixels."""
        wanted = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.tell("Emulation.setDeviceMetricsOverride", **wanted)

    def key(self, key: str, code: int, *, text: str = "", modifiers: int = 0) -> None:
        """Press a key."""
        known = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.tell("Input.dispatchKeyEvent", type="keyDown", text=text, **known)
        self.tell("Input.dispatchKeyEvent", type="keyUp", **known)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.tell("Input.insertText", text=text)

    def tree(self) -> list[dict[str, Any]]:
        """Return what assistive software reads: role, name and whether it takes the focus."""
        found = []
        for node in self.tell("Accessibility.getFullAXTree")["nodes"]:
            if not node["ignored"]:
                properties = {p["name"]: p["value"].get("value") for p in node["properties"]}
                name = node.get("name", {}).get("value", "")
                found.append({"role": node["role"]["value"], "name": name, **properties})
        return found

    def picture(self, path: Path) -> None:
        """Write the page as a .png."""
        got = self.tell("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(got["data"]))

    def complaints(self) -> list[str]:
        """Return errors of scripts and of the console, and requests that failed."""
        found = []
        for event in self.events:
            name, told = event.get("method", ""), event.get("params", {})
            if name in ("Runtime.exceptionThrown", "Network.loadingFailed") or (
                name == "Log.entryAdded" and told["entry"]["level"] == "error"
            ):
                found.append(json.dumps(told)[:300])
        return found

    def fetched(self) -> list[str]:
        """Return the URLs of all requests."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """Start a browser whose files are in `folder`."""
    assert CHROMIUM is not None
    theirs_in, into = os.pipe()
    out, theirs_out = os.pipe()

    def arrange() -> None:
        # Ends of pipes above 4 first: those that it expects may be among them.
        given, taken = os.dup(theirs_in), os.dup(theirs_out)
        high = os.dup2(given, 100), os.dup2(taken, 101)
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars",
             "--remote-debugging-pipe", "--window-size=900,1100",
             f"--user-data-dir={folder}"]  # fmt: skip
    with (
        open(folder / "said", "w") as said,
        subprocess.Popen(
            [CHROMIUM, *flags, "about:blank"],
            preexec_fn=arrange,  # noqa: PLW1509  (between fork and exec it calls dup2 alone)
            close_fds=False,
            stdout=said,
            stderr=said,
        ) as process,
    ):
        for end in (theirs_in, theirs_out):
            os.close(end)
        try:
            page = Browser(into, out)
            yield page
            page._session = ""
            with suppress(AssertionError, OSError):
                page.tell("Browser.close")
            process.wait(PATIENCE)
        finally:
            process.kill()
            for end in (into, out):
                os.close(end)
