"""The whole way from files to token sets: nothing is lost, it is the same however it is run, and errors say why."""

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from paceline.config import DataConfig
from paceline.data import build
from paceline.data.prepare import Prepared, prepare
from paceline.data.tokenizer import train
from paceline.data.tokens import TokenSet
from paceline.errors import DataError, MissingExtraError


def run(
    source: Any,
    cache: Path,
    *,
    vocabulary: int | None = 300,
    tokenizer: str | None = None,
    columns: tuple[str, ...] = ("text",),
    workers: int = 1,
    extra_tokens: Sequence[str] = (),
    said: list[str] | None = None,
    **data: Any,
) -> Prepared:
    given = [
        str(item) if isinstance(item, Path) else item for item in (source if isinstance(source, list) else [source])
    ]
    return prepare(
        DataConfig(source=tuple(given), cache=str(cache), **data),
        columns=columns,
        vocabulary=vocabulary,
        tokenizer=tokenizer,
        extra_tokens=extra_tokens,
        workers=workers,
        say=(said if said is not None else []).append,
    )


def decoded(prepared: Prepared, tokens: TokenSet) -> list[str]:
    core = Tokenizer.from_file(str(prepared.tokenizer / "tokenizer.json"))
    documents = [tokens.document(index).tolist() for index in range(len(tokens))]
    assert all(document[-1] == prepared.special.end for document in documents)
    return [core.decode(document[:-1], skip_special_tokens=False) for document in documents]


def lines(count: int) -> list[str]:
    return [f"Line {place}: the number {place * place} is the square of {place}." for place in range(count)]


def json_lines(texts: Sequence[str]) -> str:
    return "".join(json.dumps({"id": place, "text": text}) + "\n" for place, text in enumerate(texts))


def bytes_of(prepared: Prepared) -> list[bytes]:
    return [
        np.ascontiguousarray(array).tobytes()
        for tokens in (*prepared.train, *prepared.held_out)
        for array in (tokens.tokens, tokens.offsets, tokens.files)
    ]


