import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import PacelineError
from paceline.track.report import write_report

WriteRun = Callable[..., Path]

HOSTILE = "</pre></style><script>alert(1)</script><img src=x onerror=alert(2)>\" onload='x' &lt; \x1b[2J"


class Page(HTMLParser):
    """A page as a browser sees it; fails on a tag that is closed wrongly."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.policy = ""
        self.text = ""
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = str(dict(attrs)["content"])
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def charts(page: Page) -> list[str]:
    return re.findall(r"<figcaption><b>(.*?)</b>", page.source)


ALL_CHARTS = ["Loss", "Held-out", "Learning rate", "Gradient norm", "Speed", "Memory", "Step time"]


def test_a_whole_run_on_one_page(write_run: WriteRun) -> None:
    folder = write_run()
    path = write_report(folder)
    page = Page(path)
    assert path == folder / "report.html"
    assert charts(page) == ALL_CHARTS
    assert page.tags.count("svg") == 8  # the loss in two widths
    for text in (
        "runs/first",
        "llama-1m",
        "2 replicas x 1 rank",
        "1.750 bits per byte",
        "return 200",
        "name: next_token",
    ):
        assert text in page.text
    assert f"paceline train {folder}/config.yaml train.output={folder}-again checkpoint.resume=never" in page.text
    assert f"paceline train {folder}/config.yaml train.output={folder} train.steps=400" in page.text
    assert list(folder.glob(".*")) == []


def test_the_page_needs_no_network_and_runs_nothing(write_run: WriteRun) -> None:
    page = Page(write_report(write_run()))
    assert {"script", "link", "img", "iframe", "object", "a"}.isdisjoint(page.tags)
    assert {"src", "href", "style"}.isdisjoint(page.attributes)
    assert not re.search(r"https?:|url\(|@import", page.source)
    assert page.policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_hostile_texts_are_shown_and_become_nothing_else(write_run: WriteRun) -> None:
    event = {"time": 0.0, "step": 1, "kind": HOSTILE, "message": HOSTILE}
    mark = {"time": 0.0, "step": 2, "kind": "warning", "message": HOSTILE}
    evaluation = {"step": 3, "loss": 2.0, "bits_per_byte": 1.5, "samples": [{"prompt": HOSTILE, "text": HOSTILE}]}
    info = {"name": HOSTILE, "model": HOSTILE, "parameters": 1, "steps": 3, "machine": HOSTILE, "mfu_formula": HOSTILE}
    page = Page(
        write_report(
            write_run(
                3,
                events__jsonl=f"{json.dumps(event)}\n{json.dumps(mark)}\n",
                evaluations__jsonl=f"{json.dumps(evaluation)}\n",
                run__json=json.dumps(info),
                summary__json=json.dumps({"baselines": {HOSTILE: 2.0}}),
                config__yaml=f"train: {{steps: 3}}\n# {HOSTILE}".replace("\x1b", ""),
            )
        )
    )
    assert {"script", "img"}.isdisjoint(page.tags)
    assert {"onerror", "onload", "src"}.isdisjoint(page.attributes)
    assert page.tags.count("style") == 1
    assert "\x1b" not in page.source
    assert page.text.count(HOSTILE.replace("\x1b", "\u241b")) >= 9


def test_white_space_of_samples_is_kept(write_run: WriteRun) -> None:
    page = Page(write_report(write_run()))
    assert '<pre><span class="prompt">def f(x):\n</span>    return 50</pre>' in page.source
    assert "white-space: pre-wrap" in page.source


@pytest.mark.parametrize(
    ("steps", "missing", "expected"),
    [
        (1, [], ["Loss", "Learning rate", "Gradient norm", "Speed", "Memory", "Step time"]),
        (200, ["evaluations.jsonl"], ["Loss", "Learning rate", "Gradient norm", "Speed", "Memory", "Step time"]),
        (200, ["metrics.jsonl"], ["Loss", "Held-out"]),
        (200, ["events.jsonl", "config.yaml", "run.json"], ALL_CHARTS),
        (200, ["metrics.jsonl", "evaluations.jsonl", "events.jsonl"], []),
        (0, [], []),
    ],
)
def test_a_run_with_little_in_it_still_gives_a_page(
    write_run: WriteRun, steps: int, missing: list[str], expected: list[str]
) -> None:
    folder = write_run(steps)
    for name in missing:
        (folder / name).unlink()
    assert charts(Page(write_report(folder))) == expected


def test_metrics_with_nothing_but_the_loss_are_enough(write_run: WriteRun) -> None:
    def strip(record: dict[str, Any]) -> None:
        for key in set(record) - {"step", "loss"}:
            del record[key]

    assert charts(Page(write_report(write_run(30, change=strip)))) == ["Loss"]


def test_events_and_samples_are_bounded(write_run: WriteRun) -> None:
    events = [{"time": 0.0, "step": step, "kind": "checkpoint", "message": f"event {step}."} for step in range(1, 301)]
    samples = [{"prompt": f"p{i}", "text": "x" * 5000} for i in range(3)]
    measured = [{"step": step, "loss": 2.0, "bits_per_byte": 1.5, "samples": samples} for step in range(1, 201)]
    page = Page(
        write_report(
            write_run(
                events__jsonl="".join(json.dumps(event) + "\n" for event in events),
                evaluations__jsonl="".join(json.dumps(evaluation) + "\n" for evaluation in measured),
            )
        )
    )
    assert "100 earlier events are in events.jsonl." in page.text
    assert "event 100." not in page.text.replace("step 100: event 100.", "")
    assert "event 300." in page.text
    assert page.source.count("(3,000 characters more)") == 6 * 3


def test_the_way_to_go_on_depends_on_where_the_run_stands(write_run: WriteRun) -> None:
    config = "train: {steps: 200, output: 'my runs/first'}\ncheckpoint: {resume: 100}\n"
    folder = write_run(150, config__yaml=config)
    page = Page(write_report(folder))
    assert f"paceline train {folder}/config.yaml train.output={folder} checkpoint.resume=auto" in page.text
    assert "train.steps=" not in page.text


def test_a_report_that_cannot_be_written_is_an_error_that_names_it(write_run: WriteRun) -> None:
    folder = write_run(3)
    (folder / "report.html").mkdir()
    with pytest.raises(PacelineError, match=r"report\.html cannot be written: Is a directory"):
        write_report(folder)


@pytest.mark.slow
def test_a_long_run_stays_under_a_megabyte_and_keeps_its_extremes(write_run: WriteRun) -> None:
    def leap(record: dict[str, Any]) -> None:
        record["loss"] += 2.0 if record["step"] == 77_777 else 0.0

    path = write_report(write_run(100_000, change=leap))
    assert path.stat().st_size < 1_000_000
    assert "The loss leapt up at step 77,777, to 4.500 at most." in Page(path).text
