"""The text models in the training engine: they learn, replay, resume bit for bit, and refuse invalid settings."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ebt_vision.cli import main
from ebt_vision.models.checkpoint import load_pretrained
from ebt_vision.objectives.text import TextBatch, TextEBTObjective, TextObjectiveConfig, batch_loss
from ebt_vision.training.build import build_model, build_objective
from ebt_vision.training.config import ConfigError, build_config
from ebt_vision.training.loop import Trainer
from ebt_vision.training.state import checkpoint_folders
from ebt_vision.training.stopping import TrainingInterrupted

MODELS = ["causal_text_ebt", "causal_transformer"]
SIZE = dict(vocab_size=257, context_length=16, embed_dim=16, depth=1, num_heads=2)
SYSTEM_2 = dict(
    loss_steps="last",
    thinking=dict(
        num_steps=3, min_num_steps=2, step_size_factor=2.0, langevin_std=0.1, detach_between_steps=False, backprop_steps=1
    ),
)
REPLAY = dict(capacity=6, share=0.5, max_age=4, start=2)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("to be or not to be, that is the question. " * 40)
    return path


def experiment(book: Path, model_type: str = "causal_text_ebt", **sections: dict) -> dict:
    raw: dict = dict(
        name="tiny",
        model_type=model_type,
        model=dict(SIZE),
        data=dict(path=str(book), context_length=16, share=[0.0, 0.9], random_offset=True),
        optim=dict(lr=1e-2, warmup_updates=2),
        train=dict(num_updates=8, batch_size=4, ema_decay=0.8, log_every=2, checkpoint_every=4),
        validation=dict(path=str(book), share=[0.9, 1.0], num_steps=3, every=4),
    )
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return raw


def train(raw: dict, output: Path) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    return Trainer(build_config(raw), output, device="cpu").run()


def weights(output: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint_folders(output / "checkpoints")[-1]
    return {f"{p.name}/{n}": t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


@pytest.mark.parametrize("model_type", MODELS)
def test_it_trains_logs_validates_and_exports(book: Path, tmp_path: Path, model_type: str):
    raw = experiment(book, model_type, train=dict(num_updates=40, log_every=10, checkpoint_every=20), validation=dict(every=20))
    folder = train(raw, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.5 and losses[0] < 6.0
    validated = [line["validation_bits_per_byte"] for line in lines if "validation_bits_per_byte" in line]
    assert len(validated) == 2 and validated[1][0] < validated[0][0] < 8.2
    assert len(validated[0]) == (3 if model_type == "causal_text_ebt" else 1)
    assert load_pretrained(str(folder)).model_type == model_type
    if model_type == "causal_text_ebt":
        logged = [line for line in lines if "loss" in line][-1]
        assert logged["energy_after_last_update"] < logged["energy_before_last_update"]


@pytest.mark.parametrize("model_type", MODELS)
def test_a_resumed_run_ends_with_bit_equal_weights(book: Path, tmp_path: Path, model_type: str):
    extra = dict(objective=SYSTEM_2, replay=REPLAY) if model_type == "causal_text_ebt" else {}
    raw = experiment(book, model_type, **extra)
    train(raw, tmp_path / "whole")
    config = build_config(raw)
    (tmp_path / "parts").mkdir()
    trainer = Trainer(config, tmp_path / "parts", device="cpu")
    original = trainer.objective.forward

    def interrupt_the_fifth(batch: TextBatch) -> dict:
        if trainer.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return original(batch)

    trainer.objective.forward = interrupt_the_fifth  # type: ignore[method-assign]
    with pytest.raises(TrainingInterrupted):
        trainer.run()
    assert Trainer(config, tmp_path / "parts", device="cpu").step == 5
    train(raw, tmp_path / "parts")
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert ours.keys() == theirs.keys()
    if extra:
        assert ours["replay-0.safetensors/rows.candidate"].shape[1:] == (16, 257)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("model_type", MODELS)
def test_a_real_divergence_is_one_line_and_leaves_a_checkpoint_from_before_it(
    book: Path, tmp_path: Path, model_type: str, capsys: pytest.CaptureFixture[str]
):
    extra = dict(objective=SYSTEM_2, replay=REPLAY) if model_type == "causal_text_ebt" else {}
    optim = dict(lr=1e25, clip_norm=1e30, warmup_updates=0)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(experiment(book, model_type, optim=optim, **extra)))
    assert main(["train", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run"), "--device", "cpu"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ebt-vision:")]
    assert "training diverged at update" in line
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run").values())


def objective_and_batch(**options) -> tuple[TextEBTObjective, TextBatch]:
    config = build_config(experiment(Path("unused"), objective=options))
    torch.manual_seed(0)
    model = build_model(config)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(257, (4, 6), generator=g)
    batch = TextBatch(
        tokens=tokens,
        targets=tokens.roll(-1, 1),
        starts=torch.zeros_like(tokens),
        generators=[torch.Generator().manual_seed(i) for i in range(4)],
    )
    return build_objective(model, config), batch


def test_replayed_rows_take_the_last_places_and_go_on_from_where_they_ended():
    objective, batch = objective_and_batch()
    output = objective(batch)
    rows = {name: tensor[:2] for name, tensor in objective.replay_rows(batch, output).items()}
    _, fresh = objective_and_batch()
    joined = objective.continue_thinking(fresh, rows)
    assert torch.equal(joined.tokens[2:], batch.tokens[:2]) and torch.equal(joined.tokens[:2], fresh.tokens[:2])
    assert torch.equal(joined.start[2:], output["candidate"][:2])
    _, again = objective_and_batch()
    assert torch.equal(objective.continue_thinking(again, {}).start[:2], joined.start[:2])  # the drawn ones
    assert torch.equal(fresh.tokens[2:], again.tokens[2:])  # the batch itself is not changed


def test_the_loss_does_not_depend_on_padding_or_on_how_a_batch_is_split():
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(4, 6, 9, generator=g), torch.randint(9, (4, 6), generator=g)
    targets[3, 2:] = -1
    halves = torch.stack([batch_loss(logits[:2], targets[:2]), batch_loss(logits[2:], targets[2:])]).mean()
    torch.testing.assert_close(batch_loss(logits, targets), halves)
    changed = logits.clone()
    changed[3, 2:] = 7.0
    assert batch_loss(changed, targets) == batch_loss(logits, targets)


@pytest.mark.parametrize("loss_steps", ["every", "last"])
def test_only_steps_in_the_graph_are_trained(loss_steps: str):
    thinking = dict(num_steps=3, detach_between_steps=False, backprop_steps=1)
    objective, batch = objective_and_batch(loss_steps=loss_steps, thinking=thinking)
    loss = objective(batch)["loss"]
    loss.backward()
    assert objective.model.trunk.embed.weight.grad.abs().sum() > 0
    assert objective.model.log_step_size.grad.abs() > 0


@pytest.mark.parametrize(
    ("sections", "answer"),
    [
        (dict(data=dict(img_size=3)), "unknown key 'data.img_size'"),
        (dict(objective=dict(level=0.1)), "unknown key 'objective.level'"),
        (dict(objective=dict(thinking=dict(tolerance=0.1))), "tolerance"),
        (dict(objective=dict(thinking=dict(num_steps=0))), "1 or more"),
        (dict(validation=dict(num_steps=0)), "validation.num_steps=0"),
    ],
)
def test_a_wrong_setting_is_one_line(book: Path, sections: dict, answer: str):
    with pytest.raises(ConfigError) as error:
        build_config(experiment(book, **sections))
    assert answer in str(error.value) and "\n" not in str(error.value)


def test_what_does_not_fit_together_is_refused(book: Path, tmp_path: Path):
    for sections, answer in [
        (dict(model=dict(vocab_size=100)), "model.vocab_size: 257"),
        (dict(data=dict(context_length=17)), "model.context_length=16"),
        (dict(model_type="causal_transformer", replay=REPLAY), "replay.capacity=6"),
        (dict(model=dict(num_landscapes=2), train=dict(compile=True)), "compile: false"),
    ]:
        with pytest.raises(ValueError, match=answer):
            train(experiment(book, **sections), tmp_path)


def test_landscapes_train(book: Path, tmp_path: Path):
    trainer = Trainer(build_config(experiment(book, model=dict(num_landscapes=2))), tmp_path, device="cpu")
    trainer.config = replace(trainer.config, validation=replace(trainer.config.validation, path=None))
    trainer.run()
    assert trainer.model.landscapes.abs().sum(1).min() > 0  # both steps' embeddings have moved


def test_the_default_objective_thinks_twice():
    assert TextObjectiveConfig().thinking.num_steps == 2
