import itertools
import threading
import time

import numpy as np
import pytest

from tvjax.data.images import Images
from tvjax.data.loader import image_batches, prefetch


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("tvjax-loader")]


def grey(count, labels=None, names=()):
    return Images("grey", range(count), lambda shade: np.full((2, 2), shade, np.uint8), labels, names)


def test_batches_come_in_order_and_every_pass_is_the_same():
    loader = image_batches(grey(7, np.arange(7) % 2, ("even", "odd")), np.stack, 3)
    for _ in range(2):
        batches = list(loader)
        assert [batch.inputs["pixels"].shape for batch in batches] == [(3, 2, 2, 3)] * 2 + [(1, 2, 2, 3)]
        assert [int(image[0, 0, 0]) for batch in batches for image in batch.inputs["pixels"]] == list(range(7))
        assert [int(label) for batch in batches for label in batch.labels] == [0, 1, 0, 1, 0, 1, 0]
    assert len(loader) == 3 and not threads()
    whole = loader.whole()
    assert whole.inputs["pixels"].shape == (7, 2, 2, 3) and whole.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert [batch.labels for batch in image_batches(grey(2), np.stack, 1)] == [None, None]


def test_work_is_done_in_another_thread_and_not_far_ahead():
    begun, workers = [], set()

    def work(item):
        begun.append(item)
        workers.add(threading.current_thread())
        return item

    results = prefetch(work, itertools.count(), ahead=2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    time.sleep(0.05)
    assert len(begun) <= 5 + 2 and workers.isdisjoint({threading.current_thread()})
    results.close()
    assert not threads()


def test_a_consumer_that_stops_early_leaves_no_thread():
    for batch in image_batches(grey(50), np.stack, 1):
        assert batch.inputs["pixels"].shape == (1, 2, 2, 3)
        break
    del batch
    assert not threads()


def test_exceptions_come_where_their_batch_would_have_come():
    def read(shade):
        if shade == 4:
            raise ValueError("the image 4 is empty")
        return np.full((2, 2), shade, np.uint8)

    batches = iter(image_batches(Images("some", range(9), read), np.stack, 2))
    assert [len(next(batches).inputs["pixels"]) for _ in range(2)] == [2, 2]
    with pytest.raises(ValueError, match="the image 4 is empty"):
        next(batches)
    assert not threads()


@pytest.mark.parametrize("sizes", [{"size": 0}, {"size": 1, "ahead": 0}])
def test_batches_of_nothing_are_refused(sizes):
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        image_batches(grey(2), np.stack, **sizes)
