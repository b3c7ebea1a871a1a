"""Federated runs with clients in processes, or threads, of their own, and the same run played by one process."""

import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from commands import WORDS
from paceline.comm.ranks import Coordinates
from paceline.config import read
from paceline.data.tokenizer import train
from paceline.recipes.federated import Visited, serve, visit
from paceline.recipes.train import Result, run_rank
from paceline.sync.remote.keys import write_keys
from paceline.train.assemble import prepare_data, resolve_model
from paceline.train.policy import StopRequest


def write_site(folder: Path, clients: int) -> None:
    """A text for each client, the server's own, a tokenizer and keys; ``site-0`` and so on are the clients."""
    for name, files in (("texts", clients), ("public", 1)):
        (folder / name).mkdir()
        for f in range(files):
            lines = [
                f"The {WORDS[(f * 7 + p) % 16]} stands beside the {WORDS[(f + p * 3) % 16]}, says {name} {p} of {f}.\n"
                for p in range(40 + 10 * f)
            ]
            (folder / name / f"{f}.txt").write_text("\n".join(lines))
    train((folder / "public" / "0.txt").read_text().splitlines(), 300, [], folder / "tokenizer")
    write_keys(folder / "keys", host="localhost", clients=[f"site-{k}" for k in range(clients)])


def write_config(folder: Path, name: str = "config.yaml", **sections: Any) -> Path:
    """A small run of two rounds, with sections merged in."""
    tree: dict[str, Any] = {
        "model": {
            "config": {
                "model_type": "llama",
                "vocab_size": 320,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_position_embeddings": 64,
            }
        },
        "data": {
            "source": str(folder / "texts/*.txt"),
            "document": "paragraph",
            "tokenizer": str(folder / "tokenizer"),
            "clients": {"by": "natural"},
            "held_out": 0.0,
        },
        "batch": {"sequences": 2, "sequence_tokens": 32},
        "train": {"steps": 2, "output": str(folder / "one")},
        "sync": {"name": "federated", "clients_per_round": 2, "local_steps": 2},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "precision": "fp32",
        "track": {"display": "none", "tensorboard": False},
    }
    for key, value in sections.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / name
    path.write_text(yaml.safe_dump(tree))
    return path


def alone(config: Path) -> Result:
    """The run as one process plays it."""
    place = Coordinates.of(0, replicas=1, ranks=1, local_rank=0, local_ranks=1)
    return run_rank(read(config), place, None, say=lambda _: None)


def server_overrides(folder: Path) -> list[str]:
    """What the server's config has otherwise."""
    return [f"data.source={folder}/public/*.txt", "data.held_out=0.2", f"train.output={folder}/server"]


def client_overrides(folder: Path, client: int) -> list[str]:
    """What a client's config has otherwise."""
    return [f"data.source={folder}/texts/{client}.txt", f"train.output={folder}/client-{client}"]


class Site:
    """A server and clients as threads of this process, over TCP and TLS.

    Their models are built one after the other: transformers sets what is global meanwhile.
    """

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self._config, self.at = folder, config, free_address()
        self.said: dict[str, list[str]] = {}
        self.errors: dict[str, Exception] = {}
        self._threads: list[threading.Thread] = []
        self._stop = StopRequest()

    def client(self, number: int) -> None:
        """Start a client."""
        config = read(self._config, client_overrides(self.folder, number))
        # Tokenised before there are threads.
        whole = config.model_copy(update={"data": config.data.model_copy(update={"held_out": 0.0})})
        prepare_data(whole, resolve_model(whole), say=lambda _: None)
        keys = self.folder / "keys" / f"site-{number}"

        def run() -> Visited:
            return visit(config, self.at, keys, patience_s=60.0, say=self._saying(f"client {number}"))

        self._start(f"client {number}", run)
        self._wait_for(f"client {number}", "rows to learn from")

    def beside(self, run: Any) -> None:
        """Something else, once the server listens."""

        def after() -> None:
            self._wait_for("server", "listening")
            run()

        self._start("beside", after)

    def serve(self, **other: Any) -> Result:
        """Run the server to its end."""
        config = read(self._config, server_overrides(self.folder))
        other = {"deadline_s": None, "linger_s": 0.5, "stop": self._stop, **other}
        result = serve(config, self.at, self.folder / "keys/server", say=self._saying("server"), **other)
        assert not self.errors, self.errors
        return result

    def join(self) -> None:
        """Wait for the clients."""
        for thread in list(self._threads):
            thread.join(60.0)
            assert not thread.is_alive()

    def _start(self, name: str, run: Any) -> None:
        def guarded() -> None:
            try:
                run()
            except Exception as error:
                self.errors[name] = error
                self._stop.asked = True  # the server would wait for it

        thread = threading.Thread(target=guarded, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _wait_for(self, name: str, words: str) -> None:
        deadline = time.monotonic() + 60.0
        while not any(words in line for line in self.said.get(name, [])):
            assert time.monotonic() < deadline and not self.errors, (name, words, self.errors)
            time.sleep(0.005)

    def _saying(self, name: str) -> Any:
        return self.said.setdefault(name, []).append


def weights(run: Path) -> dict[str, Tensor]:
    """Of a run's export."""
    return load_file(run / "export" / "model.safetensors")


def run_site(folder: Path, config: Path, clients: Sequence[int], **other: Any) -> Site:
    """A whole run with some clients."""
    site = Site(folder, config)
    for client in clients:
        site.client(client)
    assert site.serve(**other).is_done
    site.join()
    return site


def free_address() -> str:
    """A port of this machine at which nobody listens."""
    with socket.create_server(("localhost", 0)) as taken:
        return f"localhost:{taken.getsockname()[1]}"
