"""The trained tokenizer gives text back exactly; a given one is used as transformers uses it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from paceline.data.tokenizer import LoadedTokenizer, check_vocabulary, load, train
from paceline.errors import DataError

TEXTS = [
    Path(__file__).read_text(encoding="utf-8"),
    "def f(x):\n    return x  # it's\n\n",
    "Hello world, the world is the word of 3.14 things.\r\n\t",
    "grüße €😀",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "trained"
    train(TEXTS, 400, ["<mask>", "<extra_id_0>", "<extra_id_1>"], folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> LoadedTokenizer:
    return load(str(folder))


def test_entries_and_special_tokens(trained: LoadedTokenizer) -> None:
    special = trained.special
    assert special.vocabulary == 400 == trained.core.get_vocab_size()
    assert (special.end, special.bos, special.eos, special.pad) == (0, 0, 0, 0)
    assert (special.mask, special.sentinels) == (1, (2, 3))
    assert special.ids() == {"bos": 0, "eos": 0, "pad": 0, "mask": 1, "cls": None, "sep": None, "unk": None}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(st.text(st.characters(codec="utf-8")), st.binary().map(lambda raw: raw.decode("latin-1"))))
def test_any_text_comes_back_exactly(trained: LoadedTokenizer, text: str) -> None:
    ids = trained.core.encode(text, add_special_tokens=False).ids
    assert trained.core.decode(ids, skip_special_tokens=False) == text
    assert trained.count_bytes(np.array(ids, np.uint16)) == len(text.encode())


def test_long_texts_are_counted_block_by_block(trained: LoadedTokenizer) -> None:
    text = "The world is the word of things. " * 10_000
    ids = trained.core.encode(text, add_special_tokens=False).ids
    assert len(ids) > 1 << 16
    assert trained.count_bytes(np.array(ids)) == len(text)


def test_transformers_loads_it_and_agrees(folder: Path, trained: LoadedTokenizer) -> None:
    from transformers import AutoTokenizer

    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))  # as in an export
    theirs = AutoTokenizer.from_pretrained(str(folder))
    (folder / "config.json").unlink()
    text = "".join(TEXTS) + " . , <mask>  "
    assert theirs(text, add_special_tokens=False)["input_ids"] == trained.core.encode(text).ids
    assert theirs.decode(trained.core.encode(text).ids) == text
    assert len(theirs) == trained.special.vocabulary
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id) == (0, 0, 1)


def test_training_needs_no_transformers_and_gives_the_same_in_another_process(folder: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from paceline.data.tokenizer import train
train({TEXTS!r}, 400, ["<mask>", "<extra_id_0>", "<extra_id_1>"], Path({str(tmp_path / "again")!r}))
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_vocabulary_without_room_for_all_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocabulary of 257 entries is too small .* at least 258"):
        train(TEXTS, 257, ["<mask>"], tmp_path / "t")
    assert train(TEXTS, 258, ["<mask>"], tmp_path / "t").special.vocabulary == 258


def words(folder: Path, **config: object) -> Path:
    """A folder with a tokenizer of whole words."""
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "hello": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.enable_truncation(2)
    core.enable_padding(length=8)
    folder.mkdir()
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return folder


def test_the_separator_ends_documents_where_there_is_no_end_of_text(tmp_path: Path) -> None:
    folder = words(tmp_path / "t", sep_token={"content": "[SEP]", "special": True}, cls_token="[CLS]")
    special = load(str(folder)).special
    assert (special.end, special.eos, special.sep, special.cls, special.pad) == (2, None, 2, 1, None)


def test_special_tokens_may_stand_in_a_file_of_their_own(tmp_path: Path) -> None:
    folder = words(tmp_path / "t")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "[SEP]"}')
    assert load(str(folder)).special.eos == 2


def test_truncation_and_padding_are_switched_off(tmp_path: Path) -> None:
    tokenizer = load(str(words(tmp_path / "t", eos_token="[SEP]")))
    assert tokenizer.core.encode("hello hello hello").ids == [3, 3, 3]


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"}), ("config.json", {"model_type": "qwen2"})],
)
def test_where_transformers_decides_how_text_is_split_we_follow(
    tmp_path: Path, file: str, content: dict[str, str]
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "t"
    plain = train(TEXTS, 400, [], folder)
    given = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(given | content))
    found, theirs = load(str(folder)), AutoTokenizer.from_pretrained(str(folder))
    expected = theirs(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert found.core.encode(TEXTS[0], add_special_tokens=False).ids == expected
    assert plain.core.encode(TEXTS[0]).ids != expected, "this text does not tell the two apart"
    assert found.special.eos == plain.special.eos
    assert found.fingerprint != plain.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
        ("tokenizer_config.json", '{"tokenizer_class": "TokenizersBackend"}', "neither an end-of-text nor a separator"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = words(tmp_path / "t", eos_token="[SEP]")
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load(str(folder))


def test_a_name_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be loaded: .*; expected a folder with tokenizer.json, or a Hugging"):
        load(str(tmp_path / "nothing"))


def test_a_tokenizer_must_fit_the_vocabulary_of_the_model(trained: LoadedTokenizer) -> None:
    check_vocabulary(trained, "t", 400)
    check_vocabulary(trained, "t", None)
    with pytest.raises(DataError, match=r"'t' has 400 entries but the model's vocabulary is 399; set model.config"):
        check_vocabulary(trained, "t", 399)
