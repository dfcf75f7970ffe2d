"""The benchmark programs on tiny models: rows, resuming, refusing incompatible results."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from ebt_vision.benchmark import parts
from ebt_vision.benchmark.flops import CostMeter
from ebt_vision.benchmark.protocols import Condition
from ebt_vision.core import metrics
from ebt_vision.denoising.base import for_photographs
from ebt_vision.denoising.load import load_denoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.tiling import denoise_tiled
from ebt_vision.models.dit import DiT
from ebt_vision.models.dit_config import DiTConfig
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig
from ebt_vision.noise import processes

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import compare
import denoising
import picture
import training_gain

QUICK = ["--sweep", "--strip", "0", "--candidates", "0", "--resamples", "100"]


def write_photos(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for i, size in enumerate(sizes):
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), [(32, 32)] * 5)


def regressor(seed: int) -> PatchRegressor:
    """Random weights, the head's too, which would start at zero."""
    torch.manual_seed(seed)
    model = PatchRegressor(PatchRegressorConfig(img_size=32, embed_dim=32, depth=1, num_heads=2))
    torch.nn.init.normal_(model.head.weight, std=0.05)
    return model


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("baselines")
    regressor(seed=0).save_pretrained(folder / "reg")
    DiT(DiTConfig(img_size=32, embed_dim=32, depth=1, num_heads=2)).save_pretrained(folder / "dit")
    return [str(folder / "reg"), str(folder / "dit")]


def arguments(photos: Path, output: Path, models: list[str], *more: str) -> list[str]:
    common = ["--data", str(photos), "--output", str(output), "--img-size", "32", "--batch-size", "2", "--steps", "3"]
    return ["--models", *models, *common, *QUICK, *more]


def results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def rows(output: Path) -> list[dict]:
    return results(output)["rows"]


