"""Computes items ahead of their consumer, with one background thread and a bounded number of finished items."""

import atexit
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextvars import ContextVar
from itertools import islice
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_SHELF: ContextVar["_Shelf[Any] | None"] = ContextVar("shelf", default=None)  # of a producer's thread
_PATIENCE_S = 10.0  # how long a consumer that stops waits for the producer to finish its current item


def in_batches(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Tuples of `size` items in order; the last may be shorter."""
    iterator = iter(items)
    while batch := tuple(islice(iterator, size)):
        yield batch


def prefetched(iterable: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The items of `iterable`, up to `depth` of them computed ahead by a thread; with depth 0, computed on demand.

    The thread starts at the first `next`. It ends with the iterable, with `close()` (or when this generator is
    collected), or with the interpreter, and closes the iterable's iterator. An exception of the iterable reaches the
    consumer after the items before it, with the thread's traceback.
    """
    if depth == 0:
        yield from iterable
        return
    shelf: _Shelf[T] = _Shelf(depth)
    # A daemon: at exit the interpreter does not wait for it, but runs `leave` while threads can still end in order.
    thread = threading.Thread(target=_fill, args=(iterable, shelf), name="edt-prefetch", daemon=True)

    def leave() -> None:
        shelf.abandon()
        if thread is not threading.current_thread():  # a garbage collection can run this in any thread
            thread.join(_PATIENCE_S)

    thread.start()
    atexit.register(leave)
    try:
        yield from shelf
    finally:
        leave()
        atexit.unregister(leave)


def is_abandoned() -> bool:
    """Whether this thread computes items for a consumer that has stopped: who waits for long looks now and then."""
    shelf = _SHELF.get()
    return shelf is not None and shelf.abandoned


class _Shelf(Generic[T]):
    """Finished items between two threads. `depth` limits their number, including the one in progress."""

    def __init__(self, depth: int) -> None:
        self._items: deque[T] = deque()
        self._depth = depth
        self._changed = threading.Condition()
        self._complete = self._abandoned = False
        self._error: BaseException | None = None

    def has_room(self) -> bool:
        """Wait until another item may be computed. Return False if the consumer has stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned or len(self._items) < self._depth)
            return not self._abandoned

    @property
    def abandoned(self) -> bool:
        """Whether the consumer has stopped."""
        return self._abandoned

    def put(self, item: T) -> None:
        with self._changed:
            if not self._abandoned:
                self._items.append(item)
            self._changed.notify_all()

    def finish(self, error: BaseException | None) -> None:
        with self._changed:
            self._complete, self._error = True, error
            self._changed.notify_all()

    def abandon(self) -> None:
        with self._changed:
            self._abandoned = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._complete or self._abandoned)
                if not self._items:
                    break
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
            del item  # only the consumer may refer to a batch while this waits for the next one
        if self._error is not None:
            raise self._error


def _fill(iterable: Iterable[T], shelf: _Shelf[T]) -> None:
    error: BaseException | None = None
    _SHELF.set(shelf)
    try:
        iterator = iter(iterable)
        try:
            while shelf.has_room():
                try:
                    item = next(iterator)
                except StopIteration:
                    break
                shelf.put(item)
                del item
        finally:
            if isinstance(iterator, Generator):  # the thread that reads its files also closes them
                iterator.close()
    except BaseException as raised:
        error = raised
    shelf.finish(error)
