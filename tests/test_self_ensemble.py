"""The mean over mirrored and rotated copies: the copies, the mean, the steps that are told, and stopping."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from ebt_vision import cli
from ebt_vision.benchmark.flops import CostMeter
from ebt_vision.benchmark.images import load_images
from ebt_vision.benchmark.measure import Bench, Subject
from ebt_vision.benchmark.protocols import Condition
from ebt_vision.benchmark.rows import RowSettings, prepare, rows_of
from ebt_vision.benchmark.verification import has_candidates
from ebt_vision.data.image_files import read_image
from ebt_vision.denoising.base import Denoiser, IdentityDenoiser
from ebt_vision.denoising.classical import NonLocalMeansDenoiser
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.results import DenoiseStep, no_network_result
from ebt_vision.denoising.self_ensemble import turned, turned_back


class Ramp(Denoiser):
    """Adds a ramp that falls from left to right, 1 to 0: the mean over mirrored copies adds a constant."""

    name = "ramp"

    def _denoise(self, noisy, options, image_ids, callback):
        return no_network_result(noisy + 0.2 * torch.linspace(1, 0, noisy.shape[-1]), noisy, options)


def images(count: int = 2, height: int = 16, width: int = 24) -> Tensor:
    return 0.3 + 0.3 * torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> EBTDenoiser:
    denoiser = load_denoiser(str(tiny_checkpoint))
    assert isinstance(denoiser, EBTDenoiser)
    return denoiser


def test_there_are_eight_different_copies_that_are_turned_back() -> None:
    square = torch.arange(9.0).reshape(3, 3)
    copies = [turned(square, copy) for copy in range(8)]
    assert len({tuple(copy.flatten().tolist()) for copy in copies}) == 8
    assert all(torch.equal(copies[i], other) for i, other in {1: square.flip(1), 2: square.flip(0), 4: square.T}.items())
    wide = images()
    assert all(torch.equal(turned_back(turned(wide, copy), copy), wide) for copy in range(8))


def test_an_error_that_follows_the_copy_cancels() -> None:
    noisy = images()
    one, two, eight = (Ramp().denoise(noisy, DenoiseOptions(self_ensemble=count)).image for count in (1, 2, 8))
    torch.testing.assert_close(one, noisy + 0.2 * torch.linspace(1, 0, 24))
    torch.testing.assert_close(two, noisy + 0.1)
    torch.testing.assert_close(eight, noisy + 0.1)  # every ramp has the mean 0.5 with its mirror image


@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_result_is_the_mean_of_the_results_of_the_copies(tiny: EBTDenoiser, count: int) -> None:
    noisy, plain = images(), DenoiseOptions(num_steps=2, keep_trajectory=True)
    results = [tiny.denoise_whole(turned(noisy, copy), plain) for copy in range(count)]
    mean = tiny.denoise_whole(noisy, DenoiseOptions(num_steps=2, keep_trajectory=True, self_ensemble=count))
    expected = torch.stack([turned_back(result.image, copy) for copy, result in enumerate(results)]).mean(0)
    torch.testing.assert_close(mean.image, expected, atol=1e-6, rtol=0)
    assert mean.energies is not None and mean.trajectory is not None
    torch.testing.assert_close(mean.energies, torch.stack([r.energies for r in results if r.energies is not None]).mean(0))
    assert len(mean.trajectory) == 3 and torch.equal(mean.trajectory[-1], mean.image)
    assert results[0].trajectory is not None
    torch.testing.assert_close(mean.trajectory[0], results[0].trajectory[0])
    assert mean.num_forward.tolist() == [count * int(results[0].num_forward[0])] * 2 and mean.num_steps.tolist() == [2, 2]


def test_steps_are_told_turned_back_and_copy_by_copy(tiny: EBTDenoiser) -> None:
    steps: list[DenoiseStep] = []
    noisy = images(1)
    tiny.denoise(noisy, DenoiseOptions(num_steps=1, self_ensemble=2), callback=steps.append)
    assert [(step.candidate, step.index, step.num_candidates) for step in steps] == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]
    torch.testing.assert_close(steps[2].image, steps[0].image)


@pytest.mark.parametrize(("stop_at", "index"), [(0, 1), (2, 1), (1, 2)])
def test_a_stop_keeps_the_finished_copies(tiny: EBTDenoiser, stop_at: int, index: int) -> None:
    """Stopped in the third copy, or after the last step of the second: the mean of two. In the first copy: its image so far."""
    noisy = images(1)
    options = DenoiseOptions(num_steps=2, self_ensemble=4)
    stopped = tiny.denoise_whole(noisy, options, callback=lambda step: step.candidate == stop_at and step.index == index)
    if stop_at == 0:
        expected = tiny.denoise_whole(noisy, DenoiseOptions(num_steps=2), callback=lambda step: step.index == 1).image
    else:
        expected = tiny.denoise_whole(noisy, DenoiseOptions(num_steps=2, self_ensemble=2)).image
    torch.testing.assert_close(stopped.image, expected, atol=1e-6, rtol=0)


def test_a_strength_above_1_counts_the_passes_of_both_runs(tiny: EBTDenoiser) -> None:
    noisy = images(1)
    one, two = (tiny.denoise(noisy, DenoiseOptions(num_steps=1, self_ensemble=2, strength=s)) for s in (1.0, 1.5))
    assert int(two.num_forward[0]) == 2 * int(one.num_forward[0])


def test_tiles_a_strength_and_methods_without_a_network(tiny: EBTDenoiser) -> None:
    noisy = images(1, 40, 56)
    count = DenoiseOptions(num_steps=1, self_ensemble=2, tile_size=16)
    tiled, one = tiny.denoise(noisy, count), tiny.denoise(noisy, DenoiseOptions(num_steps=1, tile_size=16))
    assert int(tiled.num_forward[0]) == 2 * int(one.num_forward[0]) and not torch.equal(tiled.image, one.image)
    for exact in (noisy, noisy.double() / 3):
        assert torch.equal(IdentityDenoiser().denoise(exact, DenoiseOptions(self_ensemble=8)).image, exact)
    assert torch.equal(Ramp().denoise(noisy, DenoiseOptions(self_ensemble=2, strength=0)).image, noisy)
    stronger = Ramp().denoise(noisy, DenoiseOptions(self_ensemble=2, strength=1.5)).image
    torch.testing.assert_close(stronger, noisy - 0.05 + 0.1)  # the input of the second pass is x + 0.5 * (x - (x + 0.1))
    told = NonLocalMeansDenoiser().denoise(noisy, DenoiseOptions(sigma=20.0, self_ensemble=2))
    assert told.image.shape == noisy.shape


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(self_ensemble=3), "self_ensemble=3 .*use 1 .off., 2, 4 or 8"),
        (dict(self_ensemble=2, num_candidates=2), "do not go together"),
    ],
)
def test_other_numbers_of_copies_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DenoiseOptions(**options)


def test_the_command_line(tiny: EBTDenoiser, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (24, 16), (200, 30, 30)).save(tmp_path / "a.png")
    words = ["denoise", str(tmp_path / "a.png"), "--model", str(tiny_checkpoint), "--output", str(tmp_path / "out")]
    words += ["--add-noise", "25", "--steps", "1"]
    assert cli.main([*words, "--self-ensemble", "2"]) == 0
    clean = read_image(tmp_path / "a.png").pixels[None]
    from ebt_vision.noise.named import Noise

    noise = Noise.parse("25")
    expected = tiny.denoise(noise.add(clean, 0), DenoiseOptions(num_steps=1, self_ensemble=2, sigma=25.0)).image[0]
    written = read_image(tmp_path / "out" / "a.png").pixels
    torch.testing.assert_close(written, expected, atol=0.5 / 255 + 1e-4, rtol=0)
    capsys.readouterr()
    for wrong in (["--self-ensemble", "5"], ["--self-ensemble", "2", "--candidates", "2"]):
        assert cli.main([*words, *wrong, "--overwrite"]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_benchmark_has_a_row_for_each_number_of_copies() -> None:
    condition = Condition(protocol="awgn", kind="sigma", strength=25.0, seed=0)
    rows = list(rows_of("m", "ebt", condition, RowSettings(steps=2, candidates=0, self_ensembles=(2, 8))))
    assert [(row.method, row.self_ensemble, row.reported) for row in rows] == [
        ("thinking", 1, (1, 2)),
        ("thinking, mean of 2 copies", 2, (1, 2)),
        ("thinking, mean of 8 copies", 8, (1, 2)),
    ]
    assert prepare(Ramp(), rows[2], condition, images(1))[2].self_ensemble == 8
    assert [row.method for row in rows_of("i", "identity", condition, RowSettings(self_ensembles=(2,)))] == ["noisy input"]
    with pytest.raises(ValueError, match="--self-ensemble 3"):
        RowSettings(self_ensembles=(3,))


def test_the_benchmark_counts_one_pass_of_every_copy(tiny: EBTDenoiser, tmp_path: Path) -> None:
    """The energy of a last image is only for the table, of every copy."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (24, 16), (200, 30, 30)).save(tmp_path / "images" / "a.png")
    loaded = load_images(str(tmp_path / "images"), img_size=None)
    bench = Bench(images=loaded, folder=tmp_path / "parts", batch_size=1, tile=None, lpips=None, meter=CostMeter())
    subject = Subject(name="m", denoiser=tiny, hash=None)
    condition = Condition(protocol="awgn", kind="sigma", strength=25.0, seed=0)
    passes = []
    for row in rows_of("m", "ebt", condition, RowSettings(steps=2, candidates=0, self_ensembles=(2, 8))):
        parts = bench.measure(subject, row, condition, [[0]], bench.parts(subject, row, condition, [0]))
        passes.append(parts[0]["passes"].tolist())
        measured = SimpleNamespace(row=row)
        assert has_candidates(measured) == (row.self_ensemble == 1)  # type: ignore[arg-type]
    assert passes == [[[1, 2]], [[2, 4]], [[8, 16]]]
