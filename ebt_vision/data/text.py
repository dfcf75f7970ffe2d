"""Text for training and measuring: documents from files, parquet, the hub or a task, packed into sequences of one length.

The tokens are one stream in memory, `boundary doc boundary doc boundary`, because the order of an epoch needs random access.
A hub set is streamed only up to `max_tokens`. Sequences are cut from the stream regardless of documents. Each token carries
the position where its document starts; attention may look back to this position.
"""

import glob
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebt_vision.core.rng import make_generator
from ebt_vision.data.sources import HUB_PREFIX, DataError, walk
from ebt_vision.data.text_tasks import TASK_PREFIX, parse_tasks, problems
from ebt_vision.data.tokenizer import BYTES, Tokenizer, load_tokenizer

TEXT_SUFFIXES = (".txt", ".text", ".md", ".py")
_OFFSET_STREAM = 0x74657874
IGNORED = -1
"""The target of a position without a token: the padding after the last sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextDataConfig:
    """Which text to use, and how it becomes sequences of `context_length` predictions."""

    path: str
    """Text file, parquet file, a glob of either, a folder, or hub:OWNER/NAME; each file or row is one document. Or generated
    problems: task:copy:1-8, or several tasks joined by "+" (see text_tasks.py). Only the answers are then targets."""
    split: str | None = None
    """Split of a hub set (default "train")."""
    text_column: str = "text"
    """Column of the text in parquet and hub sets."""
    tokenizer: str = BYTES
    """bytes, a tokenizer.json of the `tokenizers` library, or a folder that has one."""
    context_length: int = 256
    """Number of predictions per sequence."""
    share: tuple[float, float] = (0.0, 1.0)
    """The part of the token stream to use; one file can then hold training and validation text."""
    random_offset: bool = False
    """Start the sequences of every epoch at another position, drawn from (seed, epoch)."""
    max_tokens: int | None = None
    """Stop reading documents at this number of tokens; None reads all. Required for a task, which has no end."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; give text or parquet files, a folder of them or hub:OWNER/NAME")
        if self.context_length < 1:
            raise ValueError(f"context_length={self.context_length} must be 1 or more")
        first, last = self.share
        if not 0.0 <= first < last <= 1.0:
            raise ValueError(f"share={list(self.share)} must be two increasing numbers in [0, 1]")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be 1 or more, or null for all")
        if self.path.startswith(TASK_PREFIX):
            parse_tasks(self.path)
            if self.max_tokens is None:
                raise ValueError(f"max_tokens is required for {self.path}, which has no end; use for example 1000000")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """Packed sequences: S context tokens, and for each the next token to predict."""

    tokens: Tensor
    """int64 (B, S)."""
    targets: Tensor
    """int64 (B, S): the next token of each token, IGNORED after the end of the text."""
    starts: Tensor
    """int64 (B, S): the position in the sequence where the document of each token starts (see CausalTrunk.encode)."""


