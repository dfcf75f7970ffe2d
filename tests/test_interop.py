"""Networks of spandrel and deepinv as denoisers, and denoisers as deepinv's: their own classes, tiny, random weights."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ebt_vision import cli
from ebt_vision.core.checks import MissingExtraError
from ebt_vision.denoising.base import IdentityDenoiser, adapt_to_noise
from ebt_vision.denoising.load import denoiser_for, is_of_library, load_denoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.tiling import denoise_tiled
from ebt_vision.models.checkpoint import CheckpointError
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.noise.named import Noise

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import denoising


def noisy_images(count: int = 2, height: int = 37, width: int = 31) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.5 + 0.1 * torch.randn(count, 3, height, width, generator=generator)


def spandrel_file(folder: Path, kind: str, suffix: str = ".safetensors", **changes) -> tuple[Path, torch.nn.Module]:
    """A file of random weights of one of spandrel's own networks, and the network."""
    architectures = pytest.importorskip("spandrel.architectures")
    module = __import__(f"{architectures.__name__}.{kind}", fromlist=[kind])
    sizes: dict = {
        "NAFNet": dict(img_channel=3, width=4, middle_blk_num=1, enc_blk_nums=[1], dec_blk_nums=[1]),
        "DRUNet": dict(in_nc=4, out_nc=3, nc=[4, 4, 4, 4], nb=2),
        "DnCNN": dict(in_nc=3, out_nc=3, nc=4, nb=8, act_mode="R"),
        "SCUNet": dict(in_nc=3, config=[1, 1, 1, 1, 1, 1, 1], dim=64),
    }[kind]
    torch.manual_seed(0)
    network = getattr(module, kind)(**(sizes | changes)).eval()
    for name, parameter in network.named_parameters():
        if name.endswith(("beta", "gamma")):  # NAFNet's blocks begin as the identity
            torch.nn.init.normal_(parameter, std=0.5)
    path = folder / f"{kind}{suffix}"
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    return path, network


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", ["NAFNet", "DnCNN", "SCUNet"])
def test_a_blind_network_of_spandrel_gives_what_it_gives_itself(tmp_path: Path, kind: str, suffix: str):
    path, network = spandrel_file(tmp_path, kind, suffix)
    denoiser = load_denoiser(f"spandrel:{path}")
    noisy = noisy_images(2, 64, 64)
    with torch.no_grad():
        expected = network(noisy).clamp(0, 1)
    result = denoiser.denoise(noisy, DenoiseOptions(num_steps=1))
    torch.testing.assert_close(result.image, expected)
    assert (result.image - noisy).abs().max() > 1e-3
    assert result.num_forward.tolist() == [1, 1]
    assert denoiser.num_parameters == sum(p.numel() for p in network.parameters())
    assert "sigma" not in denoiser.options_used
    assert denoiser.name == f"spandrel:{kind}{suffix}" and len(denoiser.weights_hash) == 12


def test_a_noise_map_holds_sigma_and_each_image_its_own_estimate(tmp_path: Path):
    path, network = spandrel_file(tmp_path, "DRUNet")
    denoiser = load_denoiser(f"spandrel:{path}")
    assert denoiser.options_used == {"sigma"} and denoiser.patch_size == 8
    noisy = noisy_images(2, 40, 48)
    told = denoiser.denoise(noisy, DenoiseOptions(sigma=51.0)).image
    with torch.no_grad():
        noise_map = torch.full((2, 1, 40, 48), 0.2)
        expected = network(torch.cat([noisy, noise_map], 1)).clamp(0, 1)
    torch.testing.assert_close(told, expected)
    assert (denoiser.denoise(noisy, DenoiseOptions(sigma=5.0)).image - told).abs().max() > 1e-4
    mixed = torch.cat([noisy[:1], 0.5 + 3 * (noisy[1:] - 0.5)])
    estimated = denoiser.denoise(mixed)
    for i in range(2):
        torch.testing.assert_close(estimated.image[i : i + 1], denoiser.denoise(mixed[i : i + 1]).image)


def test_odd_sizes_and_tiles(tmp_path: Path):
    path, _ = spandrel_file(tmp_path, "NAFNet")
    denoiser = load_denoiser(f"spandrel:{path}")
    noisy = noisy_images(1, 75, 61)
    tiled = denoise_tiled(denoiser, noisy, tile_size=32, overlap=8)
    assert tiled.image.shape == noisy.shape and int(tiled.num_forward[0]) > 4
    assert denoiser.denoise(noisy.double()).image.dtype == torch.float64
    with torch.inference_mode():
        torch.testing.assert_close(denoiser.denoise(noisy).image, denoiser.denoise(noisy.clone()).image)


