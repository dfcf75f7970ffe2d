"""Differences on a GPU. Every test also runs on the CPU, so that the tests are tested without a GPU."""

import json
import math
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn

from ebt_vision.core.rng import generators_on, sample_generators
from ebt_vision.core.thinking import think
from ebt_vision.core.thinking_config import ThinkingConfig
from ebt_vision.data.tokenizer import ByteTokenizer
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.tiling import denoise_tiled
from ebt_vision.models.causal_text_ebt import CausalTextEBT, CausalTextEBTConfig
from ebt_vision.models.causal_transformer import CausalTransformer, CausalTransformerConfig
from ebt_vision.models.checkpoint import program_device
from ebt_vision.models.dit import DiT
from ebt_vision.models.dit_config import DiTConfig
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.models.pretrained_model import PretrainedModel
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig
from ebt_vision.probing.features import Feature, FeatureCondition, extract
from ebt_vision.probing.load import load_extractor
from ebt_vision.text.generation import GenerateOptions, generate, make_reader, predict_all
from ebt_vision.training.config import build_config
from ebt_vision.training.loop import Trainer
from ebt_vision.training.stopping import TrainingInterrupted

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU")
on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])

SIZE = dict(img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=2)
TEXT = dict(vocab_size=257, context_length=16, embed_dim=16, depth=1, num_heads=2)
THINKING = dict(num_steps=2, min_num_steps=1, step_size_factor=1.5, langevin_std=0.05)
IMAGE_REPLAY = dict(capacity=16, share=0.5, max_age=4, start=2, renoise_std=0.2, renoise_start=3, partial_moves=0.5)


@pytest.fixture(autouse=True)
def engine_is_free() -> Iterator[None]:
    """Accelerate keeps one device and one precision for a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for i, colours in enumerate(torch.randint(0, 256, (16, 2, 2, 3), generator=torch.Generator().manual_seed(0))):
        Image.fromarray(colours.byte().numpy()).resize((16, 16), Image.Resampling.BILINEAR).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("to be or not to be, that is the question. " * 20)
    return path


def image_run(photos: Path, **train) -> dict:
    return dict(
        name="tiny",
        model_type="patch_ebt",
        model=SIZE,
        data=dict(path=str(photos), img_size=16, crop="random", flip=True),
        objective=dict(thinking=THINKING),
        optim=dict(lr=2e-3, warmup_updates=2),
        replay=IMAGE_REPLAY,
        train=dict(num_updates=8, batch_size=8, ema_decay=0.9, log_every=1, checkpoint_every=4) | train,
        validation=dict(path=str(photos), num_images=4, num_steps=2, every=4, num_grid_images=1),
    )


def text_run(book: Path, **train) -> dict:
    return dict(
        name="tiny",
        model_type="causal_text_ebt",
        model=TEXT,
        data=dict(path=str(book), context_length=16, share=[0.0, 0.8]),
        objective=dict(thinking=THINKING),
        optim=dict(lr=2e-3, warmup_updates=2),
        replay=dict(capacity=6, share=0.5, max_age=4, start=2),
        train=dict(num_updates=8, batch_size=4, ema_decay=0.9, log_every=1, checkpoint_every=4) | train,
        validation=dict(path=str(book), share=[0.8, 1.0], num_steps=2, every=4),
    )


def trainer_of(raw: dict, output: Path, device: str) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    output.mkdir(exist_ok=True)
    return Trainer(build_config(raw), output, device=device)


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest error is below `tolerance` times the standard deviation of what is expected."""
    error = float((found.cpu().double() - expected.cpu().double()).abs().max())
    assert error <= tolerance * float(expected.double().std()), f"{error:.3g}"


def randomised(model: PretrainedModel) -> PretrainedModel:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name != "log_step_size":
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


# --- Training


@pytest.mark.slow
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])  # on a CPU compiling takes 80 seconds
def test_a_compiled_bfloat16_run_with_replay_follows_the_eager_one(photos: Path, tmp_path: Path, device: str):
    for name, compiled in (("eager", False), ("compiled", True)):
        trainer = trainer_of(image_run(photos, mixed_precision="bf16", compile=compiled), tmp_path / name, device)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*cannot be compiled")
            trainer.run()
        assert trainer.accelerator.device.type == device
        assert {values.device.type for values in trainer.replay.rows.values()} == {device}
        assert len(trainer.replay) == 16 and int(trainer.replay.ages.max()) > 1
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert len(eager) == 8 and all(math.isfinite(loss) for loss in eager)
    assert compiled == pytest.approx(eager, rel=0.05)