class TextSet:
    """A token stream cut into sequences; `len` is their number. `load_text_set` creates it."""

    def __init__(
        self,
        config: TextDataConfig,
        stream: np.ndarray,
        num_bytes: np.ndarray,
        tokenizer: Tokenizer,
        *,
        seed: int,
        is_target: np.ndarray | None = None,
    ):
        """`stream` has the tokens. `num_bytes`, of the same shape, has the number of text bytes of each token.

        `is_target`, bool of the same shape, marks the answers of a task; None makes every token a target. With it, the targets
        of a document whose start was cut off are ignored too, because its question is incomplete.
        """
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self._stream, self._num_bytes, self._is_target = stream, num_bytes, is_target

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream, including boundaries; all except the first are predicted."""
        return len(self._stream)

    def __len__(self) -> int:
        whole = (self.num_tokens - 1) // self.config.context_length
        return max(whole - 1, 1) if self.config.random_offset else max(whole, 1)

    @property
    def num_windows(self) -> int:
        """Number of sequences that contain every token once, including a padded last one; see `all_sequences`."""
        return -(-(self.num_tokens - 1) // self.config.context_length)

    def bytes_per_token(self, num_predicted: int | None = None) -> float:
        """Return the text bytes per predicted token, to convert bits per token to bits per byte; boundaries count as tokens.
        `num_predicted` uses only the first predicted tokens; None uses all. NaN if they have no bytes.
        """
        predicted = self._num_bytes[1:] if self._is_target is None else self._num_bytes[1:][self._is_target[1:]]
        predicted = predicted if num_predicted is None else predicted[:num_predicted]
        return float(predicted.mean(dtype=np.float64)) or math.nan

    def text(self) -> str:
        """Return the whole stream as text, one document after another."""
        return self.tokenizer.decode(self._stream.tolist())

    def report(self) -> str:
        """Describe the set in one line."""
        return (
            f"{self.num_tokens:,} tokens ({self.config.tokenizer}, {self.bytes_per_token():.2f} bytes each) from "
            f"{self.config.path}, {len(self)} sequences of {self.config.context_length}"
        )

    def sequences(self, indices: Sequence[int], epochs: Sequence[int]) -> TokenBatch:
        """Return training sequences by index, cut as in their epochs; the cut depends only on (seed, epoch)."""
        places = []
        for index, epoch in zip(indices, epochs, strict=True):
            if not 0 <= index < len(self):
                raise IndexError(f"index {index} is not in 0..{len(self) - 1}")
            places.append(index * self.config.context_length + self._offset(epoch))
        return self._cut(places)

    def all_sequences(self, first: int, last: int) -> TokenBatch:
        """Return sequences first..last-1 of the `num_windows` that cover the stream; every token is predicted once."""
        return self._cut([index * self.config.context_length for index in range(first, min(last, self.num_windows))])

    def _offset(self, epoch: int) -> int:
        room = self.num_tokens - 1 - len(self) * self.config.context_length
        if not self.config.random_offset or room < 1:
            return 0
        limit = min(room, self.config.context_length - 1) + 1
        return int(torch.randint(limit, (), generator=make_generator(self.seed, _OFFSET_STREAM, epoch)))

    def _cut(self, places: Sequence[int]) -> TokenBatch:
        S = self.config.context_length
        rows = np.full((len(places), S + 1), self.tokenizer.boundary, dtype=np.int64)
        targets = np.full((len(places), S), IGNORED, dtype=np.int64)
        for row, target, place in zip(rows, targets, places, strict=True):
            piece = self._stream[place : place + S + 1]
            row[: len(piece)] = piece
            target[: len(piece) - 1] = piece[1:]
            if self._is_target is not None:
                target[: len(piece) - 1][~self._is_target[place + 1 : place + len(piece)]] = IGNORED
                target[: int((row == self.tokenizer.boundary).argmax())] = IGNORED
        tokens = rows[:, :-1]
        at = np.where(tokens == self.tokenizer.boundary, np.arange(S), 0)
        starts = np.maximum.accumulate(at, axis=1)
        return TokenBatch(
            tokens=torch.from_numpy(np.ascontiguousarray(tokens)),
            targets=torch.from_numpy(targets),
            starts=torch.from_numpy(starts),
        )


def load_text_set(config: TextDataConfig, seed: int = 0) -> TextSet:
    """Read and tokenise the documents of `config`.

    Raises DataError if there is no text, if a file is not UTF-8 or if a column is missing; TokenizerError for a tokenizer.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if config.path.startswith(TASK_PREFIX):
        return _task_set(config, tokenizer, seed)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    boundary = np.array([tokenizer.boundary], dtype)
    pieces, num_bytes, num_tokens = [boundary], [np.zeros(1, np.uint16)], 1
    for document in read_documents(config):
        ids, widths = tokenizer.encode_with_bytes(document)
        tokens = np.asarray(ids, dtype)
        if not len(tokens):
            continue
        pieces += [tokens, boundary]
        rest = len(document.encode()) - sum(widths)  # after the last token
        num_bytes.append(np.minimum([*widths, rest], np.iinfo(np.uint16).max).astype(np.uint16))
        num_tokens += len(tokens) + 1
        if config.max_tokens is not None and num_tokens >= config.max_tokens:
            break
    stream = np.concatenate(pieces)[: config.max_tokens]
    if num_tokens == 1:
        raise DataError(f"no text in {config.path}: it is empty; check the path")
    part = slice(round(config.share[0] * len(stream)), round(config.share[1] * len(stream)))
    stream, widths_of_part = stream[part], np.concatenate(num_bytes)[: config.max_tokens][part]
    if len(stream) < 2:
        raise DataError(f"share={list(config.share)} of {config.path} has only {len(stream)} tokens; use a larger share")
    return TextSet(config, stream, widths_of_part, tokenizer, seed=seed)


