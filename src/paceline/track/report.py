"""The report of a run: one HTML file that opens from disk, without network or script.

It shows what the run's folder holds: ``run.json`` (the ``RunInfo``), ``metrics.jsonl``, ``evaluations.jsonl``,
``events.jsonl``, ``config.yaml``, and ``summary.json``, a map of what was measured after the end: ``bits_per_byte`` of
the held-out text, and ``baselines``, name to bits per byte of the same text, as in ``{"gzip -9": 1.98}``. Each may be
missing.
"""

import os
import shlex
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from paceline.errors import PacelineError
from paceline.track.figures import figures
from paceline.track.folder import RunFolder, read_run
from paceline.track.markup import Markup, element
from paceline.track.progress import ranks_words
from paceline.track.verdict import verdict
from paceline.track.words import clock, count, quantity, rate

MOST_EVENTS = 200
MOST_SAMPLED_STEPS = 6
MOST_PROMPTS = 8
MOST_ROWS = 20
MOST_TEXT = 2_000
MOST_CONFIG = 50_000


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Raises ``PacelineError`` when the folder is no run, a file in it is damaged, or the page cannot be written.
    """
    path = folder / "report.html"
    write_page(path, render(read_run(folder)))
    return path


def write_page(path: Path, text: str) -> None:
    """Write a page whole or not at all; ``PacelineError`` if it cannot be written."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise PacelineError(f"{path} cannot be written: {error.strerror}") from None


def render(run: RunFolder) -> str:
    """The whole page."""
    name = run.info.name if run.info else run.path.resolve().name
    return page(
        name,
        element("p", _about(run), class_="about"),
        _verdict(run),
        figures(run),
        _samples(run),
        _numbers(run),
        _events(run),
        _config(run),
        _commands(run),
        element("footer", f"Written by paceline from {run.path}."),
    )


