"""One contender of ``throughput.py``: trains the bench model in this process for some steps and writes down times.

Started anew for every measurement, by itself or as a rank of torchrun. All contenders start from the same weights, read
the same token file, and run the same optimizer; each is timed by the same clock, which ticks after every step.
"""

import argparse
import importlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SEED = 0
LEARNING_RATE = 3.0e-4
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
TOKENS = 4096
"""Of a step."""
DATA: dict[str, Any] = {"source": "python-docs"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is trained; the default is the bench model, of 17 M parameters."""

    model: str = "llama-17m"
    """A preset of paceline."""
    sequence_tokens: int = 512

    @property
    def sequences(self) -> int:
        """Of a step."""
        return TOKENS // self.sequence_tokens


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a contender runs."""

    program: str
    """``paceline``, ``trainer`` (transformers.Trainer) or ``loop`` (a loop as people write it by hand)."""
    bf16: bool = True
    compiled: bool = False
    recompute: str = "none"
    """Of paceline: what of the activations is computed again."""
    processes: int = 1
    micro_batches: int = 1
    """Of a step, on each process."""

    @property
    def is_ours(self) -> bool:
        """Whether this is paceline and not a peer."""
        return self.program == "paceline"


SETTINGS: dict[str, Setting] = {
    "paceline": Setting(program="paceline"),
    "paceline-compiled": Setting(program="paceline", compiled=True),
    "paceline-selective": Setting(program="paceline", compiled=True, recompute="selective"),
    "paceline-micro": Setting(program="paceline", compiled=True, micro_batches=2),
    "paceline-2p": Setting(program="paceline", processes=2),
    "paceline-2p-compiled": Setting(program="paceline", processes=2, compiled=True),
    "trainer-fp32": Setting(program="trainer", bf16=False),
    "trainer": Setting(program="trainer"),
    "trainer-compiled": Setting(program="trainer", compiled=True),
    "trainer-micro": Setting(program="trainer", compiled=True, micro_batches=2),
    "trainer-2p": Setting(program="trainer", processes=2),
    "trainer-2p-compiled": Setting(program="trainer", processes=2, compiled=True),
    "loop": Setting(program="loop"),
    "loop-compiled": Setting(program="loop", compiled=True),
    "loop-micro": Setting(program="loop", compiled=True, micro_batches=2),
}


def config(output: str, *, steps: int, setting: Setting, point: Point) -> dict[str, Any]:
    """The paceline config of the bench; the peers take model and data from it."""
    return {
        "model": {"preset": point.model},
        "data": DATA,
        "batch": {
            "sequences": point.sequences,
            "sequence_tokens": point.sequence_tokens,
            "micro": rows(setting, point),
        },
        "optimizer": {"name": "adamw", "lr": LEARNING_RATE, "betas": BETAS, "weight_decay": WEIGHT_DECAY},
        "schedule": "constant",
        "precision": "bf16" if setting.bf16 else "fp32",
        "layout": {"recompute": setting.recompute},
        "replicas": setting.processes,
        "train": {"steps": steps, "output": output, "clip_norm": CLIP_NORM, "compile": setting.compiled},
        "track": {"display": "none", "tensorboard": False},
        "seed": SEED,
    }


def rows(setting: Setting, point: Point) -> int:
    """Sequences of one forward pass."""
    return max(1, point.sequences // setting.processes // setting.micro_batches)


class Clock:
    """Remembers when each step ended, and how much memory the process had before the first."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        self._before_bytes = _status_bytes("VmRSS")

    def tick(self) -> None:
        """A step has ended."""
        self.ends.append(time.perf_counter())

    def peak_bytes(self) -> int:
        """The most resident memory since the clock was made, above what there was then."""
        return _status_bytes("VmHWM") - self._before_bytes


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def run_paceline(setting: Setting, point: Point, steps: int, output: Path) -> tuple[Clock, float]:
    """Through the library's own Trainer, with its defaults."""
    import paceline

    import_all("paceline.train.records", "torch.distributed.tensor", compiled=setting.compiled)
    clock = Clock()
    losses = []
    # One step more than is taken: the checkpoint at the end of a run is no part of a step, and no peer writes one.
    settings = config(str(output), steps=steps + 1, setting=setting, point=point)
    with paceline.Trainer(settings, say=lambda _: None) as trainer:
        for event in trainer.steps():
            clock.tick()
            losses.append(event.loss)
            if event.step == steps:
                break
        return clock, sum(losses) / steps


def run_trainer(setting: Setting, point: Point, steps: int, output: Path) -> tuple[Clock, float]:
    """transformers.Trainer, without logging, evaluation or saving."""
    import transformers

    import_all("accelerate", compiled=setting.compiled)

    class Tick(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    dataset, model = rows_and_model(point)
    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=rows(setting, point),
        gradient_accumulation_steps=setting.micro_batches,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP_NORM,
        optim="adamw_torch_fused",
        bf16=setting.bf16,
        torch_compile=setting.compiled,
        ddp_backend="gloo" if setting.processes > 1 else None,
        use_cpu=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=SEED,
    )
    clock = Clock()
    trainer = transformers.Trainer(model=model(), args=arguments, train_dataset=dataset, callbacks=[Tick()])
    return clock, trainer.train().training_loss


def run_loop(setting: Setting, point: Point, steps: int, output: Path) -> tuple[Clock, float]:
    """Mixed precision as torch's documentation shows it: fp32 weights under autocast."""
    dataset, model_of = rows_and_model(point)
    import_all(compiled=setting.compiled)
    clock = Clock()
    model = model_of()
    forward: Callable[..., Any] = torch.compile(model) if setting.compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    generator = torch.Generator().manual_seed(SEED)
    loader = torch.utils.data.DataLoader(dataset, batch_size=point.sequences, shuffle=True, generator=generator)
    total = 0.0
    for _, batch in zip(range(steps), loader, strict=False):
        for ids in batch["input_ids"].split(rows(setting, point)):
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.bf16):
                loss = forward(input_ids=ids, labels=ids).loss / setting.micro_batches
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
    return clock, total / steps


def import_all(*modules: str, compiled: bool) -> None:
    """Import what a contender would import later, so that its memory does not count as the step's."""
    for module in (*modules, "transformers.models.llama.modeling_llama", *(["torch._inductor.compile_fx"] * compiled)):
        importlib.import_module(module)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The tokens of the cache in rows of a sequence."""

    def __init__(self, tokens: Any, sequence_tokens: int) -> None:
        self._tokens = tokens
        self._length = sequence_tokens

    def __len__(self) -> int:
        return len(self._tokens) // self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.from_numpy(self._tokens[index * self._length :][: self._length].astype("int64"))
        return {"input_ids": row, "labels": row}


def rows_and_model(point: Point) -> tuple[Rows, Callable[[], Any]]:
    """What the peers train on: paceline's token file, and its model with the weights it starts from."""
    from paceline.config import Config
    from paceline.train.assemble import prepare_data, resolve_model

    parsed = Config.parse(config("unused", steps=1, setting=SETTINGS["trainer"], point=point))
    source = resolve_model(parsed)
    assert source is not None
    prepared = prepare_data(parsed, source, say=lambda _: None)

    def model() -> Any:
        built: Any = source.build(SEED)
        built.config.use_cache = False
        return built

    return Rows(prepared.train[0].tokens, point.sequence_tokens), model


def probe(point: Point) -> None:
    """Prepare the data and print what the model's speed is compared with, as JSON."""
    from paceline.comm.device import claim, matmul_flops_per_s
    from paceline.comm.ranks import ALONE
    from paceline.train.assemble import model_sizes

    _, model = rows_and_model(point)
    peak = matmul_flops_per_s(claim(ALONE), torch.bfloat16, seconds=2.0)
    built = model()
    flops = model_sizes(built, built.config.vocab_size).flops_per_token(point.sequence_tokens)
    print(json.dumps({"flops_per_token": flops, "peak_flops_per_s": peak}))


PROGRAMS = {"paceline": run_paceline, "trainer": run_trainer, "loop": run_loop}


def main() -> None:
    """Run one setting and leave ``rank-R.json`` in the folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("setting", choices=[*SETTINGS, "probe"])
    parser.add_argument("steps", type=int, nargs="?")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--model", default=Point.model)
    parser.add_argument("--sequence-tokens", type=int, default=Point.sequence_tokens)
    arguments = parser.parse_args()
    point = Point(model=arguments.model, sequence_tokens=arguments.sequence_tokens)
    if arguments.setting == "probe":
        return probe(point)
    setting = SETTINGS[arguments.setting]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    clock, loss = PROGRAMS[setting.program](setting, point, arguments.steps, arguments.folder / "run")
    result = {"ends": clock.ends, "peak_bytes": clock.peak_bytes(), "loss": loss}
    (arguments.folder / f"rank-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
