"""Items are made ahead in a thread, in order and bounded. Leaving the loop never waits for them."""

import threading
import time

import pytest

from vxl_model.video.prefetch import prefetch


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "vxl-prefetch"]


def test_order_and_bound():
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    source = prefetch(items(), ahead=3)
    assert next(source) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert made == [0, 1, 2, 3, 4]  # taken, three waiting, one that the thread holds
    assert list(source) == list(range(1, 20))
    assert not threads()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_an_error_comes_after_the_items_before_it(error):
    def items():
        yield 1
        raise error("broken")

    source = prefetch(items())
    assert next(source) == 1
    with pytest.raises(error, match="broken"):
        next(source)
    assert not threads()


def test_leaving_ends_the_thread_and_closes_the_source():
    closed = threading.Event()

    def items():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    source = prefetch(items())
    next(source)
    source.close()
    assert closed.is_set()
    assert not threads()


def test_leaving_does_not_wait_for_a_source_that_makes_nothing():
    """With a camera that is gone, Ctrl-C or an error of the consumer still ends the loop."""
    gone = threading.Event()

    def camera():
        yield 0
        gone.wait(60)

    source = prefetch(camera())
    next(source)
    begin = time.monotonic()
    source.close()
    assert time.monotonic() - begin < 10
    gone.set()
    for thread in threads():
        thread.join(10)
    assert not threads()
