"""What was skipped: followed in a model, saved, and drawn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lite_attention import LiteAttention, Report, follow
from lite_attention.report import Mask, MaskOf
from lite_attention.state import SkipState

pytestmark = pytest.mark.usefixtures("one_thread")

pytest.importorskip("safetensors")


class Model(nn.Module):
    """Layers that look at near tokens, each four times as near as the one before."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LiteAttention(-2.0) for _ in range(layers))

    def forward(self, tokens: int = 500) -> list[float]:
        """A step; what each layer skipped in it."""
        place = torch.linspace(-1, 1, tokens)[None, :, None].expand(1, -1, 2)
        # The product is the squared distance, negative, but for what is the same for all keys.
        query = torch.stack((2 * place, torch.ones_like(place)), -1)
        key = torch.stack((place, -place.square()), -1)
        for layer, block in enumerate(self.blocks):
            block(query, key, key, 4.0 ** (layer + 1))
        return [block.sparsity for block in self.blocks]


def followed(steps: int = 4) -> tuple[Report, Tensor]:
    """A report of two branches with masks, and what the layers themselves said, (branches, steps, layers)."""
    models = {"conditional": Model(), "unconditional": Model()}
    with follow(models) as report:
        report.title = "a model"
        report.keep_masks([0, 2], ["blocks.0", "blocks.2"])
        said = [[model() for model in models.values()] for _ in range(steps)]
    return report, torch.tensor(said).transpose(0, 1)


def test_a_model_is_followed_and_then_left_alone() -> None:
    model = Model()
    with follow(model) as report:
        said = torch.tensor([model() for _ in range(3)])
        assert report.layers == ["blocks.0", "blocks.1", "blocks.2"] and report.branches == ["all"]
        torch.testing.assert_close(report.sparsity("all"), said)
        assert not said[0].any() and said[1:].all() and len(said[1].unique()) == 3
        report.clear()
        said = torch.tensor([model()])
        torch.testing.assert_close(report.sparsity("all"), said)
    model()
    torch.testing.assert_close(report.sparsity("all"), said)


def test_branches_have_models_of_their_own() -> None:
    report, said = followed()
    assert report.branches == ["conditional", "unconditional"] and len(report.layers) == 3
    for branch, of_branch in zip(report.branches, said, strict=True):
        torch.testing.assert_close(report.sparsity(branch), of_branch)
    assert report.mean_sparsity == pytest.approx(said.mean().item())


def test_dense_calls_are_steps_that_skip_nothing() -> None:
    model = Model(1)
    with follow(model) as report:
        for enable in (True, False, True):
            model.blocks[0].enable_skip_optimization(enable)
            model()
    sparsity = report.sparsity("all")[:, 0]
    assert sparsity[:2].tolist() == [0.0, 0.0] and sparsity[2] > 0


def test_masks_are_those_that_the_steps_leave() -> None:
    report, _ = followed()
    assert set(report.masks) == {MaskOf(layer, step) for layer in ("blocks.0", "blocks.2") for step in (0, 2)}
    for of, mask in report.masks.items():
        bits = mask.bits()
        assert bits.shape == (2, 4, 8)  # 500 tokens: tiles of 128, blocks of 64
        visited_next = 1 - report.sparsity("conditional")[of.step + 1, report.layers.index(of.layer)]
        assert bits.float().mean().item() == pytest.approx(float(visited_next))
    report.clear()
    assert not report.masks


def test_masks_of_a_few_layers_where_none_are_named() -> None:
    def layers(count: int) -> set[str]:
        report = Report(str(number) for number in range(count))
        report.keep_masks([0])
        for layer in report.layers:
            report.add(layer, "all", 0, 0.0, SkipState(1, 1, 10, 10))
        return {of.layer for of in report.masks}

    assert layers(2) == {"0", "1"} and layers(4) == {"0", "1", "2", "3"}
    assert layers(30) == {"0", "10", "19", "29"}


@pytest.mark.parametrize(
    ("steps", "layers", "message"),
    [
        ([1, -1], None, "steps: expected numbers from 0, got -1"),
        ([1], ["a", "c"], "layers: expected some of a, b, got 'c'"),
    ],
)
def test_masks_that_cannot_be(steps: list[int], layers: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Report("ab").keep_masks(steps, layers)


def test_a_model_without_our_attention_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="model: expected a LiteAttention in it, got Linear without one"),
        follow(nn.Linear(1, 1)),
    ):
        pass


