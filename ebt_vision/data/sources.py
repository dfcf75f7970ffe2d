"""Sources of training images: folders, parquet, the Hugging Face hub and WebDataset shards, as bytes by index.

This module walks folders itself. `datasets`' ImageFolder treats words such as "test" in file names as splits and finds no
classes in ROOT/CLASS/images/FILE. Shards are indexed with tarfile, because WebDataset only streams, and the order of an epoch
needs random access.
"""

import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ebt_vision.data.decoding import SUFFIXES

if TYPE_CHECKING:
    import datasets

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
HUB_PREFIX = "hub:"


class DataError(ValueError):
    """The data set is missing, empty or unreadable; the one-line message names the place and the remedy."""


class MissingSplitError(DataError):
    """The data set exists, but it has no split of this name."""


class Source(Protocol):
    """Encoded images by index; `labels` has one integer per image, or is None."""

    labels: list[int] | None
    class_names: list[str] | None

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """A key that changes when the files change, for caches of data made from the images."""

    def name(self, index: int) -> str:
        """Return a readable name of image `index`."""

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of image `index`, empty if there are none. Raises OSError if they cannot be read."""


def open_source(path: str, split: str | None, image_column: str, label_column: str | None) -> Source:
    """Detect the kind of `path` and index it, without decoding an image; see `DataConfig.path` for the forms.

    Raises DataError if nothing is found, if a split is missing or ambiguous, or if a column is missing.
    """
    if path.startswith(HUB_PREFIX):
        return _open_table(path, path.removeprefix(HUB_PREFIX), split or "train", None, image_column, label_column)
    root = Path(path).expanduser()
    if root.is_dir():
        root, files = _files_of_folder(root, split)
    else:
        patterns = [str(root)] if root.is_file() else expand_braces(str(root))
        files = sorted({Path(match) for pattern in patterns for match in _matches(pattern)})
        if split is not None and files:
            raise DataError(f"split={split!r} is only for a folder or {HUB_PREFIX}OWNER/NAME, not for {path}; remove it")
        root = Path(os.path.commonpath([file.parent for file in files])) if files else root
    by_suffix = {suffix: [file for file in files if file.suffix.lower() == suffix] for suffix in (".parquet", ".tar")}
    if by_suffix[".parquet"]:
        names = [str(file) for file in by_suffix[".parquet"]]
        return _open_table(path, "parquet", "train", names, image_column, label_column)
    if by_suffix[".tar"]:
        return TarSource(by_suffix[".tar"], label_column, image_column)
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not images:
        raise DataError(
            f"no images at {path}: it does not exist or has no images; "
            f"give a folder of images, *.parquet, *.tar shards or {HUB_PREFIX}OWNER/NAME"
        )
    return FolderSource(root, images, has_labels=label_column is not None)


def files_fingerprint(root: Path, files: Sequence[Path]) -> str:
    """SHA-256 over name, size and modification time of each file: fast for a million files, and independent of `root`."""
    digest = hashlib.sha256()
    for file in files:
        try:
            status = file.stat()
            state = f"{status.st_size}\0{status.st_mtime_ns}"
        except OSError:  # a broken link: an unreadable image
            state = "missing"
        digest.update(f"{os.path.relpath(file, root)}\0{state}\n".encode())
    return digest.hexdigest()


def expand_braces(pattern: str) -> list[str]:
    """Expand the shell's braces, as in WebDataset's shard names: "a-{000..011}.tar" gives 12 names, "{a,b}.tar" two."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        parts = [str(n).zfill(len(numbers[1])) for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        parts = found[1].split(",")
    names = (pattern[: found.start()] + part + pattern[found.end() :] for part in parts)
    return list(itertools.chain.from_iterable(map(expand_braces, names)))


def _matches(pattern: str) -> list[str]:
    """Return the files of one brace-free pattern. A name without a wildcard is one file, which must exist."""
    if os.path.isfile(pattern):
        return [pattern]
    matches = [match for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)]
    if not matches:
        raise DataError(f"no file at {pattern}; check the path, or the numbers in its braces")
    return matches


def _files_of_folder(root: Path, split: str | None) -> tuple[Path, list[Path]]:
    """Return (root, all files under it, sorted) of one split: a sub-folder of this name, or the files that start with it."""
    if split is not None and (root / split).is_dir():
        return root / split, walk(root / split)
    files = walk(root)
    found = {name for file in files if (name := _split_of(file, root))}
    if split is not None:
        chosen = [file for file in files if re.match(re.escape(split) + r"([-_.\d]|$)", file.name)]
        if not chosen:
            raise MissingSplitError(
                f"{root} has neither a folder {split!r} nor files {split}-*; its splits: {sorted(found) or 'none'}"
            )
        return root, chosen
    if len(found) > 1:
        raise DataError(f"{root} has the splits {', '.join(sorted(found))}; choose one with split=")
    return root, files


