"""Text scores: means over tokens, best by energy, independent of the batch; shifts; the two programs."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from ebt_vision.benchmark.text import TextScores, add_typos, score_text, swap_case
from ebt_vision.data.text import TextDataConfig, load_text_set
from ebt_vision.models.causal_text_ebt import CausalTextEBT, CausalTextEBTConfig
from ebt_vision.models.causal_transformer import CausalTransformer, CausalTransformerConfig

ROOT = Path(__file__).parents[1]
SIZE = dict(vocab_size=257, context_length=16, embed_dim=16, depth=1, num_heads=2)


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "eval" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def models() -> tuple[CausalTextEBT, CausalTransformer]:
    torch.manual_seed(0)
    ebt = CausalTextEBT(CausalTextEBTConfig(**SIZE, init_step_size=0.3))
    transformer = CausalTransformer(CausalTransformerConfig(**SIZE))
    for model in (ebt, transformer):
        torch.nn.init.normal_(model.head.weight, std=0.3)
    return ebt.eval(), transformer.eval()


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("To be, or not to be: that is the question.")  # 42 bytes: the last sequence is short
    return path


def test_scores_by_hand():
    losses = np.array([[[1.0, 3.0], [0.5, 3.5]], [[2.0, 2.0], [4.0, 0.5]]], dtype=np.float32)  # (N, T, K)
    energies = np.array([[[0.0, 0.0], [0.0, 1.0]], [[1.0, -1.0], [1.0, 0.0]]], dtype=np.float32)
    scores = TextScores(losses=losses, energies=energies, bytes_per_token=2.0)
    assert scores.best_of(1).tolist() == [[1.0, 3.0], [0.5, 3.5]]
    assert scores.best_of(2).tolist() == [[1.0, 2.0], [0.5, 0.5]]
    one, two = scores.summary(1)[1], scores.summary(2)[1]
    assert one["perplexity"] == pytest.approx(math.exp(2.0)) and one["gain_nats"] == pytest.approx(0.0)
    assert two["perplexity"] == pytest.approx(math.exp(0.5)) and two["gain_nats"] == pytest.approx(1.5)
    assert two["bits_per_byte"] == pytest.approx(0.5 / math.log(2) / 2)
    assert one["gain_error"] == pytest.approx(np.std([0.5, -0.5], ddof=1) / math.sqrt(2))
    bins = scores.gain_by_difficulty(np.array([5.0, 1.0]))
    assert [b["difficulty"] for b in bins] == [1.0, 5.0]
    assert [b["gain_nats"] for b in bins] == pytest.approx([-0.5, 0.5])


def test_every_token_is_scored_once_whatever_the_batch(book: Path):
    ebt, transformer = models()
    samples = load_text_set(TextDataConfig(path=str(book), context_length=16))
    scores = [score_text(ebt, samples, num_steps=2, num_candidates=2, batch_size=size) for size in (1, 3)]
    assert scores[0].losses.shape == (2, 2, 43)  # 42 bytes and the end
    np.testing.assert_allclose(scores[0].losses, scores[1].losses, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores[0].energies, scores[1].energies, rtol=1e-4, atol=1e-4)
    assert np.abs(scores[0].losses[0] - scores[0].losses[1]).max() > 1e-3
    assert score_text(ebt, samples, num_steps=1, num_candidates=1, max_tokens=20).losses.shape == (1, 1, 20)
    baseline = score_text(transformer, samples)
    tokens = torch.tensor([256, *book.read_bytes()])
    logits = transformer(tokens[None, :16]).log_softmax(-1)[0]
    expected = -logits.gather(1, tokens[1:17, None])[:, 0]
    np.testing.assert_allclose(baseline.losses[0, 0, :16], expected.detach(), rtol=1e-4, atol=1e-5)
    assert len(baseline.summary(1)) == 1


def test_shifts_come_from_the_seed():
    text = "The Question " * 200
    assert swap_case("To Be") == "tO bE"
    typos = add_typos(text, 0)
    assert typos == add_typos(text, 0) != add_typos(text, 1)
    kept = sum(a == b for a, b in zip(text[:40], typos[:40], strict=True))
    assert typos != text and kept >= 5 and abs(len(typos) - len(text)) < 60


def test_the_program_writes_a_report_of_every_model_and_text(book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names = []
    for name, model in zip(("ebt", "lm"), models(), strict=True):
        model.save_pretrained(tmp_path / name)
        names.append(str(tmp_path / name))
    words = ["--models", *names, "--data", str(book), "--steps", "2", "--candidates", "2", "--limit", "32"]
    main = program("text_perplexity").main
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["text"] for row in results["rows"]} == {"as is", "swapped case", "typos", "code"}
    kinds = {(row["model"], row["candidates"], row["steps"]) for row in results["rows"]}
    assert kinds == {(names[0], 1, 1), (names[0], 1, 2), (names[0], 2, 1), (names[0], 2, 2), (names[1], 1, 1)}
    assert len(results["difficulty"]) == 40 and "bits per byte" in (tmp_path / "out" / "report.md").read_text()
    capsys.readouterr()
    for extra, answer in [
        (["--texts", "french"], "NAME=FILE"),
        (["--context-length", "17"], "above the 16"),
        (["--tokenizer", "wordy"], "unknown"),
        (["--share", "0.5", "0.5"], "share"),
    ]:
        assert main([*words, *extra, "--output", str(tmp_path / "bad")]) == 2
        err = capsys.readouterr().err
        assert answer in err and err.count("\n") == 1
