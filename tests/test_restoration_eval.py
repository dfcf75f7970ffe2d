"""eval/restoration.py: damages, classical methods, and the files that it writes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ebt_vision.benchmark.restoration import CLASSICAL, TASKS, Damaged, choose, damage
from ebt_vision.core.metrics import psnr
from ebt_vision.restoration.likelihoods import Mask

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import restoration


def waves(size: int = 48) -> Tensor:
    rows, columns = torch.arange(size)[:, None] / 7.0, torch.arange(size) / 5.0
    return torch.stack([0.5 + 0.3 * torch.sin(rows + k) * torch.cos(columns * (1 + k / 3)) for k in range(3)])[None]


@pytest.mark.parametrize("task", TASKS)
def test_damage_depends_on_the_seed_and_the_number_alone(task: str) -> None:
    first, again, other = (damage(task, waves(), seed=0, number=number) for number in (0, 0, 1))
    assert torch.equal(first.observed, again.observed)
    if task not in ("upscale2", "upscale4", "jpeg"):  # these draw nothing
        assert not torch.equal(first.observed, other.observed)
    value = float(first.likelihood.value(waves(), first.observed))
    per_value = value / first.observed.numel()
    expected = 0.5 * (2 / 255) ** 2 if task == "blur" else 0.0
    assert per_value == pytest.approx(expected, rel=0.1, abs=2e-5)


def test_half_of_the_pixels_are_missing_and_text_covers_some() -> None:
    for task, low, high in (("missing", 0.45, 0.55), ("scratch", 0.02, 0.3), ("text", 0.02, 0.3)):
        mask = damage(task, waves(), seed=0, number=0).likelihood
        assert isinstance(mask, Mask) and low < float((~mask.known).float().mean()) < high


@pytest.mark.parametrize(
    ("task", "name", "worse"),
    [
        ("missing", "biharmonic", "start"),
        ("missing", "TV", "start"),
        ("upscale2", "back-projection", "bicubic"),
        ("blur", "Wiener", "start"),
        ("blur", "Richardson-Lucy", "start"),
    ],
)
def test_classical_methods_repair(task: str, name: str, worse: str) -> None:
    damaged = damage(task, waves(), seed=0, number=0)
    method, values = CLASSICAL[task][name]
    start, _ = CLASSICAL[task][worse]
    before, after = (
        float(psnr(m(damaged, v).clamp(0, 1), waves(), data_range=1.0)) for m, v in ((start, 0), (method, values[0]))
    )
    assert after > before + 0.3


def test_the_parameter_with_the_best_psnr_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fade(damaged: Damaged, parameter: float) -> Tensor:
        return damaged.observed * parameter

    monkeypatch.setitem(CLASSICAL["blur"], "fade", (fade, (0.2, 1.0, 0.5)))
    assert choose("blur", "fade", [waves()], seed=0) == 1.0
    assert choose("blur", "fade", [], seed=0) == 0.2


def test_the_program_writes_rows_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        array = (waves()[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(np.roll(array, number, 0)).save(tmp_path / f"{number}.png")
    command = ["--data", str(tmp_path), "--models", "identity", "--tasks", "missing", "--skip", "TV", "biharmonic"]
    assert restoration.main([*command, "--size", "40", "--images", "2", "--output", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["start", "identity"] and results["size"] == [40, 40]
    row = results["rows"][0]
    low, high = row["psnr_interval"]
    assert low <= row["psnr"] <= high and row["psnr"] == pytest.approx(np.mean(row["psnrs"]))
    assert (tmp_path / "out" / "report.md").read_text().count("\n") == 4
    assert restoration.main([*command, "--size", "64", "--output", str(tmp_path / "out")]) == 2
    assert "use a --size of 48 or less" in capsys.readouterr().err


def test_classical_rows_of_an_earlier_run_are_taken_if_they_are_of_the_same_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, turns in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        array = (waves()[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(np.ascontiguousarray(np.rot90(array, turns)) // (turns + 1)).save(tmp_path / name / "0.png")

    def run(folder: str, output: str, *more: str) -> int:
        command = [
            "--data",
            str(tmp_path / folder),
            "--models",
            "identity",
            "--tasks",
            "upscale2",
            "--size",
            "40",
            "--skip",
            "TV",
        ]
        return restoration.main([*command, "--images", "1", "--output", str(tmp_path / output), *more])

    assert run("a", "first") == 0
    earlier = tmp_path / "first" / "results.json"
    assert run("a", "second", "--classical-from", str(earlier)) == 0
    first, second = (json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("first", "second"))
    assert [row["method"] for row in second] == ["bicubic", "back-projection", "identity"]
    assert first[:2] == second[:2]  # the seconds too: they were not measured again
    about = [json.loads((tmp_path / name / "results.json").read_text())["classical_from"] for name in ("first", "second")]
    assert about[0] is None and "--classical-from" not in about[1]["command"] and about[1]["commit"]
    broken = json.loads(earlier.read_text())
    for number, change in enumerate(({"psnrs": None}, {"psnrs": [1.0, 2.0]}, {"method": "other"})):
        (tmp_path / f"{number}.json").write_text(json.dumps(broken | {"rows": [broken["rows"][0] | change, broken["rows"][1]]}))
    assert second[2]["against"] == "back-projection" and second[2]["gain"] == first[2]["gain"]
    for arguments, said in (
        (("b", "third", "--classical-from", str(earlier)), "is of other images"),
        (("a", "third", "--classical-from", str(earlier), "--seed", "1"), "has seed=0, and this run 1"),
        (("a", "third", "--classical-from", str(earlier), "--tasks", "jpeg"), "has no row start of jpeg"),
        (("a", "third", "--classical-from", str(tmp_path / "a" / "0.png")), "is no results.json of this program"),
        (("a", "third", "--classical-from", str(tmp_path / "none.json")), "choose another --classical-from"),
        (("a", "third", "--classical-from", str(tmp_path)), "choose another --classical-from"),
        (("a", "third", "--classical-from", str(tmp_path / "0.json")), "is of other images"),
        (("a", "third", "--classical-from", str(tmp_path / "1.json")), "is of other images"),
        (("a", "third", "--classical-from", str(tmp_path / "2.json")), "has no row bicubic of upscale2"),
        (("a", "third", "--classical-from", str(earlier), "--choose-on", str(tmp_path / "a")), "leave out one"),
    ):
        assert run(*arguments) == 2 and said in capsys.readouterr().err


def test_differences_are_paired_and_against_the_best_classical_method() -> None:
    def row(method: str, psnrs: list[float], is_network: bool) -> dict:
        return {"method": method, "psnr": float(np.mean(psnrs)), "psnrs": psnrs, "is_network": is_network}

    rows = [row("start", [10.0, 30.0], False), row("TV", [20.0, 31.0], False), row("ebt", [20.5, 31.5], True)]
    restoration.differences(rows, seed=0)
    assert rows[2]["against"] == "TV" and rows[2]["gain"] == 0.5
    assert rows[2]["gain_interval"] == [0.5, 0.5]  # the same on every image, though the images differ by 11 dB
    assert "gain" not in rows[1]


def test_dpir_of_deepinv_runs_on_our_operators_and_denoisers() -> None:
    pytest.importorskip("deepinv")
    from ebt_vision.benchmark.restoration_deepinv import ITERATIONS, dpir
    from ebt_vision.denoising.base import IdentityDenoiser

    damaged = damage("upscale2", waves(), seed=0, number=0)
    image, passes = dpir(damaged.observed, damaged.likelihood, IdentityDenoiser(), noise=0.0)
    assert passes == ITERATIONS and image.shape == waves().shape
    # With a denoiser that changes nothing, only the observation counts: the image explains it.
    assert float(damaged.likelihood.value(image, damaged.observed)) / damaged.observed.numel() < 1e-5
    with pytest.raises(ValueError, match="DPIR needs a linear damage, not JpegIntervals"):
        broken = damage("jpeg", waves(), seed=0, number=0)
        dpir(broken.observed, broken.likelihood, IdentityDenoiser(), noise=0.0)


def test_more_solvers_and_dpir_are_rows_of_their_own(tmp_path: Path, tiny_checkpoint: Path) -> None:
    pytest.importorskip("deepinv")
    Image.fromarray((waves(64)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(tmp_path / "a.png")
    command = ["--data", str(tmp_path), "--models", str(tiny_checkpoint), "--tasks", "upscale2", "jpeg", "--images", "1"]
    command += ["--solvers", "descent", "--dpir", "--skip", "TV", "BM3D", "back-projection", "--size", "32"]
    assert restoration.main([*command, "--output", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["parameter"] for row in rows] == ["", "", "descent", "deepinv DPIR", "", "", "descent"]  # JPEG is not linear
    assert [row["is_network"] for row in rows] == [False, True, True, True, False, True, True]
    assert all(row["against"] == "bicubic" for row in rows[1:4])