def page(name: str, *content: Markup) -> str:
    """A whole HTML page that needs no other file, with its name as a heading."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # Whatever a text in the run holds: the page loads nothing and runs no script.
        element("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        element("title", f"{name} \u2013 paceline"),
        element("style", Markup(style("charts.css", "report.css"))),
    )
    body = element("body", element("h1", name), *content)
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def style(*sheets: str) -> str:
    """Style sheets of this package, one after the other."""
    return "".join((files("paceline.track") / sheet).read_text(encoding="utf-8") for sheet in sheets)


def _verdict(run: RunFolder) -> Markup:
    rows: list[Markup] = []
    before = ""
    for about, key, rest in verdict(run):
        rows += [element("dt", about)] if about != before else []
        rows.append(element("dd", element("b", key), rest.replace(" %", "\u00a0%")))
        before = about
    return element("dl", *rows)


def _about(run: RunFolder) -> str:
    """One line: the model, how it was trained, where and when."""
    info = run.info
    times = [time for record in (*run.events, *run.metrics) if isinstance(time := record.get("time"), int | float)]
    parts = [
        *([info.model, f"{count(info.parameters)} parameters", ranks_words(info), info.precision] if info else []),
        *([info.sync, info.machine] if info else []),
        f"started {datetime.fromtimestamp(min(times), UTC):%Y-%m-%d %H:%M} UTC" if times else "",
    ]
    return " \u00b7 ".join(part for part in parts if part)


def _samples(run: RunFolder) -> Markup:
    """What the model wrote after each prompt, over training."""
    sampled = [record for record in run.evaluations if record.get("samples")]
    if not sampled:
        return Markup()
    chosen = _spread(sampled, MOST_SAMPLED_STEPS)
    prompts = list(dict.fromkeys(sample["prompt"] for record in chosen for sample in record["samples"]))
    columns = []
    for prompt in prompts[:MOST_PROMPTS]:
        entries = []
        for record in chosen:
            for sample in record["samples"]:
                if sample["prompt"] == prompt:
                    entries.append(element("p", f"step {record['step']:,}"))
                    pieces = [element("span", prompt, class_="prompt"), _short(sample["text"])]
                    entries.append(element("pre", *(pieces[::-1] if sample.get("backward") else pieces)))
        columns.append(element("div", *entries))
    return element("section", element("h2", "What it writes"), element("div", *columns, class_="samples"))


def _numbers(run: RunFolder) -> Markup:
    """Some rows of the metrics as a table, for those who want digits or do not see pictures."""
    if not run.metrics:
        return Markup()
    held_out = dict(run.held_out("bits_per_byte"))
    rows = [
        [
            f"{record['step']:,}",
            count(record["tokens_seen"]) if "tokens_seen" in record else "-",
            quantity(record.get("loss")),
            quantity(held_out.get(record["step"])),
            rate(record.get("lr")),
            quantity(record.get("gradient_norm")),
            quantity(record.get("tokens_per_s")),
        ]
        for record in _spread(run.metrics, MOST_ROWS, [step for step, _ in run.held_out("bits_per_byte")])
    ]
    names = ["step", "tokens seen", "loss", "held-out bits/byte", "learning rate", "gradient norm", "tokens/s"]
    return element("section", element("h2", "Numbers"), table(names, rows, numbers=len(names)))


def _events(run: RunFolder) -> Markup:
    if not run.events:
        return Markup()
    begun = run.events[0].get("time", 0.0)
    shown = run.events[-MOST_EVENTS:]
    rows = [
        [
            clock(event.get("time", begun) - begun),
            f"{event['step']:,}",
            str(event.get("kind")),
            _short(event.get("message")),
        ]
        for event in shown
    ]
    left_out = len(run.events) - len(shown)
    note = element("p", f"{left_out:,} earlier events are in events.jsonl.", class_="note") if left_out else ""
    kinds = [str(event.get("kind")) for event in shown]
    return element(
        "section",
        element("h2", "Events"),
        note,
        table(["after", "step", "kind", "message"], rows, numbers=2, kinds=kinds),
    )


def _config(run: RunFolder) -> Markup:
    if not run.config_text:
        return Markup()
    text = _short(run.config_text.strip("\n"), MOST_CONFIG)
    return element("section", element("h2", "Config"), element("pre", text))


def _commands(run: RunFolder) -> Markup:
    """How to run it again and how to go on."""
    if not run.config_text:
        return Markup()
    config = str(run.path / "config.yaml")
    again = f"{run.path}-again"
    repeat = ["paceline", "train", config, f"train.output={again}", "checkpoint.resume=never"]
    proceed = ["paceline", "train", config]
    if run.setting("train", "output") != str(run.path):
        proceed.append(f"train.output={run.path}")
    if run.setting("checkpoint", "resume") not in (None, "auto"):
        proceed.append("checkpoint.resume=auto")
    last, wanted = run.metrics[-1]["step"] if run.metrics else 0, run.setting("train", "steps")
    if isinstance(wanted, int) and last >= wanted:
        proceed.append(f"train.steps={2 * wanted}")
    return element(
        "section",
        element("h2", "Commands"),
        element("h3", "The same run again, in a folder of its own"),
        element("pre", shlex.join(repeat)),
        element("h3", "Go on from the newest checkpoint"),
        element("pre", shlex.join(proceed)),
    )


def table(names: Sequence[str], rows: Iterable[Sequence[str]], numbers: int, kinds: Sequence[str] = ()) -> Markup:
    """A table whose first ``numbers`` columns are aligned to the right; ``kinds`` colours rows."""

    def cells(tag: str, row: Sequence[str]) -> list[Markup]:
        return [element(tag, text, class_="n" if place < numbers else None) for place, text in enumerate(row)]

    head = element("thead", element("tr", *cells("th", names)))
    body = [
        element("tr", *cells("td", row), class_=kinds[place] if place < len(kinds) else None)
        for place, row in enumerate(rows)
    ]
    return element("div", element("table", head, element("tbody", *body)), class_="scroll")


def _spread(records: list[dict[str, Any]], most: int, wanted: Iterable[float] = ()) -> list[dict[str, Any]]:
    """At most ``most`` records, evenly over the list with both ends; before others those whose step is ``wanted``."""
    steps = set(wanted)
    chosen = [record for record in records if record["step"] in steps]
    if not 0 < len(chosen) < most:
        chosen = records
    else:
        chosen = list({record["step"]: record for record in (records[0], *chosen, records[-1])}.values())
    last = len(chosen) - 1
    places = {round(place * last / (most - 1)) for place in range(most)} if last >= most else range(last + 1)
    return [chosen[place] for place in sorted(places)]


def _short(text: object, most: int = MOST_TEXT) -> str:
    text = str(text)
    return text if len(text) <= most else f"{text[:most]} \u2026 ({len(text) - most:,} characters more)"
