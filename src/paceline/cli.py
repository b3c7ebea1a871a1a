"""The command line. Every command takes ``--json``, which prints one JSON document as the last line of its output (of
a command that failed: its ``error``), and ``--debug``; ``main`` reads both. ``--debug`` shows an error's traceback.

Nothing heavy is imported before a command needs it: ``paceline --help`` must be quick.
"""

import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from paceline import __version__

app = typer.Typer(
    name="paceline",
    help="Train language models on any mix of machines; the way the work is shared never changes what is learned.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The config file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changes to the config, for example train.steps=100."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder (train.output).")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Explain the plan and stop.")] = False,
    on: Annotated[
        Literal["here", "ray"], typer.Option(help="Who starts the ranks: this machine, or a Ray cluster.")
    ] = "here",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a model as a config says; run it again to continue where it stopped."""
    from paceline.config import read

    tree = read(config, overrides or [])
    if dry_run:
        from paceline.recipes.explain import explain

        plan = explain(tree)
        _finish(plan.text(), plan.values(), as_json)
        return
    from paceline.recipes.train import run

    result = run(tree, on=on, debug=debug)
    if result is None:  # a rank of torchrun that is not the leader
        return
    again = f"paceline train {config}"
    end = "done" if result.loss is not None else f"complete already (step {result.step} of {result.steps})"
    if not result.is_done:
        end = f"stopped after step {result.step} of {result.steps}; `{again}` continues"
    bits = f", held-out {result.bits_per_byte:.3f} bits per byte" if result.bits_per_byte is not None else ""
    _finish(f"{end}{bits}: {result.output}/report.html, {result.output}/export", result.values(), as_json)


@app.command()
def verify(
    config: ConfigFile,
    overrides: Overrides = None,
    layouts: Annotated[
        str | None,
        typer.Option(help="'shard=2,tensor=2; pipeline=4' and so on, 'all', or 'pairs'; by default the config's own."),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="The most ranks to start.")] = 8,
    dtype: Annotated[str, typer.Option(help="fp64, fp32, bf16, bf16_pure or fp16.")] = "fp64",
    full: Annotated[bool, typer.Option("--full", help="The model as it is, not made small.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prove on a config's own model that a layout learns exactly what one process learns."""
    from paceline.config import read
    from paceline.verify.run import verify as run

    table = run(read(config, overrides or []), layouts, ranks=ranks, dtype=dtype, full=full)
    _finish(table.text(), table.values(), as_json)
    if not table.is_good:
        raise typer.Exit(1)


