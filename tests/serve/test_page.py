"""The page in a real browser: what it shows, light and dark, by keyboard and for screen readers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, CONTRAST, STRUCTURE, Browser, browsing
from served import V1, Served, served

import xmlkernels as xk

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
TEXT = "w3 w4 w5"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    words = [V1 / "bow", "--dataset", V1 / "dataset", "--threads", 1, "--max-bytes", 2000]
    with served(tmp_path_factory.mktemp("server"), *words) as found:
        yield found


@pytest.fixture(scope="module")
def page(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as found:
        yield found
        assert found.complaints() == []
        elsewhere = [url for url in found.fetched() if not url.startswith(server.url)]
        assert not [url for url in elsewhere if not url.startswith(("data:", "about:"))]


def ask(page: Browser, text: str) -> None:
    """Type a text where the focus is, and press Ctrl and Enter."""
    page.until("document.activeElement.id === 'text'")
    page.value("document.getElementById('text').value = ''")
    page.type(text)
    page.key("Enter", 13, modifiers=2)
    page.until("!document.getElementById('why').hidden")


def test_labels_are_shown_as_bars_with_their_reasons(page: Browser, server: Served) -> None:
    page.open(server.url)
    page.until("document.activeElement.id === 'text'")
    assert page.until("document.getElementById('model').textContent.includes('30 labels')")
    ask(page, TEXT)
    expected = next(xk.load(V1 / "bow").predict([TEXT], 10))
    shown = page.value(
        "[...document.querySelectorAll('#labels li')].map((x) => [x.children[0].textContent, "
        "x.children[1].textContent, x.querySelector('.fill').getBoundingClientRect().width / "
        "x.querySelector('.track').getBoundingClientRect().width])"
    )
    assert [x[0] for x in shown] == [label.name for label in expected]
    for (_, told, width), label in zip(shown, expected, strict=True):
        assert told == f"{100 * label.probability:.1f} %"
        assert width == pytest.approx(label.probability, abs=0.01)
    near = page.value("[...document.querySelectorAll('#near li')].map((x) => x.innerText)")
    assert len(near) == 5
    for one in near:
        text, told = one.split("\n", 1)
        assert set(text.split()) & set(TEXT.split())
        assert 0 < float(told.strip().split(" ")[0]) <= 1 and "w" in told
    assert "10 labels in" in page.value("document.getElementById('state').textContent")


def test_a_mistake_is_told_on_the_page(page: Browser, server: Served) -> None:
    page.open(server.url)
    page.until("document.activeElement.id === 'text'")
    page.type("w3 " * 900)
    page.key("Enter", 13, modifiers=2)
    told = page.until("document.getElementById('wrong').textContent")
    assert told == "the body has more than 2,000 bytes; send fewer texts"
    assert page.value("document.getElementById('found').hidden")
    page.events = [e for e in page.events if "413" not in str(e)]  # the browser logs it, too


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible(page: Browser, server: Served, scheme: str, tmp_path: Path) -> None:
    page.open(server.url, scheme=scheme)
    ask(page, TEXT)
    page.picture(tmp_path / f"{scheme}.png")
    assert (tmp_path / f"{scheme}.png").stat().st_size > 10_000
    few = [line for line in page.value(CONTRAST) if line[1] < line[2]]
    assert not few, few
    grounds = page.value("getComputedStyle(document.body).backgroundColor")
    assert (grounds == "rgb(255, 255, 255)") == (scheme == "light")
    tree = page.tree()
    for node in tree:
        if node.get("focusable") and node["role"] != "RootWebArea":
            assert node["name"].strip(), f"without a name: {node}"
    roles = {(node["role"], node["name"]) for node in tree}
    assert {
        ("textbox", "Text"),
        ("spinbutton", "Labels"),
        ("button", "Find labels"),
        ("heading", "Labels of a text"),
        ("region", "Labels"),
        ("region", "Why: the nearest training documents"),
    } <= roles
    live = {node["role"]: node.get("live") for node in tree if node.get("live")}
    assert live["status"] == "polite" and "alert" in live
    assert page.value("document.documentElement.lang") == "en"
    assert page.value(STRUCTURE) == []


def test_everything_can_be_reached_by_keyboard(page: Browser, server: Served) -> None:
    page.open(server.url)
    page.until("document.activeElement.id === 'text'")
    reached = []
    for _ in range(5):
        reached.append(page.value("document.activeElement.id || document.activeElement.innerText"))
        assert page.value("document.activeElement.matches(':focus-visible')"), reached
        page.key("Tab", 9)
    assert reached == ["text", "k", "Find labels", "All requests", "Metrics"]


def test_the_page_of_requests(page: Browser, server: Served) -> None:
    for scheme in ("light", "dark"):
        page.open(f"{server.url}docs", scheme=scheme)
        heads = page.until(
            "((x) => x.length > 5 && x)"
            "([...document.querySelectorAll('h2')].map((x) => x.textContent))"
        )
        assert {"POST /predict", "GET /healthz", "POST /annif/suggest"} <= set(heads)
        assert page.value(STRUCTURE) == []
        few = [line for line in page.value(CONTRAST) if line[1] < line[2]]
        assert not few, few
        assert all(n["name"] for n in page.tree() if n.get("focusable"))
