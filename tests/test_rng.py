"""Generators: on the device of the candidates, and dependent only on the seed and the sample."""

import pytest
import torch

from ebt_vision.benchmark import text
from ebt_vision.benchmark.text import score_text
from ebt_vision.core import rng
from ebt_vision.core.rng import generators_on, make_generator, sample_generators
from ebt_vision.data.order import BatchStream
from ebt_vision.data.text import TextDataConfig, load_text_set
from ebt_vision.data.tokenizer import ByteTokenizer
from ebt_vision.denoising import base, ebt
from ebt_vision.models.causal_text_ebt import CausalTextEBT, CausalTextEBTConfig
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.objectives.text import TextBatch
from ebt_vision.text import generation
from ebt_vision.training.batch_loader import BatchLoader


class Elsewhere(torch.Generator):
    """A generator of the CPU in place of one of a device that this machine may not have."""

    wanted = ""


def seeded_elsewhere(seed: int, device: torch.device | str) -> torch.Generator:
    generator = Elsewhere()
    generator.manual_seed(seed)
    generator.wanted = str(device)
    return generator


def test_generators_of_the_device_stay_and_go_on():
    generators = sample_generators(3, [5, 8])
    torch.rand(2, generator=generators[0])
    there = generators_on(generators, torch.device("cpu"))
    assert there[0] is generators[0] and there[1] is generators[1]


def test_a_generator_moved_to_another_device_begins_anew_from_its_seed(monkeypatch: pytest.MonkeyPatch):
    generators = sample_generators(3, [5, 8])
    torch.rand(2, generator=generators[0])
    monkeypatch.setattr(rng, "_seeded", seeded_elsewhere)
    moved = generators_on(generators, torch.device("meta"))
    assert [g.wanted for g in moved] == ["meta", "meta"]
    for one, index in zip(moved, [5, 8], strict=True):
        assert torch.equal(torch.rand(4, generator=one), torch.rand(4, generator=make_generator(3, index)))


def test_a_batch_s_generators_move_with_its_tensors(monkeypatch: pytest.MonkeyPatch):
    def make(indices: list[int], epochs: list[int]) -> TextBatch:
        tokens = torch.tensor(indices)[:, None]
        return TextBatch(tokens=tokens, targets=tokens, starts=tokens, generators=sample_generators(0, indices))

    monkeypatch.setattr(rng, "_seeded", seeded_elsewhere)
    indices = next(BatchStream(8, 4, seed=0))
    batch = BatchLoader(make, torch.device("meta"), num_threads=0, num_parts=1).take(indices, 0)
    assert batch.tokens.device.type == "meta" and [g.wanted for g in batch.generators] == ["meta"] * 4
    seeds = [g.initial_seed() for g in sample_generators(0, indices.indices.tolist())]
    assert [g.initial_seed() for g in batch.generators] == seeds


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """Record the devices of requested generators; None for no device."""
    devices: list = []

    def spy(function):
        def made(*args, **options):
            devices.append(options.get("device"))
            return function(*args, **options)

        return made

    for module, name in ((generation, "make_generator"), (text, "sample_generators"), (ebt, "sample_generators")):
        monkeypatch.setattr(module, name, spy(getattr(rng, name)))
    return devices


def text_model() -> CausalTextEBT:
    torch.manual_seed(0)
    return CausalTextEBT(CausalTextEBTConfig(vocab_size=257, context_length=16, embed_dim=16, depth=1, num_heads=2)).eval()


def test_text_candidates_are_drawn_where_the_weights_are(asked: list, tmp_path):
    options = generation.GenerateOptions(num_candidates=2, langevin_std=0.1)
    generation.predict_all(text_model(), torch.tensor([256, 97]), options)
    assert asked == [torch.device("cpu")] * 5  # two places of two candidates, and Langevin noise
    asked.clear()
    (tmp_path / "book.txt").write_text("To be, or not to be")
    samples = load_text_set(TextDataConfig(path=str(tmp_path / "book.txt"), context_length=16))
    assert samples.tokenizer.vocab_size == ByteTokenizer().vocab_size
    score_text(text_model(), samples, num_steps=1, num_candidates=2)
    assert len(asked) >= 4 and set(asked) == {torch.device("cpu")}


def test_image_candidates_are_drawn_where_the_images_are(asked: list):
    torch.manual_seed(0)
    model = PatchEBT(PatchEBTConfig(img_size=16, patch_size=4, embed_dim=48, depth=1, num_heads=2)).eval()
    options = base.DenoiseOptions(num_steps=1, num_candidates=3, langevin_std=0.1)
    ebt.EBTDenoiser(model).denoise(torch.rand(1, 3, 16, 16), options)
    assert asked == [torch.device("cpu")] * 3  # Langevin noise, and the starts of the second and third candidate
