import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from paceline.config import TrackConfig
from paceline.track import RunInfo, open_trackers
from paceline.track.jsonl import read_metrics
from paceline.track.live import LiveDisplay
from paceline.track.terminal import PlainDisplay, display
from track.runs import metrics_of

HOSTILE = "\x1b[2J\r\nbad\x9b1m"


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_auto_is_live_on_a_terminal_and_plain_elsewhere(info: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    live = display("auto", info, Terminal())
    assert isinstance(live, LiveDisplay)
    live.close()
    assert isinstance(display("auto", info, io.StringIO()), PlainDisplay)
    assert display("none", info, Terminal()) is None
    assert isinstance(display("plain", info, Terminal()), PlainDisplay)
    ascii_only = Terminal()
    ascii_only.encoding = "ascii"  # type: ignore[misc]
    assert isinstance(display("auto", info, ascii_only), PlainDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(display("auto", info, Terminal()), PlainDisplay)


def run_plain(info: RunInfo, steps: int, seconds: float) -> list[str]:
    """The lines of the steps when each step takes so long."""
    stream, clock = io.StringIO(), Clock()
    shown = PlainDisplay(info, stream, monotonic=clock)
    for step in range(1, steps + 1):
        clock.now += seconds
        shown.step(metrics_of(step))
    return [line for line in stream.getvalue().splitlines() if line.startswith("step")]


def test_plain_lines_are_aligned_and_hold_what_matters(info: RunInfo) -> None:
    stream, clock = io.StringIO(), Clock()
    shown = PlainDisplay(info, stream, monotonic=clock)
    for step in (1, 2):
        clock.now += 0.5
        shown.step(metrics_of(step))
    shown.evaluation({"step": 2, "loss": 2.25, "bits_per_byte": 1.8124, "targets": 32_000})
    shown.event({"step": 2, "kind": "checkpoint", "message": "saved"})
    shown.event({"step": 2, "kind": "evaluate", "message": "has its own line"})
    clock.now += 0.5
    shown.step(metrics_of(3) | {"loss": None, "mfu": None})
    shown.evaluation({"step": 200, "loss": 2.25, "bits_per_byte": None})
    shown.close()
    assert stream.getvalue().splitlines() == [
        "runs/first: llama-1m, 1.31M parameters, 2 replicas x 1 rank, bf16, all_reduce",
        "MFU = 6 N x tokens/s / 812 GFLOP/s",
        "step   1/200  loss  8.352   21,000 tokens/s  MFU  31 %   -:-- left",
        "step   2/200  loss  8.207   21,000 tokens/s  MFU  31 %   1:39 left",
        "step   2/200  held-out 1.812 bits/byte, loss 2.250 over 32,000 targets",
        "step   2/200  checkpoint: saved",
        "step   3/200  loss      -   21,000 tokens/s   1:38 left  held-out 1.812 bits/byte",
        "step 200/200  held-out loss 2.250",
    ]


SCALED = {"loss_scale": 32768.0, "skipped": False, "skipped_steps": 3}


def test_a_loss_scale_is_shown_where_there_is_one(info: RunInfo) -> None:
    stream, clock = io.StringIO(), Clock()
    plain, (live, _, _) = PlainDisplay(info, stream, monotonic=clock), live_at(120, info)
    for step, more in ((1, {}), (2, SCALED | {"skipped_steps": 0}), (3, SCALED)):
        plain.step(metrics_of(step) | more)
        live.step(metrics_of(step) | more)
        shown = [line for line in rendered(live, 120) if "loss scale" in line]
        assert [words in line for line in shown for words in ("32,768", ", 3 skipped")] == {
            1: [],
            2: [True, False],
            3: [True, True],
        }[step]
    live.close()
    assert ["loss scale" in line for line in stream.getvalue().splitlines()[-3:]] == [False, False, True]
    assert stream.getvalue().endswith("left  loss scale 32,768, 3 skipped\n")


def test_plain_lines_thin_out_and_end_with_the_last_step(info: RunInfo) -> None:
    quick = run_plain(info, 200, 0.01)
    assert [line.split()[1] for line in quick] == ["1/200", "2/200", "3/200", "103/200", "200/200"]
    assert len(run_plain(info, 200, 1.5)) == pytest.approx(20 + 20 * 2, abs=25)
    assert len(run_plain(info, 200, 90)) == 200


def live_at(width: int, info: RunInfo) -> tuple[LiveDisplay, Console, Clock]:
    console, clock = Console(file=Terminal(), force_terminal=True, width=width, height=40), Clock()
    return LiveDisplay(info, console, monotonic=clock), console, clock


def rendered(shown: LiveDisplay, width: int) -> list[str]:
    """The panel as text."""
    console = Console(file=io.StringIO(), width=width, height=40)
    console.print(shown.render())
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_live_shows_everything_within_the_width(width: int, info: RunInfo) -> None:
    shown, _, clock = live_at(width, info)
    for step in range(1, 61):
        clock.now += 0.5
        shown.step(metrics_of(step))
    shown.evaluation({"step": 50, "loss": 2.25, "bits_per_byte": 1.8124, "targets": 1})
    shown.event({"step": 50, "kind": "checkpoint", "message": "saved " + "long " * 100})
    lines = rendered(shown, width)
    shown.close()
    assert max(cell_len(line) for line in lines) <= min(width, 112)
    assert len(lines) <= 22
    text = "\n".join(lines)
    for words in ("runs/first", "llama-1m", "1.31M parameters", "2 replicas x 1 rank", "bf16", "step 60/200", "30 %"):
        assert words in text
    for words in ("3.839", "1.812", "21,000", "31 %", "0.8333", "1.00e-3", "412 MiB", "0.5 %", "step 100", "246k"):
        assert words in text
    for words in ("0:30 elapsed, 1:10 left", "MFU = 6 N", "\u2581", "\u2588", "checkpoint: saved"):
        assert words in text
    # A terminal prints ^C behind the last line; were that line full, the panel would be drawn one line too low.
    assert cell_len(lines[-1]) + len("^C") < width


def test_live_stands_before_the_first_step(info: RunInfo) -> None:
    shown, _, clock = live_at(80, info)
    clock.now += 5
    text = "\n".join(rendered(shown, 80))
    shown.close()
    assert "step 0/200" in text
    assert "0:05 elapsed, -:-- left" in text
    assert "step 50" in text


def test_after_closing_the_last_state_stays_and_the_cursor_is_back(info: RunInfo) -> None:
    shown, console, _ = live_at(80, info)
    shown.step(metrics_of(200))
    shown.close()
    output = console.file
    assert isinstance(output, Terminal)
    last = output.getvalue().rpartition("\x1b[2K")[2]
    assert last.rstrip().endswith("\x1b[?25h")
    last = re.sub(r"\x1b\[[0-9;?]*[a-z]", "", last)
    assert "200/200" in last
    assert "Ctrl-C" not in last
    assert " left" not in last
    assert last.count("\n") >= 12


def test_no_text_of_a_run_can_move_the_cursor(info: RunInfo) -> None:
    named = RunInfo(name=HOSTILE, model=HOSTILE, parameters=1, steps=2, mfu_formula=HOSTILE)
    shown, _, _ = live_at(80, named)
    event = {"step": 1, "kind": "warning", "message": HOSTILE}
    shown.event(event)
    live = "\n".join(rendered(shown, 80))
    shown.close()
    stream = io.StringIO()
    plain = PlainDisplay(named, stream)
    plain.event(event)
    for text in (live, stream.getvalue()):
        assert "bad" in text
        assert not {"\x1b", "\x9b", "\r"} & set(text)
    assert len(stream.getvalue().splitlines()) == 3


def test_open_trackers_cuts_writes_and_shows(tmp_path: Path, info: RunInfo) -> None:
    for start in (0, 2):
        stream, extra = io.StringIO(), []
        at = RunInfo(**{**vars_of(info), "start_step": start})
        run = open_trackers(tmp_path, TrackConfig(display="plain"), at, stream=stream, extra=extra)
        for step in range(start + 1, start + 4):
            run.step(metrics_of(step))
        run.close()
        assert f"step   {start + 1}/200" in stream.getvalue()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    run = open_trackers(tmp_path / "quiet", TrackConfig(display="none", tensorboard=False), info)
    run.close()
    assert {path.name for path in (tmp_path / "quiet").iterdir()} == {
        "run.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "events.jsonl",
    }


def vars_of(info: RunInfo) -> dict[str, object]:
    return {name: getattr(info, name) for name in RunInfo.__dataclass_fields__}


def test_importing_track_is_light() -> None:
    program = "import sys, paceline.track; print([n for n in ('torch', 'tensorboard', 'rich') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
