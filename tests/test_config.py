"""Configs: every shipped config loads, a typo names the nearest key, overrides reach every section."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from ebt_vision.core.step_rules import Momentum
from ebt_vision.core.yaml_files import load_yaml
from ebt_vision.training.build import build_model
from ebt_vision.training.config import ConfigError, build_config, config_to_dict, load_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_builds_and_opens_with_its_command(path: Path):
    config = load_config(path)
    assert config.name == path.stem
    if config.train.init_from and config.train.init_from.startswith("runs/"):  # a stage that goes on from another's run
        config = load_config(path, ["train.init_from=null"])
    with torch.device("cpu" if config.train.init_from else "meta"):
        assert build_model(config).num_parameters > 1000
    assert build_config(config_to_dict(config)) == config
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(head)
    assert f"train configs/{path.name}" in text
    for word in ("Hardware", "ime", "esult"):
        assert word in text, f"{path.name} does not state its {word}"


def test_the_configs_that_the_project_promises_are_there():
    names = {path.stem for path in CONFIGS}
    assert {"smoke", "paper_id_128_large", "tiny_imagenet_ebt_gpu", "tiny_imagenet_ebt_cpu"} <= names
    cpu = [load_config(path) for path in CONFIGS if path.stem.endswith("_cpu")]
    assert {config.model_type for config in cpu} == {"patch_ebt", "dit", "patch_regressor", "patch_eqm"}
    same = {(c.seed, c.train.batch_size, c.train.ema_decay, c.optim, c.objective.level, c.data) for c in cpu}
    assert len(same) == 1  # equal order, weight decay and averaging
    first, second = (load_config(CONFIGS[0].with_name(f"tiny_imagenet_ebt_cpu{stage}.yaml")) for stage in ("", "_stage2"))
    assert (second.model, second.data, second.train.batch_size) == (first.model, first.data, first.train.batch_size)
    assert second.train.init_from == f"runs/{first.name}/model"
    updates = {c.model_type: c.train.num_updates for c in cpu} | {
        "patch_ebt": first.train.num_updates + second.train.num_updates
    }
    assert set(updates.values()) == {4000}  # equal budget
    counts = []
    for config in cpu:
        with torch.device("meta"):
            counts.append(build_model(config).num_parameters)
    assert max(counts) <= 1.1 * min(counts)


def test_the_text_configs_share_budget_order_and_size():
    configs = {path.stem: load_config(path) for path in CONFIGS if path.stem.startswith("text_shakespeare")}
    assert len({(c.seed, c.train, c.data, c.validation) for c in configs.values()}) == 1
    assert len({(c.optim.lr, c.optim.weight_decay, c.optim.betas, c.optim.warmup_updates) for c in configs.values()}) == 1
    counts = {}
    for name, config in configs.items():
        with torch.device("meta"):
            counts[name] = build_model(config).num_parameters
    assert counts["text_shakespeare_ebt"] == counts["text_shakespeare_transformer"] + 1 + 128  # step size, gate
    assert max(counts.values()) <= 1.1 * min(counts.values())


def test_the_text_task_configs_share_budget_order_and_size():
    configs = [load_config(path) for path in CONFIGS if path.stem.startswith("text_tasks")]
    assert len(configs) >= 4
    assert len({(c.seed, c.train, c.data, c.validation) for c in configs}) == 1
    assert len({(c.optim.weight_decay, c.optim.betas, c.optim.warmup_updates) for c in configs}) == 1
    rates = {c.name: c.optim.lr for c in configs}  # chosen for each recipe in short trainings (docs/results/text_thinking.md)
    assert rates.pop("text_tasks_ebt_s1") == rates.pop("text_tasks_ebt_s2") == 3e-2 and set(rates.values()) == {1e-2}
    counts = []
    for config in configs:
        with torch.device("meta"):
            counts.append(build_model(config).num_parameters)
    assert max(counts) <= 1.1 * min(counts)


def test_a_convolutional_stem_can_grow(tmp_path: Path):
    path = next(path for path in CONFIGS if path.stem == "photographs_start")
    small = ["model.embed_dim=16", "model.depth=1", "model.num_heads=2", "model.stem_widths=[4, 8]", "model.stem_blocks=1"]
    build_model(load_config(path, small)).save_pretrained(tmp_path)
    start = build_model(load_config(path, [*small, f"train.init_from={tmp_path}"]))
    grown = build_model(load_config(path, [*small[:4], "model.stem_blocks=3", f"train.init_from={tmp_path}"]))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(grown(x), start(x))  # the new blocks are the identity
    grown(x).square().sum().backward()
    new = [p for name, p in grown.named_parameters() if "levels.1.2.conv2.weight" in name]
    assert len(new) == 2 and all(p.grad is not None and p.grad.abs().max() > 0 for p in new)  # but can learn
    grown.save_pretrained(tmp_path / "grown")
    with pytest.raises(ConfigError, match=r"levels.* is \(.*\) there, missing here"):
        build_model(load_config(path, [*small, f"train.init_from={tmp_path / 'grown'}"]))


def test_a_model_can_begin_with_the_weights_of_another(tmp_path: Path):
    small = "model.embed_dim=16", "model.depth=1", "model.num_heads=2", "model.energy_head=quadratic"
    path = next(path for path in CONFIGS if path.stem == "tiny_imagenet_ebt_cpu")
    start = build_model(load_config(path, list(small)))
    torch.nn.init.normal_(start.head.weight)
    start.save_pretrained(tmp_path)
    init = f"train.init_from={tmp_path}"
    model = build_model(load_config(path, [*small, init, "model.noise_process=awgn", "model.img_size=32"]))
    assert model.training and model.config.noise_process == "awgn"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in start.state_dict().items())
    seeing = build_model(load_config(path, [*small, init, "model.observation_context=true"]))
    y, x = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(seeing(y, x), start(y))  # the observation says nothing yet
    seeing(y, x).sum().backward()
    assert seeing.trunk.embed.weight.grad.unflatten(1, (-1, 6))[..., 3:].abs().max() > 0  # but can learn to
    for change, answer in {
        "model.embed_dim=24": r"does not fit model: .* is \(.*16.*\) there, \(.*24.*\) here",
        "model.depth=2": "blocks.1.* is missing there",
    }.items():
        with pytest.raises(ConfigError, match=answer):
            build_model(load_config(path, [*small, init, change]))
    regressor = next(path for path in CONFIGS if path.stem == "tiny_imagenet_regressor_cpu")
    feed_forward = build_model(load_config(regressor, [*small[:3], init]))  # the reconstruction, as a regressor
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(feed_forward(x), start.reconstruct(x))
    feed_forward.save_pretrained(tmp_path / "regressor")
    again = build_model(load_config(path, [*small, f"train.init_from={tmp_path / 'regressor'}", "model.init_step_size=0.5"]))
    torch.testing.assert_close(again.reconstruct(x), feed_forward(x))
    assert again.step_size.item() == pytest.approx(0.5)  # the regressor has none
    dit = next(path for path in CONFIGS if path.stem == "tiny_imagenet_dit_cpu")
    with pytest.raises(ConfigError, match="is a patch_ebt, not a dit"):
        build_model(load_config(dit, [init]))
    with pytest.raises(ValueError, match="neither a shipped checkpoint"):
        build_model(load_config(path, ["train.init_from=runs/nothing"]))


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("train.num_update=5", "did you mean 'num_updates'"),
        ("model.depht=3", "did you mean 'depth'"),
        ("objective.thinking.num_stepz=1", "did you mean 'num_steps'"),
        ("train.num_updates=many", "train.num_updates"),
        ("train.batch_size=-1", "must be 1 or more"),
        ("model.energy_head=cubic", "'linear' or 'quadratic'"),
        ("model_type=unet", "use one of"),
        ("model.preset=huge", "model.preset='huge'"),
        ("objective.level=2", "noise level=2"),
        ("optim.lr=0", "must be positive"),
        ("optim.lr=nan", "optim.lr: Input should be a valid number (got 'nan')"),
        ("optim.lr=.nan", "optim.lr=nan is not a finite number"),
        ("optim.lr=.inf", "optim.lr=inf is not a finite number"),
        ("validation.levels=[0.1, .nan]", "validation.levels.1=nan is not a finite number"),
        ("optim.lr=yes", "optim.lr"),
        ("optim.lr=1:30", "optim.lr: Input should be a valid number (got '1:30')"),
        ("seed=true", "seed: Input should be a valid integer (got True)"),
        ("seed=-1", "seed=-1 is not in 0.."),
        ("train.batch_size='16'", "train.batch_size: Input should be a valid integer (got '16')"),
        ("train.batch_size=16.0", "train.batch_size"),
        ("train.num_updates=true", "train.num_updates"),
        ("data.flip=1", "data.flip"),
        ("optim={lr: 1, lr: 2}", "not a YAML value"),
        ("data.crop=corner", "data.crop"),
        ("name", "does not have the form"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override: str, answer: str):
    with pytest.raises(ConfigError) as error:
        load_config(CONFIGS[-1].with_name("smoke.yaml"), [override])
    assert answer in str(error.value) and "\n" not in str(error.value)


def test_overrides_win_over_the_file_and_presets_under_both():
    path = CONFIGS[-1].with_name("smoke.yaml")
    config = load_config(path, ["optim.lr=3e-4", "objective.thinking.num_steps=3", "validation.levels=[0.1, 0.3]"])
    assert config.optim.lr == 3e-4 and config.objective.thinking.num_steps == 3
    assert config.validation.levels == (0.1, 0.3)
    raw = yaml.safe_load(path.read_text())
    raw["model"] = {"preset": "small", "patch_size": 8, "depth": 2}
    model = build_config(raw).model
    assert (model.embed_dim, model.depth, model.num_heads) == (384, 2, 6)


def test_numbers_are_read_as_people_write_them():
    path = CONFIGS[-1].with_name("smoke.yaml")
    config = load_config(path, ["optim.lr=1e-3", "optim.clip_norm=2", "train.num_updates=1_000", "seed=010", "name=2024-01-02"])
    assert (config.optim.lr, config.optim.clip_norm, config.train.num_updates) == (1e-3, 2.0, 1000)
    assert (config.seed, config.name) == (10, "2024-01-02")


@pytest.mark.parametrize("repeated", ["train: {num_updates: 5}", "optim:\n  lr: 1.0e-3\n  clip_norm: 1.0\n  lr: 2.0e-3"])
def test_a_key_that_comes_twice_is_refused(tmp_path: Path, repeated: str):
    lines = [line for line in CONFIGS[-1].with_name("smoke.yaml").read_text().splitlines() if not line.startswith("optim")]
    (tmp_path / "twice.yaml").write_text("\n".join([*lines, repeated]))
    with pytest.raises(ConfigError, match="is in line .* and again in line") as error:
        load_config(tmp_path / "twice.yaml")
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_config_is_one_line(tmp_path: Path):
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "broken.yaml").write_text("a: [1,\n")
    for name in ("missing.yaml", "list.yaml", "broken.yaml"):
        with pytest.raises(ConfigError) as error:
            load_config(tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)


def test_a_step_rule_is_given_by_name_or_with_its_settings():
    smoke = Path(__file__).parents[1] / "configs" / "smoke.yaml"
    rule = load_config(smoke, ["objective.thinking.step_rule=barzilai-borwein"]).objective.thinking.step_rule
    assert rule == "barzilai-borwein"
    config = load_config(smoke, ["objective.thinking.step_rule={name: momentum, momentum: 0.7}"])
    assert config.objective.thinking.step_rule == Momentum(momentum=0.7)
    assert build_config(config_to_dict(config)) == config
    for value, said in {
        "newton": "objective.thinking.step_rule",
        "{momentum: 0.7}": "step_rule.name=None is unknown; use one of fixed, barzilai-borwein, momentum, backtracking",
        "{name: momentum, longest: 3}": "unknown key 'objective.thinking.step_rule.longest'; known: name, momentum",
        "{name: momentum, momentum: 1.5}": "momentum=1.5 is out of range",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(said)):
            load_config(smoke, [f"objective.thinking.step_rule={value}"])


def test_langevin_noise_is_a_number_or_one_a_step():
    smoke = Path(__file__).parents[1] / "configs" / "smoke.yaml"
    for value, expected in {"0.1": 0.1, "0": 0.0, "[0.2, 0.1, 0.0]": (0.2, 0.1, 0.0)}.items():
        overrides = ["objective.thinking.num_steps=3", f"objective.thinking.langevin_std={value}"]
        config = load_config(smoke, overrides)
        assert config.objective.thinking.langevin_std == expected
        assert build_config(config_to_dict(config)) == config


def test_only_true_and_false_are_booleans():
    """YAML 1.1 reads no as false, so that train.mixed_precision=no was refused."""
    assert load_yaml("[no, off, on, yes, y, n]") == ["no", "off", "on", "yes", "y", "n"]
    assert load_yaml("[true, True, FALSE, false]") == [True, True, False, False]
    smoke = Path(__file__).parents[1] / "configs" / "smoke.yaml"
    assert load_config(smoke, ["train.mixed_precision=no"]).train.mixed_precision == "no"
    with pytest.raises(ConfigError, match="data.flip"):
        load_config(smoke, ["data.flip=nope"])
