"""Exported networks equal the network, in onnxruntime and as torch.export programs, at sizes not used for the export."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ebt_vision.cli import main
from ebt_vision.core.checks import MissingExtraError
from ebt_vision.core.thinking import think
from ebt_vision.denoising.export import Proposal, Step, export_model
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig
from ebt_vision.noise.processes import to_image_range, to_model_range

TINY = dict(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, mlp_ratio=2.0)
STEM = dict(stem_widths=(4, 8), noise_process="awgn")
KINDS = ({}, STEM, STEM | dict(observation_context=True))
each_kind = pytest.mark.parametrize("changes", KINDS, ids=lambda changes: "-".join(changes) or "plain")


def tiny_ebt(**changes: object) -> PatchEBT:
    torch.manual_seed(0)
    model = PatchEBT(PatchEBTConfig(**(TINY | changes)))  # type: ignore[arg-type]
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def run_onnx(path: Path, *images: torch.Tensor) -> list[np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return session.run(None, {name: image.numpy() for name, image in zip(names, images, strict=True)})


def inputs_of(model: PatchEBT, *shape: int) -> list[torch.Tensor]:
    """Return candidates, and the noisy images for a model with observation context."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(*shape, generator=generator) for _ in range(2 if model.config.observation_context else 1)]


@each_kind
def test_a_step_is_a_step_of_thinking(changes: dict):
    """The traced module agrees with think() before the export."""
    model = tiny_ebt(**changes)
    images, *noisy = inputs_of(model, 2, 3, 8, 12)
    candidates, energies = Step(model)(images, *noisy)
    context = tuple(to_model_range(image) for image in noisy)
    alpha = model.step_size.detach()
    result = think(model, to_model_range(images), context=context, step_size=alpha, num_steps=1)
    torch.testing.assert_close(candidates, to_image_range(result.final), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(energies, result.energies[0] / 6)  # 2 x 3 patches


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@each_kind
def test_a_proposal_takes_any_batch_and_size(changes: dict, suffix: str, tmp_path: Path):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    model = tiny_ebt(**changes)
    path = tmp_path / f"model{suffix}"
    export_model(model, path)
    for shape in ((1, 3, 8, 8), (3, 3, 20, 12)):
        images = torch.rand(*shape, generator=torch.Generator().manual_seed(1))
        expected = Proposal(model)(images)
        found = run_onnx(path, images)[0] if suffix == ".onnx" else torch.export.load(path).module()(images).detach().numpy()
        np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


@each_kind
def test_an_exported_step_gives_the_same_candidate_and_energy(changes: dict, tmp_path: Path):
    pytest.importorskip("onnxscript")
    model = tiny_ebt(**changes)
    export_model(model, tmp_path / "step.onnx", part="step", size=(8, 12))
    images = inputs_of(model, 1, 3, 8, 12)
    candidates, energies = run_onnx(tmp_path / "step.onnx", *images)
    expected = Step(model)(*images)
    np.testing.assert_allclose(candidates, expected[0].detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(energies, expected[1].detach().numpy(), rtol=1e-4)


def test_the_command_exports_a_regressor(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(0)
    model = PatchRegressor(PatchRegressorConfig(**(TINY | STEM)))  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "model")
    output = tmp_path / "model.pt2"
    assert main(["export", str(tmp_path / "model"), "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    images = torch.rand(1, 3, 12, 16)
    expected = to_image_range(model(to_model_range(images))).clamp(0, 1)
    torch.testing.assert_close(torch.export.load(output).module()(images), expected, rtol=1e-4, atol=1e-5)
    assert main(["export", str(tmp_path / "model"), "--output", str(output)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--output", "model.txt"], "must end with .onnx or .pt2"),
        (["--output", "no/model.pt2"], "is not a folder"),
        (["--output", "folder.pt2", "--overwrite"], "folder.pt2 is a folder; choose another --output"),
        (["--output", "model.pt2", "--part", "step"], "set height and width"),
        (
            ["--output", "model.pt2", "--part", "step", "--size", "9x16"],
            "size=9x16 does not fit; both sides must be multiples of 8",
        ),
        (
            ["--output", "model.pt2", "--part", "step", "--size", "0x16"],
            "size=0x16 does not fit; both sides must be multiples of 8",
        ),
        (["--output", "model.pt2", "--size", "16x16"], "--size is only for --part step"),
    ],
)
def test_a_wrong_request_is_one_line(
    arguments: list[str], answer: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.pt2").mkdir()
    assert main(["export", str(tiny_checkpoint), *arguments]) == 2
    error = capsys.readouterr().err
    assert answer in error and error.count("\n") == 1


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_disk_that_is_full_leaves_the_old_file(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export_model(tiny_ebt(energy_head="quadratic"), path)
    assert path.read_bytes() == b"old" and [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_step_as_a_torch_program_takes_the_step_of_the_network(tmp_path: Path):
    model = tiny_ebt()
    export_model(model, tmp_path / "step.pt2", part="step", size=(8, 12))
    images = inputs_of(model, 1, 3, 8, 12)
    found = torch.export.load(tmp_path / "step.pt2").module()(*images)
    for each, expected in zip(found, Step(model)(*images), strict=True):
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-5)


def test_models_without_the_part_are_refused(tmp_path: Path):
    regressor = PatchRegressor(PatchRegressorConfig(**TINY))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no energy and no step"):
        export_model(regressor, tmp_path / "step.pt2", part="step", size=(8, 8))
    linear = tiny_ebt(energy_head="linear", embed_dim=48)
    with pytest.raises(ValueError, match="no proposal"):
        export_model(linear, tmp_path / "proposal.pt2")


def test_without_onnx_one_line_names_the_extra(tmp_path: Path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r'pip install "ebt_vision\[onnx\]"'):
        export_model(tiny_ebt(), tmp_path / "model.onnx")
