"""bfloat16 at inference: used if fast and harmless, close to float32, and never the dtype of results."""

import pytest
import torch

from ebt_vision.core.metrics import psnr
from ebt_vision.core.precision import autocast, has_fast_bfloat16
from ebt_vision.denoising import network as network_module
from ebt_vision.denoising.load import denoiser_for, load_denoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.models import blocks
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig

SIZE = dict(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, noise_process="awgn")
STEM = dict(stem_widths=(4, 8))
PRECISIONS = ("float32", "bfloat16")


def network(kind: str, **changes: object) -> PatchEBT | PatchRegressor:
    torch.manual_seed(0)
    cls, config = {"ebt": (PatchEBT, PatchEBTConfig), "regressor": (PatchRegressor, PatchRegressorConfig)}[kind]
    return cls(config(**(SIZE | changes)))  # type: ignore[arg-type, operator]


@pytest.mark.parametrize("kind", ["ebt", "regressor"])
def test_bfloat16_is_close_to_float32_and_results_stay_float32(kind: str):
    model, noisy = network(kind, **STEM), torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    results = [
        denoiser_for(model, precision=precision).denoise_whole(noisy, DenoiseOptions(num_steps=2))  # type: ignore[arg-type]
        for precision in PRECISIONS
    ]
    full, half = (result.image for result in results)
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    assert psnr(half, full, data_range=1.0).min() > 55
    if kind == "ebt":
        energies = [result.energies for result in results]
        assert energies[1].dtype == torch.float32
        torch.testing.assert_close(*energies, rtol=0.05, atol=0.05)
        maps = [denoiser_for(model, precision=p).energy_map(noisy[..., :16, :16], noisy[..., :16, :16]) for p in PRECISIONS]  # type: ignore[arg-type]
        torch.testing.assert_close(*maps, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("fast", [False, True])
def test_auto_is_bfloat16_where_it_is_fast_and_the_network_adds_to_its_input(fast: bool, monkeypatch, tmp_path):
    monkeypatch.setattr(network_module, "has_fast_bfloat16", lambda device: fast)
    network("ebt", **STEM).save_pretrained(tmp_path / "conv")
    network("ebt").save_pretrained(tmp_path / "plain")
    assert load_denoiser(str(tmp_path / "conv")).uses_bfloat16 is fast
    assert load_denoiser(str(tmp_path / "conv")).double().uses_bfloat16 is False
    assert load_denoiser(str(tmp_path / "plain")).uses_bfloat16 is False
    assert load_denoiser(str(tmp_path / "conv"), precision="float32").uses_bfloat16 is False
    assert load_denoiser(str(tmp_path / "plain"), precision="bfloat16").uses_bfloat16 is True
    with pytest.raises(ValueError, match="precision='half' is unknown; use one of auto, float32, bfloat16"):
        load_denoiser(str(tmp_path / "conv"), precision="half")  # type: ignore[arg-type]


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_a_cpu_is_fast_with_either_instruction_set(avx512: bool, amx: bool, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert has_fast_bfloat16("cpu") is (avx512 or amx)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")  # a torch without the probe
    assert has_fast_bfloat16("cpu") is amx
    assert has_fast_bfloat16("mps") is False
    for capability, fast in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert has_fast_bfloat16("cuda") is fast


def test_autocast_is_bfloat16_or_nothing():
    x = torch.ones(2, 2)
    for bfloat16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with autocast("cpu", bfloat16=bfloat16):
            assert (x @ x).dtype == dtype


@pytest.mark.parametrize("tokens", [blocks.PLAIN_TOKENS, blocks.PLAIN_TOKENS + 1])
def test_attention_in_bfloat16_is_that_of_float32_rounded(tokens: int):
    """Without a gradient a CPU takes matrix products up to PLAIN_TOKENS; all other calls take PyTorch's kernel."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, tokens, 16, generator=generator).bfloat16()
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    by_kernel = blocks.self_attention(q, k, v)
    with torch.no_grad():
        found = blocks.self_attention(q, k, v)
    assert found.dtype == torch.bfloat16 and torch.equal(found, by_kernel) == (tokens > blocks.PLAIN_TOKENS)
    for result in (found, by_kernel):
        torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.01 * float(expected.abs().max()))
