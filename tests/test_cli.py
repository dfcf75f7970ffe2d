"""The command line on good and on bad input: one clear line, exit status 2, and nothing lost."""

import io
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from ebt_vision import cli
from ebt_vision.models.patch_ebt import PatchEBT, PatchEBTConfig

RNG = np.random.default_rng(0)


def photo(path: Path, height: int = 37, width: int = 45) -> Path:
    """A smooth colour image of an odd size."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 5 % 256, columns * 4 % 256, (rows + columns) * 2 % 256], axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return photo(tmp_path / "good.png")


@pytest.fixture
def run(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """denoise(*arguments) -> (status, lines on stdout, lines on stderr), with the tiny model into tmp_path/out."""

    def denoise(*arguments: str | Path, output: Path | None = None) -> tuple[int, list[str], list[str]]:
        defaults = ["--output", output or tmp_path / "out", "--model", tiny_checkpoint, "--steps", "2"]
        status = cli.main(["denoise", *map(str, arguments), *map(str, defaults)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out.splitlines(), captured.err.splitlines()

    return denoise


# --- What it does


def test_denoise_prints_a_line_and_writes_the_image(run, good: Path, tmp_path: Path) -> None:
    status, out, err = run(good, "--add-noise", "25")
    assert (status, err, len(out)) == (0, [], 1)
    assert re.search(r"good\.png: energy \S+ -> \S+, 2 steps, \S+ s, PSNR \S+ -> \S+ dB$", out[0])
    assert Image.open(tmp_path / "out" / "good.png").size == (45, 37)


def test_a_models_own_stopping_rule_holds_where_nobody_asks_for_steps(good: Path, tmp_path: Path, capsys) -> None:
    config = PatchEBTConfig(
        img_size=16, embed_dim=32, depth=1, num_heads=2, suggested_steps=5, suggested_tolerance=1e9, training_gain=1.0
    )
    PatchEBT(config).save_pretrained(tmp_path / "model")  # its energy is |y|^2 / 2, of which a step of 1 leaves nothing

    def steps(*options: str) -> str:
        arguments = ["denoise", str(good), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--overwrite"]
        assert cli.main([*arguments, *options]) == 0
        return re.search(r"(\d+) steps?", capsys.readouterr().out).group(1)

    assert steps() == "1"
    assert steps("--steps", "5") == "5"
    assert steps("--tolerance", "0", "--tolerance-of", "first", "--step-size-scale", "0.5") == "5"


def test_a_photo_that_is_clean_by_its_energy_keeps_every_pixel(good: Path, tmp_path: Path, capsys) -> None:
    config = PatchEBTConfig(img_size=16, embed_dim=48, depth=1, num_heads=2, suggested_start="proposal", suggested_steps=1)
    PatchEBT(config).save_pretrained(tmp_path / "model")
    command = ["denoise", str(good), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--overwrite"]
    assert cli.main([*command, "--clean-below", "255"]) == 0
    assert "0 steps (already clean)" in capsys.readouterr().out
    assert (np.asarray(Image.open(tmp_path / "out" / "good.png")) == np.asarray(Image.open(good))).all()
    assert cli.main([*command, "--clean-below", "0"]) == 0
    assert "1 step," in capsys.readouterr().out
    assert cli.main([*command, "--clean-below", "3", "--start", "observation"]) == 2
    assert "--clean-below has no effect where model does not start from its proposal" in capsys.readouterr().err
    assert cli.main([*command, "--model", "nlm", "--clean-below", "3"]) == 2
    assert "--clean-below has no effect on nlm" in capsys.readouterr().err


def test_noise_of_a_file_does_not_depend_on_the_others(run, good: Path, tmp_path: Path) -> None:
    other = photo(tmp_path / "a.png", 40, 40)
    run(good, "--add-noise", "25", output=tmp_path / "alone")
    run(other, good, "--add-noise", "25", output=tmp_path / "together")
    assert (tmp_path / "alone" / "good.png").read_bytes() == (tmp_path / "together" / "good.png").read_bytes()


def test_a_folder_keeps_its_tree_and_leaves_out_earlier_results(run, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    photo(tmp_path / "in" / "deep" / "a.png")
    photo(tmp_path / "in" / "b.bmp")
    for _ in range(2):  # the second time, in/out is inside of what is read
        status, out, _ = run(tmp_path / "in", "--overwrite", output=tmp_path / "in" / "out")
        assert (status, len(out)) == (0, 2)
    written = sorted(p.relative_to(tmp_path / "in" / "out").as_posix() for p in (tmp_path / "in" / "out").rglob("*.*"))
    assert written == ["b.png", "deep/a.png"]


def test_16_bit_and_orientation_are_kept(run, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "deep.tif", RNG.integers(0, 65536, (32, 40, 3), dtype=np.uint16), photometric="rgb")
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    Image.open(photo(tmp_path / "x.png")).save(tmp_path / "turned.jpg", exif=exif)
    status, _, _ = run(tmp_path / "deep.tif", tmp_path / "turned.jpg")
    assert status == 0
    assert tifffile.imread(tmp_path / "out" / "deep.tif").dtype == np.uint16
    assert Image.open(tmp_path / "out" / "turned.jpg").size == (37, 45)


def test_candidates_tolerance_and_tiles_are_taken(run, good: Path) -> None:
    status, out, _ = run(good, "--candidates", "2", "--tolerance", "0.5", "--tile", "16", "--seed", "3")
    assert status == 0 and len(out) == 1


def test_more_overlap_is_taken(run, good: Path, tmp_path: Path) -> None:
    for overlap in ("4", "12"):
        assert run(good, "--tile", "16", "--overlap", overlap, "--add-noise", "25", output=tmp_path / overlap)[0] == 0
    assert (tmp_path / "4" / "good.png").read_bytes() != (tmp_path / "12" / "good.png").read_bytes()


def test_other_noises_and_all_of_thinking_are_taken(run, good: Path, tmp_path: Path) -> None:
    plain = ("--add-noise", "salt-and-pepper:0.1")
    results = []
    for number, more in enumerate(((), ("--step-size-scale", "3"), ("--langevin", "0.05"), ("--step-rule", "momentum"))):
        assert run(good, *plain, *more, output=tmp_path / str(number))[0] == 0
        results.append((tmp_path / str(number) / "good.png").read_bytes())
    assert len(set(results)) == 4


def test_png_is_written_when_asked_for(run, tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    assert run(tmp_path / "a.jpg", "--png")[0] == 0
    assert Image.open(tmp_path / "out" / "a.png").format == "PNG"


def test_info_describes_a_checkpoint(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(tiny_checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "patch_ebt" in out and "embed_dim" in out and "sha256" in out
    assert cli.main(["info"]) == 0


def test_help_is_fast_and_imports_no_torch() -> None:
    code = "import sys; from ebt_vision import cli; cli._parser().format_help(); sys.exit('torch' in sys.modules)"
    start = time.perf_counter()
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert time.perf_counter() - start < 5  # a loaded machine; it takes 0.1 s on a quiet one


# --- Bad input: (how to make the file, what the line must say)


def header_of_20000(path: Path) -> None:
    """A PNG of a few bytes that claims 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(100))), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def nan_tiff(path: Path) -> None:
    pixels = RNG.random((32, 32, 3), dtype=np.float32)
    pixels[3, 4] = np.nan
    tifffile.imwrite(path, pixels, photometric="rgb")


