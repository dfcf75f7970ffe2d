"""Work in a thread that posts how far it is; and an accelerator's memory given back after it."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


def in_thread(work: Callable[[Callable[[T], None]], T], stop: threading.Event, *, own: bool = True) -> Iterator[T]:
    """What `work(post)` posts, as it does, and what it returns, last; what it raises is raised here.

    If nobody listens any more, `stop` is set where it is our `own`, and the work is waited for: one at a time on a device.
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
    """Give an accelerator's unused memory back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
