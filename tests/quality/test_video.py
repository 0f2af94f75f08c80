"""The video model from scenes to pictures, as small as can be."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.quality.methods import DenseAttention
from benchmarks.quality.video import scenes
from benchmarks.quality.video.model import NO_LABELS, PATCH, TINY, Config, VideoTransformer, load, rotary, rotate, save
from benchmarks.quality.video.sample import BRANCHES, Site, noise, sample
from benchmarks.quality.video.train import STAGES, Stage, train

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SMALL = Config(dim=64, layers=2, frames=4, size=16)
LABELS = torch.tensor([[1, 2, 3, 0]])


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model() -> VideoTransformer:
    """Weights far from the start, where every block is the identity; scores that differ between blocks."""
    torch.manual_seed(0)
    made = VideoTransformer(SMALL).requires_grad_(False)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for block in made.blocks:
        block.query_norm.weight.fill_(1.0)
        block.key_norm.weight.fill_(1.0)
    return made.eval()


def test_scenes_come_from_their_seed_and_labels() -> None:
    labels = scenes.draw_labels(6, random())
    clips = scenes.render(labels, random(1), 4, 32, 32)
    assert clips.shape == (6, 3, 4, 32, 32)
    assert clips.dtype == torch.float32
    assert -1 <= clips.min() < -0.5 and 0.5 < clips.max() <= 1
    assert torch.equal(clips, scenes.render(labels, random(1), 4, 32, 32))
    assert not torch.equal(clips, scenes.render(labels, random(2), 4, 32, 32))
    assert (clips[:, :, 1:] - clips[:, :, :-1]).abs().mean((1, 2, 3, 4)).min() > 0.01
    # The same scenes at any size, and the colour of the label in each.
    larger = scenes.render(labels, random(1), 4, 64, 64)
    torch.testing.assert_close(torch.nn.functional.avg_pool3d(larger, (1, 2, 2)), clips, atol=0.5, rtol=0)
    changed = labels.clone()
    changed[:, 1] = (changed[:, 1] + 1) % len(scenes.COLOURS)
    assert (scenes.render(changed, random(1), 4, 32, 32) != clips).flatten(1).any(1).all()


def test_held_out_labels_are_never_trained() -> None:
    seen = {tuple(row) for row in scenes.draw_labels(20_000, random())[:, :3].tolist()}
    held_out = {tuple(row) for row in scenes.draw_labels(2_000, random(), held_out=True)[:, :3].tolist()}
    assert not seen & held_out
    shapes, colours, motions, _ = scenes.LABELS
    assert len(seen) + len(held_out) == shapes * colours * motions
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert {(row[left], row[right]) for row in held_out} <= {(row[left], row[right]) for row in seen}


def test_the_full_model_has_the_size_that_it_should() -> None:
    config = Config()
    assert config.tokens == 12_544
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in VideoTransformer(config).parameters())
    assert 14e6 < parameters < 16e6
    assert {stage.frames * (stage.size // PATCH) ** 2 * stage.batch for stage in STAGES} == {4 * config.tokens}


def test_rotary_positions_are_relative_on_each_axis() -> None:
    full = (4, 6, 5)
    rotation = rotary(full, full, CPU)
    query, key = (torch.randn(1, 1, 1, 64, generator=random(seed)).expand(1, 120, 1, 64) for seed in range(2))
    scores = (rotate(query, rotation)[0, :, 0] @ rotate(key, rotation)[0, :, 0].T).view(*full, *full)
    torch.testing.assert_close(scores[1, 2, 3, 0, 4, 1], scores[3, 1, 4, 2, 3, 2])
    assert (scores[0, 0, 0] - scores[0, 0, 0, 0, 0, 0]).abs().flatten()[1:].min() > 1e-4
    # Half as many frames lie over the same time.
    fewer = rotary((2, 6, 5), full, CPU)
    between = (torch.atan2(rotation[1], rotation[0]).view(4, 30, 32)[:2, :, 7]).mean(0)
    torch.testing.assert_close(torch.atan2(fewer[1], fewer[0]).view(2, 30, 32)[0, :, 7], between)


@pytest.mark.parametrize("grid", [(4, 16), (2, 8), (4, 24)])
def test_the_model_takes_clips_of_any_size(model: VideoTransformer, grid: tuple[int, int]) -> None:
    clips = noise(*grid, seed=0)[None]
    calls: list[tuple[int, ...]] = []

    def attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append((layer, *query.shape))
        return DenseAttention()(query, key, value)

    velocity = model(clips, torch.tensor([0.5]), LABELS, attention)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(clips, torch.tensor([0.5]), LABELS, attention)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, velocity, rtol=0.2, atol=0.1 * float(velocity.abs().max()))
    calls = calls[: SMALL.layers]
    tokens = grid[0] * (grid[1] // PATCH) ** 2
    assert calls == [(layer, 1, tokens, SMALL.heads, 64) for layer in range(SMALL.layers)]
    assert velocity.shape == clips.shape
    assert torch.equal(velocity, model(clips, torch.tensor([0.5]), LABELS))
    assert not torch.allclose(velocity, model(clips, torch.tensor([0.5]), torch.tensor([NO_LABELS])))


def test_the_model_sees_every_pixel_where_it_is(model: VideoTransformer) -> None:
    # Without attention a patch depends on itself only.
    clips = noise(4, 16, seed=0)[None]
    changed = clips.clone()
    changed[0, :, 2, 5, 14] += 1

    def velocity(of: Tensor) -> Tensor:
        return model(of, torch.tensor([0.5]), LABELS, lambda layer, query, key, value: torch.zeros_like(query))

    where = (velocity(clips) != velocity(changed)).nonzero()
    assert where.amin(0).tolist() == [0, 0, 2, 4, 12]
    assert where.amax(0).tolist() == [0, 2, 2, 7, 15]


def test_training_lowers_the_loss_and_a_checkpoint_keeps_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.quality.video.train.WARMUP_STEPS", 5)
    stages = (Stage(0.8, 2, 16, 4), Stage(0.2, 4, 16, 2))
    trained, losses = train(SMALL, stages, CPU, steps=40)
    assert len(losses) == 40
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8]), losses
    again, same = train(SMALL, stages, CPU, steps=40)
    assert same == losses
    save(trained, tmp_path / "folder" / "model.safetensors")
    loaded = load(tmp_path / "folder" / "model.safetensors", CPU)
    assert loaded.config == SMALL
    for (name, weight), kept in zip(again.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(weight.bfloat16().float(), kept), name


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="checkpoint: expected a file, got .*model.safetensors"):
        load(path, CPU)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="checkpoint: expected one of .* without a config"):
        load(path, CPU)


def test_a_sample_depends_on_its_seed_labels_and_guidance(model: VideoTransformer) -> None:
    def clip(seed: int = 0, labels: Tensor = LABELS, guidance: float = 2.0, steps: int = 3) -> Tensor:
        return sample(model, labels, noise(4, 16, seed)[None], steps, guidance)

    first = clip()
    assert first.shape == (1, 3, 4, 16, 16)
    assert 0 <= first.min() < first.max() <= 1
    assert torch.equal(first, clip())
    for other in (clip(seed=1), clip(labels=torch.tensor([[0, 2, 3, 0]])), clip(guidance=1.0), clip(steps=2)):
        assert not torch.equal(first, other)
    both = sample(model, LABELS.repeat(2, 1), torch.stack([noise(4, 16, seed) for seed in range(2)]), 3, 2.0)
    torch.testing.assert_close(both, torch.cat((first, clip(seed=1))), rtol=1e-4, atol=1e-4)


def test_a_sample_of_a_perfect_model_is_the_scene(model: VideoTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    start, scene = noise(4, 16, seed=0)[None], scenes.render(LABELS, random(), 4, 16, 16)
    monkeypatch.setattr(VideoTransformer, "forward", lambda *args: start - scene)
    torch.testing.assert_close(sample(model, LABELS, start, 4, 3.0), (scene + 1) / 2)


def test_every_site_is_asked_once_in_order(model: VideoTransformer) -> None:
    sites: list[Site] = []

    def attention(site: Site, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sites.append(site)
        return DenseAttention()(query, key, value)

    start = noise(4, 16, seed=0)[None]
    out = sample(model, LABELS, start, 2, 2.0, attention)
    assert sites == [Site(step, branch, layer) for step in range(2) for branch in range(2) for layer in range(2)]
    assert torch.equal(out, sample(model, LABELS, start, 2, 2.0))


def run(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    main()


def test_the_commands_one_after_the_other(
    tmp_path: Path, model: VideoTransformer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.quality.video import evaluate, plot

    save(model, tmp_path / "model.safetensors")
    common = ("--checkpoint", tmp_path / "model.safetensors", "--out", tmp_path, "--pictures", tmp_path)
    methods = ("product-dense", "product-mass:0", "budget-variance:-1", "product-mass-warmup:0")
    run(evaluate.main, monkeypatch, *common, "--videos", 2, "--steps", 9, "--size", 32, "--methods", *methods)
    result = json.loads((tmp_path / "video_quality.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["dense", *(method.partition(":")[0] for method in methods)]
    assert result["setup"]["videos"] == 2 and result["setup"]["tokens"] == 256
    assert rows["dense"]["psnr"] is None and rows["dense"]["sparsity"] == 0
    assert rows["product-dense"]["psnr"] is None or rows["product-dense"]["psnr"] > 60
    for method in ("product-mass", "budget-variance"):
        assert 0.1 < rows[method]["sparsity"] < 1 and 0 < rows[method]["dropped"] < 1
        assert rows[method]["psnr"] < 80 and len(rows[method]["psnr_of_videos"]) == 2
        assert sum(rows[method]["sparsity_of_videos"]) / 2 == pytest.approx(rows[method]["sparsity"])
        assert rows[method]["attention_milliseconds"] is None
    pictures = load_file(tmp_path / "video_quality.safetensors")
    steps_skipped = pictures["sparsity product-mass-warmup 0"].amax((1, 2)) > 0
    assert steps_skipped[:5].sum() == 0 and steps_skipped[7:].sum() == 0
    assert pictures["stills dense"].shape == (4, 32, 32, 3)

    run(plot.main, monkeypatch, "--results", tmp_path, "--pictures", tmp_path, "--out", tmp_path / "docs")
    made = {path.name for path in (tmp_path / "docs").iterdir()}
    assert made == {"video_quality.png", "video_quality_frames.png", "video_quality_layers.png"}

    for main, arguments, message in (
        (evaluate.main, (*common, "--methods", "sparge"), "--methods: expected a name or pattern"),
        (evaluate.main, (*common, "--size", 30), "expected 2 or more, and a multiple of 4 from 12, got 4, 30"),
        (evaluate.main, ("--checkpoint", tmp_path / "no"), "--checkpoint: expected a file, got"),
        (evaluate.main, (*common, "--videos", 0), "--videos: expected a number above 0, got 0"),
        (plot.main, ("--results", tmp_path / "no"), "expected a file of python -m benchmarks.quality.video.evaluate"),
        (
            plot.main,
            ("--results", tmp_path, "--pictures", tmp_path, "--shown", "no"),
            "--shown: expected some of dense, ",
        ),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            run(main, monkeypatch, *arguments)
        assert message in capsys.readouterr().err


def test_quality_is_read_between_thresholds() -> None:
    from benchmarks.quality.video.evaluate import at_quality

    def row(method: str, psnr: float | None, sparsity: float, milliseconds: float | None = None) -> dict[str, Any]:
        return {"method": method, "psnr": psnr, "sparsity": sparsity, "attention_milliseconds": milliseconds}

    rows = [
        row("a", 30, 0.6, 100),
        row("a", 40, 0.2, 300),
        row("a", None, 0.0, 400),
        row("b", 36, 0.1),
        row("b", 31, 0.3),
        row("never", 45, 0.5),
        row("always", 20, 0.5),
    ]
    assert at_quality(rows, 35) == {"a": pytest.approx((0.4, 200)), "b": (pytest.approx(0.14), None)}
    assert at_quality(rows, 40)["a"] == pytest.approx((0.2, 300))
    moving = [row("a", 40, 0.2) | {"temporal_error": 0.1}, row("a", 30, 0.6) | {"temporal_error": 0.5}]
    assert at_quality(moving, 0.2, "temporal_error")["a"] == (pytest.approx(0.3), None)


def test_calibration_is_measured_on_held_out_videos(
    tmp_path: Path, model: VideoTransformer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.quality.video import calibrate

    save(model, tmp_path / "model.safetensors")
    common = ("--checkpoint", tmp_path / "model.safetensors", "--out", tmp_path)
    small = ("--videos", 1, "--steps", 4, "--size", 48)
    run(calibrate.main, monkeypatch, *common, *small, "--targets", "dropped=0.05", "sparsity=0.3")
    result = json.loads((tmp_path / "video_calibration.json").read_text())
    for row, target in zip(result["rows"], (0.05, 0.3), strict=True):
        assert row["target"] == target and row["thresholds"].keys() == {"blocks.0", "blocks.1"}
        assert row["reached"] == pytest.approx(target, rel=0.5)  # few blocks: costs move in steps
        assert 0 < row["held_out"] < 1 and 0 <= row["layers_within"] <= 1
    with pytest.raises(SystemExit):
        run(calibrate.main, monkeypatch, *common, "--targets", "speed=2")
    assert "--target: expected one of error=NUMBER" in capsys.readouterr().err


def test_a_trace_of_a_video(
    tmp_path: Path, model: VideoTransformer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.quality.video import trace
    from lite_attention import Report

    save(model, tmp_path / "model.safetensors")
    out = tmp_path / "video.trace"
    common = ("--checkpoint", tmp_path / "model.safetensors", "--steps", 6, "--size", 32, "--out", out)
    run(trace.main, monkeypatch, *common, "--rule", "mass", "--threshold", 0)
    report = Report.load(out)
    assert report.branches == list(BRANCHES) and report.layers == ["0", "1"]
    assert report.sparsity("conditional").shape == (6, 2) and report.mean_sparsity > 0.1
    assert {of.step for of in report.masks} == {2, 4}
    with pytest.raises(SystemExit):
        run(trace.main, monkeypatch, "--checkpoint", tmp_path / "no")
    assert "--checkpoint: expected a file, got" in capsys.readouterr().err


def test_errors_of_bends_are_those_of_the_rule() -> None:
    from benchmarks.quality.video.bend import squared_errors
    from lite_attention import reference

    query, key, value = (torch.randn(1, tokens, 1, 32, generator=random(tokens)) for tokens in (20, 300, 301))
    value, scale, threshold = value[:, :300], 0.3, -2.4  # below 1 / 5: each row keeps a block
    rows = query[0, :, 0] * (scale * reference.LOG2_E)
    bends = (0.0, reference.SUMMARY_BEND, math.inf)
    found, square = squared_errors(rows, key[0, :, 0], value[0, :, 0], threshold, bends)
    expected = torch.zeros(2)
    weights = torch.softmax(scale * query[0, :, 0] @ key[0, :, 0].T, 1)
    dense = weights @ value[0, :, 0]
    kept = torch.stack([part.sum(1).log2() > threshold for part in weights.split(64, 1)], 1)
    for row, of_row in enumerate(kept):
        for number, rule in enumerate(("mass", "mass_summaries")):
            mask = (of_row.int() << torch.arange(5)).sum().to(torch.int32).view(1, 1, 1, 1)
            state = (mask, torch.zeros(1, 1, 1), torch.zeros(1), None, None)
            out, _ = reference.forward(query[:, [row]], key, value, *state, scale, False, rule)
            expected[number] += (out[0, 0, 0] - dense[row]).square().sum()
    assert 0.2 < kept.float().mean() < 0.8
    torch.testing.assert_close(found[[0, 2]], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(square, dense.square().sum())

    # Blocks of keys that are all the same have no spread: any bend is exact where their values are the same as well.
    key, value = (tensor[:, :5].repeat_interleave(64, 1)[:, :300] for tensor in (key, value))
    exact, square = squared_errors(rows, key[0, :, 0], value[0, :, 0], threshold, bends)
    assert exact[0] > 1e-3 * square and exact[1:].max() < 1e-6 * square


def test_the_command_that_compares_bends(
    tmp_path: Path, model: VideoTransformer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.quality.video import bend

    save(model, tmp_path / "model.safetensors")
    common = ("--checkpoint", tmp_path / "model.safetensors", "--out", tmp_path)
    run(bend.main, monkeypatch, *common, "--thresholds", -1, 0, "--frames", 4, "--size", 32)
    rows = json.loads((tmp_path / "video_bend.json").read_text())["rows"]
    assert [row["threshold"] for row in rows] == [-1, 0]
    assert all(0 < row["bends"]["8"] < row["dropped"] for row in rows)
    assert "| -1 | " in capsys.readouterr().out


def test_tables_say_what_the_rows_do() -> None:
    from benchmarks.quality.video import tables

    def row(
        method: str, threshold: float | None, psnr: float | None, sparsity: float, milliseconds: float | None
    ) -> dict[str, Any]:
        return {
            "method": method,
            "threshold": threshold,
            "psnr": psnr,
            "ssim": 1 - sparsity,
            "temporal_error": 2 * sparsity,
            "sparsity": sparsity,
            "dropped": sparsity / 10,
            "attention_milliseconds": milliseconds,
        }

    def result(tokens: int, *rows: dict[str, Any]) -> dict[str, Any]:
        setup = {"tokens": tokens, "steps": 25, "videos": 2}
        return {"setup": setup, "machine": {"processor": "a machine"}, "rows": list(rows)}

    long = result(
        200,
        row("dense", None, None, 0.0, 100),
        row("product-dense", None, 60, 0.0, 80),
        row("product-mass", -8, 45, 0.2, 60),
        row("product-mass", -7, 35, 0.4, 50),
        row("product-mass", -6, 25, 0.6, 40),
        row("running-max-176", -4, 50, 0.1, None),
        row("running-max-176", -2, 30, 0.3, None),
    )
    short = result(100, row("product-mass", -7, 47, 0.2, 60), row("product-mass", -6, 37, 0.5, 50))
    lines = tables.video_quality(long).splitlines()
    assert "| `mass` | 30.0% | 1.50 x | 1.82 x, 1.45 x | 44.0% | 1.63 x | 2.08 x, 1.67 x |" in lines
    assert "| -7 | 35.0 dB, 40%, 2.00 x |" in tables.video_rules(long).splitlines()
    other_run = result(200, *long["rows"], row("product-mass", -5, 20, 0.7, 30) | {"dense_milliseconds": 90})
    assert "| -5 | 20.0 dB, 70%, 3.00 x |" in tables.video_rules(other_run).splitlines()
    untimed = result(200, *(line | {"attention_milliseconds": None} for line in long["rows"]))
    assert "| `mass` | 30.0% | 1.50 x | 44.0% | 1.63 x |" in tables.video_quality(untimed).splitlines()
    assert "| `mass` |  |  |  | 20.0%, 1.00 x |" in tables.video_measures(long).splitlines()
    published = "| `running_max`, blocks of 176 keys as published | 0.60 (30 dB) |  |"
    assert published in tables.video_tries(long, short).splitlines()
    same, relative, _ = tables.video_lengths(long, short).splitlines()[2:]
    assert same == "| `mass`, a share | -7, -6 | 2.00%, 5.00% | 4.00%, 6.00% | 2.00, 1.20 |"
    assert relative.endswith("| -7, -6 | 2.00%, 5.00% | 2.00%, 4.00% | 1.00, 0.80 |")


def test_no_method_is_begun_without_time(model: VideoTransformer) -> None:
    from benchmarks.quality.methods import choose_methods
    from benchmarks.quality.video.evaluate import Comparison, choose_videos, evaluate

    methods, videos = choose_methods(["product-dense", "product-mass:0"]), choose_videos("judge", 3, 4, 16)
    for minutes, known in ((1e-9, 1), (60, 3)):
        kept: list[list[int]] = []

        def keep(so_far: Sequence[Comparison], kept: list[list[int]] = kept) -> None:
            kept.append([len(comparison.runs) for comparison in so_far])

        evaluate(model, videos, methods, 1, 1.0, minutes, keep)
        assert kept == [[3] * number for number in range(1, known + 1)]


def test_videos_for_judging_are_others() -> None:
    from benchmarks.quality.video.evaluate import choose_videos

    judged, calibrated = (choose_videos(split, 3, 2, 8) for split in ("judge", "calibrate"))
    assert not any(torch.equal(left.noise, right.noise) for left in judged for right in calibrated)


def test_tiny_is_what_its_help_says() -> None:
    parameters = sum(parameter.numel() for parameter in VideoTransformer(TINY).parameters())
    assert round(parameters / 1e6, 1) == 0.8
