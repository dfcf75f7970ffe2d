"""Text tasks that are generated and exactly scored: copy, reverse, addition, and closing open brackets (Dyck words).

A problem is one document, `question=answer`. The question determines the answer. The size of a problem (letters, digits, open
brackets) can be larger than in training. Such tasks show whether more thinking helps where a model is unsure.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ebt_vision.data.sources import DataError

TASK_PREFIX = "task:"
LETTERS = "abcdefghij"
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}
MAX_SIZE = 1000
_TASK_STREAM = 0x7461736B


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, which ends with "=", and its one right answer."""

    question: str
    answer: str


def copy_problem(size: int, rng: np.random.Generator) -> Problem:
    """Repeat `size` random letters: c:hgc=hgc."""
    word = _letters(size, rng)
    return Problem(f"c:{word}=", word)


def reverse_problem(size: int, rng: np.random.Generator) -> Problem:
    """Reverse `size` random letters: r:hgc=cgh."""
    word = _letters(size, rng)
    return Problem(f"r:{word}=", word[::-1])


def addition_problem(size: int, rng: np.random.Generator) -> Problem:
    """Add two numbers of `size` digits: 47+85=231. The sum is written from its last digit (Lee et al. 2023, arXiv 2307.03381).

    In this order a digit depends only on one digit of each number and on the carry.
    """
    lowest = 0 if size == 1 else 1
    numbers = [
        int("".join(str(digit) for digit in (rng.integers(lowest, 10), *rng.integers(0, 10, size - 1)))) for _ in range(2)
    ]
    return Problem(f"{numbers[0]}+{numbers[1]}=", str(sum(numbers))[::-1])


def dyck_problem(size: int, rng: np.random.Generator) -> Problem:
    """Close the `size` brackets of four kinds that are still open: d:(<>[=]).

    Before each of them stands, with probability 1/2, a pair that is already closed.
    """
    text, still_open = "", ""
    for _ in range(size):
        if rng.random() < 0.5:
            kind = list(BRACKETS)[rng.integers(4)]
            text += kind + BRACKETS[kind]
        kind = list(BRACKETS)[rng.integers(4)]
        text, still_open = text + kind, still_open + kind
    return Problem(f"d:{text}=", "".join(BRACKETS[kind] for kind in reversed(still_open)))


TASKS: dict[str, Callable[[int, np.random.Generator], Problem]] = {
    "copy": copy_problem,
    "reverse": reverse_problem,
    "addition": addition_problem,
    "dyck": dyck_problem,
}


@dataclass(frozen=True, slots=True)
class TaskSizes:
    """A task and the range of its sizes, both ends included."""

    task: str
    min_size: int
    max_size: int

    def __str__(self) -> str:
        sizes = f"{self.min_size}-{self.max_size}" if self.max_size > self.min_size else str(self.min_size)
        return f"{self.task}:{sizes}"


def parse_tasks(path: str) -> list[TaskSizes]:
    """Parse NAME:MIN-MAX, or several joined by "+", with or without the prefix "task:". Raises DataError with the remedy."""
    found = []
    for part in path.removeprefix(TASK_PREFIX).split("+"):
        name, _, sizes = part.partition(":")
        first, dash, last = sizes.partition("-")
        last = last if dash else first
        if name not in TASKS:
            raise DataError(f"the task {name!r} of {path!r} is unknown; use one of {', '.join(TASKS)}, as in task:copy:1-8")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= MAX_SIZE):
            raise DataError(f"the sizes {sizes!r} of {path!r} are not MIN-MAX in 1..{MAX_SIZE}; use for example {name}:1-8")
        found.append(TaskSizes(name, int(first), int(last)))
    return found


def problems(tasks: list[TaskSizes], seed: int) -> Iterator[Problem]:
    """Yield problems without end; each is of a random task and of a random size. They depend only on the tasks and the seed."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, _TASK_STREAM)))
    while True:
        task = tasks[rng.integers(len(tasks))]
        yield TASKS[task.task](int(rng.integers(task.min_size, task.max_size + 1)), rng)


def _letters(size: int, rng: np.random.Generator) -> str:
    return "".join(LETTERS[i] for i in rng.integers(0, len(LETTERS), size))
