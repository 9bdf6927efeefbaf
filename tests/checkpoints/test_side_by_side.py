"""What is read ahead is bounded, and comes in order."""

import threading

import numpy as np
import pytest

from tvjax.checkpoints import fingerprint, side_by_side
from tvjax.checkpoints.side_by_side import SideBySide


class Side:
    """Leaves in memory that say when they are read."""

    def __init__(self, sizes):
        self.shapes = {f"{number:03}": (size,) for number, size in enumerate(sizes)}
        self.reads, self._lock = [], threading.Lock()

    def value(self, path):
        return np.full(self.shapes[path], int(path), np.uint8)

    def leaf_bytes(self, path):
        return self.shapes[path][0]

    def read(self, path, scratch):
        out = scratch.take("ours", self.leaf_bytes(path))
        out[:] = int(path)
        with self._lock:
            self.reads.append(path)
        return out


@pytest.fixture(autouse=True)
def little(monkeypatch):
    monkeypatch.setattr(side_by_side, "_AHEAD", 100)
    monkeypatch.setattr(side_by_side, "_KEPT", 30)


def test_leaves_come_in_order_and_no_more_than_fits_is_there():
    sizes = [5, 40, 90, 5, 5, 150, 20, 20, 20, 20, 20, 20, 99, 2]
    side = Side(sizes)
    paths = list(side.shapes)
    most, seen = 0, []
    with SideBySide(side, side) as reader:
        for path, (left, right) in reader.leaves(None):
            np.testing.assert_array_equal(left, side.value(path))
            np.testing.assert_array_equal(right, side.value(path))
            seen.append(path)
            there = set(side.reads) - set(seen[:-1])
            most = max(most, len(there))
            size = 2 * sum(map(side.leaf_bytes, there))
            assert size <= 100 or there == {path}, there
            kept = sum(scratch.size for sets in reader._memory for scratch in sets)
            assert kept <= 2 * 4 * 30 + max(100, 2 * side.leaf_bytes(path))
        expected = fingerprint({path: side.value(path) for path in paths})
        assert reader.fingerprints() == [expected, expected]
    assert seen == paths and most <= 4


def test_sides_that_lack_leaves_and_are_not_hashed():
    base, change = Side([3, 3, 3]), Side([3, 3, 3])
    del change.shapes["001"]
    done = []
    with SideBySide(base, change, hashed=[base]) as reader:
        rows = reader.leaves(lambda *row: done.append(row))
        found = {path: None if right is None else right.tolist() for path, (_, right) in rows}
        assert reader.fingerprints() == [fingerprint({path: base.value(path) for path in base.shapes})]
    assert found == {"000": [0, 0, 0], "001": None, "002": [2, 2, 2]}
    assert done == [(1, 3, "000"), (2, 3, "001"), (3, 3, "002")]


def test_an_error_of_a_side_is_raised_where_its_leaf_is_due():
    class Damaged(Side):
        def read(self, path, scratch):
            if path == "001":
                raise ValueError(path)
            return super().read(path, scratch)

    side = Damaged([3, 3])
    with SideBySide(side) as reader:
        leaves = reader.leaves(None)
        assert next(leaves)[0] == "000"
        with pytest.raises(ValueError, match="001"):
            next(leaves)
