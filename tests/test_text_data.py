"""Text data: every token predicted once, documents kept apart, order from (seed, epoch), and one clear line for bad input."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch

from ebt_vision.data.sources import DataError
from ebt_vision.data.text import IGNORED, TextDataConfig, load_text_set
from ebt_vision.data.tokenizer import ByteTokenizer, TokenizerError, load_tokenizer

BOUNDARY = 256


def text_set(path: Path, **options):
    return load_text_set(TextDataConfig(path=str(path), **(dict(context_length=4) | options)))


def test_documents_are_packed_and_each_token_knows_where_its_own_starts(tmp_path: Path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("defg")
    samples = text_set(tmp_path, context_length=9)
    batch = samples.all_sequences(0, samples.num_windows)
    B = BOUNDARY
    assert batch.tokens.tolist() == [[B, *b"abc", B, *b"defg"]]
    assert batch.targets.tolist() == [[*b"abc", B, *b"defg", B]]
    assert batch.starts.tolist() == [[0, 0, 0, 0, 4, 4, 4, 4, 4]]
    assert samples.bytes_per_token() == pytest.approx(7 / 9)


def test_all_sequences_predict_every_token_once(tmp_path: Path):
    text = "the quick brown fox"
    (tmp_path / "a.txt").write_text(text)
    samples = text_set(tmp_path / "a.txt")
    batch = samples.all_sequences(0, samples.num_windows)
    predicted = batch.targets[batch.targets != IGNORED]
    assert bytes(predicted[:-1].tolist()).decode() == text and predicted[-1] == BOUNDARY
    assert len(samples) == len(text.encode()) // 4 + 1  # training leaves out what does not fill a sequence
    assert torch.equal(samples.sequences([2], [5]).tokens, batch.tokens[2:3])  # no offset: every epoch is the same


def test_shares_of_one_file_do_not_overlap_and_miss_nothing(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x" * 50 + "y" * 49)
    first, last = (text_set(tmp_path / "a.txt", share=share) for share in ([0.0, 0.9], [0.9, 1.0]))
    assert first.num_tokens + last.num_tokens == 101
    assert first.num_tokens == 91


def test_bytes_per_token_are_those_of_the_tokens_that_are_predicted(tmp_path: Path):
    """Long words first, short ones after them: each part, and each beginning of it, has its own number of bytes a token."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "größte": 1, "a": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "größte " * 50 + "a " * 50  # 8 bytes and a space; one byte and a space
    (tmp_path / "a.txt").write_text(text)
    options = dict(tokenizer=str(tmp_path / "tokenizer.json"))
    long, short = (text_set(tmp_path / "a.txt", share=share, **options) for share in ([0.0, 0.5], [0.5, 1.0]))
    assert long.bytes_per_token() == pytest.approx(9, abs=0.1) and short.bytes_per_token() == pytest.approx(2, abs=0.2)
    whole = text_set(tmp_path / "a.txt", **options)
    assert whole.bytes_per_token() == len(text.encode()) / 101  # the boundary at the end is predicted too
    assert whole.bytes_per_token(10) == pytest.approx((10 * 9 - 1) / 10)
    text_bytes = text_set(tmp_path / "a.txt", share=[0.0, 0.5])
    assert text_bytes.bytes_per_token() == 1.0


def test_offsets_change_with_the_epoch_and_with_nothing_else(tmp_path: Path):
    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 26) for i in range(200)))
    samples = text_set(tmp_path, random_offset=True)
    epochs = [samples.sequences([1], [epoch]).tokens for epoch in range(8)]
    assert len({tuple(t.flatten().tolist()) for t in epochs}) > 1
    assert torch.equal(text_set(tmp_path, random_offset=True).sequences([3, 1], [0, 5]).tokens[1:], epochs[5])
    whole = samples.sequences(range(len(samples)), [7] * len(samples))
    assert (whole.targets != IGNORED).all()  # always full sequences


def test_parquet_gives_a_document_a_row(tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["ab", None, "cd"]}), tmp_path / "a.parquet")
    samples = text_set(tmp_path / "*.parquet", context_length=6)
    assert samples.all_sequences(0, 1).tokens[0].tolist() == [256, *b"ab", 256, *b"cd"]
    assert text_set(tmp_path, max_tokens=3).num_tokens == 3  # reads no further


def test_a_hub_set_is_streamed_no_further_than_needed(tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.table({"story": ["ab", None, "cd", "ef"]}), tmp_path / "train-0.parquet")
    (tmp_path / "train-1.parquet").write_bytes(b"cut off")  # `datasets` loads a local folder as it loads a hub set
    options = dict(text_column="story", context_length=6)
    samples = text_set(f"hub:{tmp_path}", max_tokens=6, **options)
    assert samples.all_sequences(0, 1).tokens[0].tolist() == [256, *b"ab", 256, *b"cd"]
    with pytest.raises(DataError, match="cannot be loaded"):
        text_set(f"hub:{tmp_path}", **options)
    with pytest.raises(DataError, match="no column 'text'; set text_column to one of \\['story'\\]"):
        text_set(f"hub:{tmp_path}", max_tokens=6)
    with pytest.raises(DataError, match="check the name, the split 'test'"):
        text_set(f"hub:{tmp_path}", split="test", **options)


def test_bad_input_is_one_line(tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.parquet").write_bytes(b"no")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["ab"]}), tmp_path / "a.parquet")
    for name, answer in {
        "latin.txt": "not UTF-8 at byte 3",
        "empty.txt": "no text in",
        "missing.txt": "no text at",
        "broken.parquet": "copy it again",
        "a.parquet": "no column 'text'",
    }.items():
        with pytest.raises(DataError) as error:
            text_set(tmp_path / name)
        assert answer in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(TokenizerError, match="tokenizer 'wordy' is unknown"):
        text_set(tmp_path / "latin.txt", tokenizer="wordy")
    for options, answer in [
        (dict(share=[0.5, 0.5]), "share"),
        (dict(context_length=0), "context_length"),
        (dict(path=""), "empty"),
    ]:
        with pytest.raises(ValueError, match=answer):
            TextDataConfig(**(dict(path="x") | options))


def test_bytes_come_back_as_text_character_by_character():
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer) and tokenizer.vocab_size == 257
    text = "naïve €uro"
    tokens = tokenizer.encode(text)
    assert tokenizer.decode([*tokens, BOUNDARY]) == text
    add = tokenizer.stream()
    pieces = [add(token) for token in tokens]
    assert "".join(pieces) == text and "" in pieces  # incomplete characters wait
    with pytest.raises(TokenizerError, match="not valid UTF-8 at character 1"):
        tokenizer.encode("a\udcff")


def test_a_tokenizer_file(tmp_path: Path):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "to": 1, "be": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.boundary) == (4, 3)
    assert tokenizer.encode("to be what") == [1, 2, 0]
    assert tokenizer.decode([1, 2, 3]) == "to be"
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(str(tmp_path))
