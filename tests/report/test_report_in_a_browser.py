"""Reports in a real browser: light and dark, narrow, by keyboard and for screen readers.

The rules are those of axe-core 4.14 that can break here, and WCAG 2.2's contrast.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, CONTRAST, STRUCTURE, Browser, browsing

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
KINDS = ("tiny", "cascade", "linear", "forest")


@pytest.fixture(scope="module")
def page(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as found:
        yield found
        assert found.complaints() == []
        ours = {url(folders, name) for name in KINDS}
        assert {one.partition("#")[0] for one in found.fetched()} - {"about:blank"} == ours


def url(folders: dict[str, Path], name: str) -> str:
    return (folders[name] / "report.html").as_uri()


@pytest.mark.parametrize("name", KINDS)
def test_it_is_accessible(name: str, page: Browser, folders: dict[str, Path]) -> None:
    grounds = set()
    for scheme in ("light", "dark"):
        page.size(1100, 900)
        page.open(url(folders, name), scheme=scheme)
        page.value("document.querySelectorAll('details').forEach((x) => { x.open = true })")
        lines = page.value(CONTRAST)
        assert len(lines) > 300 and any(line[3] == "text" for line in lines), "charts have text"
        few = [line for line in lines if line[1] < line[2]]
        assert not few, few
        grounds.add(page.value("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
    assert page.value(STRUCTURE) == []
    for node in page.tree():
        if node.get("focusable") and node["role"] != "RootWebArea":
            assert node["name"].strip(), f"without a name: {node}"


@pytest.mark.parametrize("name", KINDS)
def test_a_narrow_page_does_not_scroll_sideways(
    name: str, page: Browser, folders: dict[str, Path], tmp_path: Path
) -> None:
    page.size(360, 800)
    page.open(url(folders, name))
    page.value("document.querySelectorAll('details').forEach((x) => { x.open = true })")
    assert page.value("document.documentElement.scrollWidth") == 360
    # A caption of its table's width, and no text that is cut or laid over another's.
    low = page.value(
        "[...document.querySelectorAll('caption')].filter((x) => x.checkVisibility() && "
        "x.getBoundingClientRect().height > 110).map((x) => x.textContent)"
    )
    assert low == []
    page.picture(tmp_path / "narrow.png")
    assert (tmp_path / "narrow.png").stat().st_size > 20_000


def test_everything_is_reached_by_keyboard(page: Browser, folders: dict[str, Path]) -> None:
    page.size(360, 800)
    page.open(url(folders, "cascade"))
    wanted = page.value(
        "[...document.querySelectorAll('a[href], summary, [tabindex=\"0\"]')]"
        ".filter((x) => x.checkVisibility()).length"
    )
    seen = []
    for _ in range(wanted):
        page.key("Tab", 9)
        seen.append(
            page.value(
                "(document.activeElement.getAttribute('aria-label') || "
                "document.activeElement.innerText)"
            )
        )
        assert page.value("document.activeElement.matches(':focus-visible')"), seen
        assert page.value("getComputedStyle(document.activeElement).outlineStyle") != "none", seen
    assert (seen[0], seen[-1]) == ("To the summary", "All settings") and len(set(seen)) > 18
    page.value("document.querySelector('summary').focus()")
    page.key("Enter", 13, text="\r")
    assert page.value("document.querySelector('details').open")
