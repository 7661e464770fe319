"""Requests and answers: batches, bounds, mistakes in one sentence, what is counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import numpy as np
import pytest
from served import V1
from stub import Held, application_of, asking, ids, until

import xmlkernels as xk
from xmlkernels.predict.base import Label
from xmlkernels.predict.calibration import Calibration
from xmlkernels.serve import gate as gate_module
from xmlkernels.serve.batching import Batcher, Job, answer

JSON = "application/json"


def running(work: Callable[[], Awaitable[Any]]) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(300):
            return await work()

    return asyncio.run(limited())


def one(**body: Any) -> httpx.Response:
    """The answer to one request."""

    async def work() -> httpx.Response:
        async with asking(application_of(Held(), k=4, max_k=20, max_texts=3)) as client:
            return await client.post("/predict", json=body)

    found: httpx.Response = running(work)
    return found


# ---- batches ----


def test_requests_that_come_during_a_batch_are_the_next_one() -> None:
    held = Held(free=False)

    async def work() -> list[httpx.Response]:
        async with asking(application_of(held, max_batch=4)) as client:

            def ask(*texts: str) -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(client.post("/predict", json={"texts": texts}))

            tasks = [ask("a")]
            await until(lambda: held.calls)
            tasks += [ask("b"), ask("c", "d"), ask("e", "f"), ask(*"ghijkl"), ask("m")]
            batcher = held
            await until(lambda: len(tasks) == 6 and batcher.calls)
            await asyncio.sleep(0.05)  # the order in which they came does not depend on it
            held.free.set()
            return await asyncio.gather(*tasks)

    answers = running(work)
    assert [len(ids(x)) for x in answers] == [1, 1, 2, 2, 6, 1]
    # A batch of 4 texts at most; a request is never divided, and one of 6 goes alone.
    assert held.calls == [["a"], ["b", "c", "d"], ["e", "f"], list("ghijkl"), ["m"]]


def test_a_batch_waits_for_others_until_it_is_full() -> None:
    held = Held()

    async def work() -> None:
        async with asking(application_of(held, max_batch=3, max_wait=200.0)) as client:
            tasks = []
            for text in "abc":
                assert not held.calls
                tasks.append(asyncio.create_task(client.post("/predict", json={"texts": [text]})))
                for _ in range(20):
                    await asyncio.sleep(0.001)
            await asyncio.gather(*tasks)

    running(work)
    assert held.calls == [["a", "b", "c"]]


def test_requests_of_another_number_of_labels_share_no_call() -> None:
    """What fills a shortlist depends on the number of labels."""
    held = Held()
    jobs = [Job(["a"], 2), Job(["b"], 3), Job(["c"], 2)]
    found = answer(held, jobs, 8)
    assert [len(own[0]) for own in found] == [2, 3, 2] and held.calls == [["a", "c"], ["b"]]


def test_each_request_has_its_own_limits() -> None:
    model = xk.load(V1 / "bow")
    same = np.array([[[-50.0, -50], [50, 50]]])  # probabilities stay
    weight, band = np.linspace(1, 9, 30, dtype=np.float32), np.zeros(30, np.uint8)
    model.calibration = Calibration(band, same, np.zeros(1), weight, 0.5, 0.0, ("platt",), (9,))
    texts = ["w3 w4", "w9 w10 w11", "w30", ""]
    jobs: list[dict[str, Any]] = [
        {"texts": texts[:2], "k": 3},
        {"texts": texts[2:], "k": 3, "allow": [1, "w9"]},
        {"texts": texts, "k": 3, "allow": [[4], None, None, [5, 6]], "exclude": [4]},
        {"texts": texts[:1], "k": 30, "exclude": [["w30"]], "threshold": 0.35},
        {"texts": texts[:2], "k": 3, "propensity": 0.9},
    ]
    assert list(model.predict(**jobs[-1])) != list(model.predict(**jobs[0]))

    async def work() -> list[httpx.Response]:
        async with asking(application_of(model)) as client:
            return await asyncio.gather(*(client.post("/predict", json=body) for body in jobs))

    for body, got in zip(jobs, running(work), strict=True):
        kept: list[list[Label]] = list(model.predict(**body))
        assert ids(got) == [[label.id for label in own] for own in kept]
        for own, result in zip(kept, got.json()["results"], strict=True):
            for label, shown in zip(own, result["labels"], strict=True):
                assert shown["name"] == label.name
                assert shown["score"] == pytest.approx(label.score, abs=1e-5)
                assert shown["probability"] == pytest.approx(label.probability, abs=1e-6)
    assert 0 < len(kept[0]) < 29


def test_one_request_fails_alone() -> None:
    held = Held(free=False)

    async def work() -> list[httpx.Response]:
        async with asking(application_of(held)) as client:
            tasks = [asyncio.create_task(client.post("/predict", json={"texts": ["a"]}))]
            await until(lambda: held.calls)
            tasks += [
                asyncio.create_task(client.post("/predict", json={"texts": [text]}))
                for text in ("b", "bad", "c")
            ]
            await until(lambda: True)
            await asyncio.sleep(0.05)
            held.free.set()
            return await asyncio.gather(*tasks)

    found = running(work)
    assert [x.status_code for x in found] == [200, 200, 500, 200]
    assert found[2].json()["error"].startswith("the model failed: a bad text")


def test_a_client_that_leaves_costs_no_pass() -> None:
    held = Held(free=False)

    async def work() -> None:
        batcher = Batcher(held, max_batch=8, max_wait=0)
        batcher.start()
        first = asyncio.create_task(batcher.ask(Job(["a"], 1)))
        await until(lambda: held.calls)
        second = asyncio.create_task(batcher.ask(Job(["b"], 1)))
        await until(lambda: batcher.waiting)
        second.cancel()
        third = asyncio.create_task(batcher.ask(Job(["c"], 1)))
        await until(lambda: len(batcher.waiting) == 2)
        held.free.set()
        await first
        await third
        await batcher.stop()

    running(work)
    assert held.calls == [["a"], ["c"]]


# ---- bounds ----


def test_beyond_the_queue_requests_are_refused_at_once() -> None:
    held = Held(free=False)
    app = application_of(held, queue=3)

    async def work() -> tuple[list[httpx.Response], list[httpx.Response], str]:
        async with asking(app) as client:
            tasks = [
                asyncio.create_task(client.post("/predict", json={"texts": [str(n)]}))
                for n in range(9)
            ]
            await until(lambda: sum(task.done() for task in tasks) == 6)
            assert app.inside == 3
            refused = [task.result() for task in tasks if task.done()]
            await until(lambda: held.calls)
            deep, told = f"\nxmlkernels_queue_requests {3.0 - len(held.calls[0])}\n", ""
            while deep not in told:  # the last one may be on its way
                told = (await client.get("/metrics")).text
            assert (await client.get("/healthz")).json()["status"] == "ok"
            held.free.set()
            return [task.result() for task in tasks if await task], refused, told

    everyone, refused, told = running(work)
    assert sorted(x.status_code for x in everyone) == [200] * 3 + [429] * 6
    for x in refused:
        assert int(x.headers["retry-after"]) >= 1
        assert x.json() == {"error": "3 requests are inside, as many as --queue allows; try later"}
    assert 'xmlkernels_rejected_total{reason="queue"} 6.0' in told
    assert "xmlkernels_inside_requests 3.0" in told
    assert app.inside == 0


def test_a_large_body_is_refused() -> None:
    app = application_of(Held(), max_bytes=300)

    async def chunks() -> Any:
        for _ in range(4):
            yield b"x" * 100

    async def work() -> list[httpx.Response]:
        async with asking(app) as client:
            return [
                await client.post("/predict", json={"texts": ["x" * 400]}),
                await client.post("/predict", content=chunks()),
                await client.post("/annif/suggest", data={"text": "x" * 400}),
                await client.post("/predict", json={"texts": ["x" * 200]}),
            ]

    *large, small = running(work)
    assert small.status_code == 200 and app.inside == 0
    for x in large:
        assert x.status_code == 413
        assert x.json() == {"error": "the body has more than 300 bytes; send fewer texts"}


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "_PATIENCE", 0.05)
    app = application_of(Held())

    async def never() -> Any:
        yield b"{"
        await asyncio.sleep(100)

    async def work() -> httpx.Response:
        async with asking(app) as client:
            return await client.post("/predict", content=never())

    assert running(work).status_code == 408 and app.inside == 0


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"texts": []}, "texts: list should have at least 1 item"),
        ({}, "texts: field required"),
        ({"texts": ["a", 3]}, "texts[1]: input should be a valid string"),
        ({"texts": ["a"], "top_k": 3}, "top_k: extra inputs are not permitted"),
        ({"texts": ["a"], "k": 0}, "k: input should be greater than or equal to 1"),
        ({"texts": ["a"], "k": 21}, "k: expected 20 at most, got 21; ask for fewer labels"),
        ({"texts": ["a"], "threshold": 2}, "threshold: input should be less than or equal to 1"),
        ({"texts": ["a"], "threshold": "calibrated"}, "predictor: expected a calibrated model"),
        ({"texts": ["a"], "propensity": 0.1}, "predictor: expected a calibrated model"),
        ({"texts": ["a"], "propensity": -1}, "propensity: input should be greater than or equal"),
        ({"texts": ["a"], "order": "probability"}, "predictor: expected a calibrated model"),
        ({"texts": list("abcd")}, "texts: expected 3 at most, got 4; send several requests"),
        ({"texts": ["a"], "allow": []}, "allow of text 0: expected at least one label, got none"),
        ({"texts": ["a"], "allow": ["x"]}, "allow: expected names that the model has, got 'x'"),
        ({"texts": ["a"], "allow": [[0], [1]]}, "allow: expected 1 lists, one per text, got 2"),
        ({"texts": ["a"], "exclude": [[30]]}, "exclude of text 0: expected labels from 0 to 29"),
        ({"texts": ["a"], "exclude": [1.5]}, "exclude[0]: input should be a valid"),
        ({"texts": [{"ranker_text": "a"}]}, 'texts[0]: expected no "ranker_text", got one'),
        ({"texts": [{"titel": "a"}]}, "texts[0]"),
    ],
)
def test_mistakes_are_one_sentence(body: dict[str, Any], told: str) -> None:
    found = one(**body)
    assert found.status_code == 422
    sentence = found.json()["error"]
    assert sentence.startswith(told) and "\n" not in sentence, sentence


def test_documents_of_parts_and_a_default_number_of_labels() -> None:
    held = Held()

    async def work() -> list[httpx.Response]:
        async with asking(application_of(held, k=4)) as client:
            given = [{"title": "a", "content": "b"}, {"text": "c"}, "d"]
            return [
                await client.post("/predict", json={"texts": given}),
                await client.post("/predict", content=b"{}"),
                await client.post("/predict", content=b"{", headers={"content-type": JSON}),
                await client.post("/predict"),
                await client.post("/predict", json=["a"]),
                await client.post(
                    "/predict", content=b'{"texts": ["\xe9"]}', headers={"content-type": JSON}
                ),
                await client.get("/nowhere"),
                await client.get("/predict"),
            ]

    found, *broken, latin, nowhere, got = running(work)
    assert held.calls == [["a b", "c", "d"]] and [len(own) for own in ids(found)] == [4] * 3
    assert [x.status_code for x in broken] == [422] * 4
    expected = f"the body: expected a JSON object (content-type: {JSON}), got "
    untold, cut, none, other = (x.json()["error"] for x in broken)
    assert untold == f"{expected}the content-type none; see /docs"
    assert cut.startswith("the body: no JSON (Expecting property name")
    assert none == f"{expected}none; see /docs" and other == f"{expected}a list; see /docs"
    assert latin.status_code == 400 and "is no JSON in UTF-8; /docs" in latin.json()["error"]
    assert nowhere.status_code == 404 and got.status_code == 405
    assert nowhere.json() == {"error": "GET /nowhere: no such path; /docs lists all requests"}
    sentence = "GET /predict: another method than this path takes; /docs lists all requests"
    assert got.json() == {"error": sentence}


# ---- what is counted, and the pages ----


def test_requests_batches_and_paths_are_counted() -> None:
    async def work() -> str:
        async with asking(application_of(Held())) as client:
            for path in ("/healthz", "/healthz", "/somewhere/else", "/annif/projects/stub"):
                await client.get(path)
            await client.post("/predict", json={"texts": ["a", "b", "c"]})
            return (await client.get("/metrics")).text

    told = running(work)
    for line in (
        'xmlkernels_requests_total{path="/healthz",status="200"} 2.0',
        'xmlkernels_requests_total{path="other",status="404"} 1.0',
        'xmlkernels_requests_total{path="/annif/projects/{project}",status="200"} 1.0',
        'xmlkernels_request_seconds_count{path="/predict",status="200"} 1.0',
        'xmlkernels_batch_texts_bucket{le="2.0"} 0.0',
        'xmlkernels_batch_texts_bucket{le="4.0"} 1.0',
        "xmlkernels_batch_seconds_count 1.0",
        "xmlkernels_queue_requests 0.0",
    ):
        assert f"\n{line}\n" in told, line


def test_pages_fetch_nothing_from_elsewhere() -> None:
    async def work() -> list[httpx.Response]:
        async with asking(application_of(Held())) as client:
            return [await client.get(path) for path in ("/", "/docs", "/openapi.json")]

    page, docs, schema = running(work)
    for x in (page, docs):
        assert x.headers["content-type"].startswith("text/html")
        policy = x.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert "//" not in x.text.replace("// ", "").replace("http://www.w3.org", "")
    paths = schema.json()["paths"]
    assert set(paths) >= {"/predict", "/neighbours", "/healthz", "/annif", "/annif/suggest"}
    assert {"200", "413", "422", "429"} <= set(paths["/predict"]["post"]["responses"])
    assert json.dumps(paths).count("/annif/") >= 3


# ---- Annif's protocol ----


def test_the_protocol_of_annif() -> None:
    model = xk.load(V1 / "bow")

    async def work() -> list[httpx.Response]:
        async with asking(application_of(model, changed=86_400.0, max_k=7)) as client:
            return [
                await client.get("/annif"),
                await client.get("/annif/projects/stub"),
                await client.get("/annif/projects/other"),
                await client.get("/annif/vocabulary.tsv"),
                await client.post("/annif/suggest", data={"text": "w3 w4", "limit": "3"}),
                await client.post("/annif/projects/stub/suggest", data={"text": "w3 w4"}),
                await client.post("/annif/suggest", data={"text": "", "project": "stub"}),
                await client.post("/annif/suggest", data={"text": "a", "project": "other"}),
                await client.post("/annif/suggest", data={"txt": "a"}),
                await client.post("/annif/suggest", data={"text": "a", "limit": "0"}),
            ]

    status, same, none, words, three, ten, empty, other, no_text, no_limit = running(work)
    assert status.json() == same.json() and status.json()["is_trained"] is True
    assert status.json()["modification_time"] == "1970-01-02T00:00:00+00:00"
    assert none.status_code == other.status_code == 404
    assert none.json()["error"].startswith("project: expected 'stub', got 'other'")
    assert words.text.splitlines()[4] == "<urn:xmlkernels:label:4>\tw12"
    assert len(words.text.splitlines()) == 30
    expected = next(model.predict(["w3 w4"], 3))
    hits = three.json()["results"]
    assert [x["uri"] for x in hits] == [f"urn:xmlkernels:label:{x.id}" for x in expected]
    assert [x["label"] for x in hits] == [x.name for x in expected]
    assert [x["score"] for x in hits] == pytest.approx([x.probability for x in expected], abs=1e-6)
    assert all(0 < x["score"] <= 1 for x in hits)
    assert len(ten.json()["results"]) == 7 and empty.json()["results"]
    assert no_text.status_code == no_limit.status_code == 422


def test_names_that_are_uris_are_the_uris_of_labels() -> None:
    held = Held()
    held.label_names = ["http://example.org/a", "urn:b:1", "see: this", *held.label_names[3:]]

    async def work() -> httpx.Response:
        async with asking(application_of(held, uri_prefix="http://here/")) as client:
            return await client.post("/annif/suggest", data={"text": "a", "limit": "3"})

    uris = [x["uri"] for x in running(work).json()["results"]]
    assert uris == ["http://example.org/a", "urn:b:1", "http://here/2"]
