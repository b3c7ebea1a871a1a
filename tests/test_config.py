import json
from pathlib import Path

import pytest
import yaml

from paceline import registry
from paceline.config import STRATEGIES, Config, Options, choose, override, read, read_tree, schema, strategy_name
from paceline.errors import ConfigError

LEAST = {"model": {"preset": "llama-1m"}, "data": {"source": "texts"}, "train": {"steps": 3}}


def problems(tree: dict[str, object]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        Config.parse(tree)
    return caught.value.problems


def test_the_least_config_has_a_default_for_everything_else():
    config = Config.parse(LEAST)
    assert strategy_name(config.objective) == "next_token"
    assert strategy_name(config.optimizer) == "adamw"
    assert strategy_name(config.schedule) == "cosine"
    assert strategy_name(config.sync) == "all_reduce"
    assert config.checkpoint.resume == "auto" and config.replicas == 1 and config.layout.recompute == "none"


def test_a_resolved_config_is_a_config():
    config = Config.parse({**LEAST, "optimizer": {"name": "sgd", "lr": 0.5}, "data": {"source": ["a", "b"]}})
    assert Config.parse(config.tree()) == config
    assert Config.parse(yaml.safe_load(yaml.safe_dump(config.tree()))) == config


def test_spellings_of_the_readme(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {config: {model_type: llama, hidden_size: 64, num_hidden_layers: 4}}\n"
        "data: {source: texts/*.jsonl}\n"
        "batch: {sequences: 8, sequence_tokens: 512}\n"
        "train: {steps: 300, output: runs/first}\n"
        "replicas: 2\n"
        "sync: all_reduce\n"
        "layout: {}\n"
        "optimizer: {name: adamw, lr: 3.0e-4}\n"
        "precision: auto\n"
        "checkpoint: {every: 100, resume: auto}\n"
    )
    config = read(path, ["optimizer.lr=1e-3", "sync.bucket_mib=2"])
    assert config.optimizer.lr == 1e-3  # YAML reads 1e-3 as text; it is a number all the same
    assert config.sync.bucket_mib == 2


def test_problems_are_told_with_path_value_and_expectation():
    told = problems({**LEAST, "batch": {"sequences": 0, "sequence_token": 5}, "optimizer": {"lr": 1}, "replicas": 1.5})
    assert "batch.sequences=0: expected greater than 0" in told
    assert "batch.sequence_token: unknown key, did you mean 'sequence_tokens'?" in told
    assert any(line.startswith("optimizer={'lr': 1}: expected a name") for line in told)
    assert any(line.startswith("replicas=1.5: expected a valid integer") for line in told)


def test_sources_are_a_weighted_list():
    config = Config.parse({**LEAST, "data": {"source": ["a", {"source": "b", "weight": 0.5}]}})
    assert [(s.source, s.weight) for s in config.data.sources] == [("a", 1.0), ("b", 0.5)]
    assert any("weight=-1" in line for line in problems({**LEAST, "data": {"source": [{"source": "b", "weight": -1}]}}))
    assert any("empty list" in line for line in problems({**LEAST, "data": {"source": []}}))


def test_overrides_reach_into_strategies_and_leave_the_tree_alone():
    tree = {"sync": "all_reduce", "train": {"steps": 3}}
    changed = override(tree, ["sync.bucket_mib=2", "train.output=x", "data.source=[a, b]", "model.config.vocab_size=7"])
    assert changed["sync"] == {"name": "all_reduce", "bucket_mib": 2}
    assert changed["train"] == {"steps": 3, "output": "x"}
    assert changed["data"]["source"] == ["a", "b"] and changed["model"]["config"]["vocab_size"] == 7
    assert tree == {"sync": "all_reduce", "train": {"steps": 3}}


def test_overrides_reach_into_a_strategy_that_is_left_to_its_default():
    config = Config.parse(override(LEAST, ["optimizer.lr=0.5", "sync.bucket_mib=2"]))
    assert strategy_name(config.optimizer) == "adamw" and config.optimizer.lr == 0.5
    assert strategy_name(config.sync) == "all_reduce" and config.sync.bucket_mib == 2


@pytest.mark.parametrize("key", ["data.field", "data.tokenizer", "data.cache", "train.output"])
def test_empty_texts_are_refused(key):
    assert problems(override(LEAST, [f'{key}=""'])) == (f"{key}='': expected at least 1 character",)


@pytest.mark.parametrize("source", ["''", "[a.txt, '']", "[{source: ''}]"])
def test_an_empty_source_is_refused(source):
    (problem,) = problems(override(LEAST, [f"data.source={source}"]))
    assert "source is an empty text" in problem


@pytest.mark.parametrize("text", ["=3", "a..b=1", "steps"])
def test_malformed_overrides(text):
    with pytest.raises(ConfigError, match=r"expected key\.path=value"):
        override({}, [text])


NEEDED = {"auto": {"link": "1gbit/1ms"}}
"""Options without which a strategy is none."""


@pytest.mark.parametrize("kind", STRATEGIES)
def test_every_strategy_of_every_table(kind):
    """Conformance: whatever a table names can be loaded, frozen, chosen by name, described, and read back."""
    table, default = STRATEGIES[kind]
    assert default in table
    definitions = schema()["properties"][kind]["anyOf"]
    for name in table:
        options_class = table.load(name)
        assert issubclass(options_class, Options) and options_class.model_config["frozen"]
        assert options_class.__doc__, f"{name} says what it is"
        assert any(callable(getattr(options_class, does, None)) for does in ("build", "factor", "weight", "candidates"))
        options = choose(table, {"name": name, **NEEDED.get(name, {})})
        assert strategy_name(options) == name and choose(table, {"name": name, **options.model_dump()}) == options
        assert any(form.get("properties", {}).get("name") == {"const": name} for form in definitions)
        with pytest.raises(ConfigError, match="no_such_option: unknown key"):
            choose(table, {"name": name, "no_such_option": 1})


def test_unknown_names_offer_the_nearest():
    assert registry.unknown("cosin", ["cosine", "linear"]) == "unknown name, did you mean 'cosine'?"
    assert registry.unknown("xyz", ["cosine", "linear"]) == "unknown name, known: cosine, linear."


def test_schema_is_json_and_closed():
    document = json.loads(json.dumps(schema()))
    assert document["additionalProperties"] is False
    assert set(document["required"]) == {"data", "train"}
    keys = "model data objective optimizer schedule precision reduction loss_scale batch layout replicas sync train"
    keys += " average perturb spikes early_stop regularisation"
    assert list(document["properties"]) == [*keys.split(), "checkpoint", "evaluate", "track", "seed"]


def test_a_file_that_is_no_config(tmp_path: Path):
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not text"):
        read_tree(tmp_path / "b")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_tree(tmp_path)