def timeless(value):
    """Remove the fields that may differ between two runs of one command."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in ("date", "seconds_per_image")}
    return [timeless(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def full_run(photos: Path, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, baselines: list[str]) -> Path:
    """Every kind of row, on the images at two levels."""
    output = tmp_path_factory.mktemp("full")
    more = ["--levels", "0.02", "0.1", "--passes", "4", "--tolerances", "0.5", "--candidates", "3", "--candidate-steps", "2"]
    more += ["--step-sizes", "0.5", "--loops", "1", "--sweep", "0.1", "0.3", "--sweep-limit", "2", "--strip", "1"]
    assert denoising.main(arguments(photos, output, ["identity", str(tiny_checkpoint), *baselines], *more)) == 0
    return output


def test_every_model_gets_its_rows_on_the_same_noise(photos: Path, full_run: Path):
    table = [row for row in rows(full_run) if not row["sweep"]]
    expected = [
        ("noisy input", 1),
        *[("thinking", step) for step in (1, 2, 3)],
        ("thinking, tolerance 0.5", 3),
        *[("thinking, step size x 0.5", step) for step in (1, 2, 3)],
        ("best of 3", 2),
        *[("applied", step) for step in (1, 2, 3)],
        ("x0", 1),
        ("ddim", 4),
        ("recursion", 1),
    ]
    assert [(row["method"], row["steps"]) for row in table if row["strength"] == 0.1] == expected
    # Away from the training level the recursion has a second form.
    low = [(row["method"], row["steps"]) for row in table if row["strength"] == 0.02]
    assert low == [*expected, ("recursion from level 0.1", 1)]
    for row in table:  # the batch figure is that of the mean error; per image is never below it
        assert row["psnr_batch"] == pytest.approx(20 * np.log10(255) - 10 * np.log10(row["mse"]))
        assert row["psnr_image"] >= row["psnr_batch"] and row["num_images"] == 5
        low, high = row["psnr_image_ci95"]
        assert low <= row["psnr_image"] <= high and row["ssim_ci95"][0] <= row["ssim"] <= row["ssim_ci95"][1] <= 1
        assert row["reference"] == "dit:ddim:4"
    # The noisy row by another route: the level's noise on [-1, 1], clamped.
    noisy = {row["strength"]: row["mse"] for row in table if row["method"] == "noisy input"}
    pixels = [np.asarray(Image.open(photos / f"{i}.png")) for i in range(5)]
    clean = processes.to_model_range(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255)
    for level, value in noisy.items():
        again = processes.add_vp_noise(clean, level, torch.Generator().manual_seed(3)).clamp(-1, 1)
        assert float(metrics.mse(again, clean).mean()) * 127.5**2 == pytest.approx(value, rel=0.05)


def test_passes_and_flops_are_those_of_the_steps(full_run: Path):
    found = {
        (row["method"], row["steps"]): row for row in rows(full_run) if row["condition"] == "level 0.02" and not row["sweep"]
    }
    passes = {key: row["passes"] for key, row in found.items()}
    assert [passes["thinking", step] for step in (1, 2, 3)] == [1, 2, 3]
    assert passes["best of 3", 2] == 9  # three candidates, two steps and the energy of the last image each
    assert passes["ddim", 4] == 4 and passes["x0", 1] == 1 and passes["noisy input", 1] == 0
    assert passes["recursion", 1] == 20 and passes["recursion from level 0.1", 1] == 100  # every timestep of a loop
    flops = {key: row["flops"] for key, row in found.items()}
    assert flops["noisy input", 1] is None
    assert flops["thinking", 3] == pytest.approx(3 * flops["thinking", 1])
    assert flops["ddim", 4] == pytest.approx(4 * flops["x0", 1]) and flops["applied", 2] == pytest.approx(
        2 * flops["applied", 1]
    )
    assert 6 * flops["thinking", 1] < flops["best of 3", 2] < 9 * flops["thinking", 1]


def test_every_image_is_kept_and_the_rest_is_drawn(full_run: Path):
    table = pyarrow.parquet.read_table(full_run / "per_image.parquet").to_pandas()
    for row in rows(full_run):
        chosen = table[(table.model == row["model"]) & (table.method == row["method"]) & (table.steps == row["steps"])]
        chosen = chosen[(chosen.condition == row["condition"]) & (chosen.sweep == row["sweep"])]
        assert len(chosen) == row["num_images"] == (2 if row["sweep"] else 5)
        assert chosen.psnr.mean() == pytest.approx(row["psnr_image"]) and chosen.ssim.mean() == pytest.approx(row["ssim"])
    candidates = pyarrow.parquet.read_table(full_run / "candidates.parquet").to_pandas()
    assert len(candidates) == 2 * 5 * 3  # conditions, images, candidates
    steps, smaller, verified = results(full_run)["verification"]["candidates"][:3]
    assert (steps["method"], verified["method"]) == ("steps 1..3", "best of 3")
    assert smaller["method"] == "steps 1..3, step size x 0.5" and smaller["gain_over_mean"] != steps["gain_over_mean"]
    mine = candidates[candidates.condition == verified["condition"]]
    psnr = (10 * np.log10(255**2 / mine.mse)).groupby(mine.image)
    assert verified["oracle_gain_over_mean"]["mean"] == pytest.approx((psnr.max() - psnr.mean()).mean())
    kept = mine.loc[mine.groupby("image").energy.idxmin()].set_index("image")
    gain = (10 * np.log10(255**2 / kept.mse) - psnr.mean()).mean()
    assert verified["gain_over_mean"]["mean"] == pytest.approx(gain, abs=1e-6)
    states = table[(table.method == "thinking") & (table.condition == steps["condition"]) & ~table.sweep]
    lowest = states.loc[states.groupby("image").energy.idxmin()].set_index("image")
    gain = (lowest.psnr - states.groupby("image").psnr.mean()).mean()
    assert steps["gain_over_mean"]["mean"] == pytest.approx(gain, abs=1e-6)
    text = (full_run / "report.md").read_text()
    for name in ("cost.png", "levels.png", "energy.png", "strip-tiny-ebt.png"):
        assert Image.open(full_run / name).width > 200 and f"({name})" in text
    assert "noisy input" in text and "LPIPS: not available: pass --lpips-backbone" in text


def test_over_thinking_is_counted(full_run: Path):
    table = pyarrow.parquet.read_table(full_run / "per_image.parquet").to_pandas()
    chosen = table[(table.method == "thinking") & (table.condition == "level 0.1") & ~table.sweep]
    one, two = (chosen[chosen.steps == step].sort_values("image") for step in (1, 2))
    lower, worse = two.energy.to_numpy() < one.energy.to_numpy(), two.psnr.to_numpy() < one.psnr.to_numpy()
    thinking = [row for row in results(full_run)["verification"]["thinking"] if row["condition"] == "level 0.1"]
    assert [row["step"] for row in thinking] == [1, 2, 3]
    assert thinking[0]["over_thinking"] == (lower & worse).mean() and thinking[0]["energy_falls"] == lower.mean()


def test_it_goes_on_from_the_parts_that_are_done(photos: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch):
    """An interrupted and resumed run equals an uninterrupted run in another folder, except for date and seconds."""
    more = ["--candidates", "2", "--candidate-steps", "1"]
    command = arguments(photos, tmp_path / "cut", [str(tiny_checkpoint)], *more)
    write, done = parts.write_part, []

    def cut_off(path: Path, part: dict) -> None:
        if len(done) == 4:
            path.write_bytes(b"PK half")  # a kill in the middle of a write would leave no more than this, under another name
            raise KeyboardInterrupt
        done.append(path)
        write(path, part)

    monkeypatch.setattr(parts, "write_part", cut_off)
    assert denoising.main(command) == 130
    again: list[Path] = []
    monkeypatch.setattr(parts, "write_part", lambda path, part: (again.append(path), write(path, part)))
    assert denoising.main(command) == 0
    assert len(done) == 4 and not set(done) & set(again)
    assert denoising.main(arguments(photos, tmp_path / "whole", [str(tiny_checkpoint)], *more)) == 0
    assert timeless(results(tmp_path / "cut")) == timeless(results(tmp_path / "whole"))
    tables = [pyarrow.parquet.read_table(tmp_path / name / "per_image.parquet") for name in ("cut", "whole")]
    assert tables[0].to_pandas().equals(tables[1].to_pandas())


def test_parts_of_other_settings_are_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert denoising.main(arguments(photos, tmp_path, ["identity"])) == 0
    assert denoising.main(arguments(photos, tmp_path, ["identity"], "--limit", "3")) == 2
    assert "parts made with other images, limit; choose another --output" in capsys.readouterr().err
    assert denoising.main(arguments(photos, tmp_path, ["no-such-model"])) == 2
    assert "neither a shipped checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sigmas", "5"], "--sigmas has no effect with --protocol paper, only with awgn"),
        (["--protocol", "awgn", "--levels", "0.3"], "--levels has no effect with --protocol awgn, only with paper"),
        (["--clipped"], "--clipped is a track of awgn and ood"),
        (["--tolerance-of", "previous"], "--tolerance-of previous has no effect without --tolerances"),
        (["--langevin", "0.1"], "--langevin has no effect with --candidates 0"),
    ],
)
def test_options_without_an_effect_are_refused(photos: Path, tmp_path: Path, capsys, options: list[str], message: str):
    assert denoising.main(arguments(photos, tmp_path, ["identity"], *options)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    stored["config"] |= fields
    path.write_text(json.dumps(stored))


def test_parts_know_the_fields_of_the_config_that_their_row_depends_on(
    photos: Path, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
):
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    edit_config(model, training_gain=0.01)
    stopping = ["--tolerances", "0.5", "--tolerance-of", "training"]
    assert denoising.main(arguments(photos, tmp_path / "plain", [str(model)])) == 0
    assert denoising.main(arguments(photos, tmp_path / "stopping", [str(model)], *stopping)) == 0
    before = timeless(rows(tmp_path / "stopping"))
    edit_config(model, suggested_steps=7)  # no row depends on it
    assert denoising.main(arguments(photos, tmp_path / "stopping", [str(model)], *stopping)) == 0
    assert timeless(rows(tmp_path / "stopping")) == before
    edit_config(model, training_gain=100.0)  # plain thinking does not depend on it, its stopping rule does
    assert denoising.main(arguments(photos, tmp_path / "plain", [str(model)])) == 0
    capsys.readouterr()
    assert denoising.main(arguments(photos, tmp_path / "stopping", [str(model)], *stopping)) == 2
    assert "parts made with other config; choose another --output" in capsys.readouterr().err
    edit_config(model, noise_process="awgn")
    assert denoising.main(arguments(photos, tmp_path / "plain", [str(model)])) == 2
    assert "parts made with other config; choose another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--clipped"], "--clipped is a track of awgn and ood"),
        (["--protocol", "ood", "--corruptions", "fog"], "corruption 'fog' is unknown; use some of salt-and-pepper"),
        (["--reference", "identity:noisy input:7"], "is not a row of this run; the rows are: identity:noisy input:1"),
        (["--group", "both=identity"], "does not have the form NAME=MODEL,MODEL"),
        (["--lpips-backbone", "missing.pth"], "no LPIPS backbone at missing.pth"),
        (["--device", "abacus"], "device='abacus' is not on this machine"),
    ],
)
def test_what_makes_no_sense_is_one_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, more, message):
    assert denoising.main(arguments(photos, tmp_path, ["identity"], *more)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("denoising:")]
    assert len(errors) == 1 and message in errors[0]


def test_unreadable_images_are_left_out_of_every_row(tmp_path: Path, baselines: list[str], capsys: pytest.CaptureFixture):
    folder = write_photos(tmp_path / "some", [(32, 32)] * 3)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:500])
    (folder / "note.png").write_text("no image")
    assert denoising.main(arguments(folder, tmp_path / "out", ["identity", baselines[0]], "--levels", "0.1")) == 0
    assert "2 images" in (err := capsys.readouterr().err) and "2 skipped: 1.png" in err
    assert {row["num_images"] for row in rows(tmp_path / "out")} == {2}
    assert "Excluded from every row: note.png" in (tmp_path / "out" / "report.md").read_text()


def test_awgn_is_the_restoration_papers(tmp_path: Path, tiny_checkpoint: Path):
    """Noise, tiles and rounding computed independently, on photographs of two shapes, and a separate track for 8-bit input."""
    folder = write_photos(tmp_path / "photos", [(37, 45), (45, 37)])
    command = ["--protocol", "awgn", "--models", "identity", str(tiny_checkpoint), "--data", str(folder), "--sigmas", "25"]
    command += [*QUICK, "--steps", "2", "--candidates", "2", "--candidate-steps", "1"]
    assert denoising.main([*command, "--output", str(tmp_path / "float")]) == 0
    assert denoising.main([*command, "--output", str(tmp_path / "clipped"), "--clipped"]) == 0
    found = {(row["method"], row["steps"]): row for row in rows(tmp_path / "float")}
    denoiser = for_photographs(load_denoiser(str(tiny_checkpoint)))
    for method, count, step in (("noisy input", 1, 1), ("thinking", 2, 2)):
        psnrs = []
        for i in range(2):
            image = np.asarray(Image.open(folder / f"{i}.png")).astype(np.float64)
            noisy = image / 255 + np.random.RandomState(0).normal(0, 25 / 255, image.shape)
            if method == "thinking":
                tensor = torch.from_numpy(noisy).permute(2, 0, 1).float()
                output = (
                    denoise_tiled(denoiser, tensor, DenoiseOptions(num_steps=count)).image[0].permute(1, 2, 0).double().numpy()
                )
            else:
                output = noisy
            output = np.round(np.clip(output, 0, 1) * 255)
            psnrs.append(10 * np.log10(255**2 / np.mean((output - image) ** 2)))
        assert found[method, step]["psnr_image"] == pytest.approx(np.mean(psnrs), abs=2e-3)
    clipped = rows(tmp_path / "clipped")[0]
    assert clipped["condition"] == "sigma 25, 8-bit input" and clipped["noise"] != found["noisy input", 1]["noise"]
    assert found["best of 2", 1]["passes"] == 4  # for each tile
    cost = CostMeter().cost(denoiser, 32, 32)
    assert cost and found["thinking", 1]["flops"] == 4 * cost.step  # four tiles


def test_every_corruption_runs(photos: Path, tmp_path: Path, baselines: list[str]):
    assert denoising.main(arguments(photos, tmp_path, ["identity", baselines[0]], "--protocol", "ood", "--limit", "2")) == 0
    noisy = {row["condition"]: row["psnr_image"] for row in rows(tmp_path) if row["method"] == "noisy input"}
    assert list(noisy) == ["salt-and-pepper 0.05", "poisson 30", "speckle 0.2", "jpeg 10", "motion-blur 9"]
    assert all(5 < psnr < 30 for psnr in noisy.values())


def test_the_camera_protocol_has_noise_of_its_strengths_and_tells_nobody(photos: Path, tmp_path: Path):
    command = ["--protocol", "camera", "--camera-sigmas", "5", "20", "--limit", "2"]
    assert denoising.main(arguments(photos, tmp_path, ["identity", "nlm"], *command)) == 0
    found = {(row["condition"], row["method"]): row["psnr_image"] for row in rows(tmp_path)}
    noisy = [found[f"camera {sigma}", "noisy input"] for sigma in (5, 20)]
    for sigma, psnr in zip((5, 20), noisy, strict=True):
        assert psnr == pytest.approx(20 * np.log10(255 / sigma), abs=1.0)  # clipping and rounding change it a little
    assert ("camera 5", "sigma estimated") in found and ("camera 5", "told sigma") not in found
    condition = Condition(protocol="camera", kind="camera", strength=20.0)
    clean = torch.randint(0, 256, (2, 3, 16, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(condition.observe(clean, [3, 4])[1:], condition.observe(clean[1:], [4]))
    assert condition.sigma is None and condition.timestep is None


def test_seeds_and_checkpoints_combine(photos: Path, tmp_path: Path, baselines: list[str]):
    other = tmp_path / "other" / "reg"
    regressor(seed=1).save_pretrained(other)
    more = ["--seeds", "0", "1", "--levels", "0.1", "--group", f"regressor={baselines[0]},{other}"]
    assert denoising.main(arguments(photos, tmp_path / "out", ["identity"], *more)) == 0
    table, combined = rows(tmp_path / "out"), results(tmp_path / "out")["combined"]
    once = [row for row in combined if (row["model"], row["steps"]) == ("regressor", 1)]
    assert len(once) == 1 and once[0]["num_runs"] == 4 and once[0]["seeds"] == [0, 1] and len(once[0]["members"]) == 2
    values = [row["psnr_image"] for row in table if row["method"] == "applied" and row["steps"] == 1]
    assert once[0]["psnr_image"] == pytest.approx(np.mean(values))
    assert once[0]["psnr_image_spread"] == pytest.approx(np.std(values, ddof=1)) and np.std(values) > 0
    assert "mean ± standard deviation" in (tmp_path / "out" / "report.md").read_text()


def test_a_config_file_says_the_same(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    config = tmp_path / "benchmark.yaml"
    lines = [
        "models: [identity]",
        f"data: {photos}",
        "img-size: 32",
        "levels: [0.1, 0.2]",
        "sweep: []",
        "strip: 0",
        "limit: null",
    ]
    config.write_text("\n".join(lines))
    assert denoising.main(["--config", str(config), "--levels", "0.3", "--output", str(tmp_path / "out")]) == 0
    assert [row["strength"] for row in rows(tmp_path / "out")] == [0.3]  # the command line takes precedence over the file
    capsys.readouterr()
    config.write_text("\n".join([*lines, "levles: [0.1]"]))
    with pytest.raises(SystemExit) as exit_status:
        denoising.main(["--config", str(config)])
    assert exit_status.value.code == 2
    assert "unknown key 'levles'" in (err := capsys.readouterr().err) and "did you mean 'levels'?" in err
    assert err.count("\n") == 1


# --- compare


def edited(output: Path, target: Path, edit: Callable[[dict], object]) -> str:
    """A copy of a run's results, with its rows changed."""
    copy = results(output)
    for row in copy["rows"]:
        edit(row)
    target.mkdir()
    (target / "results.json").write_text(json.dumps(copy))
    return str(target)


