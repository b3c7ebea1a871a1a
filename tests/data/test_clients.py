"""Who owns which documents, the rows of each client, and who takes part in which round."""

import json

import numpy as np
import pytest

from paceline.config import ClientsConfig, DataConfig
from paceline.data.client_loader import ClientLoader
from paceline.data.clients import Clients, owners
from paceline.data.pack import PackedRows
from paceline.data.prepare import prepare
from paceline.data.rounds import Rounds, Rules
from paceline.data.tokens import TokenSet
from paceline.errors import ConfigError, DataError
from paceline.plan.batch import BatchPlan

END = 0


def token_set(lengths, files):
    """Documents whose tokens tell their number."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.repeat(np.arange(1, len(lengths) + 1), lengths).astype(np.uint16)
    tokens[offsets[1:] - 1] = END
    return TokenSet(tokens=tokens, offsets=offsets, files=np.array(files, np.int32), n_bytes=1)


def numbered(documents, files):
    return token_set([4] * documents, sorted(i % files for i in range(documents)))


def test_natural_clients_are_files_or_sources():
    sets = [numbered(6, 3), numbered(4, 2)]
    whose, count = owners(sets, ClientsConfig(), 0)
    assert count == 5 and [w.tolist() for w in whose] == [[0, 0, 1, 1, 2, 2], [3, 3, 4, 4]]
    whose, count = owners(sets, ClientsConfig(label="source"), 0)
    assert count == 2 and np.concatenate(whose).tolist() == [0] * 6 + [1] * 4


def test_fewer_natural_clients_than_labels_are_of_about_equal_size():
    whose, count = owners([token_set([4] * 10, [0] * 5 + [1] * 3 + [2] * 2)], ClientsConfig(count=2), 0)
    assert count == 2 and np.bincount(whose[0]).tolist() == [5, 5]
    with pytest.raises(DataError, match="4 is more than the 3 labels"):
        owners([numbered(6, 3)], ClientsConfig(count=4), 0)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 1000.0])
def test_dirichlet_is_a_partition_that_is_even_for_large_alpha(alpha):
    sets = [numbered(600, 3)]
    config = ClientsConfig(by="dirichlet", count=4, alpha=alpha, least=5)
    (whose,), count = owners(sets, config, 7)
    assert count == 4 and len(whose) == 600 and set(whose) == set(range(4))
    assert np.bincount(whose).min() >= 5
    assert np.array_equal(whose, owners(sets, config, 7)[0][0])
    assert not np.array_equal(whose, owners(sets, config, 8)[0][0])
    shares = np.stack([np.bincount(whose[sets[0].files == file], minlength=4) / 200 for file in range(3)])
    spread = float(shares.std(axis=1).mean())
    assert spread < 0.02 if alpha == 1000.0 else spread > 0.08
    if alpha == 0.1:
        assert shares.max() > 0.6


def test_labels_of_one_document_are_dealt_by_chance_too(monkeypatch):
    """As of a corpus whose files are its documents; however many labels are drawn at a time."""
    sets = [numbered(1200, 1200)]
    config = ClientsConfig(by="dirichlet", count=4, alpha=100.0)
    for at_once in (2**22, 64):
        monkeypatch.setattr("paceline.data.clients._AT_ONCE", at_once)
        counts = np.bincount(owners(sets, config, 0)[0][0], minlength=4)
        assert abs(counts - 300).max() < 70  # some 4.5 standard deviations


def test_what_cannot_be_dealt_is_refused():
    with pytest.raises(DataError, match="need 20 documents"):
        owners([numbered(10, 2)], ClientsConfig(by="dirichlet", count=20), 0)
    with pytest.raises(DataError, match="larger alpha"):
        owners([numbered(40, 1)], ClientsConfig(by="dirichlet", count=10, alpha=0.01, least=4), 0)
    with pytest.raises((ConfigError, ValueError), match="count of clients"):
        ClientsConfig(by="dirichlet")


def test_a_row_holds_documents_of_one_client():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 9, 40)
    whose = rng.integers(0, 3, 40)
    rows = PackedRows(token_set(lengths, [0] * 40), 7, 1, clients=whose)
    of_rows = np.repeat(np.arange(3), rows.rows_per_part)
    tokens = 0
    for index in range(len(rows)):
        row = rows.row(index, index)
        documents = set(row.tokens[row.tokens != END].tolist())
        assert {int(whose[d - 1]) for d in documents} == {int(of_rows[index])}
        tokens += len(row.tokens) - 1
    assert tokens + 3 + rows.dropped_tokens == lengths.sum()


def clients(sizes, seed=3):
    return Clients([np.repeat(np.arange(len(sizes)), sizes)], len(sizes), seed)


def test_each_client_goes_round_its_own_rows():
    some = clients([4, 0, 6])
    assert len(some) == 2 and some.left_out == 1 and some.lengths.tolist() == [4, 6]
    for client, own in ((0, range(4)), (1, range(4, 10))):
        _, rows = some.draw(client, 0, 3 * len(own))
        for epoch in np.split(rows, 3):
            assert sorted(epoch) == list(own)
        assert np.array_equal(some.draw(client, 2, 5)[1], rows[2:7])


def rules(**options):
    return Rules(**{"clients": 3, "sequences": 2, "local_steps": 2, **options})


def test_cohorts_are_drawn_alike_without_replacement_and_from_the_seed():
    rounds = Rounds(np.full(8, 10), rules(), 5)
    drawn = [[visit.client for visit in rounds.at(number).visits] for number in range(1, 401)]
    assert all(len(set(cohort)) == 3 for cohort in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=8)
    assert abs(counts - 150).max() < 45  # some 4.6 standard deviations
    other = Rounds(np.full(8, 10), rules(), 5)
    assert [v.client for v in other.at(400).visits] == drawn[-1]
    assert other.at(7) == Rounds(np.full(8, 10), rules(), 5).at(7)
    assert [v.client for v in Rounds(np.full(8, 10), rules(), 6).at(1).visits] != drawn[0]


def test_a_client_goes_on_where_it_was():
    rounds = Rounds(np.array([5, 9, 7]), rules(clients=2), 1)
    seen = {}
    for number in range(1, 9):
        for visit in rounds.at(number).visits:
            assert visit.first == seen.get(visit.client, 0) and visit.rows == 4 and visit.steps == 2
            seen[visit.client] = visit.first + 4


def test_epochs_are_whole_passes():
    visits = Rounds(np.array([5, 9, 7]), rules(local_steps=None, epochs=2), 1).at(1).visits
    assert {(v.data_rows, v.rows, v.steps) for v in visits} == {(5, 10, 5), (9, 18, 9), (7, 14, 7)}


def test_who_is_late_is_left_out():
    sizes = np.full(40, 10)
    all_of_them = Rounds(sizes, rules(clients=20, spread=1.0), 2)
    late = Rounds(sizes, rules(clients=20, spread=1.0, deadline_s=2.0), 2)
    over = Rounds(sizes, rules(clients=20, spread=1.0, over_selection=0.5), 2)
    nobody = Rounds(sizes, rules(clients=20, spread=1.0, deadline_s=1e-9), 2)
    assert len(over.at(1).visits) == len(all_of_them.at(1).visits) == 20 > len(late.at(1).visits) > 0
    assert late.at(1).time_s <= 2.0 and over.at(1).time_s < all_of_them.at(1).time_s
    assert len(nobody.at(1).visits) == 1
    kept, whole = ([v.client for v in r.at(1).visits] for r in (late, all_of_them))
    assert kept == [client for client in whole if client in kept]
    assert [v.place for v in late.at(1).visits] == list(range(len(kept)))


def test_a_buffer_takes_updates_as_they_come():
    """Replayed by a list of events: who began when, from which round, and when it is done."""
    options = rules(clients=6, spread=1.0, buffer=3, max_staleness=2)
    rounds = Rounds(np.full(12, 10), options, 4)
    stale, before_s, drawn = 0, 0.0, {}
    for number in range(1, 60):
        whole = rounds.at(number)
        assert len(whole.visits) == 3 and whole.time_s >= before_s
        before_s = whole.time_s
        for visit in whole.visits:
            assert 0 <= visit.staleness <= min(2, number - 1)
            assert visit.first >= drawn.get(visit.client, 0) and visit.first % 4 == 0
            drawn[visit.client] = visit.first + 4
            stale += visit.staleness > 0
    assert stale > 20
    assert Rounds(np.full(12, 10), options, 4).at(59) == whole
    fresh = Rounds(np.full(12, 10), rules(clients=6, spread=1.0, buffer=3, max_staleness=0), 4)
    assert all(v.staleness == 0 for number in range(1, 20) for v in fresh.at(number).visits)


class Numbers:
    """Rows that tell their place."""

    def __len__(self):
        return 100

    def row(self, index, sequence):
        from paceline.data.rows import Row

        return Row(sequence, np.array([index, index]), np.zeros(1, np.int64))


@pytest.mark.parametrize(("replicas", "ranks"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_rows_of_a_round_do_not_depend_on_who_trains_them(replicas, ranks):
    """Each client's local steps have the same rows, once each; the last step of an epoch is filled up."""
    some = clients([5, 9, 7, 8])
    batch = BatchPlan(sequences=4, sequence_tokens=2, data_parallel=ranks, micro=1, micro_batches=-(-4 // ranks))
    told = {}
    for replica in range(replicas):
        for rank in range(ranks):
            rounds = Rounds(some.lengths, rules(sequences=4, local_steps=None, epochs=1), 0)
            loader = ClientLoader([Numbers()], some, rounds, batch, replica=replica, replicas=replicas, rank=rank)
            for number in (1, 2):
                for visit, steps in loader.visits(number):
                    for local_step, micro_batches in enumerate(steps):
                        assert len(micro_batches) == batch.micro_batches
                        for row in (row for micro in micro_batches for row in micro):
                            key = (number, visit.client, local_step)
                            if row.weight:
                                told.setdefault(key, set()).add((row.sequence, int(row.tokens[0])))
    expected = {}
    rounds = Rounds(some.lengths, rules(sequences=4, local_steps=None, epochs=1), 0)
    for number in (1, 2):
        for visit in rounds.at(number).visits:
            _, rows = some.draw(visit.client, visit.first, visit.rows)
            for local_step in range(visit.steps):
                own = range(4 * local_step, min(4 * local_step + 4, visit.rows))
                key = (number, visit.client, local_step)
                expected[key] = {((visit.client << 32) + visit.first + i, int(rows[i])) for i in own}
    assert told == expected


def test_clients_told_apart_by_a_column(tmp_path):
    """Rows of two tables, of which each says in a column whose it is; the third client is in one of them only."""
    for name, hospitals in (("a", "north south north"), ("b", "south east south")):
        lines = [
            json.dumps({"text": f"letter {i} of {name} to {where}", "hospital": where})
            for i, where in enumerate(hospitals.split())
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    told = {}
    for label in ("hospital", "file"):
        data = DataConfig(source=tuple(sources), held_out=0.0, clients=ClientsConfig(label=label))
        prepared = prepare(data, columns=("text",), vocabulary=300, tokenizer=None)
        whose, count = owners(prepared.train, data.clients, 0)
        told[label] = (count, [own.tolist() for own in whose], prepared.fingerprint)
    (north, south, again), (second, east, last) = told["hospital"][1]
    assert told["hospital"][0] == 3 and north == again and south == second == last and len({north, south, east}) == 3
    assert told["file"][:2] == (2, [[0, 0, 0], [1, 1, 1]]) and told["file"][2] != told["hospital"][2]
    (tmp_path / "c.txt").write_text("a letter")
    data = DataConfig(source=str(tmp_path / "c.txt"), clients=ClientsConfig(label="hospital"))
    with pytest.raises(DataError, match=r"c.txt is text and has no columns"):
        prepare(data, columns=("text",), vocabulary=300, tokenizer=None)
