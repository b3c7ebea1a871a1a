"""A child process with a line to its parent: JSON messages both ways, a log file, and no life without the parent."""

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from paceline import errors
from paceline.errors import PacelineError, WorkerError

Message = dict[str, Any]
Main = Callable[["Line"], None]


class Line:
    """One end of the messages between a child and its parent."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def send(self, kind: str, **content: Any) -> None:
        """Send a message; a parent that is gone is ignored, for the child is about to be told."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(json.dumps({"kind": kind, **content}).encode())

    def receive(self) -> Message:
        """Wait for the next message; ``EOFError`` when the other end is gone."""
        message: Message = json.loads(self.connection.recv_bytes())
        return message


class Child:
    """A started process, its line, and what became of it."""

    def __init__(self, name: str, main: Main, log: Path, *, method: str, debug: bool) -> None:
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        self.name = name
        self.log = log
        self.line = Line(ours)
        self.error: Message | None = None
        self.finished = False
        self.process = context.Process(target=_run, args=(main, theirs, log, debug), name=name)  # type: ignore[attr-defined]
        self.process.start()
        theirs.close()

    def death(self) -> str:
        """How an ended process ended, in words."""
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name} (exit code {code})"
        return f"exit code {code}"


def told_error(message: Message, log: Path) -> PacelineError:
    """The error a child reported, as its own type where it was meant for the user, with the traceback if it has one."""
    text = message["message"]
    if not message["expected"]:
        text = f"{text}. Its log: {log}"
    if message["traceback"]:
        text = f"{text}\n{message['traceback']}"
    kind = getattr(errors, message["type"], WorkerError) if message["expected"] else WorkerError
    error: PacelineError = kind(text)
    return error


def start_method() -> str:
    """Fork where no GPU driver is: the parent has imported everything. A GPU's context does not survive a fork."""
    return "spawn" if os.path.exists("/dev/nvidia0") else "fork"


def torch_start_method() -> str:
    """The same for a child that computes with torch: in a parent that has done so, it cannot be forked.

    It would wait forever for the parent's OpenMP threads. Any thread counts as one; NumPy's own end themselves when
    the data is prepared, at the first fork.
    """
    return "spawn" if len(os.listdir("/proc/self/task")) > 1 else start_method()


def _run(main: Main, connection: Connection, log: Path, debug: bool) -> None:
    """The child's first function: output to the log, one message at the end, an exit status that tells."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole foreground group; the parent decides
    _end_with_parent()
    _redirect_output(log)
    line = Line(connection)
    status = 0
    try:
        main(line)
        line.send("finished")
    except Exception as error:
        traceback.print_exc()
        expected = isinstance(error, PacelineError)
        line.send(
            "error",
            type=type(error).__name__,
            message=str(error) if expected else f"{type(error).__name__}: {error}",
            expected=expected,
            traceback=traceback.format_exc() if debug else None,
        )
        status = error.exit_status if isinstance(error, PacelineError) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Leave without the interpreter's tear-down: communication threads of a lost peer may never join.
    os._exit(status)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a killed launcher leaves no rank behind
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:  # it died before it could be watched
        os._exit(1)


def _redirect_output(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
