"""A sample of the matrix of layouts and families; all of it: ``make verify-all``."""

import pytest

from layout_matrix import FAMILIES, STEPS
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