@app.command("lr-range")
def lr_range(
    config: ConfigFile,
    overrides: Overrides = None,
    low: Annotated[float, typer.Option("--from", help="The rate of the first step.")] = 1e-5,
    high: Annotated[float, typer.Option("--to", help="The rate of the last step.")] = 1.0,
    steps: Annotated[int, typer.Option(min=10, help="Steps of the test.")] = 100,
    output: Annotated[Path, typer.Option(help="Where the page with the picture goes.")] = Path("lr-range.html"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find a learning rate: a short run whose rate rises from step to step, without checkpoints."""
    from paceline.config import read
    from paceline.recipes.lr_range import lr_range as run

    found = run(read(config, overrides or []), output, low=low, high=high, steps=steps, debug=debug)
    _finish(f"{found.words()}\npicture: {output}", {**found.values(), "path": str(output)}, as_json)


@app.command("noise-scale")
def noise_scale(
    config: ConfigFile,
    overrides: Overrides = None,
    batches: Annotated[int, typer.Option(min=3, help="Steps whose gradients are taken.")] = 8,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Estimate the gradient-noise scale of a run, which says how large a batch is worth its sequences."""
    from paceline.config import read
    from paceline.recipes.noise_scale import noise_scale as run

    found = run(read(config, overrides or []), batches=batches, debug=debug)
    _finish(found.words(), found.values(), as_json)


@app.command()
def seeds(
    config: ConfigFile,
    overrides: Overrides = None,
    chosen: Annotated[str, typer.Option("--seeds", help="Numbers with commas between them.")] = "0,1,2",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a config once for each of some seeds, and show how far the results lie apart by chance."""
    from paceline.config import read
    from paceline.errors import ConfigError
    from paceline.recipes.seeds import seeds as run

    try:
        numbers = [int(word) for word in chosen.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds={chosen!r}: expected numbers with commas between them, such as 0,1,2") from None
    found = run(read(config, overrides or []), numbers, debug=debug)
    _finish(found.text(), found.values(), as_json)


Keys = Annotated[Path, typer.Option("--keys", metavar="FOLDER", help="A folder that federated-keys wrote.")]


@app.command("federated-keys")
def federated_keys(
    folder: Annotated[Path, typer.Argument(help="Where the keys go.")],
    host: Annotated[
        str | None, typer.Option(help="Name or address of the server, as clients reach it; for the first call.")
    ] = None,
    clients: Annotated[str, typer.Option(help="Names with commas between them.")] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make what a federated server and its clients know each other by: a certificate, and a token for each client."""
    from paceline.sync.remote.keys import write_keys

    names = [name.strip() for name in clients.split(",") if name.strip()]
    write_keys(folder, host=host, clients=names)
    text = f"{folder}/server stays with the server; each client gets its own folder: " + ", ".join(
        str(folder / name) for name in names
    )
    _finish(text, {"server": str(folder / "server"), "clients": [str(folder / name) for name in names]}, as_json)


@app.command("federated-server")
def federated_server(
    config: ConfigFile,
    keys: Keys,
    overrides: Overrides = None,
    at: Annotated[str, typer.Option("--listen", metavar="HOST:PORT", help="Where clients connect.")] = "0.0.0.0:7440",
    deadline_s: Annotated[
        float | None, typer.Option(help="Seconds after which a round goes on with the clients that came.")
    ] = None,
    linger_s: Annotated[float, typer.Option(help="At the end, wait so long for clients that are away.")] = 60.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve a federated run to clients that are processes of their own; run it again to continue."""
    from paceline.config import read
    from paceline.recipes.federated import serve

    result = serve(read(config, overrides or []), at, keys, deadline_s=deadline_s, linger_s=linger_s)
    end = "done" if result.is_done else f"stopped after round {result.step} of {result.steps}; run it again to continue"
    _finish(f"{end}: {result.output}/report.html, {result.output}/export", result.values(), as_json)


@app.command("federated-client")
def federated_client(
    config: ConfigFile,
    keys: Keys,
    server: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="Where the server listens.")],
    overrides: Overrides = None,
    patience_s: Annotated[float, typer.Option(help="Give up when the server is away for so long.")] = 3600.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Take part in a federated run, with the data of this machine; may be stopped and started at any time."""
    from paceline.config import read
    from paceline.recipes.federated import visit

    done = visit(read(config, overrides or []), server, keys, patience_s=patience_s)
    _finish(f"the run is over, {done.rounds} rounds here: {done.output}/export", done.values(), as_json)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("runs/demo"),
    overrides: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a small model on this machine's own Python documentation and sources, in about two minutes."""
    from paceline.recipes.demo import demo as run

    summary = run(output, overrides or [], debug=debug)
    _finish(summary.text(), summary.values(), as_json)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("paceline.yaml"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a commented config to start from."""
    from paceline.recipes.init import write_starter

    write_starter(path)
    _finish(f"wrote {path}; look at it, then: paceline train {path} --dry-run", {"path": str(path)}, as_json)


@app.command()
def schema(as_json: Json = False, debug: Debug = False) -> None:
    """Print the JSON schema of a config file, for editors to complete and check it."""
    from paceline.config import schema as config_schema

    print(json.dumps(config_schema()) if as_json else json.dumps(config_schema(), indent=1))


@app.command()
def report(run: RunFolder, as_json: Json = False, debug: Debug = False) -> None:
    """Write RUN/report.html: one self-contained page of what happened."""
    from paceline.track.report import write_report

    path = write_report(run)
    _finish(f"wrote {path}", {"path": str(path)}, as_json)


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a Hugging Face folder.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="At most this many new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt with a trained model, as it is written."""
    from paceline.serve.generate import generate as stream

    pieces = []
    for piece in stream(run, prompt, tokens=tokens, temperature=temperature, seed=seed):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()
    if as_json:
        print(json.dumps({"prompt": prompt, "text": "".join(pieces)}))


def _finish(text: str, values: dict[str, Any], as_json: bool) -> None:
    """The command's answer, for a person and, as the last line, for a program."""
    print(text, flush=True)
    if as_json:
        print(json.dumps(values), flush=True)


def _version(value: bool) -> None:
    if value:
        print(f"paceline {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run a command; an expected error is one line on standard error and an exit status other than 0."""
    _open_closed_streams()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if "RANK" in os.environ else "true")
    debug = "--debug" in sys.argv
    try:
        app()
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except Exception as error:
        from paceline.errors import PacelineError

        if debug:
            traceback.print_exc()
        if isinstance(error, PacelineError):
            _fail(f"{type(error).__name__}: {error}", error.exit_status)
        hint = "" if debug else " Run again with --debug for the traceback."
        _fail(f"internal error: {type(error).__name__}: {' '.join(str(error).split())}.{hint}", 1)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is the interpreter's own end


def _fail(message: str, status: int) -> None:
    print(message, file=sys.stderr, flush=True)
    if "--json" in sys.argv:
        with suppress(OSError):  # standard output may be what failed
            print(json.dumps({"error": message}), flush=True)
    sys.exit(status)


def _open_closed_streams() -> None:
    """Point closed standard streams (``>&-``) to nowhere: the next file opened would take their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))
