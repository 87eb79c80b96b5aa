"""Collect what several requests ask for into batches of one size."""

import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Value = TypeVar("Value")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Item(Generic[Value, Result]):
    key: Hashable
    value: Value
    result: "Future[Result]" = field(default_factory=Future)


class Batcher(Generic[Value, Result]):
    """Runs values of equal key together, at most `size` at once, in one thread and in order of arrival.

    A batch starts as soon as the previous one has ended, with what has arrived by then: nothing waits for others, and
    batches fill up while the device is busy. `run(key, values)` returns one result for each value. A batch that fails
    is repeated value by value, so that an error goes only to the values that cause it.
    """

    def __init__(self, run: Callable[[Hashable, Sequence[Value]], Sequence[Result]], size: int) -> None:
        self._run, self._size = run, size
        self._waiting: list[_Item[Value, Result]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def submit(self, key: Hashable, values: Sequence[Value]) -> "list[Future[Result]]":
        """The future results of values. A future that is cancelled before its batch starts takes no place in one."""
        items = [_Item[Value, Result](key, value) for value in values]
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._waiting += items
            self._changed.notify()
        return [item.result for item in items]

    def close(self) -> None:
        """Finish what was submitted, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _next(self) -> list[_Item[Value, Result]]:
        """The first items of the key of the oldest one; empty when closed and finished."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            batch: list[_Item[Value, Result]] = []
            others: list[_Item[Value, Result]] = []
            for item in self._waiting:
                fits = len(batch) < self._size and item.key == (batch or [item])[0].key
                if not fits:
                    others.append(item)
                elif item.result.set_running_or_notify_cancel():
                    batch.append(item)
            self._waiting = others
            return batch

    def _work(self) -> None:
        while (batch := self._next()) or not self._closed or self._waiting:
            if batch:  # empty if all that waited was cancelled
                self._settle(batch)

    def _settle(self, batch: list[_Item[Value, Result]]) -> None:
        try:
            results = self._run(batch[0].key, [item.value for item in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].result.set_exception(error)
                return
            for item in batch:
                self._settle([item])
            return
        for item, result in zip(batch, results, strict=True):
            item.result.set_result(result)
