"""Syncs on a slow network: time per step, bytes on the wire, and what is learned, on one machine.

    python benchmarks/wan.py [--preset quick|all] [--sync all_reduce --sync '{name: diloco, every: 100}' ...]
                             [--link 100mbit/25ms] [--back LINK] [--loss 0.001] [--jitter 5ms] [--mtu 9000]
                             [--replicas 2] [--steps 200] [--warmup 100] [--compute-ms 30] [--json]

Every sync trains the same Llama of 1.6 M parameters from the same weights on the same batches, as that many replicas of
paceline, each a process with a network of its own; ``emulator.py`` delays and limits what they send each other. Before
each run an all-reduce of 4 bytes, and one of 4 MiB, show that it does, and end the run if not.

Timed are the steps after ``--warmup`` up to ``--steps``: what training is like while it goes on. One more step follows,
the last of the run, which for most syncs ends with an exchange of everything; it stands by itself.

    ms/step    from the end of a step to that of the next, on the slowest rank, mean over the steps that are timed
    compute    share of that time which is not spent in the sync: forward, backward, optimizer, loading. Each step
               sleeps until this has taken ``--compute-ms``, as if the model were larger; ``ms`` is what it took
    wire       bytes that rank 0's network interface has sent a step, with all headers and acknowledgements
    payload    bytes that the sync's closed formula says, which are what the plan shows
    model      ms/step as ``sync: auto`` takes it to be: the compute, and bytes and delays on the link
    end        what the last step took
    loss       held-out, after the last step: all have seen the same tokens
    dropped    packets, and the latest that one was handed on after it was due: a machine that is busy spoils the times

A period (``every``) should divide ``--steps`` and ``--warmup``, so that whole periods are timed.

Where the machine does not allow network namespaces this is refused. There is no weaker stand-in: gloo's members tell
each other where to connect in a form of its own, into which no proxy fits, and a sleep inside the link would be a model
of a network, where this is to measure one.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from emulator import Forbidden, Weather
from meter import PROBE_BYTES
from wan_cases import Conditions, config
from wan_runs import measure
from wan_table import Result, line_of

from paceline.errors import ConfigError, PlanError
from paceline.plan.network import Network
from paceline.recipes.prepare import prepare_in_child
from paceline.sync.rows import PRESETS, ROWS


def compare(syncs: Sequence[Any], given: Conditions) -> list[Result]:
    """One after the other; prints a line as each ends."""
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="paceline-wan-") as folder:
        prepare_in_child(config("all_reduce", given), Path(folder) / "prepare.log", say=print, debug=False)
        for sync in syncs:
            result = measure(sync, given, Path(folder))
            if not results:
                small, rate = 1e3 * result.probe.small_s, result.probe.bits_per_s / 1e6
                print(f"all-reduce of 4 bytes: {small:.1f} ms; of {PROBE_BYTES >> 20} MiB: {rate:.1f} Mbit/s")
                print(
                    f"timed: steps {given.warmup + 1} to {given.steps}; step {given.steps + 1}, the last, ends with an "
                    f"exchange of everything and is not among them: 'end ms'\n{line_of()}"
                )
            results.append(result)
            print(line_of(result), flush=True)
    return results


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sync", action="append", default=[], help="as in a config; may be given again and again")
    parser.add_argument("--preset", choices=list(PRESETS), help="rows of the table of syncs; quick if nothing is named")
    parser.add_argument("--link", type=_network, default="100mbit/25ms", help="rate, and delay one way")
    parser.add_argument("--back", type=_network, help="what all but the first replica send by; as --link")
    parser.add_argument("--loss", type=float, default=0.0, help="share of packets that get lost")
    parser.add_argument("--jitter", type=float, default=0.0, help="most milliseconds added to a delay")
    parser.add_argument("--queue", type=float, default=400.0, help="most milliseconds that a packet waits to be sent")
    parser.add_argument("--mtu", type=int, default=9000)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200, help="up to which they are timed; one more follows")
    parser.add_argument("--warmup", type=int, default=100, help="how many of the first are not timed, at least one")
    parser.add_argument("--compute-ms", type=float, default=30.0, help="least time that a step computes")
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    asked = parser.parse_args()
    if asked.steps <= asked.warmup:
        parser.error(f"--steps {asked.steps}: expected more than --warmup {asked.warmup}, which are part of them")
    given = Conditions(
        link=asked.link,
        back=asked.back or asked.link,
        weather=Weather(loss=asked.loss, jitter_s=asked.jitter / 1e3, queue_s=asked.queue / 1e3),
        mtu=asked.mtu,
        replicas=asked.replicas,
        steps=asked.steps,
        warmup=max(1, asked.warmup),
        compute_s=asked.compute_ms / 1e3,
    )
    preset = asked.preset or (None if asked.sync else "quick")
    syncs = [ROWS[name] for name in PRESETS.get(preset, ())] + [yaml.safe_load(text) for text in asked.sync]
    try:
        results = compare(syncs, given)
    except Forbidden as error:
        sys.exit(
            f"NOT MEASURED: {error}. Run as root, in a container with --cap-add SYS_ADMIN --cap-add NET_ADMIN "
            "--device /dev/net/tun"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted; no process and no network is left")
    except (ConfigError, PlanError) as error:
        sys.exit(str(error))
    if asked.json:
        print(json.dumps([asdict(result) for result in results]))


def _network(text: str) -> Network:
    try:
        return Network.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":  # numpy would start threads, and ranks are forked
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "OPENBLAS_NUM_THREADS": "1"})  # noqa: S606
    main()
