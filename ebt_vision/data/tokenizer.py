"""Text to tokens and back: bytes, which need nothing, or any tokenizer file of the `tokenizers` library."""

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

BYTES = "bytes"
_INSTALL = "pip install 'ebt_vision[text]'"


class TokenizerError(ValueError):
    """A tokenizer is missing or damaged, or a text cannot be turned into tokens; the message is one line."""


class Tokenizer(Protocol):
    """`vocab_size` tokens 0..vocab_size-1; `boundary` is the one put before and after every document."""

    vocab_size: int
    boundary: int

    def encode(self, text: str) -> list[int]: ...

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens, and how many UTF-8 bytes of the text each one stands for: those since the end of the token before."""

    def decode(self, tokens: list[int]) -> str: ...

    def stream(self) -> Callable[[int], str]:
        """A function that takes the tokens of a text one by one and gives the new characters that are complete."""


class ByteTokenizer:
    """The 256 bytes of UTF-8, and 256 for the document boundary."""

    vocab_size, boundary = 257, 256

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes; TokenizerError for a text that has none (bytes of a command line that are not UTF-8)."""
        try:
            return list(text.encode())
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid UTF-8 at character {error.start}; convert it to UTF-8") from None

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """The bytes, and 1 for each of them; TokenizerError as encode."""
        tokens = self.encode(text)
        return tokens, [1] * len(tokens)

    def decode(self, tokens: list[int]) -> str:
        """Text; boundaries are left out, bytes that make no character become U+FFFD."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def stream(self) -> Callable[[int], str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(bytes([token])) if token < 256 else ""


class FileTokenizer:
    """A tokenizer.json. The boundary is its end-of-text token, or one more token after its vocabulary where it has none."""

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
        """Tokens without special ones; TokenizerError for a text that is no UTF-8."""
        return self.encode_with_bytes(text)[0]

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """Tokens and their bytes; what no token stands for, such as dropped spaces, counts for the token after it."""
        data = np.array(ByteTokenizer().encode(text), np.uint8)
        found = self._backend.encode(text, add_special_tokens=False)
        # The byte after each character: the places where a character begins, without the first one, and the end.
        begins = np.flatnonzero((data & 0xC0) != 0x80)
        after = np.append(begins, len(data))  # after[i]: the bytes of the first i characters
        ends = np.maximum.accumulate(after[[last for _, last in found.offsets]]) if found.ids else np.zeros(0, np.int64)
        return list(found.ids), np.diff(ends, prepend=0).tolist()

    def decode(self, tokens: list[int]) -> str:
        """Text; boundaries are left out."""
        return str(self._backend.decode([token for token in tokens if token != self.boundary]))

    def stream(self) -> Callable[[int], str]:
        seen: list[int] = []
        shown = 0

        def add(token: int) -> str:
            nonlocal shown
            seen.append(token)
            text = self.decode(seen).rstrip("\ufffd")  # a character that is not complete yet
            new, shown = text[shown:], max(shown, len(text))
            return new

        return add


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or a tokenizer.json, or a folder with one; TokenizerError says in one line what is wrong with another."""
    if name == BYTES:
        return ByteTokenizer()
    path = Path(name).expanduser()
    if not path.exists():
        raise TokenizerError(f"tokenizer {name!r} is unknown; use 'bytes', a tokenizer.json or a folder that has one")
    return FileTokenizer(path)