def test_every_document_of_every_kind_of_file_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    texts = lines(60)
    (folder / "a.jsonl").write_text(json_lines(texts[:10]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(texts[10:20]).encode()))
    (folder / "c.json").write_text(json.dumps([{"text": text} for text in texts[20:30]]))
    (folder / "d.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts[30:40]))
    (folder / "e.tsv").write_text("id\ttext\n" + "".join(f"1\t{text}\n" for text in texts[40:50]))
    pq.write_table(pa.table({"text": texts[50:]}), folder / "f.parquet")
    (folder / "g.txt").write_bytes("first\r\n\r\nsecond 😀\n".encode())
    prepared = run(folder, tmp_path / "cache", held_out=0)
    assert decoded(prepared, prepared.train[0]) == [*texts, "first\r\n\r\nsecond 😀\n"]
    assert prepared.train[0].files.tolist() == [place // 10 for place in range(60)] + [6]
    statistics = prepared.statistics
    assert statistics.documents == 61
    assert (
        statistics.bytes == prepared.train[0].n_bytes == sum(map(len, texts)) + len("first\r\n\r\nsecond 😀\n".encode())
    )
    assert statistics.tokens == len(prepared.train[0].tokens)
    assert (statistics.held_out_documents, len(prepared.held_out[0])) == (0, 0)
    assert (statistics.empty, statistics.quarantined, statistics.quarantine) == (0, 0, None)
    assert prepared.train[0].tokens.dtype == np.uint16


def test_held_out_documents_are_chosen_by_their_text(tmp_path: Path) -> None:
    texts = lines(400)
    (tmp_path / "a.txt").write_text("\n".join([*texts, *texts]))
    (tmp_path / "b.txt").write_text("\n".join([*reversed(texts), *lines(500)[400:]]))
    held = []
    for name in ("a.txt", "b.txt"):
        prepared = run(tmp_path / name, tmp_path / "cache", document="line", held_out=0.1)
        held.append(set(decoded(prepared, prepared.held_out[0])))
        assert not held[-1] & set(decoded(prepared, prepared.train[0]))
        statistics = prepared.statistics
        assert statistics.documents + statistics.held_out_documents == (800 if name == "a.txt" else 500)
        assert statistics.held_out_tokens == len(prepared.held_out[0].tokens)
    assert 20 < len(held[0]) < 65
    assert held[0] == held[1] & set(texts), "more data or another order moves no document"


def test_one_file_is_held_out_from_by_its_end(tmp_path: Path) -> None:
    text = "\n".join(lines(2000))
    (tmp_path / "a.txt").write_text(text)
    prepared = run(tmp_path / "a.txt", tmp_path / "cache", held_out=0.05)
    ((first,), (second,)) = decoded(prepared, prepared.train[0]), decoded(prepared, prepared.held_out[0])
    assert first + second == text
    assert prepared.held_out[0].n_bytes == len(second.encode()) == prepared.statistics.held_out_bytes
    assert len(prepared.held_out[0].tokens) / len(prepared.train[0].tokens) == pytest.approx(0.05 / 0.95, rel=0.01)


def test_sentences_are_documents_and_stay_on_the_side_of_their_text(tmp_path: Path) -> None:
    texts = [f"Sentence one of {place}. Sentence two of {place}!\n\nAnd the end of {place}." for place in range(300)]
    (tmp_path / "a.jsonl").write_text(json_lines(texts))
    prepared = run(tmp_path / "a.jsonl", tmp_path / "cache", split="sentence", held_out=0.1)
    held = decoded(prepared, prepared.held_out[0])
    assert len(held) % 3 == 0
    assert 30 < len(held) < 200
    for place in range(0, len(held), 3):
        number = held[place].removeprefix("Sentence one of ").rstrip(".")
        expected = [f"Sentence one of {number}.", f"Sentence two of {number}!", f"And the end of {number}."]
        assert held[place : place + 3] == expected
    assert len(held) + len(prepared.train[0]) == 900


def test_pairs(tmp_path: Path) -> None:
    rows = [(f"Quelle {place}", f"target number {place}") for place in range(150)]
    content = "de,en\n" + "".join(f"{de},{en}\n" for de, en in rows) + "nur,\nx,y,z\n"
    (tmp_path / "a.csv").write_text(content)
    prepared = run(tmp_path / "a.csv", tmp_path / "cache", columns=("de", "en"), held_out=0.1)
    found = []
    for part in (prepared.train[0], prepared.held_out[0]):
        assert part.target is not None
        assert len(part) == len(part.target)
        found += list(zip(decoded(prepared, part), decoded(prepared, part.target), strict=True))
    assert sorted(found) == sorted(rows)
    statistics = prepared.statistics
    assert (statistics.empty, statistics.quarantined) == (1, 1)
    assert statistics.bytes + statistics.held_out_bytes == sum(len(de) + len(en) for de, en in rows)


@pytest.mark.parametrize("document", ["file", "paragraph", "line"])
def test_the_number_of_processes_changes_no_byte(
    tmp_path: Path, document: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_CHUNK_BYTES", 5000)
    for place in range(3):
        text = "\n".join(lines(500)).replace("0:", "0:\n\n")
        (tmp_path / f"{place}.txt").write_text(f"File {place}\n{text}")
    (tmp_path / "other.jsonl").write_text(json_lines(lines(300)))
    found = [
        run([tmp_path / "*.txt", tmp_path / "other.jsonl"], tmp_path / str(workers), document=document, workers=workers)
        if document != "file"
        else run(tmp_path / "*.txt", tmp_path / str(workers), document=document, workers=workers)
        for workers in (1, 2, 3)
    ]
    assert bytes_of(found[0]) == bytes_of(found[1]) == bytes_of(found[2])
    assert len({prepared.fingerprint for prepared in found}) == 1


def test_long_documents_are_encoded_in_pieces_with_the_same_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(f"{line}\n    indented\n\n" for line in lines(500))
    (tmp_path / "a.txt").write_text(text)
    whole = run(tmp_path / "a.txt", tmp_path / "whole")
    monkeypatch.setattr(build, "_PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(build, "_CHUNK_BYTES", 3000)
    pieces = run(tmp_path / "a.txt", tmp_path / "pieces", workers=2)
    assert bytes_of(whole) == bytes_of(pieces)


def test_a_second_call_opens_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(lines(100)))
    said: list[str] = []
    first = run(tmp_path / "a.txt", tmp_path / "cache", said=said)
    assert [line.split()[0] for line in said] == ["training", "tokenised"]
    second = run(tmp_path / "a.txt", tmp_path / "cache", said=said)
    assert len(said) == 2
    assert (first.fingerprint, first.special, first.statistics) == (
        second.fingerprint,
        second.special,
        second.statistics,
    )
    assert isinstance(second.train[0].tokens, np.memmap)


def test_the_fingerprint_follows_the_tokens_not_the_place(tmp_path: Path) -> None:
    def fingerprint(name: str, content: str, **options: Any) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        return run(tmp_path / name, tmp_path / "cache", **options).fingerprint

    text = "\n".join(lines(200))
    base = fingerprint("a/a.txt", text)
    assert fingerprint("b/b.md", text) == base
    others = [
        fingerprint("c/a.txt", text + "!"),
        fingerprint("a/a.txt", text, document="line"),
        fingerprint("a/a.txt", text, held_out=0.2),
        fingerprint("a/a.txt", text, vocabulary=320),
        fingerprint("a/a.txt", text, extra_tokens=["<mask>"]),
    ]
    assert len({base, *others}) == 6


def test_special_tokens_are_reserved(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(lines(100)))
    extra = ["<mask>", "<extra_id_0>", "<extra_id_1>"]
    for _ in range(2):  # made, then opened
        special = run(tmp_path / "a.txt", tmp_path / "cache", extra_tokens=extra).special
        assert (special.end, special.mask, special.sentinels, special.vocabulary) == (0, 1, (2, 3), 300)


def test_a_given_tokenizer_is_used_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(lines(100)))
    for name, size in (("own", 260), ("given", 270)):
        train(lines(50), size, [], tmp_path / name)
    own, given = str(tmp_path / "own"), str(tmp_path / "given")
    prepared = run(tmp_path / "a.txt", tmp_path / "cache", vocabulary=1000, tokenizer=own)
    assert (prepared.tokenizer, prepared.special.vocabulary) == (tmp_path / "own", 260)
    prepared = run(tmp_path / "a.txt", tmp_path / "cache", vocabulary=None, tokenizer=own)
    assert prepared.tokenizer == tmp_path / "own"
    first = prepare(
        DataConfig(source=str(tmp_path / "a.txt"), tokenizer=given, cache=str(tmp_path / "cache")),
        columns=("text",),
        vocabulary=1000,
        tokenizer=own,
    )
    assert (first.tokenizer, first.special.vocabulary) == (tmp_path / "given", 270)
    assert (
        "".join(decoded(first, first.train[0]) + decoded(first, first.held_out[0])) == (tmp_path / "a.txt").read_text()
    )


def test_a_tokenizer_that_needs_its_class_is_saved_beside_the_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "a.txt").write_text("\n".join(lines(100)))
    train(lines(50), 270, [], tmp_path / "t")
    (tmp_path / "t" / "config.json").write_text('{"model_type": "qwen2"}')
    for _ in range(2):
        prepared = run(tmp_path / "a.txt", tmp_path / "cache", tokenizer=str(tmp_path / "t"), held_out=0)
        assert prepared.tokenizer.parent.parent == tmp_path / "cache"
        theirs = AutoTokenizer.from_pretrained(str(prepared.tokenizer))
        ids = theirs((tmp_path / "a.txt").read_text(), add_special_tokens=False)["input_ids"]
        assert prepared.train[0].tokens.tolist() == [*ids, prepared.special.end]


def test_bad_rows_are_counted_and_kept_aside(tmp_path: Path) -> None:
    good = lines(120)
    rows = [json.dumps({"text": text}) for text in good]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows[:60], "{broken", '{"text": " "}', *rows[60:], '{"txt": "x"}']))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff' + b"x" * 5000 + b'"}\n{"text": "one more"}\n')
    said: list[str] = []
    prepared = run([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "cache", held_out=0.1, said=said)
    statistics = prepared.statistics
    assert (statistics.quarantined, statistics.empty) == (3, 1)
    assert [(counts.quarantined, counts.empty) for counts in statistics.by_source] == [(2, 1), (1, 0)]
    assert statistics.documents + statistics.held_out_documents == 121 + 1  # the one of b is cut through
    assert any("3 rows could not be used" in line for line in said)
    assert statistics.quarantine
    kept = [json.loads(line) for line in statistics.quarantine.read_text().splitlines()]
    assert [(row["name"], row["row"]) for row in kept] == [
        (str(tmp_path / "a.jsonl"), 61),
        (str(tmp_path / "a.jsonl"), 123),
        (str(tmp_path / "b.jsonl"), 1),
    ]
    assert kept[0]["raw"] == "{broken\n"
    assert kept[1]["reason"] == "no field 'text'; it has 'txt'"
    assert len(kept[2]["raw"]) == 1000


def test_a_source_whose_rows_are_all_bad_is_refused_and_its_rows_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n[]\n')
    with pytest.raises(DataError) as caught:
        run(tmp_path / "a.jsonl", tmp_path / "cache", tokenizer=None)
    message = str(caught.value)
    assert (
        "a.jsonl, row 1: no field 'text'; it has 'body'; none of its 2 rows can be used, they are kept in " in message
    )
    kept = Path(message.rpartition("kept in ")[2]).read_text().splitlines()
    assert [json.loads(line)["row"] for line in kept] == [1, 2]
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", b"good \xff bad", {}, r"a.txt is not UTF-8 text \(byte 5 is 0xff\)"),
        ("a.txt", b"\x7fELF\0\0", {}, "a.txt holds a NUL byte at 4, so it is not text"),
        ("a.txt", b"", {}, r"no text in 1 files \(1 empty documents\)"),
        ("a.txt", b" \n ", {}, r"no text in 1 files \(1 empty documents\)"),
        ("a.jsonl", b"", {}, r"no text in 1 files \(0 empty documents\)"),
        ("a.csv", b"a,b\n1,2\n", {}, "no column 'text'; it has 'a', 'b'"),
        ("a.parquet", b"PAR1", {}, "not Parquet"),
        ("a.txt", b"text", {"document": "row"}, "is text and has no rows"),
        ("a.txt", b"text", {"vocabulary": 100}, "vocabulary of 100 entries is too small"),
        ("a.txt", b"text", {"vocabulary": None}, "no tokenizer and no vocabulary size: set data.tokenizer"),
        ("a.bin", b"text", {}, "unknown kind of file '.bin'"),
        ("a.txt", b"one\n" * 200, {"document": "line", "held_out": 0.999}, "takes all 200 documents"),
    ],
)
def test_data_that_gives_nothing_is_refused_with_the_reason(
    tmp_path: Path, name: str, content: bytes, options: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        run(tmp_path / name, tmp_path / "cache", **options)
    assert not list((tmp_path / "cache").glob("*/header.json"))


def test_a_tokenizer_too_large_for_the_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    train(lines(50), 300, [], tmp_path / "t")
    with pytest.raises(DataError, match=r"t' has 300 entries but the model's vocabulary is 299; set model\.config"):
        run(tmp_path / "a.txt", tmp_path / "cache", vocabulary=299, tokenizer=str(tmp_path / "t"))


def test_a_hub_name_without_the_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"'org/name': no such path; .*paceline\[hub\]"):
        run("org/name", tmp_path / "cache")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("\n".join(lines(100)))
    plain = build.encode_chunks

    def slow(*arguments: Any) -> Any:
        with (tmp_path / "a.txt").open("a") as file:
            file.write("more")
        return plain(*arguments)

    monkeypatch.setattr(build, "encode_chunks", slow)
    with pytest.raises(DataError, match=r"a.txt changed while it was read"):
        run(tmp_path / "a.txt", tmp_path / "cache")


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(lines(100)))
    first = run(tmp_path / "a.txt", tmp_path / "cache")
    before = bytes_of(first)
    (path,) = (tmp_path / "cache").glob("*/0/train/tokens.npy")
    os.truncate(path, path.stat().st_size - 2)
    said: list[str] = []
    assert bytes_of(run(tmp_path / "a.txt", tmp_path / "cache", said=said)) == before
    assert "0/train/tokens.npy has" in said[0]