def test_results_merge_into_one_table(full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    renamed = edited(full_run, tmp_path / "b", lambda row: row.update(model=row["model"] + "_b", hash="other"))
    both = [str(full_run / "results.json"), renamed]
    assert compare.main([*both, "--conditions", "level 0.1"]) == 0
    text = capsys.readouterr().out
    assert "## level 0.1, seed 0, 5 images" in text and "| tiny-ebt_b |" in text and "level 0.02" not in text
    assert compare.main([*both, "--format", "latex", "--models", "tiny-ebt", "identity_b"]) == 0
    text = capsys.readouterr().out
    assert r"\toprule" in text and r"identity\_b" in text and "dit" not in text.replace("dit:ddim", "")
    target = tmp_path / "table.csv"
    assert compare.main([*both, "--format", "csv", "--output", str(target)]) == 0
    header, *lines = target.read_text().splitlines()
    assert "psnr_image_ci95_low" in header.split(",")
    assert len(lines) == 2 * sum(not row["sweep"] for row in rows(full_run))
    same = edited(full_run, tmp_path / "same", lambda row: None)
    assert compare.main([str(full_run), same]) == 0  # rows that both files have are there once
    assert capsys.readouterr().out.count("| noisy input |") == 2


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda row: row.update(images="others"), "was measured on other images than"),
        (lambda row: row.update(noise="other"), "was measured on other noise than"),
        (lambda row: row.update(seed=1), "has no rows for paper level 0.02, seed"),
        (lambda row: row.update(mse=2 * row["mse"]), "has a mean error of"),
    ],
)
def test_rows_that_do_not_compare_are_refused(full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, edit, message):
    assert compare.main([str(full_run), edited(full_run, tmp_path / "b", edit)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_files_that_are_no_results_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "results.json").write_text('{"rows": []}')
    assert compare.main([str(tmp_path)]) == 2
    assert "has no about, protocol" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "missing.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err


# --- the other programs


def test_the_picture_is_drawn(tmp_path: Path, photos: Path, tiny_checkpoint: Path):
    target = tmp_path / "picture.png"
    picture.main(["--model", str(tiny_checkpoint), "--images", str(photos / "0.png"), "--steps", "1", "--output", str(target)])
    assert Image.open(target).width > 100


def test_the_training_gain_is_the_mean_fall_of_the_first_step(
    photos: Path, baselines: list[str], tiny_checkpoint: Path, capsys
):
    assert training_gain.main(["--model", str(tiny_checkpoint), "--data", str(photos), "--limit", "4"]) == 0
    told = capsys.readouterr().out
    falls = training_gain.measure(str(tiny_checkpoint), str(photos), 0.1, 4, batch_size=3)
    assert falls.shape == (4,) and f"training_gain: {falls.mean():.4g} " in told
    assert training_gain.main(["--model", baselines[0], "--data", str(photos)]) == 2
    assert "is not an EBT" in capsys.readouterr().err
