"""The live display: a panel of about 16 lines that is drawn over itself while the run goes on."""

import sys
import threading
import time
from collections.abc import Callable

from rich.box import ROUNDED
from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from paceline.track.base import Record, RunInfo
from paceline.track.progress import Progress, event_words, held_out_words, loss_scale_words, ranks_words
from paceline.track.words import clock, count, one_line, percent, quantity, rate, size

WIDEST = 112
THREE_COLUMNS_FROM = 100
REFRESHES_PER_S = 2


class LiveDisplay:
    """A panel on ``console``, shown from the start; after ``close`` its last state stays on the screen."""

    def __init__(self, info: RunInfo, console: Console, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._progress = Progress(info, monotonic)
        self._console = console
        self._lock = threading.Lock()  # the panel is drawn by a thread of its own
        self._closed = False
        # What else is printed to this terminal goes above the panel; what is piped elsewhere stays in its pipe.
        self._live = Live(
            console=console,
            get_renderable=self.render,
            refresh_per_second=REFRESHES_PER_S,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start(refresh=True)

    def step(self, metrics: Record) -> None:
        """Take the metrics; they are drawn within half a second."""
        with self._lock:
            self._progress.take_step(metrics)

    def evaluation(self, evaluation: Record) -> None:
        """Take the measurement."""
        with self._lock:
            self._progress.held_out = evaluation

    def event(self, event: Record) -> None:
        """Show the event among the last three."""
        with self._lock:
            self._progress.take_event(event)

    def close(self) -> None:
        """Draw a last time, and give the terminal back."""
        with self._lock:
            self._closed = True
        self._live.stop()

    def render(self) -> RenderableType:
        """The panel as it is now, for rich."""
        width = min(self._console.width, WIDEST)
        with self._lock:
            inside: list[RenderableType] = [self._bar(), Text(), self._values(3 if width >= THREE_COLUMNS_FROM else 2)]
            if bars := self._progress.losses.bars(width - 20):
                inside.append(
                    Text.assemble(("\nloss, smoothed ", "dim"), (bars, "cyan"), no_wrap=True, overflow="crop")
                )
            inside += [Text()] * bool(self._progress.events) + [_event(*event) for event in self._progress.events]
            title = Text(f" {one_line(self._progress.info.name)} ", style="bold", no_wrap=True, overflow="ellipsis")
            panel = Panel(Group(self._head(), *inside), title=title, box=ROUNDED, border_style="dim", width=width)
            return Group(panel, *self._notes(width))

    def _head(self) -> Text:
        info = self._progress.info
        parts = (f"{count(info.parameters)} parameters", ranks_words(info), info.precision, info.sync)
        head = Text(one_line(info.model), style="bold")
        return head.append("  " + "  ".join(parts), style="not bold")

    def _bar(self) -> Table:
        progress, steps = self._progress, self._progress.info.steps
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        times = f"{clock(progress.elapsed_s())} elapsed"
        if not self._closed:
            times += f", {clock(progress.left_s())} left"
        row.add_row(
            Text.assemble(("step ", "dim"), (f"{progress.step:,}", "bold"), f"/{steps:,}"),
            ProgressBar(total=steps, completed=progress.step, complete_style="cyan", finished_style="cyan"),
            f"{100 * progress.step // steps} %  {times}",
        )
        return row

    def _cells(self) -> list[tuple[str, str]]:
        progress, metrics, held_out = self._progress, self._progress.metrics, self._progress.held_out
        speed, seconds = metrics.get("tokens_per_s"), metrics.get("step_s")
        return [
            ("loss", quantity(metrics.get("loss"))),
            ("smoothed", quantity(progress.smoothed)),
            ("held-out", f"{held_out_words(held_out)} at {held_out['step']:,}" if held_out else "-"),
            ("tokens seen", count(metrics["tokens_seen"]) if "tokens_seen" in metrics else "-"),
            ("gradient norm", quantity(metrics.get("gradient_norm"))),
            ("learning rate", rate(metrics.get("lr"))),
            ("tokens/s", f"{speed:,.0f}" if speed is not None else "-"),
            ("MFU", percent(metrics.get("mfu"))),
            ("step time", f"{seconds:.3f} s" if seconds is not None else "-"),
            ("data wait", percent(progress.data_wait())),
            ("memory", size(metrics.get("memory_bytes"))),
            ("next checkpoint", f"step {progress.next_checkpoint():,}"),
            *([("loss scale", loss_scale_words(metrics))] if "loss_scale" in metrics else []),
        ]

    def _values(self, columns: int) -> Table:
        cells = self._cells()
        rows = -(-len(cells) // columns)
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for column in range(columns):
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(no_wrap=True, ratio=2 if column else 3)  # the first holds the held-out measurement
        for row in range(rows):
            grid.add_row(*(text for cell in cells[row::rows] for text in cell))
        return grid

    def _notes(self, width: int) -> list[RenderableType]:
        """What stands beneath. The last line is short: a terminal prints ``^C`` behind it, which must not wrap."""
        formula = one_line(self._progress.info.mfu_formula)
        note = Constrain(Padding(Text(formula, style="dim"), (0, 1), expand=False), width)
        notes: list[RenderableType] = [note] if formula else []
        return notes if self._closed else [*notes, Text(" Ctrl-C finishes the step, saves and stops ", style="dim")]


def _event(at_s: float, event: Record) -> Text:
    style = {"warning": "yellow", "error": "red"}.get(event["kind"], "")
    words = Text(f"{clock(at_s):>5}  ", style="dim", no_wrap=True, overflow="ellipsis")
    return words.append(f"step {event['step']:,}  {event_words(event)}", style=f"not dim {style}".strip())
