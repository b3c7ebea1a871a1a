import os
import signal

import pytest

from paceline.comm.ranks import ALONE
from paceline.launch.local import LocalRun


def deaf(coordinates, rendezvous, line):
    """A rank that cannot finish its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line.send("ready")
    while True:
        signal.pause()


def test_a_second_interrupt_ends_ranks_that_do_not_stop(tmp_path):
    run = LocalRun(deaf, [ALONE], port=0, logs=tmp_path)
    messages = run.messages()
    assert next(messages) == (0, {"kind": "ready"})
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        next(messages)
    with pytest.raises(ProcessLookupError):
        os.kill(run.ranks[0].pid, 0)