@on_every_device
@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_resumed_run_goes_on_as_the_whole_one(photos: Path, book: Path, tmp_path: Path, modality: str, device: str):
    raw = image_run(photos) if modality == "image" else text_run(book)
    whole = trainer_of(raw, tmp_path / "whole", device)
    whole.run()
    parts = trainer_of(raw, tmp_path / "parts", device)
    forward = parts.objective.forward

    def interrupt_the_fifth(batch):
        if parts.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return forward(batch)

    parts.objective.forward = interrupt_the_fifth  # type: ignore[method-assign]
    with pytest.raises(TrainingInterrupted):
        parts.run()
    resumed = trainer_of(raw, tmp_path / "parts", device)
    assert resumed.step == 5 and torch.equal(resumed.replay.ages, parts.replay.ages)
    assert {values.device.type for values in resumed.replay.rows.values()} == {device}
    resumed.run()
    # A GPU adds in no fixed order, and the optimiser divides small gradients by their own size.
    rel = 0.0 if device == "cpu" else 1e-3
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=rel)
    for name, expected in whole.model.state_dict().items():
        found = resumed.model.state_dict()[name]
        if device == "cpu":
            assert torch.equal(found, expected), name
        else:
            assert float((found - expected).abs().mean()) < 1e-4, name


@on_every_device
@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_training_draws_for_candidates_on_its_device(photos: Path, book: Path, tmp_path: Path, modality: str, device: str):
    trainer = trainer_of(image_run(photos) if modality == "image" else text_run(book), tmp_path / "run", device)
    forward, seen = trainer.objective.forward, []

    def watched(batch):
        seen.extend(generator.device.type for generator in batch.generators)
        return forward(batch)

    trainer.objective.forward = watched  # type: ignore[method-assign]
    trainer.run()
    assert len(seen) == 8 * trainer.config.train.batch_size and set(seen) == {device}


@on_every_device
def test_first_and_second_order_gradients_are_those_of_the_cpu(device: str):
    clean = torch.randn(3, 3, 12, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for place in ("cpu", device):
        model = randomised(PatchEBT(PatchEBTConfig(**SIZE, init_step_size=0.05))).double().to(place)
        config = ThinkingConfig(num_steps=2, detach_between_steps=False)
        noisy = (clean * 0.9 + 0.1).to(place)
        result = think(model, noisy, config, step_size=model.step_size, create_graph=True)
        (result.final - clean.to(place)).square().mean().backward()
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-7, atol=1e-10, msg=name)


# --- Thinking


@on_every_device
def test_generators_of_a_device_make_a_sample_s_draws_whatever_its_batch(device: str):
    start = torch.zeros(4, 2, 5, 3, device=device)
    config = ThinkingConfig(num_steps=3, langevin_std=0.5, step_size=0.3, step_size_factor=2.0)

    def run(rows: slice) -> Tensor:
        generators = sample_generators(7, range(4)[rows], device=start.device)
        return think(lambda y: 0.5 * y.square().flatten(1).sum(1), start[rows], config, generator=generators).final

    together = run(slice(0, 4))
    assert together.device.type == device and float(together.std()) > 0.1
    for i in range(4):
        assert torch.equal(run(slice(i, i + 1)), together[i : i + 1])


@needs_gpu
def test_a_gpu_draws_other_numbers_from_the_same_seed():
    (cpu,) = sample_generators(7, [0])
    (gpu,) = generators_on([cpu], torch.device("cuda", 0))
    (same,) = sample_generators(7, [0], device="cuda")
    drawn = torch.randn(64, generator=gpu, device="cuda")
    assert torch.equal(drawn, torch.randn(64, generator=same, device="cuda"))
    assert not torch.allclose(drawn.cpu(), torch.randn(64, generator=cpu))


@on_every_device
def test_a_stopping_rule_and_best_of_run_on_the_device(device: str):
    denoiser = EBTDenoiser(randomised(PatchEBT(PatchEBTConfig(**SIZE, init_step_size=0.05))).to(device))  # type: ignore[arg-type]
    noisy = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(2)).to(device)
    options = DenoiseOptions(num_steps=6, num_candidates=3, langevin_std=0.02, tolerance=0.3, keep_candidates=True)
    result = denoiser.denoise(noisy, options, image_ids=[4, 5, 6])
    again = denoiser.denoise(noisy[1:2], options, image_ids=[5])
    assert result.image.device == noisy.device and result.chosen is not None and result.chosen.shape == (3,)
    assert int(result.num_steps.max()) <= 6
    assert_near(again.image, result.image[1:2], 1e-3)


# --- Denoising in tiles


