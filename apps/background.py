"""Run work in a thread that posts its progress, and free the memory of an accelerator afterwards."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


def in_thread(work: Callable[[Callable[[T], None]], T], stop: threading.Event, *, own: bool = True) -> Iterator[T]:
    """Run `work(post)` in a thread; yield every posted value and finally its return value. Exceptions are raised here.

    If the caller closes this generator, `stop` is set if it is `own`. The generator then waits for the thread to end, so that
    only one thread uses the device.
    """
    posts: queue.SimpleQueue[tuple[str, T | BaseException]] = queue.SimpleQueue()

    def run() -> None:
        try:
            posts.put(("end", work(lambda value: posts.put(("post", value)))))
        except BaseException as error:  # raised again by the listener
            posts.put(("error", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        kind = "post"
        while kind == "post":
            kind, value = posts.get()
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        if own and thread.is_alive():
            stop.set()
        thread.join()


def free_memory() -> None:
    """Free unused memory of the accelerator."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
