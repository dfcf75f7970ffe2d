"""The speed program: it runs, counts and refuses; no timing is asserted."""

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from ebt_vision.benchmark import time_profile, training_cost
from ebt_vision.benchmark.time_profile import KINDS, time_by_kind
from ebt_vision.benchmark.timing import MatrixProduct, Version, time_side_by_side
from ebt_vision.core.precision import has_fast_bfloat16
from ebt_vision.models.trunk_config import TrunkConfig
from ebt_vision.training.config import build_config

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))
import plain_steps
import scale
import speed
import speed_text

TINY = [
    "--rounds",
    "1",
    "--img-size",
    "16",
    "--patch-size",
    "4",
    "--embed-dim",
    "48",
    "--depth",
    "1",
    "--num-heads",
    "2",
    "--batch-size",
    "2",
    "--dit-dim",
    "16",
    "--dit-depth",
    "1",
    "--dit-heads",
    "2",
    "--dit-passes",
    "3",
    "--tokens",
    "16",
    "64",
    "--context-length",
    "8",
    "--text-embed-dim",
    "16",
    "--text-depth",
    "1",
    "--text-num-heads",
    "2",
    "--text-batch-size",
    "2",
    "--generate",
    "6",
    "--device",
    "cpu",
]


def test_every_part_runs_and_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert speed.main([*TINY, "--no-compile", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["parts"]) == list(speed.PARTS) and results["about"]["command"].startswith(
        "python eval/speed.py --rounds 1"
    )
    rows = {part: {row.get("name"): row for row in found["rows"]} for part, found in results["parts"].items()}
    image = rows["image"]
    assert list(image) == [
        "plain, eager, float32",
        "ours, linear head, eager",
        "ours, quadratic head, eager",
        "feed-forward, eager",
    ]
    assert image["plain, eager, float32"]["ratio"] == 1 and all(row["rate"] > 0 for row in image.values())
    # Six products against three, but for what the first and the last layers need not do, and attention.
    six, three = (image[name]["flops_per_unit"] for name in ("ours, quadratic head, eager", "feed-forward, eager"))
    assert 1.8 < six / three < 2.4
    one, eight = (rows["inference"][name]["flops_per_unit"] for name in ("EBT, 1 step", "EBT, 8 steps"))
    assert 5 < eight / one < 8  # the last energy needs no gradient
    # Over two steps of 2S tokens ours does more than half of the work once.
    plain, ours = (rows["text"][name]["flops_per_unit"] for name in ("plain, 16 tokens a step", "ours, context read once"))
    assert 1.3 < plain / ours < 3
    assert results["parts"]["generation"]["rows"][0]["tokens"] == 6
    report = (tmp_path / "report.md").read_text()
    assert report in capsys.readouterr().out and "| feed-forward, eager |" in report and "GFLOP/s" in report


@pytest.mark.slow
def test_compiled_steps_count_the_products_of_the_eager_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first version is compiled to machine code, which takes most of a minute; the others only up to that."""
    real_compile, backends = torch.compile, iter(["inductor"])

    def compile_once(function, **options):
        return real_compile(function, **options | {"backend": next(backends, "aot_eager")})

    monkeypatch.setattr(torch, "compile", compile_once)
    precision = "bf16" if has_fast_bfloat16(torch.device("cpu")) else "fp32"  # slow bfloat16 takes three minutes here
    assert speed.main([*TINY, "--parts", "image", "--precision", precision, "--output", str(tmp_path)]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "results.json").read_text())["parts"]["image"]["rows"]}
    for name in ("ours, linear head", "ours, quadratic head", "feed-forward"):
        assert rows[f"{name}, compiled"]["flops_per_unit"] == rows[f"{name}, eager"]["flops_per_unit"] > 0
    assert next(backends, None) is None


def test_steps_that_disagree_are_not_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed_text, "_plain_text_loss", lambda *arguments: torch.tensor(99.0))
    assert speed.main([*TINY, "--parts", "text", "--output", str(tmp_path)]) == 2
    assert "disagree" in capsys.readouterr().err
    assert speed.main([*TINY, "--parts", "tokens", "--tokens", "60", "--output", str(tmp_path)]) == 2
    assert "--tokens 60 is not a square" in capsys.readouterr().err


def test_rates_and_shares_come_from_units_and_counted_products():
    left = torch.randn(64, 32)
    twice = Version(name="two", call=lambda: [left @ left.T for _ in range(2)], units=1)
    once = Version(name="one", call=lambda: left @ left.T, units=1, counted=lambda: [left @ left.T for _ in range(5)])
    timings, rate = time_side_by_side([twice, once], MatrixProduct(rows=8, inner=8, columns=8), rounds=3)
    product = 2 * 64 * 32 * 64
    assert [timing.flops_per_unit for timing in timings] == [2 * product, 5 * product]
    for timing in timings:
        assert timing.rate == pytest.approx(1 / timing.seconds) and timing.peak_bytes is None
        assert timing.share_of_matrix_rate == pytest.approx(timing.flops_per_unit * timing.rate / rate)
    assert timings[0].ratio == 1 and timings[1].ratio == pytest.approx(timings[1].rate / timings[0].rate)


def test_a_profile_tells_products_from_the_rest(tmp_path: Path):
    left, weight = torch.randn(512, 512), torch.nn.Parameter(torch.randn(512, 512))
    weight.grad = torch.randn(512, 512)
    step = torch.optim.AdamW([weight]).step
    for call, kind in ((lambda: left @ left, "matrix products"), (lambda: left.exp().cos(), "other"), (step, "optimizer")):
        call()
        shares = time_by_kind(call)
        assert tuple(shares) == KINDS and sum(shares.values()) == pytest.approx(1)
        assert max(shares, key=shares.__getitem__) == kind
    tiny = [*TINY, "--no-compile", "--parts", "text", "--profile", "--output", str(tmp_path)]
    assert speed.main(tiny) == 0
    found = json.loads((tmp_path / "results.json").read_text())["parts"]["text"]
    assert list(found["profile"]) == [row["name"] for row in found["rows"]]
    assert all(shares["matrix products"] > 0 and shares["optimizer"] > 0 for shares in found["profile"].values())
    assert "| share of the time | matrix products |" in (tmp_path / "report.md").read_text()


def test_on_a_gpu_each_kernel_is_counted_once(monkeypatch: pytest.MonkeyPatch):
    """What torch's profiler lists there: operations with their kernels' time, the kernels again, and spans of named regions."""

    def event(key: str, own: float, *, cuda: bool = False, total: float | None = None, annotation: bool = False):
        return SimpleNamespace(
            key=key,
            device_type=DeviceType.CUDA if cuda else DeviceType.CPU,
            is_user_annotation=annotation,
            self_device_time_total=own,
            device_time_total=own if total is None else total,
        )

    events = [
        event("aten::mm", 50.0),
        event("sm90_xmma_gemm", 50.0, cuda=True),
        event("aten::_scaled_dot_product_flash_attention", 0.0, total=20.0),
        event("aten::_flash_attention_forward", 20.0),
        event("flash_fwd_kernel", 20.0, cuda=True),
        event("triton_poi_fused_add", 10.0),
        event("triton_poi_fused_add", 10.0, cuda=True),
        event("Optimizer.step#AdamW.step", 0.0, total=15.0, annotation=True),
        event("Optimizer.step#AdamW.step", 17.0, cuda=True, annotation=True),
        event("aten::_fused_adamw_", 15.0),
        event("multi_tensor_apply_kernel", 15.0, cuda=True),
        event("Memcpy HtoD", 5.0, cuda=True),
    ]

    class Profiler(contextlib.nullcontext):
        def key_averages(self):
            return events

    monkeypatch.setattr(time_profile, "profile", lambda activities: Profiler(Profiler()))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    shares = time_profile.time_by_kind(lambda: None, "cuda")
    expected = dict(zip(KINDS, (0.5, 0.2, 0.1, 0.15, 0.05), strict=True))
    assert shares == pytest.approx(expected)


def test_the_plain_image_model_is_the_paper_s():
    """It has the published size: about 685 M parameters at depth 24, width 1536, MLP ratio 1."""
    sizes = TrunkConfig(img_size=128, patch_size=16, embed_dim=1536, depth=24, num_heads=16, mlp_ratio=1)
    with torch.device("meta"):
        model = plain_steps.PlainEBT(sizes)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(685e6, rel=0.02)


def test_the_peak_memory_of_each_row_is_found_in_a_process_of_its_own(tmp_path: Path):
    tiny = [*TINY, "--no-compile", "--parts", "tokens", "--tokens", "16", "--batch-size", "64"]
    assert speed.main([*tiny, "--peak-memory", "--output", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["parts"]["tokens"]["rows"]
    assert 2**20 < row["peak_bytes"] < 2**30
    assert "GiB" in (tmp_path / "report.md").read_text()


def test_a_large_run_is_predicted_from_a_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    raw = dict(name="tiny", model_type="patch_ebt", data=dict(path="unused", img_size=16), train=dict(batch_size=128))
    raw["model"] = dict(img_size=16, patch_size=4, embed_dim=48, depth=4, num_heads=2, mlp_ratio=2.0)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(raw))
    assert scale.main([str(config), "train.num_updates=10", "--gpus", "8", "64", "--share", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "| 8 | 16 | 50% |" in printed and "| 64 | 2 | 50% |" in printed and "10 updates of 128 images" in printed
    assert scale.main([str(config), "train.batch_size=100", "--gpus", "8"]) == 2
    assert "use a multiple of 8" in capsys.readouterr().err


def test_a_network_of_any_depth_is_counted_from_two_shallow_ones(tmp_path: Path):
    raw = dict(name="tiny", model_type="patch_ebt", data=dict(path="unused", img_size=16))
    raw["model"] = dict(img_size=16, patch_size=4, embed_dim=48, depth=4, num_heads=2, mlp_ratio=2.0)
    config = build_config(raw)
    counted, run = training_cost.training_cost(config), training_cost._measure(config)
    assert (counted.num_parameters, counted.flops) == (run.num_parameters, run.flops)
    assert counted.kept_bytes == pytest.approx(run.kept_bytes, rel=0.02)