def test_stop_is_heard_before_every_batch_of_tiles(tmp_path: Path):
    path, _ = spandrel_file(tmp_path, "NAFNet")
    denoiser = load_denoiser(f"spandrel:{path}")
    noisy = noisy_images(1, 40, 40)
    told: list[int] = []
    result = denoiser.denoise(noisy, DenoiseOptions(num_steps=1), callback=lambda step: told.append(step.index))
    assert told == [0, 1] and result.num_steps.tolist() == [1]
    stopped = denoiser.denoise(noisy, DenoiseOptions(num_steps=1), callback=lambda step: True)
    assert torch.equal(stopped.image, noisy.clamp(0, 1)) and stopped.num_forward.tolist() == [0]


def test_images_of_the_vp_process_are_brought_to_full_signal(tmp_path: Path):
    path, _ = spandrel_file(tmp_path, "DnCNN")
    noise = Noise(kind="paper", amount=0.1)
    denoiser = adapt_to_noise(load_denoiser(f"spandrel:{path}"), noise)
    noisy = noisy_images()
    scale = denoiser.scale_for(DenoiseOptions(noise_level=0.1))
    assert scale > 1.0
    stretched = (noisy * 2 - 1) * scale / 2 + 0.5
    told = denoiser.denoise(noisy, DenoiseOptions(noise_level=0.1)).image
    torch.testing.assert_close(told, load_denoiser(f"spandrel:{path}").denoise(stretched).image)


class _Evil:
    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: None, "is not there"),
        (lambda path: path.write_bytes(pickle.dumps({"a": _Evil()})), "cannot be loaded"),
        (lambda path: torch.save({"a": _Evil()}, path), "forbidden"),
        (lambda path: torch.save({"strange.weight": torch.zeros(3)}, path), "no network that spandrel knows"),
        (lambda path: path.write_text("no weights"), "cannot be loaded"),
    ],
)
def test_files_that_spandrel_cannot_use(tmp_path: Path, write: Callable[[Path], object], said: str):
    pytest.importorskip("spandrel")
    path = tmp_path / "network.pth"
    write(path)
    with pytest.raises(CheckpointError, match=said) as error:
        load_denoiser(f"spandrel:{path}")
    assert "\n" not in str(error.value)


def test_networks_that_spandrel_knows_but_do_not_fit(tmp_path: Path):
    grey, _ = spandrel_file(tmp_path, "DnCNN", in_nc=1, out_nc=1)
    with pytest.raises(CheckpointError, match="from 1 to 1 channels"):
        load_denoiser(f"spandrel:{grey}")
    with pytest.raises(CheckpointError, match="is not a .safetensors or .pth file"):
        load_denoiser("spandrel:network.onnx")


