"""The page about a run: well-formed, whole in itself, escaped, and with the figures of the run."""

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from reformer_lm.pages.charts import MAX_POINTS, Mark, Series, bucket_chart, line_chart, short_number
from reformer_lm.training.report_page import RunReport, best_validation, build_page

# Elements without an end, and those of SVG that end where they begin unless they hold a title.
VOID = {"meta", "br"}
CLOSED = {"line", "circle", "rect", "polyline", "polygon"}


class Reader(HTMLParser):
    """Insists that each element is closed where it should be, and keeps elements, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in CLOSED
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all_text(self) -> str:
        return " ".join(self.text)


def lines() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"step": 0, "time": 1.0, "validation/loss": 5.0, "validation/perplexity": 148.41},
        {"step": 100, "time": 2.0, "validation/loss": 2.5, "validation/perplexity": 12.18},
        {"step": 200, "time": 3.0, "validation/loss": 2.75, "validation/perplexity": 15.64},
        {"step": 200, "time": 3.0, "buckets/layer_0": [[0, 4], [3, 10]], "buckets/layer_10": [[2, 14]]},
        {"step": 200, "time": 3.0, "sample": "</p><script>alert(1)</script>春天 & 花"},
    ]
    for step in range(10, 201, 10):
        found.append(
            {
                "step": step,
                "time": 1.0,
                "train/loss": 5 - step / 100,
                "train/perplexity": math.exp(5 - step / 100),
                "train/learning_rate": 3e-4,
                "train/gradient_norm": 1.0,
                "train/tokens_per_second": 1234.5,
                "train/tokens_seen": step * 4096,
                "train/seconds": step * 0.5,
                "memory/process_peak_mib": 700.0,
            }
        )
    return found


def report(**changes: Any) -> RunReport:
    start = {
        "time": "2026-01-02T03:04:05+00:00",
        "step": 0,
        "program": "train_reformer.py",
        "arguments": ["--raw", "--output_dir", "my <model>"],
        "folder": "/home/me",
        "commit": {"hash": "abc123", "has_changes": True},
        "versions": {"torch": "2.13.0"},
        "hardware": {"processor": "A <fast> one", "cores": 2},
        "data": {"data/train.json": "sha256 00ff"},
        "parameters": 4_200_000,
        "precision": "float32",
    }
    parts: dict[str, Any] = {
        "outcome": "Finished after 200 steps",
        "total_steps": 200,
        "lines": lines(),
        "settings": {
            "model": {"hidden_size": 16, "num_hidden_layers": 11, "axial_dims": None, "axial_shape": [4, 4]},
            "training": {"lr": 0.01, "output_dir": "my <model>", "raw": True},
        },
        "starts": [start],
    }
    return RunReport(**{**parts, **changes})


def test_page_is_whole_in_itself() -> None:
    page = build_page(report())
    reader = Reader(page)
    tags = {tag for tag, _ in reader.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in reader.elements:
        assert not attributes.keys() & {"src", "href", "xlink:href", "srcset", "action", "style", "onload", "onclick"}
    assert not re.search(r"https?:|url\(|@import", page)
    metas = [attributes for tag, attributes in reader.elements if tag == "meta"]
    assert {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; style-src 'unsafe-inline'",
    } in metas
    assert any(attributes.get("name") == "viewport" for attributes in metas)
    assert "prefers-color-scheme: dark" in page


def test_text_from_outside_is_escaped() -> None:
    page = build_page(report())
    assert "<script" not in page and "<fast>" not in page and "<model>" not in page
    text = Reader(page).all_text()
    assert "</p><script>alert(1)</script>春天 & 花" in text
    assert "A <fast> one" in text
    Reader(build_page(report(lines=[{"step": 1, "sample": "\ud800<"}]))).all_text()
    build_page(report(lines=[{"step": 1, "sample": "\ud800<"}])).encode("utf-8")


def test_page_has_the_figures_of_the_run() -> None:
    page = build_page(report())
    reader = Reader(page)
    text = reader.all_text()
    for figure in (
        "12.18", "at step 100", "15.64", "148.41 at step 0", "of 200", "819,200", "1 min 40 s", "4.2M parameters",
        "11 layers of width 16", "700 MiB", "abc123", "not committed", "2.13.0", "sha256 00ff", "float32",
        "train_reformer.py --raw --output_dir 'my <model>'", "[4, 4]", "true", "layer 10: largest 2, 0% empty",
        "layer 0: largest 3, 29% empty",
    ):  # fmt: skip
        assert figure in text, figure
    rows = re.findall(r"<tr( class=best)?><td>([\d,]+)</td><td>([\d.]+)</td><td>([\d.]+)</td>", page)
    assert rows == [
        ("", "0", "5.0000", "148.41"),
        (" class=best", "100", "2.5000", "12.18"),
        ("", "200", "2.7500", "15.64"),
    ]
    captions = re.findall(r"<figcaption>([^<]*)", page)
    assert captions[:6] == [
        "Loss, nats per token",
        "Perplexity, logarithmic",
        "Learning rate",
        "Gradient norm, before clipping",
        "Tokens per second",
        "Peak memory of the process, MiB",
    ]
    assert "best 2.5, step 100" in text
    assert sum(tag == "svg" for tag, _ in reader.elements) == 8


def test_page_of_a_run_that_measured_nothing() -> None:
    empty = report(lines=[], starts=[], settings={}, outcome="Ended by an error at step 0 of 5: <out of memory>")
    text = Reader(build_page(empty)).all_text()
    assert "<out of memory>" in text
    # Of a perplexity that no float holds, and of losses that are none, the metrics file has null.
    nothing = [{"step": 0, "validation/loss": None, "validation/perplexity": None}]
    assert best_validation(report(lines=nothing)) is None
    Reader(build_page(report(lines=nothing)))
    high = [{"step": 0, "validation/loss": 800.0, "validation/perplexity": None}]
    assert "∞" in Reader(build_page(report(lines=high))).all_text()


def points_of(chart: str, kind: str = "polyline") -> list[tuple[float, float]]:
    (text,) = re.findall(rf'<{kind} class="\w+ s1" points="([^"]*)"', chart)
    return [tuple(map(float, pair.split(","))) for pair in text.split()]  # type: ignore[misc]


def test_a_curve_goes_through_its_points() -> None:
    chart = line_chart("c", [Series("a", [(0, 10.0), (5, 20.0), (10, 15.0)])])
    (x0, y0), (x1, y1), (x2, y2) = points_of(chart)
    assert x0 < x1 < x2 and x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    # Downwards on the screen is less; halfway in value is halfway in height.
    assert y1 < y2 < y0
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)
    log = points_of(line_chart("c", [Series("a", [(0, 1.0), (1, 10.0), (2, 100.0), (3, -1.0)])], log=True))
    assert len(log) == 3
    assert log[1][1] == pytest.approx((log[0][1] + log[2][1]) / 2, abs=0.1)


def test_many_points_become_means_in_a_band_of_their_extremes() -> None:
    values = [(step, 1.0 if step % 2 else 3.0) for step in range(10_000)]
    values[5000] = (5000, 100.0)
    chart = line_chart("c", [Series("a", values)], from_zero=True)
    means, band = points_of(chart), points_of(chart, "polygon")
    assert len(means) == MAX_POINTS and len(band) == 2 * MAX_POINTS
    # The one high value is seen in the band, at the top of the picture.
    assert min(y for _, y in band) == 12.0
    assert min(y for _, y in means) > 100
    assert len(chart) < 40_000


@pytest.mark.parametrize("points", [[(3, 2.0)], [(0, 0.0), (1, 0.0)], [(0, -5.0), (1, 5.0)], [(1, 1e-9), (2, 1e9)]])
@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("from_zero", [True, False])
def test_odd_values_are_drawn_inside_the_picture(points: list[tuple[float, float]], log: bool, from_zero: bool) -> None:
    mark = Mark(*points[-1], "here") if not log or points[-1][1] > 0 else None
    chart = line_chart("c", [Series("a", points)], log=log, from_zero=from_zero and not log, mark=mark)
    if not chart:
        assert log and max(value for _, value in points) <= 0
        return
    Reader(chart)
    for x, y in points_of(chart):
        assert 0 <= x <= 400 and 0 <= y <= 220


def test_bars_are_shares_of_the_tokens() -> None:
    chart = bucket_chart("c", [(0, 5), (1, 6), (3, 10), (4, 1), (60, 1)], 60)
    assert re.findall(r"<title>(.*?)</title>", chart) == [
        "6 buckets of 1 token hold 6.0% of all",
        "10 buckets of 2 to 3 tokens hold 30.0% of all",
        "1 buckets of 4 to 7 tokens hold 4.0% of all",
        "1 buckets of 32 to 63 tokens hold 60.0% of all",
    ]
    heights = [float(height) for height in re.findall(r'height="([\d.]+)">', chart)]
    assert [height / heights[-1] for height in heights] == pytest.approx([0.1, 0.5, 4 / 60, 1], abs=0.01)
    Reader(chart)
    Reader(bucket_chart("c", [(0, 5)], 0))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (3e-4, "3e-4"), (0.25, "0.25"), (12.5, "12.5"), (4096, "4,096"), (1234567, "1.235M"), (-0.5, "-0.5"),
        (2.5e9, "2.5G"), (1e20, "1.0e20"), (0.1 + 0.2, "0.3"), (1000, "1,000"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert short_number(value) == text
