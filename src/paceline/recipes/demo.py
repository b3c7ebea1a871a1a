"""``paceline demo``: the whole of a run on text that every machine with Python has."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from paceline.config import Config, override
from paceline.data.tokens import TokenSet
from paceline.errors import DataError
from paceline.evaluate.baselines import gzip_bits_per_byte, ngram_bits_per_byte
from paceline.recipes.train import Result
from paceline.recipes.train import run as train
from paceline.track.report import write_report
from paceline.train.assemble import prepare_data, resolve_model
from paceline.train.records import write_text

PROMPT = "def read_lines(path):\n"

CONFIG: dict[str, Any] = {
    "model": {
        "config": {
            "model_type": "llama",
            "vocab_size": 4096,
            "hidden_size": 128,
            "intermediate_size": 288,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        }
    },
    "data": {"source": "python-docs"},
    "optimizer": {"name": "muon", "lr": 8.0e-3},
    "schedule": {"name": "linear", "warmup_steps": 50, "final": 0.0},
    "batch": {"sequences": 8, "sequence_tokens": 256},
    "replicas": 2,
    "sync": "all_reduce",
    "train": {"steps": 800},
    "checkpoint": {"every": 400},
    "evaluate": {"every": 200, "sequences": 128, "prompts": [PROMPT], "sample_tokens": 64},
}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the demo came to, beside what needs no training of this kind."""

    run: Result
    gzip_bits_per_byte: float
    ngram_bits_per_byte: float
    sample: str
    seconds: float

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            **asdict(self),
            "bits_per_byte": self.run.bits_per_byte,
            "baselines": {"gzip -9": self.gzip_bits_per_byte, "order-5 byte n-gram": self.ngram_bits_per_byte},
        }

    def text(self) -> str:
        """For a person."""
        assert self.run.bits_per_byte is not None
        rows = [
            ("this model", self.run.bits_per_byte),
            ("order-5 byte n-gram, all training text", self.ngram_bits_per_byte),
            ("gzip -9", self.gzip_bits_per_byte),
        ]
        rows.sort(key=lambda row: row[1])
        table = "\n".join(f"  {bits:5.2f}  {name}" for name, bits in rows)
        sample = "\n".join(f"  | {line}" for line in (PROMPT + self.sample).splitlines())
        return f"""
held-out bits per byte (lower is better):
{table}

what it writes after {PROMPT.strip()!r}:
{sample}

{self.seconds:.0f} s in all, {self.run.first_loss_s:.1f} s to the first loss. In {self.run.output}:
  report.html     pictures and the config        checkpoints/  to continue from
  metrics.jsonl   one line a step                export/       a Hugging Face folder
next:
  paceline generate {self.run.output} "import "
  paceline init my.yaml && paceline train my.yaml --dry-run"""


def demo(output: Path, overrides: Sequence[str] = (), *, debug: bool = False) -> Summary:
    """Train, measure and sample; raises what training raises."""
    start = time.perf_counter()
    tree = {**CONFIG, "train": {**CONFIG["train"], "output": str(output)}}
    config = Config.parse(override(tree, overrides))
    run = train(config, debug=debug)
    if run is None or run.bits_per_byte is None:
        raise DataError(f"{output} was complete already; remove it, or choose another --output, to run the demo again")
    held_out, training = _texts(config)
    summary = Summary(
        run=run,
        gzip_bits_per_byte=gzip_bits_per_byte(held_out),
        ngram_bits_per_byte=ngram_bits_per_byte(training, held_out),
        sample=_sample(output),
        seconds=time.perf_counter() - start,
    )
    write_text(output / "summary.json", json.dumps(summary.values()))
    write_report(output)
    return summary


def _texts(config: Config) -> tuple[bytes, bytes]:
    """The held-out and the training text, as the model saw them: decoded from the tokens."""
    prepared = prepare_data(config, resolve_model(config), say=lambda _: None)
    tokenizer = Tokenizer.from_file(str(prepared.tokenizer / "tokenizer.json"))
    return _decode(tokenizer, prepared.held_out), _decode(tokenizer, prepared.train)


def _decode(tokenizer: Tokenizer, parts: Sequence[TokenSet]) -> bytes:
    documents = [part.document(i)[:-1].tolist() for part in parts for i in range(len(part))]
    return "".join(tokenizer.decode_batch(documents)).encode()


def _sample(output: Path) -> str:
    last = json.loads((output / "evaluations.jsonl").read_text().splitlines()[-1])
    return str(last["samples"][0]["text"])