def truncated(path: Path) -> None:
    photo(path)
    path.write_bytes(path.read_bytes()[:60])


BAD_FILES = {
    "missing.png": (lambda path: None, "does not exist"),
    "text.png": (lambda path: path.write_text("hello, I am a text file\n"), "image"),
    "empty.png": (lambda path: path.touch(), "empty"),
    "one.png": (lambda path: Image.new("RGB", (1, 1)).save(path), "1x1"),
    "huge.png": (header_of_20000, "pixels"),
    "nan.tif": (nan_tiff, "finite|NaN"),
    "cut.png": (truncated, "cut.png"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_and_the_others_are_done(run, good: Path, tmp_path: Path, name: str) -> None:
    make, wanted = BAD_FILES[name]
    make(tmp_path / name)
    last = photo(tmp_path / "last.png")
    status, out, err = run(good, tmp_path / name, last)
    assert status == 2
    assert len(out) == 2 and (tmp_path / "out" / "good.png").is_file() and (tmp_path / "out" / "last.png").is_file()
    assert len(err) == 2 and err[0].startswith("ebt-vision: ") and name in err[0] and re.search(wanted, err[0])
    assert err[0].count(name) == 1
    assert err[1] == f"ebt-vision: 1 of 3 failed, 2 written to {tmp_path / 'out'}"


def test_existing_results_are_kept_unless_told(run, good: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "good.png"
    target.parent.mkdir()
    target.write_bytes(b"precious")
    status, _, err = run(good)
    assert status == 2 and "exists" in err[0] and target.read_bytes() == b"precious"
    assert run(good, "--overwrite")[0] == 0
    assert target.read_bytes() != b"precious"


def test_the_input_is_not_overwritten_by_its_result(run, good: Path) -> None:
    before = good.read_bytes()
    status, _, err = run(good, output=good.parent)
    assert status == 2 and "exists" in err[0] and good.read_bytes() == before


def test_two_inputs_of_one_name_do_not_replace_each_other(run, good: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    status, out, err = run(good, photo(tmp_path / "other" / "good.png"), "--overwrite")
    assert status == 2 and len(out) == 1 and "rename" in err[0]


def test_unwritable_output_is_said_before_any_work(run, good: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a regular file")
    status, out, err = run(good, output=tmp_path / "file" / "out")
    assert (status, out, len(err)) == (2, [], 1)
    assert "output" in err[0] and "choose another folder" in err[0]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "-1"),
        ("--steps", "0"),
        ("--steps", "two"),
        ("--candidates", "0"),
        ("--tolerance", "nan"),
        ("--add-noise", "-5"),
        ("--add-noise", "fog:5"),
        ("--step-size-scale", "0"),
        ("--seed", "-1"),
        ("--tile", "0"),
        ("--overlap", "-1"),
        ("--stepz", "3"),
        ("--model", ""),
        ("--device", " "),
    ],
)
def test_a_bad_option_is_one_line(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["denoise", str(good), "--output", str(tmp_path / "out"), option, value])
    err = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(err) == 1 and option in err[0]


@pytest.mark.parametrize("option", ["--tile=4", "--overlap=999", "--device=abacus"])
def test_a_value_that_only_the_library_can_judge(run, good: Path, option: str) -> None:
    status, out, err = run(good, option)
    assert (status, out) == (2, []) and option.split("=")[1] in err[0]


def test_an_unknown_model_is_one_line(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["denoise", str(good), "--output", str(tmp_path / "out"), "--model", "no-such-model"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "no-such-model" in err[0]


def test_a_damaged_checkpoint_is_one_line(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "patch_ebt", "config": {}}')
    (broken / "model.safetensors").write_bytes(b"not weights")
    assert cli.main(["denoise", str(good), "--output", str(tmp_path / "out"), "--model", str(broken)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "model.safetensors" in err[0]


def test_an_interrupt_keeps_what_is_done(run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ebt_vision.data import image_files

    second, read_image = photo(tmp_path / "second.png"), image_files.read_image

    def read_until_second(path):
        if Path(path) == second:
            raise KeyboardInterrupt
        return read_image(path)

    monkeypatch.setattr(image_files, "read_image", read_until_second)
    status, out, err = run(good, second)
    assert status == 130 and len(out) == 1 and "1 of 2" in err[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.png"]


# --- Names and places


def test_an_input_folder_inside_of_the_output_is_denoised(run, tmp_path: Path) -> None:
    """Only an output inside the input contains earlier results."""
    (tmp_path / "big" / "in").mkdir(parents=True)
    photo(tmp_path / "big" / "in" / "a.png")
    status, out, err = run(tmp_path / "big" / "in", output=tmp_path / "big")
    assert (status, len(out), err) == (0, 1, []) and (tmp_path / "big" / "a.png").is_file()


def test_a_folder_with_nothing_but_earlier_results_is_refused(run, tmp_path: Path) -> None:
    (tmp_path / "in" / "out").mkdir(parents=True)
    photo(tmp_path / "in" / "out" / "a.png")
    status, out, err = run(tmp_path / "in", output=tmp_path / "in" / "out")
    assert (status, out) == (2, []) and "has no images except earlier results" in err[0]


def test_no_result_replaces_another_input(run, tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "deep").mkdir()
    other = photo(tmp_path / "deep" / "a.png", 20, 20)
    before = other.read_bytes()
    status, out, err = run(tmp_path / "a.png", other, "--overwrite", output=tmp_path / "deep")
    assert status == 2 and "a.png" in err[0] and other.read_bytes() == before
    photo(tmp_path / "b.bmp")
    third = photo(tmp_path / "deep" / "b.png", 20, 20)
    before = third.read_bytes()
    status, out, err = run(tmp_path / "b.bmp", third, "--png", "--overwrite", output=tmp_path / "deep")
    assert status == 2 and third.read_bytes() == before


@pytest.mark.parametrize("command", ["denoise", "train", "info", "generate"])
def test_an_empty_name_is_refused(command: str, good: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unset shell variable must not mean the current folder or the default."""
    monkeypatch.chdir(tmp_path)
    tries = {
        "denoise": [["", "--output", "o"], [str(good), "--output", ""], [str(good), "--output", "o", "--model", ""]],
        "train": [[""], ["a.yaml", "--output", ""]],
        "info": [[""]],
        "generate": [["a", "--model", ""], ["a", "--tokenizer", ""]],
    }
    for words in tries[command]:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, *words])
        err = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(err) == 1 and "'' is empty; is a shell variable unset?" in err[0]
    assert [path.name for path in tmp_path.iterdir()] == ["good.png"]


def test_a_suffix_that_is_no_images_stays_in_the_name(run, tmp_path: Path) -> None:
    photo(tmp_path / "x.png").rename(tmp_path / "IMG.2024")
    photo(tmp_path / "y.bmp")
    photo(tmp_path / "z.jpg").rename(tmp_path / "z.jfif")
    assert run(tmp_path / "IMG.2024", tmp_path / "y.bmp", tmp_path / "z.jfif")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["IMG.2024.png", "y.png", "z.png"]


def test_what_a_folder_leaves_out_is_said(run, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    photo(tmp_path / "in" / "a.png")
    photo(tmp_path / "b.jpg").rename(tmp_path / "in" / "deep" / "b.jfif")
    (tmp_path / "in" / ".hidden").touch()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    status, out, err = run(tmp_path / "in")
    assert (status, len(out), len(err)) == (0, 1, 1)
    assert "skipped 1 file not named as images (.jfif) and the linked folder linked" in err[0]
    status, _, err = run(tmp_path / "in" / "deep" / "b.jfif")
    assert (status, err) == (0, [])


def test_a_pipe_is_refused_at_once(run, good: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    status, out, err = run(tmp_path / "pipe.png", good)
    assert (status, len(out)) == (2, 1) and "pipe.png is a pipe or a device" in err[0]


def test_another_run_into_the_same_folder(run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that another run has written in the meantime are kept and are not failures."""
    from ebt_vision.data import image_files

    second, third, read_image = photo(tmp_path / "second.png"), photo(tmp_path / "third.png"), image_files.read_image

    def read_while_another_works(path):
        if Path(path) == good:
            (tmp_path / "out" / "second.png").write_bytes(b"another's, before its turn")
        if Path(path) == third:
            (tmp_path / "out" / "third.png").write_bytes(b"another's, during its turn")
        return read_image(path)

    monkeypatch.setattr(image_files, "read_image", read_while_another_works)
    status, out, err = run(good, second, third)
    assert (status, len(out), len(err)) == (0, 1, 2)
    assert all("another run has written" in line for line in err)
    assert (tmp_path / "out" / "second.png").read_bytes() == b"another's, before its turn"
    assert (tmp_path / "out" / "third.png").read_bytes() == b"another's, during its turn"


def test_names_that_stdout_cannot_encode(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / os.fsdecode(b"odd\xff.png")
    photo(tmp_path / "x.png").rename(odd)
    last = photo(tmp_path / "\u6f22.png")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    status, _, _ = run(odd, last)
    stream.flush()
    lines = stream.buffer.getvalue().decode("latin-1").splitlines()
    assert status == 0 and len(lines) == 2 and r"odd\udcff.png" in lines[0] and r"\u6f22.png" in lines[1]
    assert (tmp_path / "out" / odd.name).is_file() and (tmp_path / "out" / last.name).is_file()


def test_a_reader_that_leaves_does_not_stop_the_work(good: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As in `ebt-vision denoise ... | head -1`."""
    second = photo(tmp_path / "second.png")
    words = [good, second, "--output", tmp_path / "out", "--model", tiny_checkpoint, "--steps", "1"]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ebt_vision", "denoise", *map(str, words)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.png", "second.png"]


def test_a_command_whose_output_cannot_be_written_has_not_succeeded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert cli.main(["info"]) == 141


# --- Options that have no effect


def test_tolerance_of_needs_a_tolerance(run, good: Path) -> None:
    status, out, err = run(good, "--tolerance-of", "previous")
    assert (status, out) == (2, []) and "--tolerance-of previous has no effect without --tolerance" in err[0]
    assert run(good, "--tolerance-of", "previous", "--tolerance", "0.1")[0] == 0


def test_a_tolerance_needs_more_than_one_step(good: Path, tmp_path: Path, capsys) -> None:
    words = [
        "denoise",
        str(good),
        "--output",
        str(tmp_path / "out"),
        "--model",
        "tiny_imagenet_regressor",
        "--tolerance",
        "0.1",
    ]
    assert cli.main(words) == 2
    assert "one step that tiny_imagenet_regressor suggests; add --steps" in capsys.readouterr().err.strip().splitlines()[-1]
    assert cli.main([*words, "--steps", "2"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--candidates", "2"],
        ["--tolerance", "0.1"],
        ["--langevin", "0.1"],
        ["--step-size-scale", "2"],
        ["--steps", "3"],
        ["--step-rule", "momentum"],
    ],
)
def test_options_that_a_model_has_no_use_for(good: Path, tmp_path: Path, capsys, words: list[str]) -> None:
    assert cli.main(["denoise", str(good), "--output", str(tmp_path / "out"), "--model", "nlm", *words]) == 2
    assert f"{words[0]} has no effect on nlm" in capsys.readouterr().err
    assert cli.main(["denoise", str(good), "--output", str(tmp_path / "out"), "--model", "nlm"]) == 0


@pytest.mark.parametrize(
    "words", [["--langevin", "0.1"], ["--step-size-scale", "2"], ["--step-rule", "momentum"], ["--likelihood-weight", "0.1"]]
)
def test_options_of_steps_need_a_step_after_the_proposal(good: Path, tmp_path: Path, capsys, words: list[str]) -> None:
    """photographs_ebt suggests its proposal alone."""
    command = ["denoise", str(good), "--output", str(tmp_path / "out")]
    assert cli.main([*command, *words]) == 2
    expected = f"{words[0]} has no effect on the proposal, the one step of photographs_ebt; add --steps 2 or more"
    assert expected in capsys.readouterr().err
    assert cli.main([*command, *words, "--steps", "2"]) == 0
    assert cli.main([*command, *words, "--start", "observation", "--overwrite"]) == 0


@pytest.mark.parametrize("strength", ["-1", "1.6", "nan"])
def test_a_strength_out_of_range_is_one_line(good: Path, tmp_path: Path, capsys, strength: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["denoise", str(good), "--output", str(tmp_path / "out"), f"--strength={strength}"])
    assert stopped.value.code == 2 and "use a number from 0 to 1.5" in capsys.readouterr().err


# --- train


def test_train_without_its_config_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "smoke.yaml").touch()  # the line names what there is
    assert cli.main(["train", str(tmp_path / "smok.yaml")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "smok.yaml does not exist" in err[0] and "smoke.yaml" in err[0]


def test_train_takes_overrides_before_and_after_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.touch()
    args = cli._parse(["train", str(config), "a=1", "--output", "runs/x", "b=2"])
    assert args.overrides == ["a=1", "b=2"] and args.output == Path("runs/x")
    assert cli.main(["train", str(config), "nonsense"]) == 2


def test_train_refuses_a_typo_in_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "typo.yaml"
    config.write_text("modle:\n  embed_dim: 64\n")
    assert cli.main(["train", str(config)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "modle" in err[0] and "model" in err[0].replace("modle", "")


def test_a_diverged_training_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ebt_vision.training import run
    from ebt_vision.training.loop import TrainingDivergedError

    def diverge(*args, **kwargs):
        raise TrainingDivergedError("loss is nan at step 7;\n lower the learning rate")

    monkeypatch.setattr(run, "train", diverge)
    (tmp_path / "a.yaml").touch()
    assert cli.main(["train", str(tmp_path / "a.yaml")]) == 2
    assert capsys.readouterr().err == "ebt-vision: loss is nan at step 7; lower the learning rate\n"
