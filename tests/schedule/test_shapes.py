import pytest
import torch

from paceline.schedule.shapes import Shapes, Wire, header, read_header, signature_of


def signature(rows, positions):
    return signature_of({"input_ids": torch.empty(rows, positions), "use_cache": False})


def wires(*shape):
    return ((Wire(shape, torch.float32),),)


def seen(shape, *sizes):
    """What was seen of a border whose shape is a function of rows and positions."""
    shapes = Shapes()
    for rows, positions in sizes:
        shapes.see(signature(rows, positions), wires(*shape(rows, positions)))
    return shapes


def test_headers_carry_shapes_and_dtypes():
    sent = (Wire((2, 7, 32), torch.bfloat16), Wire((), torch.int64), Wire((1, 4, 7, 7), torch.bool))
    assert read_header(header(sent).tolist()) == sent
    assert len(header(sent)) == len(header(()))


def test_what_was_seen_is_told():
    shapes = seen(lambda b, s: (b, s, 32), (2, 8))
    assert shapes.tell(signature(2, 8)) == wires(2, 8, 32)


def test_nothing_is_told_of_sizes_that_never_changed():
    shapes = seen(lambda b, s: (b, s, 32), (2, 8))
    assert shapes.tell(signature(2, 6)) is None and shapes.tell(signature(1, 8)) is None


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        (lambda b, s: (b, s, 32), (3, 12, 32)),
        (lambda b, s: (b, s // 2, 32), (3, 6, 32)),
        (lambda b, s: (1, 4, s, s), (1, 4, 12, 12)),
    ],
    ids=["hidden", "pieces", "bias"],
)
def test_dimensions_follow_those_of_the_inputs(shape, told):
    shapes = seen(shape, (2, 8), (3, 8), (2, 10))
    assert shapes.tell(signature(3, 12)) == wires(*told)


def test_what_follows_no_rule_is_not_told():
    shapes = seen(lambda b, s: (b * s, 32), (2, 8), (3, 10))
    assert shapes.tell(signature(3, 8)) is None


def test_a_dimension_that_may_be_of_rows_or_positions_is_not_told():
    shapes = seen(lambda b, s: (s, 32), (8, 8), (10, 10))
    assert shapes.tell(signature(4, 6)) is None
    assert shapes.tell(signature(6, 6)) == wires(6, 32)


def test_inputs_of_another_kind_tell_nothing():
    shapes = seen(lambda b, s: (b, s, 32), (2, 8), (3, 10))
    other = signature_of({"input_ids": torch.empty(2, 8), "position_ids": torch.empty(2, 8)})
    assert shapes.tell(other) is None and Shapes().tell(other) is None


def test_tensors_of_changing_number_are_not_told():
    shapes = seen(lambda b, s: (b, s, 32), (2, 8), (3, 10))
    shapes.see(signature(4, 9), ((Wire((4, 9, 32), torch.float32), Wire((4,), torch.int64)),))
    assert shapes.tell(signature(4, 8)) is None
