"""The table of mistakes fits the code; whether verify catches them is for ``make mutants``."""

import ast
from pathlib import Path

import pytest

import paceline
from layout_matrix import FAMILIES
from mutations import MUTATIONS
from paceline.verify.cases import MIXTURE, SINGLE, TOGETHER, parse

PACKAGE = Path(paceline.__file__).parent
TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mistake_can_be_made(mutation):
    text = (PACKAGE / mutation.path).read_text()
    assert text.count(mutation.old) == 1
    mutant = text.replace(mutation.old, mutation.new)
    assert ast.dump(ast.parse(mutant)) != ast.dump(ast.parse(text))
    assert mutation.family in FAMILIES
    assert bool(mutation.layouts) is not bool(mutation.tests)
    assert all((TESTS / name).is_file() for name in mutation.tests)


def test_layouts_that_should_notice_are_tried_by_default():
    default = {case.name for case in parse("; ".join((*SINGLE, *TOGETHER, *MIXTURE)))}
    assert {case.name for mutation in MUTATIONS for case in _cases(mutation)} <= default


def _cases(mutation):
    return parse(mutation.layouts) if mutation.layouts else []


def test_names_are_unique():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