def _task_set(config: TextDataConfig, tokenizer: Tokenizer, seed: int) -> TextSet:
    """Generate problems up to max_tokens tokens; the answers and the boundaries after them are the targets."""
    assert config.max_tokens is not None
    stream, num_bytes, is_target = [tokenizer.boundary], [0], [False]
    for problem in problems(parse_tasks(config.path), seed):
        for text, scored in ((problem.question, False), (problem.answer, True)):
            tokens, widths = tokenizer.encode_with_bytes(text)
            stream += tokens
            num_bytes += widths
            is_target += [scored] * len(tokens)
        stream.append(tokenizer.boundary)
        num_bytes.append(0)
        is_target.append(True)
        if len(stream) >= config.max_tokens:
            break
    part = slice(*(round(share * config.max_tokens) for share in config.share))
    arrays = np.array(stream, np.int64)[part], np.array(num_bytes, np.uint16)[part]
    if len(arrays[0]) < 2:
        raise DataError(f"share={list(config.share)} of {config.path} has only {len(arrays[0])} tokens; use a larger share")
    return TextSet(config, *arrays, tokenizer, seed=seed, is_target=np.array(is_target)[part])


def read_documents(config: TextDataConfig) -> Iterator[str]:
    """Yield the documents of a text set one by one. Raises DataError like load_text_set."""
    if config.path.startswith(HUB_PREFIX):
        yield from _hub_documents(config)
        return
    for file in _files(config.path):
        if file.suffix.lower() == ".parquet":
            yield from _parquet_documents(file, config.text_column)
        else:
            yield _read_text(file)


def _files(path: str) -> list[Path]:
    root = Path(path).expanduser()
    if root.is_dir():
        known = (*TEXT_SUFFIXES, ".parquet")
        files = [file for file in walk(root) if file.suffix.lower() in known]
    else:
        files = [root] if root.is_file() else [Path(match) for match in glob.glob(str(root), recursive=True)]
    files = sorted(file for file in files if file.is_file())
    if not files:
        raise DataError(
            f"no text at {path}: it does not exist or has no text; give text or parquet files or {HUB_PREFIX}OWNER/NAME"
        )
    return files


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start}; convert it, for example with iconv -t UTF-8") from None


def _parquet_documents(file: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file} is not a parquet file or is damaged ({' '.join(str(error).split())}); copy it again"
        ) from error
    if column not in table.schema_arrow.names:
        raise DataError(f"{file} has no column {column!r}; set text_column to one of {table.schema_arrow.names}")
    for batch in table.iter_batches(batch_size=256, columns=[column]):
        for value in batch.column(0).to_pylist():
            if value is not None and not isinstance(value, str):
                raise DataError(f"column {column!r} of {file} has {type(value).__name__}, not text; set text_column")
            yield value or ""


def _hub_documents(config: TextDataConfig) -> Iterator[str]:
    import datasets

    name, split = config.path.removeprefix(HUB_PREFIX), config.split or "train"
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        for row in rows:
            if config.text_column not in row:
                raise DataError(f"{config.path} has no column {config.text_column!r}; set text_column to one of {list(row)}")
            yield row[config.text_column] or ""
    except DataError:
        raise
    except Exception as error:  # each library below has its own errors
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise DataError(
            f"{config.path} cannot be loaded ({reason}); check the name, the split {split!r} and the network"
        ) from error
