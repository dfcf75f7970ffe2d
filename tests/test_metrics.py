"""LPIPS on a backbone from a file, and never on a random one."""

import lpips
import pytest
import torch
import torchvision
from torch import nn

from ebt_vision.core.metrics import MissingBackboneError, PerceptualDistance, ssim


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory):
    """SqueezeNet's weights as torchvision keeps them (random ones stand in: what counts is that they are used)."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("backbone") / "squeezenet.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return path


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    clean = torch.rand(2, 3, 48, 40, generator=generator)
    return (clean + 0.2 * torch.randn(clean.shape, generator=generator)).clamp(0, 1), clean


def test_it_is_the_packages_distance_on_the_files_weights(backbone):
    noisy, clean = pair()
    distance = PerceptualDistance(str(backbone), net="squeeze")
    found = distance(noisy, clean)
    # The package's model, its layers given the weights one by one by their place in the trunk.
    model = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()
    state = torch.load(backbone, weights_only=True)
    names = {}
    for name, _ in model.net.named_parameters():
        names[name] = "features." + name.split(".", 1)[1]  # sliceN.PLACE.rest
    with torch.no_grad():
        for name, parameter in model.net.named_parameters():
            parameter.copy_(state[names[name]])
        expected = model(2 * noisy - 1, 2 * clean - 1).flatten().double()
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float64 and (found > 0).all()
    assert torch.equal(distance(clean, clean), torch.zeros(2, dtype=torch.float64))
    assert distance(noisy[..., :16, :16], clean[..., :16, :16]).isnan().all()
    assert distance.name.startswith("lpips 0.1 squeeze, backbone ")


def test_without_weights_it_says_what_to_pass(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(MissingBackboneError, match="not available: pass --lpips-backbone"):
        PerceptualDistance(net="squeeze")
    with pytest.raises(ValueError, match="no LPIPS backbone at nowhere.pth"):
        PerceptualDistance("nowhere.pth", net="squeeze")
    with pytest.raises(ValueError, match="does not contain the weights of torchvision's squeezenet1_1"):
        torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
        PerceptualDistance(str(tmp_path / "other.pth"), net="squeeze")
    # What torchvision's download left behind is found.
    (tmp_path / "checkpoints").mkdir()
    url = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url
    (tmp_path / "checkpoints" / url.rsplit("/", 1)[-1]).write_bytes(backbone.read_bytes())
    assert PerceptualDistance(net="squeeze").name == PerceptualDistance(str(backbone), net="squeeze").name


def test_ssim_needs_room_for_its_window():
    with pytest.raises(ValueError, match="11x11"):
        ssim(torch.rand(1, 3, 10, 20), torch.rand(1, 3, 10, 20), data_range=1.0)
