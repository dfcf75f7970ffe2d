"""Generation: the cache equals thinking at all positions at once, tokens are sampled correctly, bad input gives one line."""

import re

import pytest
import torch

from ebt_vision import cli
from ebt_vision.data.tokenizer import ByteTokenizer
from ebt_vision.models.causal_text_ebt import CausalTextEBT, CausalTextEBTConfig
from ebt_vision.models.causal_transformer import CausalTransformer, CausalTransformerConfig
from ebt_vision.text import generation
from ebt_vision.text.generation import GenerateOptions, choose_token, generate, make_reader, predict_all

SIZE = dict(vocab_size=257, context_length=24, embed_dim=16, depth=2, num_heads=2)
KINDS = ["ebt", "transformer"]


def model_of(kind: str, head_std: float = 0.4):
    torch.manual_seed(0)
    if kind == "ebt":
        model = CausalTextEBT(CausalTextEBTConfig(**SIZE, init_step_size=0.3))
    else:
        model = CausalTransformer(CausalTransformerConfig(**SIZE))
    torch.nn.init.normal_(model.head.weight, std=head_std)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_reading_token_by_token_gives_what_all_places_at_once_give(
    kind: str, candidates: int, dtype: torch.dtype, error: float
):
    model = model_of(kind, head_std=0.1).to(dtype)  # a mild one: thinking amplifies float32's rounding
    options = GenerateOptions(num_steps=3, num_candidates=candidates, seed=5)
    tokens = torch.tensor([256, *b"thinking longer"])
    parallel = predict_all(model, tokens, options)
    reader = make_reader(model)
    for place, token in enumerate(tokens):
        with torch.no_grad():
            reader.read(token.reshape(1, 1))
            guess = reader.guess(place, options)
        torch.testing.assert_close(guess.logits[0], parallel.logits[place], rtol=error, atol=error)
        if kind == "ebt":
            assert guess.energies.shape == (candidates, 1) and guess.num_forward == candidates * 4
            torch.testing.assert_close(
                guess.energies[:, 0], parallel.energies[:, place], rtol=error, atol=error
            )  # energies are about 100


def test_an_explanation_is_the_trajectory_of_the_chosen_candidate():
    model = model_of("ebt", head_std=0.1)
    options = GenerateOptions(num_tokens=6, num_steps=3, num_candidates=2, temperature=0, seed=5, explain=True)
    found = list(generate(model, ByteTokenizer(), "to be", options))
    plain = list(
        generate(
            model, ByteTokenizer(), "to be", GenerateOptions(num_tokens=6, num_steps=3, num_candidates=2, temperature=0, seed=5)
        )
    )
    assert [t.token for t in found] == [t.token for t in plain] and all(t.explanation is None for t in plain)
    tokens = [256, *b"to be"]
    for token in found:
        explanation = token.explanation
        assert len(explanation.energies) == 4 and explanation.energies[-1] == pytest.approx(token.energy)
        # One thinking step of the same candidates: the choice after one step. The candidate is the one that wins after three.
        parallel = predict_all(model, torch.tensor(tokens), options)
        winner = parallel.trajectories[int(parallel.energies[:, -1].argmin())]
        first, last = winner.logits[1, -1].softmax(0), winner.logits[3, -1].softmax(0)
        assert explanation.first_choice == int(first.argmax()) and explanation.probability == pytest.approx(
            float(last.max()), rel=1e-4
        )
        assert explanation.runner_up == int(last.topk(2).indices[1])
        assert explanation.runner_up_probability == pytest.approx(float(last.topk(2).values[1]), rel=1e-4)
        assert explanation.first_probability == pytest.approx(float(first[token.token]), rel=1e-4)
        tokens.append(token.token)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_changes_no_token_also_where_the_context_is_full(kind: str, monkeypatch: pytest.MonkeyPatch):
    model = model_of(kind)

    def never_the_end(logits, *rest):
        return choose_token(logits.index_fill(0, torch.tensor([256]), -1e9), *rest)

    monkeypatch.setattr(generation, "choose_token", never_the_end)
    options = GenerateOptions(num_tokens=40, num_steps=2, temperature=1.0, top_p=0.9)
    runs = [list(generate(model, ByteTokenizer(), "to be", options, use_cache=cache)) for cache in (True, False)]
    assert [t.token for t in runs[0]] == [t.token for t in runs[1]] and len(runs[0]) == 40
    again = list(generate(model, ByteTokenizer(), "to be", options))
    assert again == runs[0]
    other = GenerateOptions(num_tokens=40, num_steps=2, top_p=0.9, seed=1)
    assert [t.token for t in generate(model, ByteTokenizer(), "to be", other)] != [t.token for t in runs[0]]