def test_a_trace_keeps_everything(tmp_path: Path) -> None:
    report, _ = followed()
    report.add("blocks.1", "unconditional", 5, 0.25)  # the others did not run, and step 4 did not either
    report.reasons |= {"a reason", "another"}
    report.save(tmp_path / "run.trace")
    loaded = Report.load(tmp_path / "run.trace")
    assert (loaded.title, loaded.layers, loaded.reasons) == (report.title, report.layers, report.reasons)
    assert loaded.branches == report.branches and repr(loaded) == repr(report)
    for branch in report.branches:
        torch.testing.assert_close(loaded.sparsity(branch), report.sparsity(branch), equal_nan=True, rtol=0, atol=0)
    assert list(loaded.masks) == list(report.masks)
    for of, mask in report.masks.items():
        assert torch.equal(loaded.masks[of].words, mask.words) and loaded.masks[of].blocks == mask.blocks
    Report().save(tmp_path / "empty.trace")
    assert Report.load(tmp_path / "empty.trace").branches == []


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "run.trace"
    report, _ = followed()
    report.save(path)
    whole, tensors = path.read_bytes(), load_file(path)

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=f"trace .*run.trace: {message}"):
            Report.load(path)

    for text in (b"", b"not a trace", whole[:40], whole[:-1]):
        path.write_bytes(text)
        refused("expected a file that Report.save wrote, got")
    path.write_bytes(whole.replace(b'\\"format\\":1', b'\\"format\\":2'))
    refused("expected a file that Report.save wrote, format: ")
    path.write_bytes(whole.replace(b'\\"branches\\":[\\"c', b'\\"branches\\":[ \\"'))  # one letter less in a name
    assert Report.load(path).branches[0] == "onditional"
    save_file(tensors, path)
    refused("expected a file that Report.save wrote, header: ")
    report.masks[MaskOf("blocks.0", 0)] = Mask(torch.zeros(2, 4, 1, dtype=torch.int32), 33)
    report.save(path)
    refused("mask 0: expected 3 dimensions of torch.int32, the last one 2, got .* the last one 1")
    with pytest.raises(OSError, match="none.trace"):
        Report.load(tmp_path / "none.trace")


def test_the_picture_shows_what_was_skipped(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report, said = followed()
    report.add("blocks.1", "unconditional", 5, 0.25)
    figure = report.plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    by_title = {axes.get_title(): axes for axes in figure.axes}
    for branch in report.branches:
        sparsity = report.sparsity(branch)
        (axes,) = (axes for title, axes in by_title.items() if title.startswith(f"branch {branch}: "))
        assert f"{float(sparsity.nanmean()):.1%} skipped" in axes.get_title()
        drawn = torch.as_tensor(axes.images[0].get_array().filled(math.nan))
        torch.testing.assert_close(drawn, sparsity.T, equal_nan=True, check_dtype=False)
    lines = [axes.lines[0] for axes in figure.axes if axes.lines]
    assert [line.get_xdata().tolist() for line in lines] == [[0, 1, 2, 3], [0, 1, 2, 3, 5]]
    assert lines[0].get_ydata().tolist() == pytest.approx(said[0].mean(1).tolist())
    skipped = float(said[0, 3, 2])
    mask = by_title[f"layer 2 after step 2: {skipped:.0%} skipped"].images[0].get_array()
    assert mask.shape == (4, 8) and mask.mean() == pytest.approx(1 - skipped)
    assert "a model" in figure.subfigs[0].get_suptitle() and "grey" in figure.subfigs[0].get_suptitle()


def test_the_picture_without_masks_and_that_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = Report(["only"])
    with pytest.raises(ValueError, match="report: expected one of a generation, got one in which nothing ran"):
        report.plot()
    report.add("only", "all", 0, 0.0)
    figure = report.plot()
    assert not figure.subfigs and "grey" not in figure.get_suptitle()
    with pytest.raises(ValueError, match="not supported"):
        report.plot(tmp_path / "picture.docx")