@pytest.mark.parametrize(("name", "extra"), [("spandrel:a.pth", "spandrel"), ("deepinv:DRUNet:a.pth", "deepinv")])
def test_without_the_extra_one_line_says_what_to_install(name: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    for module in (extra, f"{extra}.models"):
        monkeypatch.setitem(sys.modules, module, None)
    assert is_of_library(name)
    with pytest.raises(MissingExtraError, match=rf'pip install "ebt_vision\[{extra}\]"'):
        load_denoiser(name)


def deepinv_file(folder: Path, kind: str, suffix: str, **sizes) -> tuple[Path, torch.nn.Module]:
    models = pytest.importorskip("deepinv.models")
    torch.manual_seed(3)
    network = getattr(models, kind)(pretrained=None, **sizes).eval()
    path = folder / f"{kind}{suffix}"
    save_file(network.state_dict(), path) if suffix == ".safetensors" else torch.save(network.state_dict(), path)
    return path, network


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_deepinvs_networks_from_a_local_file(tmp_path: Path, suffix: str):
    path, network = deepinv_file(tmp_path, "DRUNet", suffix, nc=(4, 4, 4, 4), nb=1)
    denoiser = load_denoiser(f"deepinv:DRUNet(nc=(4, 4, 4, 4), nb=1):{path}")
    assert denoiser.options_used == {"sigma"}
    noisy = noisy_images(2, 64, 48)
    with torch.no_grad():
        expected = network(noisy, 0.1).clamp(0, 1)
    torch.testing.assert_close(denoiser.denoise(noisy, DenoiseOptions(sigma=25.5)).image, expected)
    path, network = deepinv_file(tmp_path, "DnCNN", suffix, depth=3, nf=4)
    denoiser = load_denoiser(f"deepinv:DnCNN(depth=3, nf=4):{path}")
    assert denoiser.options_used == frozenset()
    with torch.no_grad():
        torch.testing.assert_close(denoiser.denoise(noisy).image, network(noisy).clamp(0, 1))


def test_deepinvs_methods_without_weights():
    pytest.importorskip("deepinv")
    noisy = noisy_images(2)
    median = load_denoiser("deepinv:MedianFilter(kernel_size=3)")
    assert median.num_parameters == 0 and median.options_used == frozenset()
    assert median.denoise(noisy).image.std() < 0.6 * noisy.std()
    variation = load_denoiser("deepinv:TVDenoiser(n_it_max=20)")
    assert variation.options_used == {"sigma"}
    weak, strong = (variation.denoise(noisy, DenoiseOptions(sigma=sigma)).image for sigma in (2.0, 50.0))
    assert strong.std() < weak.std() < noisy.std()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("DRUNet", "needs weights; name their file"),
        ("DRUNet:missing.pth", "missing.pth is not there"),
        ("DRUNet(nc=oops):random", "must hold plain values"),
        ("DnCNN(colour=1):random", "cannot be built"),
        ("MedianFilter:some.pth", "has no weights"),
        ("Nothing", "has no denoiser 'Nothing'"),
        ("Client(endpoint='http://localhost')", "without the network"),
        ("ArtifactRemoval", "has no denoiser 'ArtifactRemoval'"),
        ("", "is not of the form"),
    ],
)
def test_what_deepinv_cannot_build(name: str, said: str):
    pytest.importorskip("deepinv")
    with pytest.raises(CheckpointError, match=said) as error:
        load_denoiser(f"deepinv:{name}")
    assert "\n" not in str(error.value)


def test_deepinvs_files_that_do_not_fit_or_hold_programs(tmp_path: Path):
    path, _ = deepinv_file(tmp_path, "DnCNN", ".pth", depth=3, nf=4)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_denoiser(f"deepinv:DnCNN(depth=4, nf=4):{path}")
    torch.save({"a": _Evil()}, path)
    with pytest.raises(CheckpointError, match="no file of plain tensors"):
        load_denoiser(f"deepinv:DnCNN(depth=3, nf=4):{path}")


def test_random_weights_are_the_same_every_time():
    pytest.importorskip("deepinv")
    state = torch.get_rng_state()
    first, second = (load_denoiser("deepinv:DnCNN(depth=3, nf=4):random") for _ in range(2))
    assert first.weights_hash == second.weights_hash
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.denoise(noisy_images()).image, second.denoise(noisy_images()).image)


def ebt() -> torch.nn.Module:
    torch.manual_seed(0)
    model = PatchEBT(PatchEBTConfig(img_size=16, patch_size=4, embed_dim=48, depth=1, num_heads=2, init_step_size=0.3))
    for name, parameter in model.named_parameters():
        if name != "log_step_size":
            torch.nn.init.normal_(parameter, std=0.15)
    return denoiser_for(model)


def deepinv_denoiser(denoiser, options: DenoiseOptions | None = None):
    pytest.importorskip("deepinv")
    from ebt_vision.interop.deepinv_denoiser import DeepinvDenoiser

    return DeepinvDenoiser(denoiser, options)


@pytest.mark.parametrize(
    "sigma", [0.1, torch.tensor(0.1), torch.tensor([0.1, 0.1]), torch.full((2, 1, 1, 1), 0.1), [0.1], None]
)
def test_an_adapter_takes_sigma_in_every_shape_that_deepinv_gives(sigma):
    import_deepinv = pytest.importorskip("deepinv")
    adapter = deepinv_denoiser(ebt(), DenoiseOptions(num_steps=2))
    assert isinstance(adapter, import_deepinv.models.Denoiser)
    x = noisy_images(2, 20, 24).requires_grad_()
    out = adapter(x, sigma)
    assert out.shape == x.shape and out.dtype == x.dtype and not out.requires_grad
    torch.testing.assert_close(out, ebt().denoise(x.detach(), DenoiseOptions(num_steps=2)).image)


