"""The parts of the benchmark against hand arithmetic and other implementations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from ebt_vision.benchmark.flops import Cost, CostMeter
from ebt_vision.benchmark.measure import Subject
from ebt_vision.benchmark.options import OneLineParser, config_to_arguments
from ebt_vision.benchmark.protocols import OOD_STRENGTHS, Condition, same_shapes
from ebt_vision.benchmark.rows import Row, RowSettings, prepare, rows_of
from ebt_vision.benchmark.statistics import auroc, bootstrap_means, intervals, mean_and_spread, spearman
from ebt_vision.benchmark.tables import latex, markdown
from ebt_vision.core.arguments import number
from ebt_vision.denoising.classical import NonLocalMeansDenoiser
from ebt_vision.denoising.ebt import EBTDenoiser
from ebt_vision.denoising.options import DenoiseOptions
from ebt_vision.denoising.regressor import RegressorDenoiser
from ebt_vision.denoising.tiling import denoise_tiled, tile_grid
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig
from ebt_vision.models.regressor import PatchRegressor, PatchRegressorConfig
from ebt_vision.noise.processes import alphas_cumprod, to_image_range, to_model_range

# --- statistics


def test_bootstrap_intervals_are_the_normal_ones_on_normal_data():
    values = np.random.default_rng(0).normal(3.0, 2.0, (400, 1))
    means = bootstrap_means(values, num_resamples=2000, seed=1)
    low, high = intervals(means)[:, 0]
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03) and high == pytest.approx(values.mean() + half, abs=0.03)
    assert np.array_equal(means, bootstrap_means(values, num_resamples=2000, seed=1))
    assert not np.array_equal(means, bootstrap_means(values, num_resamples=2000, seed=2))


def test_bootstrap_draws_are_paired():
    """A column and the same plus one: the difference of the means is one in every sample, also when drawn apart."""
    column = np.random.default_rng(0).normal(size=(50, 1))
    together = bootstrap_means(np.hstack([column, column + 1]), num_resamples=100)
    np.testing.assert_allclose(together[:, 1] - together[:, 0], 1.0)
    np.testing.assert_allclose(bootstrap_means(column, num_resamples=100)[:, 0], together[:, 0])
    with pytest.raises(ValueError, match="nothing to resample"):
        bootstrap_means(np.empty((0, 1)))


def test_spearman_and_auroc_are_scipys_and_sklearns():
    random = np.random.default_rng(0)
    energy, error = random.integers(0, 5, (6, 9)).astype(float), random.normal(size=(6, 9))  # ties among the energies
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(energy, error, strict=True)]
    np.testing.assert_allclose(spearman(energy, error), expected)
    worse = [error_of >= np.sort(error_of)[5] for error_of in error]  # the 4 largest of 9
    expected = [roc_auc_score(a, b) for a, b in zip(worse, energy, strict=True)]
    np.testing.assert_allclose(auroc(energy, error), expected)


def test_rankings_by_hand():
    error = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(error, error) == auroc(error, error) == 1.0
    assert spearman(-error, error) == -1.0 and auroc(-error, error) == 0.0
    assert auroc(np.zeros(4), error) == 0.5 and np.isnan(spearman(np.zeros(4), error))
    assert np.isnan(auroc(error, np.zeros(4)))
    assert mean_and_spread(np.array([1.0, 3.0])) == (2.0, pytest.approx(2**0.5)) and mean_and_spread(np.array([1.0])) == (
        1.0,
        None,
    )


# --- protocols


def every_condition() -> list[Condition]:
    paper = Condition(protocol="paper", kind="level", strength=0.1)
    awgn = Condition(protocol="awgn", kind="sigma", strength=25)
    ood = [Condition(protocol="ood", kind=kind, strength=strength) for kind, strength in OOD_STRENGTHS.items()]
    return [paper, awgn, *ood]


@pytest.mark.parametrize("condition", every_condition(), ids=lambda condition: condition.kind)
def test_noise_depends_on_the_image_and_not_on_its_batch(condition: Condition):
    clean = torch.randint(0, 256, (3, 3, 37, 31), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = clean.clone()
    noisy = condition.observe(clean, [4, 5, 6])
    torch.testing.assert_close(noisy[1:2], condition.observe(clean[1:2], [5]), rtol=0, atol=1e-6)
    assert torch.equal(clean, before)
    if condition.protocol != "awgn" and condition.kind not in ("jpeg", "motion-blur"):  # those draw nothing for each image
        assert not torch.equal(noisy[1:2], condition.observe(clean[1:2], [9]))
    assert not torch.equal(noisy, clean / 255.0)


def test_awgn_is_numpys_seed_zero_for_every_image():
    clean = torch.full((2, 3, 37, 31), 128, dtype=torch.uint8)
    noisy = Condition(protocol="awgn", kind="sigma", strength=50).observe(clean, [0, 1])
    expected = 128 / 255 + np.random.RandomState(0).normal(0, 50 / 255, (37, 31, 3))
    for image in noisy:
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert noisy.min() < 0 and noisy.max() > 1  # not clipped
    seen = Condition(protocol="awgn", kind="sigma", strength=50, clipped=True).observe(clean, [0, 1])
    assert torch.equal(seen, (noisy.clamp(0, 1) * 255).round() / 255)


def test_conditions_that_differ_have_other_hashes():
    first = Condition(protocol="awgn", kind="sigma", strength=25)
    others = [
        Condition(protocol="awgn", kind="sigma", strength=50),
        Condition(protocol="awgn", kind="sigma", strength=25, seed=1),
        Condition(protocol="awgn", kind="sigma", strength=25, clipped=True),
    ]
    assert len({condition.noise_hash for condition in [first, *others]}) == 4
    assert first.noise_hash == Condition(protocol="awgn", kind="sigma", strength=25).noise_hash


def test_outputs_are_rounded_but_for_the_paper_s():
    paper, awgn, *_ = every_condition()
    image = torch.tensor([[[[0.501]]]])
    assert paper.measured(image).item() == pytest.approx(127.755) and awgn.measured(image).item() == 128


def test_neighbours_of_one_shape_make_a_batch():
    shapes = [(3, 8, 9), (3, 8, 9), (3, 9, 8), (3, 8, 9)]
    assert same_shapes([torch.empty(shape) for shape in shapes]) == [[0, 1], [2], [3]]


# --- rows and cost


def test_classical_methods_get_vp_noise_at_the_images_own_scale():
    """x sqrt(a) + n sqrt(1 - a), divided by sqrt(a): the image, with noise of the ratio of the two."""
    paper = every_condition()[0]
    row = Row(model="nlm", kind="classical", method="told sigma", num_steps=1, reported=(1,))
    clean = torch.rand(1, 3, 8, 8)
    alpha_bar = float(alphas_cumprod()[99])
    noiseless = to_image_range(to_model_range(clean) * alpha_bar**0.5)
    _, scaled, options = prepare(NonLocalMeansDenoiser(), row, paper, noiseless)
    torch.testing.assert_close(scaled, clean)
    assert options.sigma == pytest.approx(127.5 * ((1 - alpha_bar) / alpha_bar) ** 0.5)


def test_ddim_takes_no_more_passes_than_there_are_timesteps():
    rows = rows_of(
        "dit", "dit", Condition(protocol="paper", kind="level", strength=0.02), RowSettings(passes=(1, 20, 21), loops=0)
    )
    assert [row.num_steps for row in rows if row.method == "ddim"] == [1, 20]
    with pytest.raises(ValueError, match="--passes 0 is out of range"):
        RowSettings(passes=(0,))


def test_flops_are_those_counted_by_hand():
    dim, hidden, patch, tokens, depth = 32, 64, 4 * 4 * 3, 16, 2
    size = dict(img_size=16, patch_size=4, embed_dim=dim, depth=depth, num_heads=2, mlp_ratio=2.0)
    linear = tokens * (patch * dim + depth * (3 * dim * dim + dim * dim + 2 * dim * hidden) + dim * patch)
    attention = depth * 2 * tokens * tokens * dim  # queries by keys, and weights by values
    forward = 2 * (linear + attention)
    # Backward, a linear layer takes one more product to reach its input, and an attention product one for each factor.
    gradient = 2 * (2 * linear + 3 * attention)
    ebt = CostMeter().cost(EBTDenoiser(PatchEBT(PatchEBTConfig(**size))), 16, 16)
    assert ebt == Cost(step=gradient, final=forward)
    regressor = CostMeter().cost(RegressorDenoiser(PatchRegressor(PatchRegressorConfig(**size))), 16, 16)
    assert regressor == Cost(step=forward, final=0)
    assert CostMeter().cost(NonLocalMeansDenoiser(), 16, 16) is None


def test_flops_of_a_run_by_hand():
    cost = Cost(step=10, final=3)
    plain = Row(model="m", kind="ebt", method="thinking", num_steps=4, reported=(1, 2, 3, 4))
    assert [cost.of_run(plain, 4, step) for step in plain.reported] == [10, 20, 30, 40]
    best = Row(model="m", kind="ebt", method="best of 2", num_steps=4, reported=(4,), num_candidates=2)
    assert cost.of_run(best, 2 * 5, 4) == 2 * (4 * 10 + 3)
    stopping = Row(model="m", kind="ebt", method="tolerance", num_steps=4, reported=(4,), tolerance=0.1)
    assert cost.of_run(stopping, 3, 4) == 30 and cost.of_run(stopping, 5, 4) == 43


def test_tiles_are_counted_as_they_are_cut():
    calls = []
    denoiser = RegressorDenoiser(
        PatchRegressor(PatchRegressorConfig(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2))
    )
    image = torch.rand(1, 3, 37, 16)
    denoise_tiled(denoiser, image, callback=lambda done, total: calls.append(total))
    assert set(calls) == {tile_grid(denoiser, (37, 16)).count} == {3}
    calls.clear()
    denoise_tiled(denoiser, image, overlap=12, callback=lambda done, total: calls.append(total))
    assert set(calls) == {tile_grid(denoiser, (37, 16), overlap=12).count} == {7}


def test_a_tolerance_of_the_previous_step_is_a_row_of_its_own():
    settings = RowSettings(steps=4, tolerances=(0.05,), tolerance_of="previous", candidates=0)
    condition = Condition(protocol="paper", kind="level", strength=0.1)
    plain, stopping = rows_of("m", "ebt", condition, settings)
    assert stopping.method == "thinking, tolerance 0.05 of the previous" and stopping.reported == (4,)
    denoiser = EBTDenoiser(PatchEBT(PatchEBTConfig(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2)))
    _, _, options = prepare(denoiser, stopping, condition, torch.rand(1, 3, 16, 16))
    assert (options.tolerance, options.tolerance_of) == (0.05, "previous")


def test_figures_with_another_limit_for_clean_images_stay_apart():
    condition = Condition(protocol="awgn", kind="sigma", strength=25.0)
    keys = []
    for suggested, given in ((0.0, None), (0.5, None), (0.6, None), (0.5, 0.2), (0.6, 0.2)):
        config = PatchEBTConfig(
            img_size=16, embed_dim=48, depth=1, num_heads=2, suggested_start="proposal", suggested_clean_below=suggested
        )
        (row,) = rows_of("m", "ebt", condition, RowSettings(steps=1, candidates=0, clean_below=given))
        denoiser = EBTDenoiser(PatchEBT(config))
        _, _, options = prepare(denoiser, row, condition, torch.rand(1, 3, 16, 16))
        assert options.clean_below == given
        keys.append((row.clean_below, Subject(name="m", denoiser=denoiser, hash="").config_of(row)))
    assert keys[3] == keys[4] and len({str(key) for key in keys}) == 4


def test_the_regressor_is_applied_as_often_as_an_ebt_thinks_and_stopped_by_its_change():
    settings = RowSettings(steps=4, regressor_tolerances=(0.05,))
    condition = Condition(protocol="paper", kind="level", strength=0.1)
    plain, stopping = rows_of("m", "regressor", condition, settings)
    assert (plain.method, plain.num_steps, plain.reported) == ("applied", 4, (1, 2, 3, 4))
    assert (stopping.method, stopping.reported, stopping.needs_final_energy) == ("applied, tolerance 0.05", (4,), False)
    model = PatchRegressor(PatchRegressorConfig(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2))
    _, _, options = prepare(RegressorDenoiser(model), stopping, condition, torch.rand(1, 3, 16, 16))
    assert (options.tolerance, options.tolerance_of) == (0.05, "first")
    assert Cost(step=10, final=0).of_run(stopping, 3, 4) == 30  # three applications of four


def test_a_tolerance_of_the_trainings_gain_is_a_row_of_its_own():
    condition = Condition(protocol="paper", kind="level", strength=0.1)
    settings = RowSettings(steps=4, tolerances=(0.005,), tolerance_of="training", candidates=0)
    assert [row.method for row in rows_of("m", "ebt", condition, settings)] == [
        "thinking",
        "thinking, tolerance 0.005 of the training's",
    ]


def test_a_smaller_step_size_is_a_row_of_its_own():
    condition = Condition(protocol="paper", kind="level", strength=0.1)
    _, half = rows_of("m", "ebt", condition, RowSettings(steps=4, step_sizes=(0.5,), candidates=0))
    assert half.method == "thinking, step size x 0.5" and half.reported == (1, 2, 3, 4)
    torch.manual_seed(0)
    model = PatchEBT(PatchEBTConfig(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, init_step_size=0.3))
    torch.nn.init.normal_(model.head.weight, std=0.05)
    denoiser, noisy = EBTDenoiser(model), torch.rand(1, 3, 16, 16) * 0.5 + 0.25
    _, _, options = prepare(denoiser, half, condition, noisy)
    whole, moved = (denoiser.denoise(noisy, replace(options, num_steps=1, step_size_scale=s)).image - noisy for s in (1.0, 0.5))
    torch.testing.assert_close(moved, 0.5 * whole, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="--step-sizes 0.0 is out of range"):
        RowSettings(step_sizes=(0.0,))


# --- candidates


def test_every_candidate_is_kept():
    torch.manual_seed(0)
    model = PatchEBT(PatchEBTConfig(img_size=16, patch_size=4, embed_dim=48, depth=1, num_heads=2, init_step_size=0.3))
    torch.nn.init.normal_(model.head.weight, std=0.05)
    denoiser, noisy = EBTDenoiser(model), torch.rand(2, 3, 17, 18)
    result = denoiser.denoise(noisy, DenoiseOptions(num_candidates=3, keep_candidates=True, tile_size=0), image_ids=[0, 1])
    assert result.candidate_images.shape == (3, *noisy.shape)
    assert torch.equal(result.image, result.candidate_images[result.chosen, torch.arange(2)])
    assert len({float(image.sum()) for image in result.candidate_images}) == 3
    assert denoiser.denoise(noisy, DenoiseOptions(num_candidates=3)).candidate_images is None
    tiled = denoise_tiled(denoiser, noisy[:1], DenoiseOptions(num_candidates=2, keep_candidates=True), batch_size=1)
    assert tiled.candidate_images.shape == (2, 1, 3, 17, 18)
    # The first candidate starts from the image itself: it is the image of one candidate.
    torch.testing.assert_close(tiled.candidate_images[0], denoise_tiled(denoiser, noisy[:1], DenoiseOptions()).image)


# --- options and tables


def parser() -> OneLineParser:
    parser = OneLineParser(prog="test")
    parser.add_argument("--sizes", type=number(int, 1, 9), nargs="*")
    parser.add_argument("--batch-size", type=number(int, 1), default=3)
    parser.add_argument("--group", nargs="*")
    parser.add_argument("--clipped", action="store_true")
    return parser


def test_a_config_file_is_a_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("sizes: [1, 2]\nbatch_size: 5\ngroup: {both: [a, b]}\nclipped: true\n")
    assert config_to_arguments(path, parser()) == ["--sizes", "1", "2", "--batch-size=5", "--group", "both=a,b", "--clipped"]
    settings = parser().parse(["--config", str(path), "--batch-size", "7"])
    assert (settings.sizes, settings.batch_size, settings.group, settings.clipped) == ([1, 2], 7, ["both=a,b"], True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch-sise: 1", "did you mean 'batch-size'?"),
        ("sizes: [10]", "'10' is not valid; use a whole number from 1 to 9"),
        ("clipped: 3", "clipped: 3 is not true or false"),
        ("[1]", "must be a mapping"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_wrong_config_is_one_line(tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit_status:
        parser().parse(["--config", str(tmp_path / "c.yaml")])
    assert exit_status.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_tables_escape_what_their_format_reads():
    columns = [("name", lambda record: record["name"])]
    assert markdown(columns, [{"name": "a|b"}]) == "| name |\n| --- |\n| a\\|b |\n"
    assert r"50\% of a\_b $\pm$ \{c\}" in latex(columns, [{"name": "50% of a_b ± {c}"}])