def test_more_candidates_lower_the_energy_and_langevin_and_tolerance_are_obeyed():
    model, tokenizer = model_of("ebt"), ByteTokenizer()

    def first(**options):
        return next(generate(model, tokenizer, "to be", GenerateOptions(**(dict(temperature=0.0) | options))))

    one, many = first(), first(num_candidates=6)
    assert many.energy <= one.energy and many.num_forward == 6 * one.num_forward
    assert first(langevin_std=0.5).energy != one.energy
    assert first(num_steps=50, tolerance=0.2).num_forward < 51


def test_tokens_are_drawn_as_asked():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def shares(**options) -> list[float]:
        g = torch.Generator().manual_seed(0)
        drawn = [choose_token(logits, GenerateOptions(**options), g) for _ in range(2000)]
        return [drawn.count(token) / 2000 for token in range(4)]

    assert shares(temperature=0.0) == [1, 0, 0, 0]
    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)
    assert shares(top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert shares(top_p=0.5) == [1, 0, 0, 0]
    assert shares(temperature=0.5)[0] == pytest.approx(0.25 / 0.365, abs=0.04)


def test_the_document_s_end_stops_generation():
    model = model_of("transformer")
    torch.nn.init.zeros_(model.head.weight)
    hidden = model.trunk.encode(torch.tensor([[256, 97]]))[0][0, -1]
    model.head.weight.data[256] = 100.0 * hidden.detach()
    assert list(generate(model, ByteTokenizer(), "a", GenerateOptions(temperature=0.0))) == []


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (dict(num_steps=0), "num_steps=0"),
        (dict(num_candidates=0), "num_candidates=0"),
        (dict(temperature=-1.0), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(langevin_std=-1.0), "langevin_std"),
    ],
)
def test_a_wrong_option_is_one_line(options: dict, answer: str):
    with pytest.raises(ValueError, match=answer):
        GenerateOptions(**options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoints") / "text"
    model_of("ebt").save_pretrained(folder)
    return str(folder)


def test_the_command_writes_the_prompt_and_what_follows(checkpoint: str, capsys: pytest.CaptureFixture[str]):
    words = ["generate", "to be", "--model", checkpoint, "--tokens", "5", "--steps", "2", "--candidates", "2", "--top-p", "0.9"]
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("to be") and captured.out.endswith("\n")
    assert "5 tokens" in captured.err and "energy" in captured.err
    assert cli.main(words) == 0
    assert capsys.readouterr().out == captured.out


def test_the_command_explains_every_token(checkpoint: str, capsys: pytest.CaptureFixture[str]):
    words = ["generate", "to be", "--model", checkpoint, "--tokens", "4", "--steps", "3", "--temperature", "0"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert cli.main([*words, "--explain"]) == 0
    lines = capsys.readouterr().out.split("\n", 5)
    assert lines[0].split() == ["token", "probability", "runner-up", "after", "one", "step", "energies", "by", "step"]
    assert lines[5] == text
    for line in lines[1:5]:
        assert len(re.findall(r"-?\d+\.\d\d(?!\d)", line)) == 4  # the energies before and after three steps


def test_the_command_answers_bad_input_in_one_line(
    checkpoint: str, tiny_checkpoint, tmp_path, capsys: pytest.CaptureFixture[str]
):
    for words, answer in [
        (["", "--model", checkpoint], "the prompt is empty"),
        (["x" * 24, "--model", checkpoint], "24 tokens, but the model accepts 23"),
        (["caf\udce9", "--model", checkpoint], "not valid UTF-8 at character 3"),
        (["x", "--model", checkpoint, "--tokenizer", "wordy"], "tokenizer 'wordy' is unknown"),
        (["x", "--model", str(tiny_checkpoint)], "cannot generate text"),
        (["x", "--model", str(tmp_path / "none")], "neither a shipped checkpoint"),
        (["x", "--model", checkpoint, "--top-p", "2"], "top_p=2"),
    ]:
        assert cli.main(["generate", *words]) == 2
        err = capsys.readouterr().err
        assert answer in err and err.count("\n") == 1 and "Traceback" not in err
    model_of("transformer").save_pretrained(tmp_path / "transformer")
    for options, answer in {
        ("--steps", "3"): "--steps has no effect on a causal_transformer",
        ("--candidates", "2"): "--candidates has no effect",
        ("--explain",): "--explain has no effect on a causal_transformer",
        ("--temperature", "0", "--top-p", "0.9"): "--top-p has no effect at --temperature 0",
    }.items():
        assert cli.main(["generate", "x", "--model", str(tmp_path / "transformer"), *options]) == 2
        assert answer in capsys.readouterr().err
    for steps in ("0", "many"):
        with pytest.raises(SystemExit) as left:
            cli.main(["generate", "x", "--model", checkpoint, "--steps", steps])
        assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1