def _split_of(file: Path, root: Path) -> str | None:
    """Return the split of a top folder ("train/...") or of the name of a table or shard ("train-00000.parquet")."""
    parts = file.relative_to(root).parts
    is_table = len(parts) == 1 and file.suffix.lower() in (".parquet", ".tar")
    word = parts[0] if len(parts) > 1 else re.split(r"[-_.\d]", parts[0])[0] if is_table else ""
    return word if word.lower() in SPLIT_NAMES else None


def walk(root: Path) -> list[Path]:
    """Return every file under `root` except hidden ones, sorted. Links to folders are followed, except a link to a folder that
    contains the link itself."""
    found: list[Path] = []
    above = {str(root): frozenset({_identity(root)})}  # for each folder: itself and its parents
    for folder, subfolders, names in os.walk(root, followlinks=True):
        inside = above.pop(folder)
        kept = []
        for name in subfolders:
            path = os.path.join(folder, name)
            if not name.startswith(".") and (identity := _identity(path)) not in inside:
                above[path] = inside | {identity}
                kept.append(name)
        subfolders[:] = kept
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _identity(folder: str | Path) -> tuple[int, int]:
    """Return the identity of a folder, independent of its path."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


class FolderSource:
    """Image files. The class of ROOT/CLASS/.../FILE is CLASS; there are no classes unless every file has one."""

    def __init__(self, root: Path, files: Sequence[Path], has_labels: bool) -> None:
        self._root, self._files = root, list(files)
        parts = [file.relative_to(root).parts for file in files]
        self.labels: list[int] | None = None
        self.class_names: list[str] | None = None
        if has_labels and all(len(part) > 1 for part in parts):
            self.class_names = sorted({part[0] for part in parts})
            numbers = {name: number for number, name in enumerate(self.class_names)}
            self.labels = [numbers[part[0]] for part in parts]

    def __len__(self) -> int:
        return len(self._files)

    def fingerprint(self) -> str:
        return files_fingerprint(self._root, self._files)

    def name(self, index: int) -> str:
        return str(self._files[index].relative_to(self._root))

    def read(self, index: int) -> bytes:
        return self._files[index].read_bytes()


class TableSource:
    """An image column of a `datasets.Dataset` that is not decoded."""

    def __init__(
        self,
        where: str,
        table: "datasets.Dataset",
        image_column: str,
        label_column: str | None,
        fingerprint: Callable[[], str],
    ) -> None:
        if image_column not in table.column_names:
            raise DataError(f"{where} has no column {image_column!r}; set image_column to one of {table.column_names}")
        self._column, self._fingerprint = image_column, fingerprint
        self.labels, self.class_names = _read_labels(where, table, label_column)
        from datasets import Image

        self._images = table.select_columns([image_column]).cast_column(image_column, Image(decode=False))

    def __len__(self) -> int:
        return len(self._images)

    def fingerprint(self) -> str:
        return self._fingerprint()

    def name(self, index: int) -> str:
        stored = (self._images[index][self._column] or {}).get("path")
        return f"row {index} ({stored})" if stored else f"row {index}"

    def read(self, index: int) -> bytes:
        stored = self._images[index][self._column] or {}
        if stored.get("bytes") is None and stored.get("path"):
            return Path(stored["path"]).read_bytes()
        return stored.get("bytes") or b""


def _read_labels(where: str, table: "datasets.Dataset", column: str | None) -> tuple[list[int] | None, list[str] | None]:
    """Return labels and class names of a column of integers, ClassLabel or strings; a missing column "label" means no
    labels."""
    if column is None or (column == "label" and column not in table.column_names):
        return None, None
    if column not in table.column_names:
        raise DataError(f"{where} has no column {column!r}; set label_column to one of {table.column_names} or to null")
    values = list(table[column])
    if all(value is None or value == -1 for value in values):  # test splits on the hub mark "no label" like this
        return None, None
    if None in values:
        raise DataError(
            f"{values.count(None)} of {len(values)} rows have no label in column {column!r} of {where} (the first is row "
            f"{values.index(None)}); label them, remove them, or set label_column to null"
        )
    if all(isinstance(value, str) for value in values):
        return _numbered(values)
    if not all(isinstance(value, int) for value in values):
        raise DataError(f"column {column!r} of {where} is not all integers or all strings; set label_column to null")
    return values, getattr(table.features[column], "names", None)


def _numbered(values: list[str]) -> tuple[list[int], list[str]]:
    """Number class names 0, 1, ... in alphabetical order; return labels and names."""
    names = sorted(set(values))
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers[value] for value in values], names


def _open_table(
    where: str, builder: str, split: str, files: list[str] | None, image_column: str, label_column: str | None
) -> TableSource:
    if files is not None and _num_rows(files) == 0:
        raise DataError(f"{where} has no images: 0 rows in {len(files)} parquet file(s); check the files")
    import datasets

    try:
        table = datasets.load_dataset(builder, data_files=files, split=split)
    except Exception as error:  # each library below has its own errors, from an unknown name to a damaged file
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        kind = MissingSplitError if files is None and reason.lower().startswith("unknown split") else DataError
        raise kind(f"{where} cannot be loaded ({reason}); check the name, the split {split!r} and the files") from error

    def fingerprint() -> str:
        if files is None:  # a hub set: use its own record of downloads
            downloads = sorted(map(str, table.info.download_checksums or {}))  # addresses that contain the revision
            return f"{where} {split} {table.info.version} {table.info.download_size} {len(table)} {downloads}"
        return files_fingerprint(Path(files[0]).parent, [Path(file) for file in files])

    return TableSource(where, table, image_column, label_column, fingerprint)


def _num_rows(files: list[str]) -> int | None:
    """Return the rows of parquet files; None if one is damaged, which load_dataset then explains."""
    import pyarrow
    from pyarrow import parquet

    try:
        return sum(parquet.read_metadata(file).num_rows for file in files)
    except (OSError, pyarrow.ArrowException):
        return None


@dataclass(frozen=True, slots=True)
class _Member:
    shard: Path
    key: str
    offset: int
    size: int


class TarSource:
    """WebDataset shards. Files with the same key (the path up to the first dot of the name) form a sample, with one image.

    If a sample has several images, `image_column` names the field (the part after the key). Without it, the only field without
    a dot is used: 000.jpg, not 000.depth.png. Labels come from KEY.cls (an integer or a class name), or from `label_column` of
    KEY.json; there are none unless every image has one.
    """

    def __init__(self, shards: Sequence[Path], label_column: str | None, image_column: str = "image") -> None:
        self._members: list[_Member] = []
        self._shards = list(shards)
        labels: list[int | str | None] = []
        for shard in shards:
            images: dict[str, dict[str, _Member]] = {}
            found: dict[str, int | str] = {}
            try:
                with tarfile.open(shard, "r:") as tar:
                    for member in tar:
                        folder, _, name = member.name.rpartition("/")
                        stem, _, extension = name.partition(".")
                        key = f"{folder}/{stem}" if folder else stem
                        suffix = "." + extension.rpartition(".")[2].lower()
                        if not member.isfile() or name.startswith("."):
                            continue
                        if suffix in SUFFIXES:
                            place = _Member(shard, key, member.offset_data, member.size)
                            images.setdefault(key, {})[extension.lower()] = place
                        elif suffix in (".cls", ".json") and label_column is not None:
                            content = tar.extractfile(member).read()  # type: ignore[union-attr]
                            value = _member_label(content, suffix, label_column, f"{member.name} in {shard}")
                            if value is not None and (suffix == ".cls" or key not in found):
                                found[key] = value
            except (tarfile.TarError, OSError) as error:
                raise DataError(f"{shard} is not an uncompressed tar, or is damaged ({error}); copy it again") from error
            self._members += [_choose_image(fields, image_column) for fields in images.values()]
            labels += [found.get(key) for key in images]
        if not self._members:
            raise DataError(f"no images in {shards[0]}{' and the other shards' if len(shards) > 1 else ''}; check the shards")
        numbers = [label for label in labels if isinstance(label, int)]
        names = [label for label in labels if isinstance(label, str)]
        if numbers and names:
            raise DataError(
                f"labels of {shards[0]} are not all integers or all names (both {numbers[0]} and {names[0]!r} occur); "
                "set label_column to null"
            )
        self.labels: list[int] | None = numbers if len(numbers) == len(labels) else None
        self.class_names: list[str] | None = None
        if len(names) == len(labels):
            self.labels, self.class_names = _numbered(names)

    def __len__(self) -> int:
        return len(self._members)

    def fingerprint(self) -> str:
        return files_fingerprint(self._shards[0].parent, self._shards)

    def name(self, index: int) -> str:
        return f"{self._members[index].shard.name}:{self._members[index].key}"

    def read(self, index: int) -> bytes:
        member = self._members[index]
        with member.shard.open("rb") as file:
            file.seek(member.offset)
            return file.read(member.size)


def _choose_image(fields: dict[str, _Member], image_column: str) -> _Member:
    """Return the image of a sample from its images by field. Raises DataError if the choice is ambiguous."""
    plain = [field for field in fields if "." not in field]
    chosen = [image_column.lower()] if image_column.lower() in fields else plain or list(fields)
    member = fields[chosen[0]]
    if len(chosen) > 1:
        names = ", ".join(chosen[:3]) + (", ..." if len(chosen) > 3 else "")
        raise DataError(
            f"sample {member.key} in {member.shard} has {len(chosen)} images ({names}; keys end at the name's first dot); "
            f"set image_column to one of them, or rename the files"
        )
    return member


def _member_label(content: bytes, suffix: str, label_column: str, where: str) -> int | str | None:
    """Return the label in a .cls or .json file of a shard; None without a label. Raises DataError for an unreadable file."""
    try:
        text = content.decode().strip()
        if suffix == ".cls":
            return int(text) if re.fullmatch(r"-?\d+", text) else text or None
        value = json.loads(text)
    except ValueError as error:
        reason = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
        raise DataError(f"{where} is not valid {reason} ({error}); correct it, or set label_column to null") from error
    value = value.get(label_column) if isinstance(value, dict) else value
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None
