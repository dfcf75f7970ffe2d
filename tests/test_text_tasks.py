"""Generated problems: one right answer each, targets only in answers, and exact scores over steps and candidates."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ebt_vision.benchmark.text_thinking import AnswerScores, answer_batch, best_temperatures, score_answers, task_problems
from ebt_vision.core.rng import make_generator
from ebt_vision.data.sources import DataError
from ebt_vision.data.text import IGNORED, TextDataConfig, load_text_set
from ebt_vision.data.text_tasks import BRACKETS, TASKS, Problem, TaskSizes, parse_tasks, problems
from ebt_vision.models.causal_text_ebt import CausalTextEBT, CausalTextEBTConfig
from ebt_vision.models.causal_transformer import CausalTransformer, CausalTransformerConfig
from ebt_vision.objectives.text import TextObjectiveConfig, toward_tokens
from eval import text_thinking

SIZES = dict(context_length=32, embed_dim=16, depth=1, num_heads=2)


def closed(question: str) -> str:
    """An independent answer to a Dyck problem: close what a stack still holds."""
    stack: list[str] = []
    for character in question.removeprefix("d:").removesuffix("="):
        if character in BRACKETS:
            stack.append(BRACKETS[character])
        else:
            assert stack.pop() == character
    return "".join(reversed(stack))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_answers_follow_from_their_questions(task: str, size: int):
    rng = np.random.default_rng(size)
    for _ in range(20):
        problem = TASKS[task](size, rng)
        body = problem.question[:-1]
        assert problem.question.endswith("=")
        if task == "copy":
            assert problem.answer == body.removeprefix("c:") and len(problem.answer) == size
        elif task == "reverse":
            assert problem.answer[::-1] == body.removeprefix("r:") and len(problem.answer) == size
        elif task == "addition":
            first, second = body.split("+")
            assert len(first) == len(second) == size and int(problem.answer[::-1]) == int(first) + int(second)
        else:
            assert problem.answer == closed(problem.question) and len(problem.answer) == size


def test_problems_depend_on_the_seed_alone_and_cover_tasks_and_sizes():
    tasks = parse_tasks("task:copy:1-3+dyck:2")
    drawn = [problem for problem, _ in zip(problems(tasks, 5), range(300), strict=False)]
    again = [problem for problem, _ in zip(problems(tasks, 5), range(300), strict=False)]
    other = [problem for problem, _ in zip(problems(tasks, 6), range(300), strict=False)]
    assert drawn == again != other
    assert {len(p.answer) for p in drawn if p.question[0] == "c"} == {1, 2, 3}
    assert {len(p.answer) for p in drawn if p.question[0] == "d"} == {2}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("task:sorting:1-3", "the task 'sorting' of .* is unknown; use one of copy, reverse, addition, dyck"),
        ("task:copy", "the sizes '' .* use for example copy:1-8"),
        ("task:copy:0-3", "the sizes '0-3'"),
        ("task:copy:4-3", "the sizes '4-3'"),
        ("task:copy:1-2000", "1..1000"),
    ],
)
def test_a_task_that_does_not_exist_is_one_line(path: str, message: str):
    with pytest.raises(DataError, match=message):
        TextDataConfig(path=path, max_tokens=100)


def test_a_task_needs_a_number_of_tokens():
    with pytest.raises(ValueError, match="max_tokens is required for task:copy:1-3, which has no end"):
        TextDataConfig(path="task:copy:1-3")


def test_only_whole_problems_have_targets_and_only_in_their_answers():
    config = TextDataConfig(path="task:copy:3", max_tokens=400, context_length=25, random_offset=True)
    samples = load_text_set(config, seed=3)
    batch = samples.sequences(range(len(samples)), [1] * len(samples))
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        inside = False
        for position, (token, target) in enumerate(zip(tokens, targets, strict=True)):
            inside = inside or token == 256  # the first document of a sequence may lack its question
            text = bytes(min(t, 255) for t in tokens[: position + 1])
            document = text.rsplit(b"\xff", 1)[-1]
            if not inside or b"=" not in document:
                assert target == IGNORED
            else:
                question, answer = document[2:].split(b"=")
                assert target == ([*question, 256][len(answer)])
    # Three letters and the boundary of each problem: 3 bytes for 4 targets.
    assert samples.bytes_per_token(40) == pytest.approx(0.75)


def test_shares_of_a_task_are_parts_of_one_stream():
    whole = load_text_set(TextDataConfig(path="task:copy:1-4", max_tokens=200), seed=1).text()
    parts = [
        load_text_set(TextDataConfig(path="task:copy:1-4", max_tokens=200, share=share), seed=1).text()
        for share in ((0.0, 0.75), (0.75, 1.0))
    ]
    assert "".join(parts) == whole


def test_starts_on_the_way_to_a_token_by_hand():
    start = torch.zeros(1, 4, 5)
    targets = torch.tensor([[1, 2, IGNORED, 3]])
    right = toward_tokens(start, targets, TextObjectiveConfig(answer_share=1.0, wrong_share=0.0), make_generator(0))
    assert torch.equal(right[0].argmax(-1)[[0, 1, 3]], torch.tensor([1, 2, 3])) and not right[0, 2].any()
    assert ((right >= 0) & (right <= 8.0)).all() and (right != 0).sum() == 3
    wrong = toward_tokens(
        start.expand(200, 4, 5), targets.expand(200, 4), TextObjectiveConfig(answer_share=1.0, wrong_share=1.0), None
    )
    tokens = set(wrong[:, 0].argmax(-1)[wrong[:, 0].any(-1)].tolist())
    assert tokens == {1, 2, 3}  # any target of the sequence, sometimes the right one
    none = toward_tokens(start, targets, TextObjectiveConfig(answer_share=0.0), make_generator(0))
    assert torch.equal(none, start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(answer_share=1.5), "objective.answer_share=1.5 is not in"),
        (dict(wrong_share=-1.0), "objective.wrong_share=-1.0 is not in"),
        (dict(answer_logit=0.0), "objective.answer_logit=0.0 must be positive"),
    ],
)
def test_wrong_options_of_starts(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TextObjectiveConfig(**options)


def test_answer_batch_by_hand():
    batch = answer_batch([Problem("c:ab=", "ab"), Problem("c:a=", "a")])
    assert batch.tokens.tolist() == [[256, *b"c:ab=ab"], [256, *b"c:a=a", 256, 256]]
    none = IGNORED
    assert batch.targets.tolist() == [[none] * 5 + [*b"ab", 256], [none] * 4 + [97, 256, none, none]]


def scores(**changes) -> AnswerScores:
    values = dict(
        losses=np.array([[[1.0, 2.0, 3.0], [1.0, 1.0, 2.0]], [[0.5, 4.0, 3.0], [0.0, 3.0, 0.5]]], np.float32),
        is_right=np.array([[[1, 0, 1], [1, 1, 0]], [[1, 0, 0], [1, 0, 1]]], bool),
        energies=np.array([[[0.0, 1.0, 0.0], [2.0, 1.0, 2.0]], [[1.0, 2.0, 1.0], [1.0, 2.0, 1.0]]], np.float32),
        tempered=np.zeros((2, 21)),
        problem=np.array([0, 0, 1]),
        num_bytes=2,
        flops=np.array([10.0, 30.0, 50.0]),
    )
    return AnswerScores(**(values | changes))


def test_rows_by_hand():
    one, two = scores().rows(1), scores().rows(2)
    assert [row["token_accuracy"] for row in one] == pytest.approx([2 / 3, 2 / 3])
    assert [row["answer_accuracy"] for row in one] == [0.5, 0.5]  # the second problem; then the first
    assert one[0]["bits_per_byte"] == pytest.approx(6.0 / np.log(2) / 2)
    assert one[1]["gain_nats"] == pytest.approx(2 / 3) and one[0]["gain_nats"] == 0.0
    assert one[1]["gain_percent"] == pytest.approx(100 * (1 - np.exp(4 / 3 - 2)))
    # With two candidates the first wins at step 1 everywhere; at step 2 the tokens 1 and 3 come from the second.
    assert two[0]["bits_per_byte"] == one[0]["bits_per_byte"]
    assert two[1]["perplexity"] == pytest.approx(np.exp((0.0 + 1.0 + 0.5) / 3))
    assert two[1]["answer_accuracy"] == 1.0 and two[1]["answer_gain"] == 0.5
    assert [row["flops"] for row in one] == [30.0, 50.0] and [row["flops"] for row in two] == [50.0, 90.0]


def test_gain_error_by_hand():
    # Problems of two tokens and one: the residual sums are (0 + 1) - 2 * 2/3 and 1 - 2/3.
    residuals = np.array([1.0 - 4 / 3, 1 / 3])
    expected = 1.959964 * np.sqrt((residuals**2).sum() / 1 * 2) / 3
    assert scores().rows(1)[1]["gain_error"] == pytest.approx(expected)


def text_ebt(**options) -> CausalTextEBT:
    torch.manual_seed(0)
    model = CausalTextEBT(CausalTextEBTConfig(**SIZES | options, add_last_token=True))
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model.eval()


def test_scores_do_not_depend_on_the_batch_and_temperature_1_is_the_loss():
    model = text_ebt()
    group = task_problems(TaskSizes("copy", 1, 4), 7, seed=2)
    whole = score_answers(model, group, num_steps=3, num_candidates=2, seed=4)
    parts = score_answers(model, group, num_steps=3, num_candidates=2, seed=4, batch_size=3)
    np.testing.assert_allclose(whole.losses, parts.losses, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole.energies, parts.energies, rtol=1e-4, atol=1e-4)
    assert (whole.problem == parts.problem).all() and whole.num_bytes == sum(len(p.answer) for p in group)
    ones = [1.0] * 3
    assert whole.bits_at(ones) == pytest.approx([row["bits_per_byte"] for row in whole.rows(1)])
    best = best_temperatures(whole.tempered)
    assert all(b <= o + 1e-12 for b, o in zip(whole.bits_at(best), whole.bits_at(ones), strict=True))


def test_a_transformer_has_one_step_and_the_loss_of_its_logits():
    torch.manual_seed(0)
    model = CausalTransformer(CausalTransformerConfig(**SIZES)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    group = task_problems(TaskSizes("reverse", 1, 3), 5, seed=0)
    found = score_answers(model, group, num_steps=4, num_candidates=3)
    assert found.losses.shape[:2] == (1, 1) and found.energies is None
    batch = answer_batch(group)
    logits = model(batch.tokens)[batch.targets != IGNORED]
    targets = batch.targets[batch.targets != IGNORED]
    expected = torch.nn.functional.cross_entropy(logits, targets).item()
    assert found.losses.mean() == pytest.approx(expected, rel=1e-5)
    assert (found.is_right[0, 0] == (logits.argmax(-1) == targets).numpy()).all()


def test_every_step_costs_the_same_number_of_products():
    found = score_answers(text_ebt(), task_problems(TaskSizes("copy", 2, 2), 4, seed=0), num_steps=3, num_candidates=1)
    steps = np.diff(found.flops)
    assert 0 < found.flops[0] < steps[0] and steps[1] == pytest.approx(steps[2])


def test_problems_that_do_not_fit():
    with pytest.raises(ValueError, match="a problem has .* tokens, above the 32 of the model; use smaller sizes"):
        score_answers(text_ebt(), task_problems(TaskSizes("copy", 40, 40), 2, seed=0))
    with pytest.raises(ValueError, match="1 problems have no interval"):
        score_answers(text_ebt(), task_problems(TaskSizes("copy", 1, 1), 1, seed=0))


def test_the_program_reports_each_recipe_once_and_chooses_on_other_problems(tmp_path: Path, capsys: pytest.CaptureFixture):
    for seed in (0, 1):
        torch.manual_seed(seed)
        text_ebt(depth=1 + seed).save_pretrained(tmp_path / f"ebt{seed}")
    CausalTransformer(CausalTransformerConfig(**SIZES)).save_pretrained(tmp_path / "transformer")
    models = [f"ebt={tmp_path / 'ebt0'}", f"ebt={tmp_path / 'ebt1'}", f"transformer={tmp_path / 'transformer'}"]
    command = ["--models", *models, "--tasks", "copy:1-2", "dyck:3", "--choose-on", "copy:1-2", "--device", "cpu"]
    sizes = ["--problems", "6", "--steps", "3", "--candidates", "2", "--output", str(tmp_path / "out")]
    status = text_thinking.main([*command, *sizes])
    assert status == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [m["label"] for m in results["models"]] == ["ebt", "ebt", "transformer"]
    # Two EBTs with 1 and 2 candidates and 3 steps, and one transformer, on two tasks.
    assert len(results["rows"]) == 2 * (2 * 2 * 3 + 1)
    first = [row["answer_accuracy"] for row in results["rows"] if row["label"] == "ebt" and row["task"] == "copy:1-2"]
    assert all(0 <= value <= 1 for value in first)
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.count("| dyck:3 | ebt |") == 4 and report.count("| dyck:3 | transformer |") == 3  # its gain has no row
    assert "±" in report.split("| dyck:3 | ebt |")[1].split("\n")[0]


def test_wrong_arguments_of_the_program_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    CausalTransformer(CausalTransformerConfig(**SIZES | {"vocab_size": 300})).save_pretrained(tmp_path / "other")
    for words, message in (
        (["--models", "=x"], "--models =x does not have the form LABEL=FOLDER"),
        (["--models", str(tmp_path / "other")], "has 300 tokens; the problems are bytes, which need 257"),
        (["--models", str(tmp_path / "other"), "--tasks", "copy:1-2+dyck:2"], "separate them by spaces"),
        (["--models", str(tmp_path / "other"), "--tasks", "sums:1"], "the task 'sums' of 'sums:1' is unknown"),
    ):
        assert text_thinking.main([*words, "--device", "cpu", "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
