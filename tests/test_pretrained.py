"""The shipped checkpoints: present, small, equal in size, described, and useful for their purpose."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ebt_vision.benchmark.text import score_text
from ebt_vision.benchmark.text_thinking import score_answers, task_problems
from ebt_vision.core import metrics
from ebt_vision.data.image_files import read_image
from ebt_vision.data.text import TextDataConfig, load_text_set
from ebt_vision.data.text_tasks import TaskSizes
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.tiling import denoise_tiled
from ebt_vision.models import pretrained_model
from ebt_vision.models.checkpoint import default_pretrained, list_pretrained, load_pretrained
from ebt_vision.models.patch_ebt import PatchEBT
from ebt_vision.models.pretrained_model import PRETRAINED_DIR, CheckpointError, PretrainedModel
from ebt_vision.noise import processes

NAMES = ["tiny_imagenet_dit", "tiny_imagenet_ebt", "tiny_imagenet_eqm", "tiny_imagenet_regressor"]
PHOTO_NAME = "photographs_ebt"
TEXT_NAMES = ["text_shakespeare_ebt", "text_shakespeare_transformer"]
TASK_NAMES = ["text_tasks_ebt", "text_tasks_transformer"]
CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def clean() -> Tensor:
    """Twelve 64x64 crops of the page's example photographs, (12, 3, 64, 64) in [0, 1]."""
    examples = Path(__file__).parents[1] / "apps" / "examples"
    photos = [read_image(path).pixels for path in sorted(examples.glob("*.png"))]
    return torch.stack([photo[:, 20:84, x : x + 64] for photo in photos for x in (0, 60, 120, 180)])


