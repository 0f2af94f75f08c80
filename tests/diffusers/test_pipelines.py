"""LiteAttention in diffusers: real pipelines and transformers with random weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lite_attention import LiteAttention

diffusers = pytest.importorskip("diffusers")

from lite_attention.backend.diffusers import Report, disable, enable, skipping  # noqa: E402
from tests.diffusers.conftest import STEPS, TEXT, make_pipeline, sharpen  # noqa: E402

Generate = Callable[..., Tensor]

ROUNDING = 1e-4
"""How far PyTorch's attention and ours may be apart in latents of about 1, float32, after a whole generation."""


def test_dense_equals_stock_and_disable_restores_it_bit_for_bit(pipeline: Any, generate: Generate) -> None:
    stock = generate(pipeline)
    report = enable(pipeline, threshold=-math.inf)
    torch.testing.assert_close(generate(pipeline), stock, rtol=0, atol=ROUNDING)
    assert report.mean_sparsity == 0 and not report.reasons
    disable(pipeline)
    assert torch.equal(generate(pipeline), stock)
    disable(pipeline)


@pytest.mark.parametrize("rule", ["running_max", "mass", "mass_summaries"])
def test_skipping_equals_a_state_for_each_layer_and_branch(
    rule: str, pipeline: Any, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The oracle knows the order of calls: prompt and negative prompt take turns, two layers each.
    from diffusers.models.transformers import transformer_wan

    stock = transformer_wan.dispatch_attention_fn
    calls: list[int] = []
    states: dict[tuple[int, int], LiteAttention] = {}

    def oracle(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if key.shape[1] == TEXT:
            return stock(query, key, value, **options)
        place = len(calls) % 4
        calls.append(place)
        switched = len(calls) > 4 * steps_of_first
        state = states.setdefault((int(switched), place), LiteAttention(-1.0, rule=rule))  # type: ignore[arg-type]
        return state(query, key, value)  # type: ignore[no-any-return]

    report = enable(pipeline, threshold=-1.0, rule=rule)  # type: ignore[arg-type]
    got = generate(pipeline)
    steps_of_first = int((~report.sparsity("cond")[:, :2].isnan().any(1)).sum())
    assert report.branches == ["cond", "uncond"]
    assert report.mean_sparsity > 0.05
    disable(pipeline)
    with monkeypatch.context() as patch:
        patch.setattr(transformer_wan, "dispatch_attention_fn", oracle)
        want = generate(pipeline)
    assert torch.equal(got, want)


def test_generations_do_not_touch_each_other(pipeline: Any, generate: Generate) -> None:
    report = enable(pipeline, threshold=-1.0)
    first, second = generate(pipeline, seed=1), generate(pipeline, seed=2)
    sparsity = report.sparsity("cond")
    assert torch.equal(generate(pipeline, seed=1), first)
    disable(pipeline)
    report = enable(pipeline, threshold=-1.0)
    assert torch.equal(generate(pipeline, seed=2), second)
    assert torch.equal(report.sparsity("cond").nan_to_num(), sparsity.nan_to_num())


def test_a_generation_that_was_broken_off_leaves_nothing(pipeline: Any, generate: Generate) -> None:
    class BrokenOffError(Exception):
        pass

    def breaks(pipeline: Any, step: int, timestep: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise BrokenOffError
        return inputs

    enable(pipeline, threshold=-1.0)
    want = generate(pipeline, seed=1)
    with pytest.raises(BrokenOffError):
        generate(pipeline, seed=2, callback_on_step_end=breaks)
    assert torch.equal(generate(pipeline, seed=1), want)


def test_state_is_dropped_at_the_end(pipeline: Any, generate: Generate) -> None:
    enable(pipeline, threshold=-1.0)
    generate(pipeline)
    session = pipeline._lite_attention_session
    layers = [layer for transformer in session.transformers for layer in transformer.layers.values()]
    assert layers and not any(layer.attentions for layer in layers)


def test_guidance_off_has_one_branch(pipeline: Any, generate: Generate) -> None:
    with skipping(pipeline, threshold=-1.0) as report:
        generate(pipeline, guidance_scale=1.0)
    assert report.branches == ["cond"]
    assert report.mean_sparsity > 0.05


def test_warmup_and_cooldown_steps_are_dense(generate: Generate, pipeline: Any) -> None:
    stock = generate(pipeline)
    report = enable(pipeline, threshold=-1.0, warmup_steps=2, cooldown_steps=1)
    generate(pipeline)
    sparsity = report.sparsity("cond").nan_to_num().amax(1)
    # The last dense steps decide what the first step after them skips.
    assert not sparsity[:2].any() and sparsity[2:5].all() and not sparsity[5:].any()
    enable(pipeline, threshold=-1.0, warmup_steps=STEPS)
    assert torch.equal(generate(pipeline), stock)


def test_thresholds_by_step_count_the_steps_of_the_generation(generate: Generate, pipeline: Any) -> None:
    stock = generate(pipeline)
    report = enable(pipeline, threshold={2: -100.0, 4: -1.0, 5: -math.inf}, warmup_steps=1)
    generate(pipeline)
    sparsity = report.sparsity("cond").nan_to_num().amax(1)
    assert not sparsity[:5].any()  # -100 skips nothing, and the step at -1 is the first that clears
    report = enable(pipeline, threshold={3: -1.0})
    generate(pipeline)
    sparsity = report.sparsity("cond").nan_to_num().amax(1)
    assert not sparsity[:3].any() and sparsity[3:].all()
    enable(pipeline, threshold={STEPS: -1.0})
    torch.testing.assert_close(generate(pipeline), stock, rtol=0, atol=ROUNDING)


def test_a_threshold_that_rises_equals_thresholds_by_step(generate: Generate, pipeline: Any) -> None:
    def run(**options: Any) -> tuple[Tensor, Tensor]:
        report = enable(pipeline, **options)
        return generate(pipeline), report.sparsity("cond").nan_to_num().sum(1)

    flat, of_flat = run(threshold=-3.0)
    same, _ = run(threshold=-3.0, threshold_rise=0)
    assert torch.equal(same, flat)
    rising, of_rising = run(threshold=-3.0, threshold_rise=2.5)
    by_step, of_step = run(threshold={step: -3.0 + 0.5 * step for step in range(STEPS)})
    assert torch.equal(rising, by_step) and torch.equal(of_rising, of_step)
    assert of_rising[-1] > of_flat[-1]
    # Never above 0, where it would be as if negative.
    high, _ = run(threshold=-3.0, threshold_rise=5.0, warmup_steps=2)
    clamped, _ = run(threshold={0: -3.0, 1: -2.0, 2: -1.0, 3: 0.0}, warmup_steps=2)
    assert torch.equal(high, clamped)
    one, _ = run(threshold=[-3.0], threshold_rise=2.5)
    assert torch.equal(one, rising)


@pytest.mark.parametrize("rule", ["mass", "mass_summaries"])
def test_relative_thresholds_count_from_the_number_of_blocks(generate: Generate, pipeline: Any, rule: str) -> None:
    def run(**options: Any) -> Tensor:
        report = enable(pipeline, rule=rule, **options)
        output = generate(pipeline)
        skipped.append(report.mean_sparsity)
        return output

    skipped: list[float] = []
    uniform = -math.log2(6)  # blocks of this video
    assert torch.equal(run(threshold=-0.5, relative=True), run(threshold=-0.5 + uniform))
    assert torch.equal(run(relative=True), run(threshold=-1 + uniform))
    # A rise is added first: it goes past 1 / blocks, and reaches 1 in the last step.
    risen = [min(-1 + 4 * (step / (STEPS - 1)) + uniform, 0.0) for step in range(STEPS)]
    assert risen[-1] == 0 > risen[-2] > uniform
    rising = run(threshold=-1, threshold_rise=4, relative=True)
    assert torch.equal(rising, run(threshold=dict(enumerate(risen))))
    rows = run(threshold=[-1], threshold_rise=4, relative=True)
    assert torch.equal(rows, rising)
    assert skipped[0] == skipped[1] > 0 and skipped[4] == skipped[5] > skipped[2]


def test_layers_and_heads_can_be_left_dense(generate: Generate, pipeline: Any) -> None:
    stock = generate(pipeline)
    report = enable(pipeline, threshold=-1.0)
    generate(pipeline)
    everywhere = report.mean_sparsity
    report = enable(pipeline, threshold=-1.0, dense_layers=[report.layers[-1]])
    generate(pipeline)
    skipped = report.sparsity("cond").nan_to_num().amax(0) > 0
    assert skipped.any() and not skipped[-1]
    report = enable(pipeline, threshold=-1.0, dense_layers=["*:0"])
    generate(pipeline)
    assert 0 < report.mean_sparsity < everywhere
    enable(pipeline, threshold=-1.0, dense_layers=["*"])
    assert torch.equal(generate(pipeline), stock)


def test_a_scheduler_that_was_replaced_is_followed(pipeline: Any, generate: Generate) -> None:
    enable(pipeline, threshold=-1.0)
    before = pipeline.scheduler
    pipeline.scheduler = type(before).from_config(before.config)
    first = generate(pipeline, seed=1)
    generate(pipeline, seed=2)
    assert torch.equal(generate(pipeline, seed=1), first)
    disable(pipeline)
    assert "set_timesteps" not in vars(before) and "set_timesteps" not in vars(pipeline.scheduler)


def test_rows_of_a_batch_may_have_thresholds_of_their_own(pipeline: Any) -> None:
    noise = torch.Generator().manual_seed(0)
    prompts, negatives = torch.randn(2, 2, TEXT, 32, generator=noise).unbind(0)
    latents = torch.randn(2, 16, 3, 32, 16, generator=noise)

    def run(rows: slice, threshold: Any) -> Tensor:
        with skipping(pipeline, threshold=threshold):
            return pipeline(  # type: ignore[no-any-return]
                prompt_embeds=prompts[rows],
                negative_prompt_embeds=negatives[rows],
                latents=latents[rows],
                height=256,
                width=128,
                num_frames=9,
                guidance_scale=3.0,
                num_inference_steps=STEPS,
                output_type="latent",
            ).frames

    together = run(slice(0, 2), [-1.0, -math.inf])
    torch.testing.assert_close(together[:1], run(slice(0, 1), -1.0), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(together[1:], run(slice(1, 2), -math.inf), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("offload_first", [True, False])
def test_cpu_offload_and_skipping_leave_each_other_alone(generate: Generate, offload_first: bool) -> None:
    pytest.importorskip("accelerate")

    def run(pipeline: Any) -> tuple[list[Tensor], Tensor]:
        videos = [generate(pipeline, seed=seed) for seed in (1, 2)]  # offload is put on anew after each generation
        return videos, pipeline._lite_attention_session.report.sparsity("cond")

    pipeline = make_pipeline(1)
    stock = generate(pipeline)
    enable(pipeline, threshold=-1.0)
    want, share = run(pipeline)
    disable(pipeline)
    if offload_first:
        pipeline.enable_model_cpu_offload(device="cpu")
    enable(pipeline, threshold=-1.0)
    if not offload_first:
        pipeline.enable_model_cpu_offload(device="cpu")
    got, again = run(pipeline)
    assert all(map(torch.equal, got, want))
    assert torch.equal(again, share)
    disable(pipeline)
    assert torch.equal(generate(pipeline), stock)
    assert hasattr(pipeline.transformer, "_hf_hook")


@pytest.mark.filterwarnings("ignore")
def test_compiled_transformers_skip_alike(pipeline: Any, generate: Generate) -> None:
    enable(pipeline, threshold=-1.0)
    want = generate(pipeline)
    disable(pipeline)
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    stock = generate(pipeline)
    report = enable(pipeline, threshold=-1.0)
    torch.testing.assert_close(generate(pipeline), want, rtol=0, atol=ROUNDING)
    assert report.mean_sparsity > 0.05
    disable(pipeline)
    assert torch.equal(generate(pipeline), stock)


def test_the_report_has_masks_and_can_be_kept(pipeline: Any, generate: Generate, tmp_path: Path) -> None:
    report = enable(pipeline, threshold=-1.0)
    assert "0 steps" in repr(report)
    first, *_, last = report.layers
    report.keep_masks([STEPS - 2], [first, last])
    generate(pipeline, seed=1)
    generate(pipeline)
    ran = {layer for layer, share in zip(report.layers, report.sparsity("cond")[-1], strict=True) if not share.isnan()}
    assert {of.layer for of in report.masks} == ran & {first, last}
    for of, mask in report.masks.items():
        skipped = float(report.sparsity("cond")[of.step + 1, report.layers.index(of.layer)])
        assert mask.bits().float().mean().item() == pytest.approx(1 - skipped) and skipped > 0
    report.save(tmp_path / "wan.trace")
    kept = Report.load(tmp_path / "wan.trace")
    assert kept.title == "WanPipeline" and repr(kept) == repr(report) and list(kept.masks) == list(report.masks)


def test_options_are_checked_and_leave_the_pipeline_alone(pipeline: Any, generate: Generate) -> None:
    stock = generate(pipeline)
    for error, message, options in (
        (ValueError, "threshold", {"threshold": math.nan}),
        (TypeError, "threshold", {"threshold": "hot"}),
        (ValueError, "rule", {"rule": "best"}),
        (ValueError, "relative: expected False with the rule 'running_max'", {"relative": True}),
        (TypeError, "relative: expected a bool, got int 1", {"rule": "mass", "relative": 1}),
        (ValueError, "warmup_steps: expected 0 or more", {"warmup_steps": -1}),
        (TypeError, "cooldown_steps: expected an int", {"cooldown_steps": 1.5}),
        (TypeError, "threshold_rise: expected a number, got str", {"threshold_rise": "4"}),
        (ValueError, "threshold_rise: expected a number from 0 to 16, got -1", {"threshold_rise": -1}),
        (ValueError, "threshold_rise: expected a number from 0 to 16, got nan", {"threshold_rise": math.nan}),
        (ValueError, "threshold_rise: expected 0 beside .* by step", {"threshold": {0: -8}, "threshold_rise": 4}),
        (ValueError, "dense_layers: expected patterns that fit layers .*'blocks.99'", {"dense_layers": ["blocks.99"]}),
        (ValueError, "dense_layers: expected numbers of heads", {"dense_layers": ["*:a"]}),
        (TypeError, "dense_layers: expected a list of patterns", {"dense_layers": "*"}),
    ):
        with pytest.raises(error, match=message):
            enable(pipeline, **options)
    assert torch.equal(generate(pipeline), stock)


class Tiny(diffusers.DiffusionPipeline):  # type: ignore[misc]
    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)


def test_a_pipeline_without_a_known_transformer_is_refused() -> None:
    pipeline = Tiny(torch.nn.Linear(1, 1), diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="pipeline: expected one with a transformer of CogVideoX.*, got Tiny"):
        enable(pipeline)


def test_a_transformer_belongs_to_one_pipeline(pipeline: Any, generate: Generate) -> None:
    other = type(pipeline)(**{**pipeline.components, "scheduler": diffusers.UniPCMultistepScheduler()})
    enable(pipeline, threshold=-1.0)
    with pytest.raises(ValueError, match="got one that is enabled in another pipeline"):
        enable(other)
    want = generate(pipeline)
    disable(other)
    assert torch.equal(generate(pipeline), want)


def test_pipelines_in_threads_do_not_meet(generate: Generate) -> None:
    pipelines = [make_pipeline(1), make_pipeline(1)]
    for pipeline, threshold in zip(pipelines, (-1.0, -0.5), strict=True):
        enable(pipeline, threshold=threshold)
    alone = [generate(pipeline) for pipeline in pipelines]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(generate, pipelines))
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got, want)


def flux() -> tuple[Any, tuple[int, ...], Callable[..., dict[str, Any]]]:
    made = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    grid = torch.meshgrid(torch.arange(1.0), torch.arange(24.0), torch.arange(16.0), indexing="ij")
    places = torch.stack(grid, -1).view(-1, 3)
    text_places = torch.zeros(TEXT, 3)
    return (
        made,
        (1, 384, 4),
        lambda text: {
            "pooled_projections": text.mean(1),
            "img_ids": places,
            "txt_ids": text_places,
        },
    )


def qwen_image() -> tuple[Any, tuple[int, ...], Callable[..., dict[str, Any]]]:
    made = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    return (
        made,
        (1, 384, 16),
        lambda text: {
            "encoder_hidden_states_mask": torch.ones(text.shape[:2], dtype=torch.bool),
            "img_shapes": [[(1, 24, 16)]],
        },
    )


def cogvideox() -> tuple[Any, tuple[int, ...], Callable[..., dict[str, Any]]]:
    made = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=16,
        sample_height=32,
        sample_frames=9,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    angles = torch.outer(torch.arange(384.0), 1.0 / 100 ** torch.linspace(0, 1, 8)).repeat_interleave(2, 1)
    rotary = (angles.cos(), angles.sin())
    return made, (1, 3, 4, 32, 16), lambda text: {"image_rotary_emb": rotary}


def ltx() -> tuple[Any, tuple[int, ...], Callable[..., dict[str, Any]]]:
    made = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    return (
        made,
        (1, 384, 8),
        lambda text: {
            "encoder_attention_mask": torch.ones(text.shape[:2], dtype=torch.bool),
            "num_frames": 3,
            "height": 16,
            "width": 8,
        },
    )


def hunyuan_video() -> tuple[Any, tuple[int, ...], Callable[..., dict[str, Any]]]:
    made = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
    )
    mask = torch.tensor([[1] * (TEXT - 2) + [0, 0]])
    return (
        made,
        (1, 4, 3, 16, 8),
        lambda text: {
            "encoder_attention_mask": mask,
            "pooled_projections": text.mean(1),
            "guidance": torch.tensor([1000.0]),
        },
    )


def wan_vace() -> tuple[Any, tuple[int, ...], Callable[..., dict[str, Any]]]:
    made = diffusers.WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=1,
        rope_max_seq_len=32,
        vace_layers=[0],
        vace_in_channels=16,
    )
    control = torch.randn(1, 16, 3, 32, 16)
    return made, (1, 16, 3, 32, 16), lambda text: {"control_hidden_states": control}