def test_an_adapter_tells_each_image_its_own_sigma():
    adapter = deepinv_denoiser(load_denoiser("nlm"))
    x = noisy_images(2, 24, 24)
    out = adapter(x, torch.tensor([0.02, 0.2]))
    for i, sigma in enumerate((5.1, 51.0)):
        expected = load_denoiser("nlm").denoise(x[i : i + 1], DenoiseOptions(sigma=sigma)).image
        torch.testing.assert_close(out[i : i + 1], expected)
    grey = adapter(x[:, :1], 0.1)
    assert grey.shape == (2, 1, 24, 24)
    assert adapter.double()(x.double(), 0.1).dtype == torch.float64


def test_a_plug_and_play_algorithm_of_deepinv_runs_on_an_adapter():
    """Inpainting by proximal gradient descent: with the identity as prior, the data term alone fills in what was seen."""
    deepinv = pytest.importorskip("deepinv")
    clean = torch.full((1, 3, 16, 16), 0.25)
    mask = torch.ones(3, 16, 16)
    mask[:, ::2] = 0.0
    physics = deepinv.physics.Inpainting(img_size=(3, 16, 16), mask=mask)
    y = physics(clean)
    for denoiser in (IdentityDenoiser(), ebt()):
        prior = deepinv.optim.PnP(denoiser=deepinv_denoiser(denoiser, DenoiseOptions(num_steps=1)))
        algorithm = deepinv.optim.PGD(
            prior=prior, data_fidelity=deepinv.optim.L2(), stepsize=1.0, sigma_denoiser=0.05, max_iter=3
        )
        found = algorithm(y, physics)
        assert found.shape == clean.shape and bool(torch.isfinite(found).all())
        if isinstance(denoiser, IdentityDenoiser):
            torch.testing.assert_close(found[:, :, 1::2], clean[:, :, 1::2])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return folder


@pytest.mark.parametrize("protocol", ["paper", "awgn"])
def test_peers_in_the_benchmark(tmp_path: Path, photos: Path, protocol: str):
    pytest.importorskip("deepinv")
    blind, network = spandrel_file(tmp_path, "NAFNet")
    mapped, _ = spandrel_file(tmp_path, "DRUNet", ".pth")
    output = tmp_path / "results"
    models = [f"spandrel:{blind}", f"spandrel:{mapped}", "deepinv:DnCNN(depth=3, nf=4):random", "identity"]
    noise = ["--sigmas", "25"] if protocol == "awgn" else ["--levels", "0.1", "--sweep", "--img-size", "32"]
    command = ["--models", *models, "--data", str(photos), "--protocol", protocol, *noise, "--output", str(output)]
    assert denoising.main([*command, "--device", "cpu"]) == 0
    rows = {row["model"]: row for row in json.loads((output / "results.json").read_text())["rows"]}
    assert [rows[name]["method"] for name in rows] == ["blind", "told sigma", "blind", "noisy input"]
    row = rows["NAFNet.safetensors"]
    assert row["parameters"] == sum(p.numel() for p in network.parameters())
    assert row["flops"] > 0 and row["passes"] == 1 and len(row["hash"]) == 12
    assert all(rows[name]["hash"] for name in rows if name != "identity")


def test_the_command_line_takes_a_peer(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    path, _ = spandrel_file(tmp_path, "DRUNet")
    words = ["denoise", str(photos / "0.png"), "--model", f"spandrel:{path}", "--device", "cpu"]
    assert cli.main([*words, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "0.png").exists()
    assert "1 step" in capsys.readouterr().out
    assert cli.main([*words, "--steps", "3", "--output", str(tmp_path / "out2")]) == 2
    assert "--steps has no effect on spandrel:DRUNet.safetensors" in capsys.readouterr().err


def test_the_page_offers_peers_and_compares_them(tmp_path: Path, tiny_checkpoint: Path):
    from apps.denoise import find_models
    from apps.service import Service

    path, _ = spandrel_file(tmp_path, "NAFNet")
    models = find_models(str(tiny_checkpoint), [f"spandrel:{path}", "deepinv:DnCNN(depth=3, nf=4):random"])
    assert list(models)[-2:] == ["spandrel:NAFNet.safetensors", "deepinv:DnCNN(depth=3, nf=4):random"]
    methods = Service(models, load_denoiser, "cpu")._methods("tiny-ebt")
    assert list(methods)[-3:-1] == list(models)[-2:] and list(methods)[-1] == "BM3D"
    assert methods["spandrel:NAFNet.safetensors"]().num_parameters > 0