def noisy(clean: Tensor, level: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return processes.to_image_range(processes.add_vp_noise(processes.to_model_range(clean), level, generator))


def psnr(images: Tensor, clean: Tensor) -> float:
    return float(metrics.psnr(images, clean, data_range=1.0).mean())


def test_they_are_there_small_and_of_equal_size():
    assert list_pretrained() == sorted([*NAMES, PHOTO_NAME, *TEXT_NAMES, *TASK_NAMES])
    assert default_pretrained() == PHOTO_NAME and default_pretrained("causal_text_ebt") == "text_shakespeare_ebt"
    files = [path for path in PRETRAINED_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 60e6
    counts = [load_pretrained(name).num_parameters for name in NAMES]
    assert max(counts) <= 1.1 * min(counts)
    text = [PRETRAINED_DIR / name / "model.safetensors" for name in TEXT_NAMES]
    assert sum(path.stat().st_size for path in text) < 20e6
    ebt, transformer = (load_pretrained(name).num_parameters for name in TEXT_NAMES)
    assert ebt == transformer + 1 + 128  # the step size, the gate


@pytest.mark.parametrize("name", [*NAMES, PHOTO_NAME, *TEXT_NAMES, *TASK_NAMES])
def test_each_card_says_how_it_came_about(name: str):
    card = (PRETRAINED_DIR / name / "README.md").read_text()
    config = f"{name}_cpu.yaml" if name in NAMES else f"{name}.yaml"
    data = ("research use only", "PSNR")
    if name in TEXT_NAMES:
        data = ("public domain", "bits per byte")
    elif name in TASK_NAMES:
        data = ("generated problems", "bits per byte")
    assert (CONFIGS / config).is_file()
    for word in ("command", "commit", "hardware", config, *data):
        assert word in card, f"{name}: the card does not state: {word}"


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_the_text_models_know_shakespeare_from_noise(name: str, tmp_path: Path):
    """Two lines of the public domain, in order and with their bytes shuffled."""
    line = b"Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"
    shuffled = bytes(line[i] for i in torch.randperm(len(line), generator=torch.Generator().manual_seed(0)))
    bits = []
    for text in (line, shuffled):
        (tmp_path / "text.txt").write_bytes(text)
        samples = load_text_set(TextDataConfig(path=str(tmp_path / "text.txt"), context_length=len(line) - 1))
        scores = score_text(load_pretrained(name), samples, num_steps=2, num_candidates=1)
        bits.append(scores.summary(1)[-1]["bits_per_byte"])
    assert bits[0] < 3.5 < bits[1]


@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_task_models_solve_problems_of_their_sizes(name: str):
    for task in ("copy", "reverse", "dyck"):
        scores = score_answers(
            load_pretrained(name), task_problems(TaskSizes(task, 1, 6), 20, seed=9), num_steps=2, num_candidates=1
        )
        assert scores.rows(1)[-1]["answer_accuracy"] >= 0.95, task


def test_the_ebt_denoises_and_thinking_longer_helps_at_noise_it_never_saw(clean: Tensor):
    denoiser = load_denoiser("tiny_imagenet_ebt")
    seen, unseen = (
        denoiser.denoise(noisy(clean, level), DenoiseOptions(num_steps=8, keep_trajectory=True, noise_level=level))
        for level in (0.1, 0.2)
    )
    assert seen.trajectory is not None and unseen.trajectory is not None
    at_seen, at_unseen = ([psnr(image, clean) for image in r.trajectory] for r in (seen, unseen))
    assert at_seen[1] > at_seen[0] + 6.0  # one step at the level it was trained at
    assert at_unseen[1] > at_unseen[0] + 3.0
    assert at_unseen[4] > at_unseen[1] + 1.5  # more steps at one that it was not
    assert seen.energies is not None and bool((seen.energies.diff(dim=0).mean(1) < 0).all())


@pytest.mark.parametrize(("sigma", "gain"), [(15.0, 5.0), (50.0, 10.0)])
def test_the_photograph_ebt_removes_noise_whose_strength_it_is_not_told(sigma: float, gain: float, clean: Tensor):
    start = processes.add_gaussian_noise(clean, sigma, torch.Generator().manual_seed(0))
    denoiser = load_denoiser(PHOTO_NAME)
    result = denoiser.denoise(start, DenoiseOptions(num_steps=denoiser.suggested_steps))
    assert psnr(result.image, clean) > psnr(start.clamp(0, 1), clean) + gain
    assert result.energies is not None and bool((result.energies.diff(dim=0).mean(1) < 0).all())


@pytest.mark.parametrize(("name", "steps"), [("tiny_imagenet_regressor", 1), ("tiny_imagenet_dit", 10)])
def test_the_baselines_denoise(name: str, steps: int, clean: Tensor):
    start = noisy(clean, 0.1)
    result = load_denoiser(name).denoise(start, DenoiseOptions(num_steps=steps, noise_level=0.1))
    assert psnr(result.image, clean) > psnr(start.clamp(0, 1), clean) + 4.0


def test_what_load_denoiser_gives_is_what_the_command_line_gives(clean: Tensor):
    """On images larger than the training images, whole or in tiles."""
    image = torch.cat([torch.cat(list(clean[:3]), dim=2), torch.cat(list(clean[3:6]), dim=2)], dim=1)[None, :, :96, :160]
    start = processes.add_gaussian_noise(image, 25.0, torch.Generator().manual_seed(0))
    denoiser = load_denoiser(PHOTO_NAME)
    result = denoiser.denoise(start)
    assert torch.equal(result.image, denoise_tiled(denoiser, start, denoiser.suggested_options).image)
    whole = denoiser.denoise(start, DenoiseOptions(num_steps=denoiser.suggested_steps, tile_size=0))
    assert abs(psnr(result.image, image) - psnr(whole.image, image)) < 0.1
    assert psnr(result.image, image) > psnr(start.clamp(0, 1), image) + 7.0


def test_the_photograph_ebt_leaves_clean_images_and_drawings_alone(clean: Tensor):
    denoiser = load_denoiser(PHOTO_NAME)
    assert psnr(denoiser.denoise(clean).image, clean) > 45.0
    squares = torch.zeros(1, 3, 64, 64)
    squares[:, 0] = 1.0  # pure red
    squares[:, :, 16:40, 8:30] = 1.0
    assert psnr(denoiser.denoise(squares).image, squares) > 38.0
    faint = processes.add_gaussian_noise(clean, 2.55, torch.Generator().manual_seed(0))
    assert psnr(denoiser.denoise(faint).image, clean) > psnr(faint.clamp(0, 1), clean) + 0.5


# --- From a name to a model, and from a model to a folder


def test_a_shipped_name_needs_no_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrained_model, "hf_hub_download", None)  # calling it fails
    model = PatchEBT.from_pretrained("tiny_imagenet_ebt")
    assert not model.training and model.config == load_pretrained("tiny_imagenet_ebt").config
    assert type(PretrainedModel.from_pretrained("tiny_imagenet_regressor")).__name__ == "PatchRegressor"
    with pytest.raises(CheckpointError, match="is for a 'patch_regressor' model, not for 'patch_ebt'"):
        PatchEBT.from_pretrained("tiny_imagenet_regressor")


@pytest.mark.parametrize(
    ("keyword", "remedy"),
    [
        ("torch_dtype", r"does not accept torch_dtype; call .to\(device, dtype\) on the model"),
        ("map_location", r"call .to\(device, dtype\)"),
        ("strict", "loading is always strict"),
        ("revison", "did you mean revision"),
        ("config", "it accepts force_download, token"),
    ],
)
def test_keywords_that_loading_does_not_take(keyword: str, remedy: str):
    with pytest.raises(ValueError, match=remedy):
        PatchEBT.from_pretrained("tiny_imagenet_ebt", **{keyword: 1})


def test_names_that_are_nothing():
    for load in (PatchEBT.from_pretrained, load_pretrained, load_denoiser):
        with pytest.raises(CheckpointError, match="name is empty"):
            load("")
    with pytest.raises(
        CheckpointError, match="'nobody/nothing' is neither a shipped checkpoint .* cannot be downloaded"
    ) as error:
        PatchEBT.from_pretrained("nobody/nothing")  # the tests are offline
    assert "\n" not in str(error.value)


def test_a_card_with_its_licence_goes_where_the_weights_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    card = (PRETRAINED_DIR / "tiny_imagenet_ebt" / "README.md").read_text()
    assert "research use only" in card
    PatchEBT.from_pretrained("tiny_imagenet_ebt").save_pretrained(tmp_path / "first")
    load_pretrained(str(tmp_path / "first")).save_pretrained(tmp_path / "second")
    load_denoiser(str(tmp_path / "second")).model.save_pretrained(tmp_path / "third")
    assert [(tmp_path / name / "README.md").read_text() for name in ("first", "second", "third")] == [card] * 3

    # From the hub, and a card that is there already is left alone.
    asked = []
    monkeypatch.setattr(
        pretrained_model, "hf_hub_download", lambda name, file, **_: asked.append(file) or str(tmp_path / "first" / file)
    )
    (tmp_path / "fourth").mkdir()
    (tmp_path / "fourth" / "README.md").write_text("mine")
    for folder in ("fourth", "fifth"):
        load_pretrained("hub:owner/name").save_pretrained(tmp_path / folder)
    assert (tmp_path / "fourth" / "README.md").read_text() == "mine"
    assert (tmp_path / "fifth" / "README.md").read_text() == card and "README.md" in asked

    # A model that was made here has the card to be filled in.
    PatchEBT(load_pretrained("tiny_imagenet_ebt").config).save_pretrained(tmp_path / "new")
    assert "Not filled in yet" in (tmp_path / "new" / "README.md").read_text()
