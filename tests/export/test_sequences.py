"""SequenceAt of SplitToSequence carries like Split."""

from __future__ import annotations

import numpy as np
import pytest

from .folding import Model, check, folded


def split(positions, sizes, axis=1, extra=None):
    m = Model()
    y = m.op("Conv", m.input(2, 3, 6, 6), m.weight(6, 3, 3, 3), m.weight(6))
    sequence = m.op("SplitToSequence", y, m.constant(np.asarray(sizes, np.int64)), axis=axis)
    pieces = [m.op("SequenceAt", sequence, m.constant(np.int64(p))) for p in positions]
    given = [min(sizes, 6 - start) for start in range(0, 6, sizes)] if isinstance(sizes, int) else sizes
    outputs = []
    for position, piece in zip(positions, pieces, strict=True):
        m.output(m.bn(piece, given[position]), shape=(2, given[position], 4, 4))
    if extra is not None:
        outputs.append(m.op(extra, sequence))
    return m.build(*outputs)


@pytest.mark.parametrize("sizes", [2, 4, [1, 2, 3]])
@pytest.mark.parametrize("positions", [[0], [1, 0], [-1, 0]])
def test_pieces_along_the_channels(sizes, positions):
    assert folded(check(split(positions, sizes)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: split([0, 0], 3), "the sequence has other readers"),
        (lambda: split([0], 6, extra="SequenceLength"), "the sequence has other readers"),
    ],
)
def test_what_others_read_stays(model, reason):
    result = check(model())
    assert all(reason in entry.reason for entry in result.report.entries)


def test_pieces_along_another_axis():
    """As many rows to a piece as there are channels; a map along the rows would go into the weight."""
    m = Model()
    y = m.op("MatMul", m.weight(12, 5), m.input(5, 6))
    sequence = m.op("SplitToSequence", y, m.constant(np.int64(6)), axis=0)
    piece = m.op("SequenceAt", sequence, m.constant(np.int64(1)))
    assert not folded(check(m.build(m.bn(piece, 6))))