@pytest.mark.parametrize("make", [cogvideox, flux, qwen_image, ltx, hunyuan_video, wan_vace])
def test_other_transformers(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    transformer, shape, arguments = make()
    sharpen(transformer)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = Tiny(transformer, scheduler)
    first_text = {"start": 0, "end": 384, "none": None}
    masks: list[Tensor] = []

    @torch.no_grad()
    def run() -> Tensor:
        generator = torch.Generator().manual_seed(1)
        sample, text = torch.randn(shape, generator=generator), torch.randn(1, TEXT, 32, generator=generator)
        scheduler.set_timesteps(4)
        for timestep in scheduler.timesteps:
            with transformer.cache_context("cond"):
                out = transformer(
                    hidden_states=sample,
                    encoder_hidden_states=text,
                    timestep=timestep.expand(1),
                    return_dict=False,
                    **arguments(text),
                )[0]
            sample = sample + 0.1 * out if out.shape == sample.shape else sample
        session = getattr(pipeline, "_lite_attention_session", None)
        if session is not None:
            (hook,) = session.transformers
            for layer in hook.layers.values():
                for attention, _ in layer.attentions.values():
                    if attention.skip_state is not None:
                        masks.append(attention.skip_state.mask.clone())
            place = first_text[hook.family.text]
            for mask in masks:
                if place is not None:  # the prompt's block is visited by every tile
                    assert bool((mask[..., place // 64 // 32] >> (place // 64 % 32) & 1).all())
        return out  # type: ignore[no-any-return]

    stock = run()
    report = enable(pipeline, threshold=-math.inf)
    torch.testing.assert_close(run(), stock, rtol=0, atol=ROUNDING)
    report = enable(pipeline, threshold=-1.0)
    run()
    assert report.mean_sparsity > 0.01 and not report.reasons
    assert len(masks) == len(report.layers) == 2
    disable(pipeline)
    assert torch.equal(run(), stock)


def test_without_a_branch_attention_is_dense_and_says_so() -> None:
    torch.manual_seed(0)
    transformer, shape, arguments = ltx()
    pipeline = Tiny(sharpen(transformer), diffusers.FlowMatchEulerDiscreteScheduler())
    text = torch.randn(1, TEXT, 32)
    inputs = {"hidden_states": torch.randn(shape), "encoder_hidden_states": text, "timestep": torch.tensor([500])}
    with torch.no_grad():
        stock = transformer(**inputs, **arguments(text), return_dict=False)[0]
        report = enable(pipeline, threshold=-1.0)
        pipeline.scheduler.set_timesteps(4)
        out = transformer(**inputs, **arguments(text), return_dict=False)[0]
    assert torch.equal(out, stock)
    assert report.reasons == {"the pipeline does not say which guidance branch it computes"}
    assert "guidance branch" in repr(report)


def test_old_state_is_not_used() -> None:
    # A caching library may skip a layer for some steps.
    torch.manual_seed(0)
    transformer, shape, arguments = ltx()
    pipeline = Tiny(sharpen(transformer), diffusers.FlowMatchEulerDiscreteScheduler())
    report = enable(pipeline, threshold=-1.0)
    pipeline.scheduler.set_timesteps(20)
    text = torch.randn(1, TEXT, 32)
    (hook,) = pipeline._lite_attention_session.transformers
    for gap in (1, 1, 5, 1):
        hook.session.steps["cond"] += gap - 1
        with torch.no_grad(), transformer.cache_context("cond"):
            transformer(
                hidden_states=torch.randn(shape),
                encoder_hidden_states=text,
                timestep=torch.tensor([500]),
                **arguments(text),
            )
    sparsity = report.sparsity("cond")
    assert isinstance(report, Report)
    assert sparsity[1].any() and not sparsity[6].any() and sparsity[7].any()
    assert sparsity[2:6].isnan().all()
