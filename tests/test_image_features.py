"""Features of the image models keep timm's contract: which blocks, in which order, formats, and what timm reads of a model."""

import pytest
import torch
from timm.data import resolve_model_data_config
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor

from ebt_vision.models.dit import DiT
from ebt_vision.models.dit_config import DiTConfig
from ebt_vision.models.image_features import ImageFeatures, take_indices
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig

SIZE = dict(img_size=16, patch_size=4, embed_dim=48, depth=4, num_heads=2)
CASES = ["ebt", "context", "stem", "regressor", "dit"]


def model_of(case: str) -> ImageFeatures:
    torch.manual_seed(0)
    model: ImageFeatures
    if case == "dit":
        model = DiT(DiTConfig(**SIZE))
        for parameter in model.parameters():  # its blocks start as the identity
            torch.nn.init.normal_(parameter, std=0.1)
    elif case == "regressor":
        model = PatchRegressor(PatchRegressorConfig(**SIZE))
    else:
        extra = {"context": dict(observation_context=True), "stem": dict(stem_widths=(4, 8))}.get(case, {})
        model = PatchEBT(PatchEBTConfig(**SIZE, **extra))
    return model.eval()


def inputs_of(case: str) -> tuple[Tensor, ...]:
    x = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(1))  # 3 x 5 patches
    return {"context": (x, -x), "dit": (x, torch.tensor([3, 70]))}.get(case, (x,))


@pytest.mark.parametrize("indices", [None, 1, 3, [-1], [2, 0], [0, -4], (1, -1, 3)])
def test_blocks_are_counted_as_timm_counts_them(indices):
    theirs, last = feature_take_indices(4, indices)
    ours = take_indices(4, indices)
    assert ours == sorted(set(theirs)) and ours[-1] == last


@pytest.mark.parametrize("indices", [0, 5, -1, [4], [-5], [0, 9]])
def test_blocks_that_do_not_exist_are_refused_as_timm_refuses_them(indices):
    with pytest.raises(AssertionError):
        feature_take_indices(4, indices)
    with pytest.raises(ValueError, match=r"indices=.*use -?\d+\.\.\d"):
        take_indices(4, indices)
    with pytest.raises(ValueError, match="indices="):
        model_of("ebt").forward_intermediates(*inputs_of("ebt"), indices=indices)
    with pytest.raises(ValueError, match=r"indices=\[\] names no block"):
        take_indices(4, [])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_intermediates(case: str):
    model, inputs = model_of(case), inputs_of(case)
    every = model.forward_intermediates(*inputs)
    assert [tuple(tokens.shape) for tokens in every] == [(2, 15, 48)] * 4
    assert not any(torch.allclose(a, b) for a, b in zip(every, every[1:], strict=False))
    for indices, expected in (([-1], [3]), ([2, 0], [0, 2]), (2, [2, 3])):
        found = model.forward_intermediates(*inputs, indices=indices)
        assert len(found) == len(expected)
        for tokens, i in zip(found, expected, strict=True):
            torch.testing.assert_close(tokens, every[i])
    final, (normed,) = model.forward_intermediates(*inputs, indices=[1], norm=True, output_fmt="NCHW", intermediates_only=False)
    torch.testing.assert_close(final, model.forward_features(*inputs))
    torch.testing.assert_close(final, model.final_norm(every[3]))
    assert normed.shape == (2, 48, 3, 5)
    torch.testing.assert_close(normed[:, :, 1, 4], model.final_norm(every[1])[:, 9])  # row 1, column 4 of 5
    torch.testing.assert_close(model.forward_head(final, pre_logits=True), final.mean(1))


@pytest.mark.parametrize("case", CASES)
def test_what_timm_reads_of_a_model(case: str):
    model = model_of(case)
    data = resolve_model_data_config(model)
    assert data["input_size"] == (3, 16, 16) and data["mean"] == data["std"] == (0.5, 0.5, 0.5) and data["crop_pct"] == 1.0
    assert model.num_features == model.head_hidden_size == 48 and model.num_classes == 0
    assert [(info["num_chs"], info["reduction"]) for info in model.feature_info] == [(48, 4)] * 4
    modules = dict(model.named_modules())
    assert all(info["module"] in modules for info in model.feature_info)
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="num_classes=10: .* has no classifier"):
        model.reset_classifier(10)
    with pytest.raises(ValueError, match="global_pool='max'"):
        model.reset_classifier(0, "max")


@pytest.mark.parametrize("case", ["ebt", "stem", "regressor"])
@torch.no_grad()
def test_timm_s_feature_getter_wraps_a_model_of_one_input(case: str):
    model, (x,) = model_of(case), inputs_of(case)
    getter = FeatureGetterNet(model, out_indices=[1, -1])
    maps = getter(x)
    assert [tuple(m.shape) for m in maps] == [(2, 48, 3, 5)] * 2 and getter.feature_info.channels() == [48, 48]
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), model.forward_intermediates(x, indices=[3])[0])


def test_wrong_uses_are_one_line():
    model, (x,) = model_of("ebt"), inputs_of("ebt")
    with pytest.raises(ValueError, match=r"use indices=\[1\]"):
        model.forward_intermediates(x, [1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(ValueError, match="a DiT needs images and timesteps, got 1"):
        model_of("dit").forward_features(x)
    with pytest.raises(ValueError, match="needs 1 context images, got 0"):
        model_of("context").forward_features(x)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_residual_stream_is_float32_under_autocast(case: str):
    """bfloat16 would round what every block adds; DiT and trunk alike, so that a comparison in bfloat16 is one of networks."""
    model, inputs = model_of(case), inputs_of(case)
    blocks = model.get_submodule(model.blocks_name)
    seen: list[torch.dtype] = []
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
        if i > 0 or case == "dit":  # what the first block of a trunk is given is its embedding, in bfloat16
            block.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.forward_intermediates(*inputs)
    assert len(seen) >= 7 and set(seen) == {torch.float32} and {x.dtype for x in tokens} == {torch.float32}
    exact = model.forward_intermediates(*inputs)[-1]
    assert not torch.equal(tokens[-1], exact)  # autocast was at work
    torch.testing.assert_close(tokens[-1], exact, atol=0.05 * float(exact.std()), rtol=0.05)


@torch.no_grad()
def test_a_dit_in_half_precision_throughout_stays_there():
    model, (x, t) = model_of("dit").bfloat16(), inputs_of("dit")
    assert {tokens.dtype for tokens in model.forward_intermediates(x.bfloat16(), t)} == {torch.bfloat16}
