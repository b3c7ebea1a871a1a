"""The page of what is proven against a sample of its cells; all of them: ``make verify-all``."""

import pytest

from layout_matrix import FAMILIES, STEPS, cases, differs, said
from paceline.verify.cases import SINGLE, parse
from paceline.verify.run import Trial

SEVERAL = ("tensor=4", "replicas=2,tensor=2,sequence=true,recompute=full", "shard=2,pipeline=2,schedule=gpipe")
SAMPLE = [("llama", words) for words in (*SINGLE, *SEVERAL)] + [
    (family, SINGLE[(3 * i + j) % len(SINGLE)])
    for i, family in enumerate(name for name in FAMILIES if name != "llama")
    for j in (0, 9)
]


@pytest.fixture(scope="module")
def trial_of(pool):
    trials = {}

    def get(family):
        if family not in trials:
            trials[family] = Trial(FAMILIES[family].config(), pool, steps=STEPS)
        return trials[family]

    yield get
    for trial in trials.values():
        trial.__exit__()


@pytest.mark.parametrize(("family", "words"), SAMPLE)
def test_a_cell(trial_of, family, words):
    (case,) = parse(words)
    row = trial_of(family).judge(case)
    assert row.verdict == "equal", row.text()
    assert not differs(row, said().get((family, case.name))), f"the page does not say so of {family}: make verify-all"


def test_the_page_has_every_cell():
    assert said().keys() == {(family, case.name) for family in FAMILIES for case in cases(family)}


def test_the_page_has_what_is_asked_of_it():
    proven = [cell for cell, word in said().items() if word == "yes"]
    assert len(proven) >= 130
    assert all(sum(family == name for name, _ in proven) >= (45 if family == "llama" else 12) for family in FAMILIES)
