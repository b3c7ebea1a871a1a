"""What a user on a bad day sees: one line that says what is wrong, an exit status that is not 0, and no traceback."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import paceline, tiny_config, write_texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_texts(tmp_path)
    return tmp_path


def refused(folder: Path, *arguments: str, status: int | None = None) -> str:
    """Run a command that must fail properly; returns its one line."""
    ended = paceline(folder, *arguments)
    assert ended.status not in (0, None) and (status is None or ended.status == status), ended
    assert "Traceback" not in ended.err + ended.out and "internal error" not in ended.err, ended
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended
    return lines[0]


LAYER_DROP = (
    "{model_type: opt, vocab_size: 400, hidden_size: 16, word_embed_proj_dim: 16, ffn_dim: 32, num_hidden_layers: 2, "
    "num_attention_heads: 2, max_position_embeddings: 64, layerdrop: 0.5}"
)
OVERRIDES = {
    "unknown key": (["batch.sequenses=8"], "batch.sequenses: unknown key, did you mean 'sequences'?"),
    "unknown section": (["modle.preset=llama-1m"], "modle: unknown key, did you mean 'model'?"),
    "unknown option": (["optimizer.learning_rate=1"], "optimizer.learning_rate: unknown key"),
    "wrong type": (["batch.sequences=many"], "batch.sequences='many': expected"),
    "truth value for a number": (["replicas=true"], "replicas=True: expected a number"),
    "negative": (["batch.sequences=-4"], "batch.sequences=-4: expected greater than 0"),
    "zero": (["train.steps=0"], "train.steps=0: expected greater than 0"),
    "not a number": (["optimizer.lr=.nan"], "optimizer.lr=nan: expected"),
    "heads that do not divide": (["model.config.num_attention_heads=3"], "num_attention_heads"),
    "typo in the model": (["model.config.hiden_size=64"], "hiden_size"),
    "unknown family": (["model.config.model_type=lama"], "did you mean 'llama'"),
    "no family": (["model={config: {hidden_size: 8}}"], "model_type"),
    "two models": (["model.preset=llama-1m"], "exactly one of config, preset, path; got config, preset"),
    "unknown preset": (["model={preset: llama-2m}"], "model.preset='llama-2m'"),
    "no such model folder": (["model={path: ./nowhere}"], "nowhere"),
    "a head the family does not have": (["objective=masked"], "llama"),
    "unknown strategy": (["sync=all_redude"], "sync='all_redude': unknown name, did you mean 'all_reduce'?"),
    "unknown optimizer": (["optimizer={name: adamm}"], "did you mean 'adamw'?"),
    "fewer sequences than ranks": (["replicas=5"], "batch.sequences=4 is fewer than the 5 data-parallel ranks"),
    "micro-batch above the share": (["batch.micro=9"], "batch.micro=9 is more than a rank's share of 4"),
    "a layout that is not built": (["layout.expert=2"], "layout.expert=2"),
    "more tensor ranks than heads": (["layout.tensor=4"], "tensor="),
    "an optimizer that looks at the loss": (
        ["layout.shard=2", "optimizer={name: lbfgs}", "train.clip_norm=null"],
        "layout.shard=2: optimizer=lbfgs looks at the loss of the whole model",
    ),
    "a penalty that bf16 would round away": (
        ["precision=bf16_pure", "regularisation.l1=0.1"],
        "regularisation.l1=0.1: its pull is mostly smaller than precision=bf16_pure can tell",
    ),
    "mixup of isolated documents": (
        ["objective={name: next_token, mixup: 0.2}", "data.isolate_documents=true"],
        "data.isolate_documents=true does not go with objective.mixup",
    ),
    "an optimizer of the loss, and replicas that learn alone": (
        ["replicas=2", "optimizer={name: lbfgs}", "sync=diloco"],
        "sync=diloco: optimizer=lbfgs compares losses of the same batch",
    ),
    "more stages than blocks": (["layout.pipeline=4", "batch.micro=1"], "Use"),
    "dropout where blocks are compiled": (
        ["train.compile=true", "model.config.attention_dropout=0.1"],
        "train.compile=true with dropout (in model.layers.0.self_attn) is not built",
    ),
    "chance that ranks would not share": (
        ["layout.tensor=2", f"model={{config: {LAYER_DROP}}}"],
        "layout.tensor=2: model.decoder draws random numbers",
    ),
    "more tokens than positions": (["batch.sequence_tokens=65"], "65 is more than the model's 64 positions"),
    "override without a value": (["train.steps"], "expected key.path=value"),
    "missing data": (["data.source=nowhere.txt"], "nowhere.txt"),
    "glob that matches nothing": (["data.source=texts/*.md"], "texts/*.md"),
    "unknown step to resume": (["checkpoint.resume=7"], "no checkpoint of step 7"),
    "vocabulary too small": (["model.config.vocab_size=100"], "100"),
    "too little text": (
        ["batch.sequence_tokens=64", "data.source=short.txt"],
        "fewer than the 65 that one sequence takes",
    ),
    "empty data": (["data.source=empty.txt"], "empty.txt"),
    "no data named": (["data.source=''"], "source is an empty text"),
    "binary data": (["data.source=binary.txt"], "binary.txt"),
    "no such column": (["data={source: rows.jsonl, field: body}"], "body"),
    "not a table": (["data={source: texts, document: row}"], "row"),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_bad_values(folder, name):
    (folder / "short.txt").write_text("A few words are not enough.\n")
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 20)
    (folder / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    overrides, expected = OVERRIDES[name]
    assert expected in refused(folder, "train", str(tiny_config(folder)), *overrides)


def test_every_problem_is_told_at_once(folder):
    config = tiny_config(folder, batch={"sequences": -1}, replicas="two", sync="gosip")
    ended = paceline(folder, "train", str(config))
    assert ended.status == 2
    assert all(part in ended.err for part in ("batch.sequences=-1", "replicas='two'", "sync='gosip'"))
    assert len(ended.err.splitlines()) == 3


CONFIG_TEXTS = {
    "not YAML": ("model: [", "not valid YAML"),
    "a key twice": ("replicas: 1\nreplicas: 2\n", "line 2, column 1: key 'replicas' stands twice"),
    "no map": ("- model\n", "expected `key: value` lines"),
    "missing sections": ("replicas: 2\n", "data is missing"),
}


@pytest.mark.parametrize("name", CONFIG_TEXTS)
def test_bad_config_files(folder, name):
    text, expected = CONFIG_TEXTS[name]
    (folder / "bad.yaml").write_text(text)
    ended = paceline(folder, "train", "bad.yaml")
    assert ended.status == 2 and expected in ended.err and "Traceback" not in ended.err


def test_missing_config_says_how_to_get_one(folder):
    assert "`paceline init none.yaml` writes one" in refused(folder, "train", "none.yaml")


def test_tokenizer_and_model_that_disagree(folder):
    config = str(tiny_config(folder))
    assert paceline(folder, "train", config, "train.output=big").status == 0
    line = refused(folder, "train", config, "data.tokenizer=big/export", "model.config.vocab_size=300")
    assert "entries but the model's vocabulary is 300" in line


def trained(folder: Path) -> Path:
    assert paceline(folder, "train", str(tiny_config(folder, checkpoint={"every": 3}))).status == 0
    return folder / "run" / "checkpoints" / "step-00000006"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "corrupt shard": ("rank-00000.safetensors", flip),
    "cut shard": ("rank-00000.safetensors", cut),
    "missing shard": ("rank-00000.safetensors", Path.unlink),
    "cut manifest": ("manifest.json", cut),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_a_way_out(folder, name):
    file, damage = DAMAGES[name]
    damage(trained(folder) / file)
    config = tiny_config(folder, train={"steps": 8})
    line = refused(folder, "train", str(config))
    assert file in line and "checkpoint.resume=3" in line
    assert paceline(folder, "train", str(config), "checkpoint.resume=3").status == 0, "the way out works"


def test_another_run_in_the_folder_is_not_continued(folder):
    trained(folder)
    config = tiny_config(folder, train={"steps": 8})
    assert "seed=0" in refused(folder, "train", str(config), "seed=1")
    assert "optimizer='adamw'" in refused(folder, "train", str(config), "optimizer={name: sgd}")
    assert "batch.sequence_tokens=32" in refused(folder, "train", str(config), "batch.sequence_tokens=16")
    weights = "data.source=[{source: texts/*.txt, weight: 2}]"
    assert "weights of data.source=[1.0], this config has [2.0]" in refused(folder, "train", str(config), weights)
    assert "choose another" in refused(folder, "train", str(config), "checkpoint.resume=never")
    assert "model/" in refused(folder, "train", str(config), "model.config.hidden_size=32")


def test_unwritable_output(folder):
    (folder / "file").write_text("")
    line = refused(folder, "train", str(tiny_config(folder)), "train.output=file/run")
    assert "train.output='file/run' cannot be written: Not a directory" in line


def test_a_launcher_that_fails_leaves_no_rank_running(folder):
    """The ranks would go on for hours, and the launcher wait for them."""
    (folder / "run" / "processes.json").mkdir(parents=True)
    line = refused(folder, "train", str(tiny_config(folder, train={"steps": 1_000_000}, replicas=2)))
    assert "processes.json cannot be written: Is a directory" in line


def test_full_disk(folder):
    """/dev/full answers every write as a full disk does."""
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").symlink_to("/dev/full")
    line = refused(folder, "train", str(tiny_config(folder)))
    assert "metrics.jsonl cannot be written: No space left on device" in line


def test_port_in_use(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(folder, "train", str(tiny_config(folder, replicas=2)), f"train.port={port}")
    assert f"train.port={port} cannot be opened" in line and "0 for a free one" in line


def test_commands_on_what_is_no_run(folder):
    assert "holds no trained model" in refused(folder, "generate", "texts", "x")
    assert "texts" in refused(folder, "report", "texts")
    (folder / "there.yaml").write_text("")
    assert "is there already" in refused(folder, "init", "there.yaml")


def test_a_prompt_must_say_something_and_fit(folder):
    trained(folder)
    assert "the prompt is empty" in refused(folder, "generate", "run", "")
    assert "the model has 64 positions" in refused(folder, "generate", "run", "oak", "--tokens", "100")
