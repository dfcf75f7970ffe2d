"""Features: every layer returns the tokens of the network for the requested input; names, pools and errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ebt_vision.core.rng import sample_generators
from ebt_vision.core.thinking import think
from ebt_vision.models.dit import DiT
from ebt_vision.models.dit_config import DiTConfig
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig
from ebt_vision.noise import processes
from ebt_vision.probing.extractors import TrunkExtractor
from ebt_vision.probing.features import Feature, FeatureCondition, choose_layers, extract, pool_tokens
from ebt_vision.probing.load import load_extractor

SIZE = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints ebt, context, dit and reg whose every weight matters."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    models = {
        "ebt": PatchEBT(PatchEBTConfig(**SIZE, init_step_size=0.05)),
        "context": PatchEBT(PatchEBTConfig(**SIZE, init_step_size=0.05, observation_context=True)),
        "dit": DiT(DiTConfig(**SIZE)),
        "reg": PatchRegressor(PatchRegressorConfig(**SIZE)),
    }
    for name, model in models.items():
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def model_range(images: Tensor) -> Tensor:
    return processes.to_model_range(images.float() / 255)


def feature(layer: str, pool: str = "mean", **condition) -> Feature:
    return Feature(condition=FeatureCondition(**condition), layer=layer, pool=pool)


def only(extractor, images: Tensor, asked: Feature, seed: int = 0) -> Tensor:
    return extract(extractor, images, range(len(images)), [asked], seed=seed)[asked]


@pytest.mark.parametrize("name", ["ebt", "reg"])
def test_layers_are_the_trunk_s_tokens(name: str, folder: Path, images: Tensor):
    extractor = load_extractor(str(folder / name))
    asked = [feature("block0", "tokens"), feature("block1"), feature("final"), feature("final", "max")]
    found = extract(extractor, images, range(5), asked)
    trunk = extractor.model.trunk
    first, second = trunk.forward_intermediates(model_range(images))
    torch.testing.assert_close(found[asked[0]], first)
    torch.testing.assert_close(found[asked[1]], second.mean(1))
    torch.testing.assert_close(found[asked[2]], trunk(model_range(images)).mean(1))
    torch.testing.assert_close(found[asked[3]], trunk(model_range(images)).amax(1))
    assert not any(p.requires_grad for p in extractor.model.parameters()) and not extractor.model.training


@pytest.mark.usefixtures("one_thread")
def test_the_gradient_is_that_of_finite_differences(folder: Path, images: Tensor):
    extractor = load_extractor(str(folder / "ebt"))
    extractor.model.double()
    clean = model_range(images[:1]).double()
    tokens = extractor.tokens(clean, clean, None, ["gradient"])["gradient"]  # (1, 4, 192)
    for patch, place, pixel in ((0, 0, (0, 0, 0, 0)), (3, 0, (0, 0, 8, 8)), (1, 3 * 8 * 2 + 2, (0, 2, 2, 8))):
        up, down = clean.clone(), clean.clone()
        up[pixel] += 1e-5
        down[pixel] -= 1e-5
        with torch.no_grad():
            slope = (extractor.model(up) - extractor.model(down)) / 2e-5
        assert float(tokens[0, patch, place]) == pytest.approx(float(slope), rel=1e-4, abs=1e-8)
    assert only(load_extractor(str(folder / "ebt")), images, feature("gradient")).shape == (5, 192)


@pytest.mark.parametrize("name", ["ebt", "context"])
def test_thinking_first_and_noise(name: str, folder: Path, images: Tensor):
    """Tokens after n steps are those of the candidate that think() reaches, the context being the noisy input."""
    extractor = load_extractor(str(folder / name))
    model = extractor.model
    conditions = [dict(noise_level=0.1, thinking_steps=n) for n in (0, 1, 3)]
    asked = [feature("block1", "tokens", **condition) for condition in conditions]
    found = extract(extractor, images, range(5), asked, seed=4)
    timestep = processes.level_to_timestep(0.1)
    noisy = processes.add_vp_noise(model_range(images), 0.1, sample_generators(4, range(5), 0x70726F62, timestep))
    context = model.context_of(noisy)
    for asked_for, steps in zip(asked, (0, 1, 3), strict=True):
        final = think(model, noisy, context=context, step_size=model.step_size.detach(), num_steps=steps).final
        tokens = model.forward_intermediates(final, *context, indices=[1])[0]
        torch.testing.assert_close(found[asked_for], tokens.detach())
    assert not torch.equal(found[asked[0]], found[asked[2]])


def test_an_awgn_model_gets_the_signal_at_full_strength(images: Tensor):
    torch.manual_seed(0)
    networks = {process: PatchEBT(PatchEBTConfig(**SIZE, noise_process=process)) for process in ("vp", "awgn")}
    networks["awgn"].load_state_dict(networks["vp"].state_dict())
    seen = {}
    for process, network in networks.items():
        extractor = TrunkExtractor(network, process, process)
        extractor.tokens = lambda candidate, *rest, p=process: seen.update({p: candidate}) or {"final": candidate.flatten(2)}
        extract(extractor, images, range(5), [feature("final", noise_level=0.1)], seed=4)
    signal, _ = processes.signal_and_noise_scale(0.1)
    assert signal < 0.99
    torch.testing.assert_close(seen["awgn"], seen["vp"] / signal)


def test_dit_is_told_its_timestep(folder: Path, images: Tensor):
    extractor = load_extractor(str(folder / "dit"))
    asked = [feature("final", timestep=t) for t in (0, 500)]
    found = extract(extractor, images, range(5), asked)
    for asked_for, t in zip(asked, (0, 500), strict=True):
        tokens = extractor.model.forward_features(model_range(images), torch.full((5,), t))
        torch.testing.assert_close(found[asked_for], tokens.mean(1).detach())
    assert not torch.allclose(found[asked[0]], found[asked[1]])
    inner = only(extractor, images, feature("block0", "tokens", timestep=0))
    expected = extractor.model.forward_intermediates(model_range(images), torch.zeros(5, dtype=torch.int64), indices=[0])[0]
    torch.testing.assert_close(inner, expected)


def test_a_batch_does_not_matter_nor_does_what_else_is_asked_for(folder: Path, images: Tensor):
    extractor = load_extractor(str(folder / "ebt"))
    asked = [feature("block1", noise_level=0.2), feature("gradient", noise_level=0.2, thinking_steps=2), feature("block0")]
    together = extract(extractor, images, range(5), asked, seed=3)
    for one in asked:
        torch.testing.assert_close(extract(extractor, images[2:3], [2], [one], seed=3)[one], together[one][2:3])
    other = extract(extractor, images, range(5), asked, seed=4)
    assert not torch.allclose(other[asked[0]], together[asked[0]]) and torch.equal(other[asked[2]], together[asked[2]])


def test_timm_models_of_both_kinds(images: Tensor, tmp_path: Path):
    import timm

    vit = load_extractor("timm:test_vit", img_size=32)
    big = torch.nn.functional.interpolate(images.float(), 32).byte()
    found = extract(vit, big, range(5), [feature("block3", "tokens"), feature("final")])
    block, final = found.values()
    assert block.shape == (5, 4, 64) and final.shape == (5, 64) and len(vit.blocks) > 3
    x = (big.float() / 255 - 0.5) / 0.5  # this ViT's mean and deviation
    torch.testing.assert_close(final, vit.model.forward_features(x)[:, 1:].mean(1), atol=1e-5, rtol=1e-4)

    net = load_extractor("timm:test_resnet", img_size=32)
    with torch.no_grad():
        expected = net.model.forward_features((big.float() / 255 - net._mean) / net._std).mean((2, 3))
    torch.testing.assert_close(only(net, big, feature("final")), expected)
    # The global stream is left alone, seeds differ, and weights come back from a file.
    state = torch.get_rng_state()
    assert (
        load_extractor("timm:test_resnet", seed=0).identity
        == net.identity
        != load_extractor("timm:test_resnet", seed=1).identity
    )
    assert torch.equal(torch.get_rng_state(), state)
    from safetensors.torch import save_file

    torch.manual_seed(5)
    whole = timm.create_model("test_resnet")
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_extractor("timm:test_resnet", timm_weights=str(tmp_path / "weights.safetensors"))
    torch.testing.assert_close(loaded.model.state_dict()["conv1.0.weight"], whole.state_dict()["conv1.0.weight"])


def test_pixels_and_random_weights(folder: Path, images: Tensor):
    pixels = load_extractor("pixels", img_size=16)
    assert pixels.layers == ("side4", "side8", "side16")
    torch.testing.assert_close(only(pixels, images, feature("side16")), model_range(images).flatten(1))
    blocks = model_range(images).reshape(5, 3, 4, 4, 4, 4).mean((3, 5)).flatten(1)
    torch.testing.assert_close(only(pixels, images, feature("side4")), blocks)
    trained, fresh = load_extractor(str(folder / "ebt")), load_extractor(f"random:{folder / 'ebt'}")
    again, other = load_extractor(f"random:{folder / 'ebt'}"), load_extractor(f"random:{folder / 'ebt'}", seed=1)
    assert fresh.identity == again.identity and len({trained.identity, fresh.identity, other.identity}) == 3
    assert fresh.num_parameters == trained.num_parameters


def test_an_identity_knows_what_the_features_depend_on(folder: Path, tmp_path: Path):
    """The identity does not include suggestions for thinking, but it includes the scale of the input."""
    shutil.copytree(folder / "ebt", tmp_path / "ebt")
    path = tmp_path / "ebt" / "config.json"
    stored = json.loads(path.read_text())
    identities = []
    for edit in ({}, {"training_gain": 300.0, "suggested_steps": 9, "init_step_size": 3.0}, {"noise_process": "awgn"}):
        path.write_text(json.dumps(stored | {"config": stored["config"] | edit}))
        identities.append(load_extractor(str(tmp_path / "ebt")).identity)
    assert identities[0] == identities[1] != identities[2]


def test_layers_by_word(folder: Path):
    extractor = load_extractor(str(folder / "ebt"))
    chosen = choose_layers(extractor, ["all", "-1", "0", "last2", "gradient"])
    assert chosen == {
        "block0": ("block0",),
        "block1": ("block1",),
        "final": ("final",),
        "last2": ("block0", "block1"),
        "gradient": ("gradient",),
    }
    assert list(choose_layers(load_extractor("pixels"), ["all"])) == ["side4", "side8", "side16", "side32"]
    for word in ("2", "-3", "last3", "last0", "nonsense"):
        with pytest.raises(ValueError, match="has no layer .*; use all, 0..1, last1..last2, final, gradient"):
            choose_layers(extractor, [word])


def test_pools():
    tokens = torch.tensor([[[1.0, 5.0], [3.0, -1.0]]])
    assert pool_tokens(tokens, "mean").tolist() == [[2.0, 2.0]] and pool_tokens(tokens, "max").tolist() == [[3.0, 5.0]]
    assert torch.equal(pool_tokens(tokens, "tokens"), tokens)


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("ebt", dict(timestep=3), "takes no timestep; leave it out"),
        ("dit", dict(), "needs a timestep"),
        ("reg", dict(thinking_steps=1), "does not think"),
        ("reg", dict(layer="gradient"), "has no layer 'gradient'"),
    ],
)
def test_what_a_network_cannot_do_is_said(name: str, asked: dict, message: str, folder: Path, images: Tensor):
    layer = asked.pop("layer", "block0")
    with pytest.raises(ValueError, match=message):
        only(load_extractor(str(folder / name)), images, feature(layer, **asked))


def test_bad_names_sizes_and_conditions(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="was trained at 16 px, not at img_size=32; remove img_size"):
        load_extractor(str(folder / "ebt"), img_size=32)
    for name in ("no-such", "random:no-such"):
        with pytest.raises(ValueError, match="neither a shipped checkpoint"):
            load_extractor(name)
    with pytest.raises(ValueError, match="timm:no_such cannot be created at 64 px .*Unknown model"):
        load_extractor("timm:no_such")
    with pytest.raises(ValueError, match="timm weights are only for a timm:NAME"):
        load_extractor("pixels", timm_weights="pretrained")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="check its name, weights and size"):
        load_extractor("timm:test_resnet", timm_weights=str(tmp_path / "bad.safetensors"))
    for bad in (dict(noise_level=1.5), dict(timestep=1000), dict(thinking_steps=-1)):
        with pytest.raises(ValueError):
            FeatureCondition(**bad)
    with pytest.raises(ValueError, match="pool='cls' is unknown; use one of mean, max, tokens"):
        feature("block0", "cls")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floats_in_the_unit_range_are_the_same_images(dtype: torch.dtype, folder: Path, images: Tensor):
    extractor = load_extractor(str(folder / "reg"))
    expected = only(extractor, images, feature("final"))
    found = only(extractor, (images.double() / 255).to(dtype), feature("final"))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-2 if dtype == torch.float16 else 1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (lambda x: x.float(), r"values in \[0, 255\].*use images / 255"),
        (lambda x: x.float() / 127.5 - 1, r"values in \[-1, 1\].*for -1..1 \(images \+ 1\) / 2"),
        (lambda x: x.long(), "dtype torch.int64; use uint8, or floats in"),
        (lambda x: x.float().div(255).fill_(float("nan")), "NaN or infinite"),
        (lambda x: x[0], r"of shape \(3, 16, 16\); use a tensor \(B, 3, H, W\)"),
        (lambda x: x[:, :1], r"of shape \(5, 1, 16, 16\)"),
        (lambda x: x.numpy(), "a ndarray; use a tensor"),
    ],
)
def test_images_of_another_kind_or_range_are_refused_in_one_line(change, answer: str, folder: Path, images: Tensor):
    whole = images.clone()
    whole[0, 0, 0, 0], whole[0, 0, 0, 1] = 0, 255
    with pytest.raises(ValueError, match=answer) as error:
        extract(load_extractor(str(folder / "reg")), change(whole), range(5), [feature("final")])
    assert "\n" not in str(error.value)
