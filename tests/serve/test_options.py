"""The options of `xmlkernels serve`, each seen in what is served."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from served import V1
from starlette.testclient import TestClient

from xmlkernels import InputError
from xmlkernels.cli import serve
from xmlkernels.predict.forest import Forest
from xmlkernels.predict.ranked import RankedPredictor
from xmlkernels.serve.server import bound

Found = dict[str, Any]


def started(monkeypatch: pytest.MonkeyPatch, *folders: object, **options: Any) -> Found:
    """What the command would serve, and where."""
    seen: Found = {}

    def keep(app: Any, listener: socket.socket, asked: Any) -> None:
        seen.update(app=app, at=listener.getsockname())
        with socket.create_connection(seen["at"], timeout=60):
            pass  # it listens when it says so

    from xmlkernels.serve import server

    monkeypatch.setattr(server, "run", keep)
    given = {"port": 0, "neighbours": 0, **options}
    serve.run(serve.Options(tuple(map(str, folders)), **given))
    return seen


def test_where_it_listens_and_what_it_is_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.2", 0))
        port = taken.getsockname()[1]
        taken.listen()
        with pytest.raises(InputError, match=rf"--port {port}: expected a free port of 127.0.0.2"):
            started(monkeypatch, V1 / "bow", host="127.0.0.2", port=port)
    found = started(monkeypatch, V1 / "bow", host="127.0.0.2", port=port, name="mine")
    assert found["at"] == ("127.0.0.2", port)
    assert f"serving mine (30 labels) at http://127.0.0.2:{port}/" in capsys.readouterr().out
    with TestClient(found["app"]) as client:
        assert client.get("/healthz").json()["model"] == "mine"
        assert client.get("/annif/projects/mine").status_code == 200
    with pytest.raises(InputError, match="--host: expected an address of this machine"):
        started(monkeypatch, V1 / "bow", host="no.such.host.invalid")
    found = started(monkeypatch, V1 / "bow")
    with TestClient(found["app"]) as client:
        assert client.get("/annif").json()["project_id"] == "bow"


def test_bounds_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = {"max_batch": 2, "max_wait_ms": 1.5, "queue": 7, "max_texts": 3, "max_bytes": 900}
    more = {"k": 4, "max_k": 6, "uri_prefix": "http://here/"}
    found = started(monkeypatch, V1 / "bow", **bounds, **more)
    gate = found["app"]
    assert (gate.queue, gate.max_bytes) == (7, 900)
    with TestClient(gate) as client:
        (labels,) = (
            x["labels"] for x in client.post("/predict", json={"texts": ["w3"]}).json()["results"]
        )
        assert len(labels) == 4
        for body, status in (
            ({"texts": ["a"] * 4}, 422),
            ({"texts": ["a"], "k": 7}, 422),
            ({"texts": ["a" * 900]}, 413),
        ):
            assert client.post("/predict", json=body).status_code == status
        (hit,) = client.post("/annif/suggest", data={"text": "w3", "limit": "1"}).json()["results"]
        assert hit["uri"].startswith("http://here/")


def test_how_the_queue_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from xmlkernels.serve import app

    seen: Found = {}
    whole = app.Batcher

    def made(predictor: Any, **how: Any) -> Any:
        seen.update(how)
        return whole(predictor, **how)

    monkeypatch.setattr(app, "Batcher", made)
    started(monkeypatch, V1 / "bow", max_batch=2, max_wait_ms=1.5)
    assert (seen["max_batch"], seen["max_wait"]) == (2, 0.0015)


def test_which_model_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    whole = serve.load

    def loaded(*words: Any, **how: Any) -> Any:
        told.append((words, how, whole(*words, **{**how, "device": "cpu"})))
        return told[-1][2]

    monkeypatch.setattr(serve, "load", loaded)
    monkeypatch.setattr(serve, "find_device", lambda name: f"device {name}")
    options: Found = {"checkpoint": str(V1 / "run"), "which": "best", "device": "auto"}
    started(monkeypatch, V1 / "ranker_model", **options, threads=3)
    words, how, model = told.pop()
    assert words == (str(V1 / "ranker_model"), str(V1 / "run"))
    assert how == {"which": "best", "device": "device auto", "threads": 3}
    assert type(model) is RankedPredictor and model.threads == 3
    started(monkeypatch, V1 / "ranker_tree", V1 / "ranker_tree")
    assert type(told.pop()[2]) is Forest


def test_neighbours_are_those_of_a_dataset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given: Found = {"dataset": str(V1 / "dataset"), "neighbours": 1000}
    found = started(monkeypatch, V1 / "ranker_tree", **given)
    assert "no neighbours" not in capsys.readouterr().out
    ask = {"text": "w3 w4 w5", "count": 3}
    with TestClient(found["app"]) as client:
        near = client.post("/neighbours", json=ask).json()
        assert near["reason"] == "" and len(near["neighbours"]) == 3
        likeness = [x["similarity"] for x in near["neighbours"]]
        assert likeness == sorted(likeness, reverse=True) and 0 < likeness[0] <= 1
        for x in near["neighbours"]:
            assert set(x["text"].split()) & {"w3", "w4", "w5"} and x["labels"]
    for options, reason in (
        ({"neighbours": 0}, "it is switched off"),
        ({**given, "neighbours": 5}, "--neighbours searches 5 at most"),
        ({"neighbours": 9}, "dataset: expected the dataset that the model was trained on"),
    ):
        found = started(monkeypatch, V1 / "ranker_tree", **options)
        assert "no neighbours on the page: " in capsys.readouterr().out
        with TestClient(found["app"]) as client:
            none = client.post("/neighbours", json=ask).json()
            assert none["neighbours"] == [] and reason in none["reason"]
    # The model's own files name it, from the folder in which it was trained.
    monkeypatch.chdir(V1)
    for folder in ("ranker_tree", "run", "bow/checkpoint"):
        found = started(monkeypatch, V1 / folder, neighbours=1000)
        with TestClient(found["app"]) as client:
            assert client.post("/neighbours", json=ask).json()["reason"] == "", folder
    with pytest.raises(InputError, match="nowhere"):
        started(monkeypatch, V1 / "bow", dataset="nowhere", neighbours=9)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"queue": 0}, "--queue: expected 1 or more, got 0"),
        ({"max_wait_ms": -1.0}, "--max-wait-ms: expected 0 or more"),
        ({"port": 70000}, "--port: expected a number from 0 to 65535, got 70000"),
        ({"k": 30, "max_k": 20}, r"--k: expected 20 at most \(--max-k\), got 30"),
        ({"name": "a/b"}, "--name: expected a name without /"),
    ],
)
def test_options_that_cannot_be_used(
    options: Found, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=told):
        started(monkeypatch, V1 / "bow", **options)


def test_without_the_packages_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    told = r'the package uvicorn, got .*; pip install "xmlkernels\[serve\]"'
    with pytest.raises(InputError, match=told):
        started(monkeypatch, V1 / "bow")


def test_an_answer_does_not_wait_for_an_acknowledgement() -> None:
    """asyncio sets TCP_NODELAY on connections of a socket that names its protocol."""
    with bound("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
