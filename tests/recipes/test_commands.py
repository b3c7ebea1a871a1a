import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from commands import paceline, tiny_config, write_texts
from paceline.config import read
from paceline.registry import SYNC_CHOICES
from paceline.serve.generate import generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run in it."""
    made = tmp_path_factory.mktemp("commands")
    write_texts(made)
    assert paceline(made, "train", str(tiny_config(made))).status == 0
    return made


def test_init_writes_a_config_that_can_be_planned(folder):
    assert paceline(folder, "init", "new.yaml", "--json").json() == {"path": "new.yaml"}
    text = (folder / "new.yaml").read_text()
    assert read(folder / "new.yaml").replicas == 2
    assert all("#" in line for line in text.splitlines() if line.startswith(("model", "data", "batch", "replicas")))
    ended = paceline(folder, "train", "new.yaml", "--dry-run")
    assert ended.status == 0 and "2 rank(s)" in ended.out


def test_schema_describes_every_key_and_strategy(folder):
    whole = json.loads(paceline(folder, "schema").out)
    assert json.loads(paceline(folder, "schema", "--json").out.splitlines()[-1]) == whole
    assert whole["properties"]["sync"]["anyOf"][0] == {"enum": list(SYNC_CHOICES)}
    assert whole["properties"]["sync"]["anyOf"][-1]["type"] == "array", "levels"
    batch = whole["$defs"]["BatchConfig"]["properties"]
    assert batch["sequences"]["exclusiveMinimum"] == 0 and batch["sequences"]["description"]


def test_generate_streams_and_repeats_itself_for_a_seed(folder):
    one = paceline(folder, "generate", "run", "The oak", "--tokens", "8", "--json")
    assert one.status == 0, one
    assert one.json()["prompt"] == "The oak"
    again = paceline(folder, "generate", "run", "The oak", "--tokens", "8")
    assert again.out.strip("\n") == one.json()["text"].strip("\n")
    greedy = [paceline(folder, "generate", "run/export", "The", "--temperature", "0", "--seed", s).out for s in "12"]
    assert greedy[0] == greedy[1]


def test_generate_refuses_what_does_not_write(folder):
    bert = {"model_type": "bert", "vocab_size": 400, "hidden_size": 16, "intermediate_size": 32}
    bert |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    config = tiny_config(folder, objective="masked", train={"output": "bert"})
    ended = paceline(folder, "train", str(config), f"model={json.dumps({'config': bert})}")
    assert ended.status == 0, ended
    ended = paceline(folder, "generate", "bert", "The")
    assert ended.status == 1 and "does not continue text" in ended.err and "Traceback" not in ended.err


def test_generate_refuses_a_model_that_writes_backward(folder):
    config = str(tiny_config(folder, objective="right_to_left", train={"steps": 1, "output": "backward"}))
    assert paceline(folder, "train", config).status == 0
    for place in ("backward", "backward/export"):
        ended = paceline(folder, "generate", place, "The")
        assert ended.status == 1 and "writes from right to left" in ended.err


def test_report_is_written_again(folder):
    (folder / "run" / "report.html").unlink()
    assert paceline(folder, "report", "run", "--json").json() == {"path": "run/report.html"}
    assert (folder / "run" / "report.html").read_text().startswith("<!doctype html>")


def test_version_and_help(folder):
    assert paceline(folder, "--version").out.startswith("paceline 0.")
    help_text = paceline(folder, "--help").out
    commands = ("train", "lr-range", "noise-scale", "seeds", "demo", "init", "schema", "report", "generate")
    assert all(f"  {name} " in help_text for name in commands)
    assert paceline(folder, "trian").status == 2


def test_debug_shows_the_traceback(folder):
    config = str(tiny_config(folder, train={"output": "debug"}))
    plain = paceline(folder, "train", config, "optimizer={name: sgd, lr: 1.0e+30}")
    full = paceline(folder, "train", config, "optimizer={name: sgd, lr: 1.0e+30}", "--debug")
    assert "Traceback" not in plain.err and "Traceback" in full.err


@pytest.mark.parametrize("words", [("init", "there.yaml"), ("report", "texts"), ("generate", "texts", "x")])
def test_every_command_takes_debug(folder, words):
    (folder / "there.yaml").write_text("")
    assert "Traceback" in paceline(folder, *words, "--debug").err
    assert "Traceback" not in paceline(folder, *words).err


def test_the_demo_from_end_to_end(folder):
    small = [
        "train.steps=3",
        "batch={sequences: 2, sequence_tokens: 64}",
        "evaluate.sample_tokens=4",
        "checkpoint.every=0",
    ]
    ended = paceline(folder, "demo", "--output", "demo", "--json", *small)
    assert ended.status == 0, ended
    summary = ended.json()
    assert 1.0 < summary["ngram_bits_per_byte"] < summary["gzip_bits_per_byte"] < summary["bits_per_byte"]
    assert "order-5 byte n-gram" in ended.out and (folder / "demo" / "export" / "config.json").exists()
    assert "gzip -9" in (folder / "demo" / "report.html").read_text()
    again = paceline(folder, "demo", "--output", "demo", *small)
    assert again.status == 1 and "complete already" in again.err


def test_a_failed_command_ends_with_json_too(folder):
    ended = paceline(folder, "report", "nowhere", "--json")
    assert ended.status == 1 and ended.json() == {"error": ended.err.strip()}
    assert paceline(folder, "report", "nowhere").out == ""


def test_generate_says_in_one_line_what_it_cannot_use(folder):
    shutil.copytree(folder / "run" / "export", folder / "damaged")
    (folder / "damaged" / "model.safetensors").write_bytes(b"cut")
    shutil.copytree(folder / "run" / "export", folder / "mute")
    (folder / "mute" / "tokenizer.json").unlink()
    for place, prompt, expected in (
        ("damaged", "The", "ModelError: damaged cannot be loaded"),
        ("mute", "The", "ModelError: mute cannot be loaded"),
        ("run", "\udcff", "ConfigError: the prompt is not valid UTF-8"),
    ):
        ended = paceline(folder, "generate", place, prompt)
        assert ended.status and ended.err.startswith(expected) and len(ended.err.splitlines()) == 1, ended


def test_generation_ends_when_its_reader_leaves(folder):
    pieces = generate(folder / "run", "The", tokens=40, temperature=1.0, seed=0)
    next(pieces)
    pieces.close()
    assert not [thread for thread in threading.enumerate() if "run" in thread.name]


def test_closed_streams_are_not_taken_by_files():
    program = "import os, paceline.cli as c; c._open_closed_streams(); os._exit(os.dup(2))"
    ended = subprocess.run(["sh", "-c", f"exec {sys.executable} -c '{program}' <&- >&-"], check=False)
    assert ended.returncode > 2