@on_every_device
def test_tiles_in_batches_are_those_one_by_one_and_those_of_the_cpu(device: str):
    noisy = torch.rand(1, 3, 37, 53, generator=torch.Generator().manual_seed(3))
    model = randomised(PatchEBT(PatchEBTConfig(**SIZE, init_step_size=0.05)))
    options = DenoiseOptions(num_steps=2)
    expected = denoise_tiled(EBTDenoiser(model), noisy, options).image  # type: ignore[arg-type]
    denoiser = EBTDenoiser(model.to(device))  # type: ignore[arg-type]
    images = [denoise_tiled(denoiser, noisy.to(device), options, batch_size=size).image for size in (1, 5)]
    assert all(image.device.type == device for image in images)
    assert_near(images[0], images[1], 1e-4)
    assert_near(images[0], expected, 1e-3)
    stem = randomised(PatchEBT(PatchEBTConfig(**SIZE, stem_widths=(8, 16), suggested_start="proposal")))
    proposal = DenoiseOptions(num_steps=1, final_energy=False)
    slow, fast = (EBTDenoiser(stem.to(device), precision=precision) for precision in ("float32", "bfloat16"))  # type: ignore[arg-type]
    precise = denoise_tiled(slow, noisy.to(device), proposal).image
    rough = [denoise_tiled(fast, noisy.to(device), proposal, batch_size=size).image for size in (1, 5)]
    assert not torch.equal(rough[0], precise)
    assert_near(rough[0], rough[1], 0.02)
    assert_near(rough[0], precise, 0.05)
    jittered = DenoiseOptions(num_steps=2, num_candidates=2, langevin_std=0.02, seed=5)
    one, five = (denoise_tiled(denoiser, noisy.to(device), jittered, batch_size=size).image for size in (1, 5))
    assert_near(one, five, 1e-3)


# --- Text


@on_every_device
@pytest.mark.parametrize("kind", ["ebt", "transformer"])
def test_text_is_generated_on_the_device(kind: str, device: str):
    torch.manual_seed(0)
    model: PretrainedModel
    if kind == "ebt":
        model = CausalTextEBT(CausalTextEBTConfig(**TEXT, init_step_size=0.3))
    else:
        model = CausalTransformer(CausalTransformerConfig(**TEXT))
    nn.init.normal_(model.head.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    model = model.to(device).eval()
    options = GenerateOptions(num_tokens=12, num_steps=2, num_candidates=2, top_p=0.9, seed=5)
    runs = [list(generate(model, ByteTokenizer(), "to be", options)) for _ in range(2)]
    assert runs[0] == runs[1] and len(runs[0]) >= 1
    # Token by token against the cache, and all places at once.
    tokens = torch.tensor([256, *b"to be"], device=device)
    parallel = predict_all(model, tokens, options)
    assert parallel.logits.device.type == device
    reader = make_reader(model)
    for place, token in enumerate(tokens):
        with torch.no_grad():
            reader.read(token.reshape(1, 1))
            guess = reader.guess(place, options)
        torch.testing.assert_close(guess.logits[0], parallel.logits[place], rtol=1e-3, atol=1e-3)


# --- Features


@on_every_device
@pytest.mark.parametrize("kind", ["ebt", "context", "regressor", "dit"])
def test_features_are_those_of_the_cpu(tmp_path: Path, kind: str, device: str):
    model: PretrainedModel
    if kind == "dit":
        model = DiT(DiTConfig(**SIZE))
    elif kind == "regressor":
        model = PatchRegressor(PatchRegressorConfig(**SIZE))
    else:
        model = PatchEBT(PatchEBTConfig(**SIZE, init_step_size=0.05, observation_context=kind == "context"))
    randomised(model).save_pretrained(tmp_path / kind)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    conditions = [dict(noise_level=level) | (dict(timestep=50) if kind == "dit" else {}) for level in (0.0, 0.1)]
    if kind in ("ebt", "context"):
        conditions.append(dict(noise_level=0.1, thinking_steps=2))
    layers = ["block0", "final", *(["gradient"] if kind in ("ebt", "context") else [])]
    asked = [Feature(condition=FeatureCondition(**c), layer=layer, pool="mean") for c in conditions for layer in layers]
    found, expected = (
        extract(load_extractor(str(tmp_path / kind), device=place), images, range(4), asked, seed=3)
        for place in (device, "cpu")
    )
    for feature in asked:
        assert found[feature].device.type == "cpu" and found[feature].dtype == torch.float32
        assert_near(found[feature], expected[feature], 1e-3)


# --- Programs


@needs_gpu
def test_programs_use_tf32():
    before = torch.get_float32_matmul_precision()
    try:
        assert program_device() == "cuda" and torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_engine_s_state_can_be_taken_back():
    """Check the assumption of the fixture above."""
    PartialState(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert PartialState._shared_state == {}