RUN = """
import sys
from paceline.config import DataConfig
from paceline.data import build
from paceline.data.prepare import prepare

build._CHUNK_BYTES = 5000
if sys.argv[3] == "hang":
    plain = build.encode_chunks
    def encode_chunks(*arguments):
        for place, item in enumerate(plain(*arguments)):
            yield item
            if place == 1:
                print("tokenising", flush=True)
                sys.stdin.read()
    build.encode_chunks = encode_chunks
data = DataConfig(source=sys.argv[1], cache=sys.argv[2])
found = prepare(data, columns=("text",), vocabulary=300, tokenizer=None, workers=2, say=lambda line: None)
assert not {"torch", "transformers", "pyarrow", "datasets"} & set(sys.modules)
print(found.fingerprint)
"""


def start(source: Path, cache: Path, how: str = "run") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(source), str(cache), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_killed_in_the_middle_it_leaves_nothing_and_runs_again_to_the_same(tmp_path: Path) -> None:
    for place in range(4):
        (tmp_path / f"{place}.txt").write_text("\n".join(lines(500)))
    with start(tmp_path / "*.txt", tmp_path / "cache", "hang") as process:
        assert process.stdout
        assert process.stdout.readline() == "tokenising\n"
        assert list((tmp_path / "cache").glob("*.tmp/0/log0/tokens"))
        process.send_signal(signal.SIGKILL)
    assert not [path for path in (tmp_path / "cache").glob("*/header.json") if path.parent.suffix != ".tmp"]
    again = run(tmp_path / "*.txt", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.tmp"))
    assert bytes_of(again) == bytes_of(run(tmp_path / "*.txt", tmp_path / "elsewhere"))


def test_processes_that_start_together_do_the_work_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(lines(3000)))
    processes = [start(tmp_path / "a.txt", tmp_path / "cache") for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(outputs)) == 1
    assert len(list((tmp_path / "cache").glob("*/header.json"))) == 1
