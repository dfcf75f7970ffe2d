"""Text to tokens and back: bytes, which need no file, or any tokenizer file of the `tokenizers` library."""

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

BYTES = "bytes"
_INSTALL = "pip install 'ebt_vision[text]'"


class TokenizerError(ValueError):
    """A tokenizer is missing or damaged, or a text cannot be tokenised; the message is one line."""


class Tokenizer(Protocol):
    """`vocab_size` tokens 0..vocab_size-1; `boundary` is the token before and after every document."""

    vocab_size: int
    boundary: int

    def encode(self, text: str) -> list[int]: ...

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """Return the tokens, and for each the number of UTF-8 bytes of text since the end of the previous token."""

    def decode(self, tokens: list[int]) -> str: ...

    def stream(self) -> Callable[[int], str]:
        """Return a function that takes the tokens of a text one by one and returns the new complete characters."""


class ByteTokenizer:
    """The 256 bytes of UTF-8, and 256 for the document boundary."""

    vocab_size, boundary = 257, 256

    def encode(self, text: str) -> list[int]:
        """Return UTF-8 bytes. Raises TokenizerError for a text without UTF-8 form (command line bytes that are not UTF-8)."""
        try:
            return list(text.encode())
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid UTF-8 at character {error.start}; convert it to UTF-8") from None

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """Return the bytes, and 1 for each of them. Raises TokenizerError like encode."""
        tokens = self.encode(text)
        return tokens, [1] * len(tokens)

    def decode(self, tokens: list[int]) -> str:
        """Return the text without boundaries; invalid bytes become U+FFFD."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def stream(self) -> Callable[[int], str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(bytes([token])) if token < 256 else ""


class FileTokenizer:
    """A tokenizer.json. The boundary is its end-of-text token, or an additional token after its vocabulary."""

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise TokenizerError(f"tokenizer {path} needs the tokenizers package; {_INSTALL}") from error
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            self._backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            reason = " ".join(str(error).split())
            raise TokenizerError(f"tokenizer {file} cannot be read ({reason}); give a tokenizer.json or 'bytes'") from error
        size = self._backend.get_vocab_size(with_added_tokens=True)
        ends = (self._backend.token_to_id(name) for name in ("<|endoftext|>", "</s>", "<eos>", "[SEP]"))
        end = next((token for token in ends if token is not None), None)
        self.boundary = size if end is None else end
        self.vocab_size = size + (end is None)

    def encode(self, text: str) -> list[int]:
        """Return the tokens without special ones. Raises TokenizerError for a text that is not UTF-8."""
        return self.encode_with_bytes(text)[0]

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """Return the tokens and their bytes. Text without a token, such as dropped spaces, counts for the next token."""
        data = np.array(ByteTokenizer().encode(text), np.uint8)
        found = self._backend.encode(text, add_special_tokens=False)
        # The byte after each character: the start of every character except the first, and the end.
        begins = np.flatnonzero((data & 0xC0) != 0x80)
        after = np.append(begins, len(data))  # after[i]: number of bytes of the first i characters
        ends = np.maximum.accumulate(after[[last for _, last in found.offsets]]) if found.ids else np.zeros(0, np.int64)
        return list(found.ids), np.diff(ends, prepend=0).tolist()

    def decode(self, tokens: list[int]) -> str:
        """Return the text without boundaries."""
        return str(self._backend.decode([token for token in tokens if token != self.boundary]))

    def stream(self) -> Callable[[int], str]:
        seen: list[int] = []
        shown = 0

        def add(token: int) -> str:
            nonlocal shown
            seen.append(token)
            text = self.decode(seen).rstrip("\ufffd")  # an incomplete character
            new, shown = text[shown:], max(shown, len(text))
            return new

        return add


def load_tokenizer(name: str) -> Tokenizer:
    """Load `bytes`, a tokenizer.json, or a folder with one. Raises TokenizerError with a one-line message."""
    if name == BYTES:
        return ByteTokenizer()
    path = Path(name).expanduser()
    if not path.exists():
        raise TokenizerError(f"tokenizer {name!r} is unknown; use 'bytes', a tokenizer.json or a folder that has one")
    return FileTokenizer(path)
