"""How long a denoising step of a Wan transformer takes in vLLM-Omni: stock attention, LITE_ATTN off, and skipping.

vLLM-Omni's own transformer in the shape of Wan2.1-14B with random weights, batch 1, no guidance, without the rest of
the pipeline. So that a share means the same in every run, which blocks are skipped is forced: bits are drawn at random
and the threshold clears none. All runs share the weights; stock attention is what LITE_ATTN hands over to.

A run without self-attention says which share of a step it takes, and so what a faster attention can bring (Amdahl):
with the speed-up of the kernel alone, and if what is skipped cost nothing.

    python -m benchmarks.wan_step_time    # 480p and 720p, 81 frames: about 3 minutes on an H100, 45 GB
    python -m benchmarks.wan_step_time --sizes 832x480x81 --compile    # blocks compiled, as the engine does by default
    python -m benchmarks.wan_step_time --layers 2 --heads 2 --sizes 256x128x9 --seconds 5    # whether it works
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.forward_time import Workload, random_mask, tracking_call
from benchmarks.results import DIRECTORY, write_result
from lite_attention.ranges import unpack_bits
from lite_attention.tiles import BLOCK_K, ceil_div

DTYPE = torch.bfloat16
HEAD_DIM = 128
FFN_RATIO = 13824 / 5120
TEXT = (512, 4096)
"""Tokens of the prompt and the width of their embedding."""
NEVER = -1000.0
"""A threshold that clears no block."""

Step = Callable[[], object]


class Size(NamedTuple):
    """Of a video, in pixels and frames."""

    width: int
    height: int
    frames: int

    @classmethod
    def parse(cls, text: str) -> Self:
        try:
            width, height, frames = (int(number) for number in text.split("x"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHTxFRAMES, such as 832x480x81, got {text}") from None
        return cls(width, height, frames)

    @property
    def latents(self) -> tuple[int, int, int]:
        """Frames, height and width of what is denoised."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def tokens(self) -> int:
        frames, height, width = self.latents
        return frames * (height // 2) * (width // 2)


class _Nothing:
    """In place of self-attention."""

    def forward(self, query: Tensor, *_others: object) -> Tensor:
        return query.contiguous()


class Model:
    """A Wan transformer as a worker of vLLM-Omni makes it.

    Attributes:
        device: of the worker.
        pipeline: what LITE_ATTN takes for the runner's.
        layers: the self-attentions of the blocks.
        ours: LITE_ATTN's implementation of each.
    """

    def __init__(self, layers: int, heads: int, compiled: bool) -> None:
        from vllm_omni.diffusion.compile import regionally_compile
        from vllm_omni.diffusion.config import set_current_diffusion_config
        from vllm_omni.diffusion.data import OmniDiffusionConfig
        from vllm_omni.diffusion.worker.diffusion_worker import DiffusionWorker
        from vllm_omni.plugins import load_omni_general_plugins

        load_omni_general_plugins()
        attention = {"per_role": {"self": {"backend": "LITE_ATTN"}}}
        self.config = OmniDiffusionConfig(
            model_class_name="WanPipeline", dtype=DTYPE, num_gpus=1, diffusion_attention_config=attention
        )
        self.worker = DiffusionWorker(local_rank=0, rank=0, od_config=self.config, skip_load_model=True)
        self.device: torch.device = self.worker.device
        from vllm_omni.diffusion.models.wan2_2.wan2_2_transformer import WanTransformer3DModel

        width = heads * HEAD_DIM
        torch.set_default_dtype(DTYPE)
        with self.context(), set_current_diffusion_config(self.config), self.device:
            transformer = WanTransformer3DModel(
                num_attention_heads=heads, ffn_dim=round(width * FFN_RATIO), num_layers=layers
            ).eval()
        torch.set_default_dtype(torch.float32)
        with torch.no_grad():
            for name, parameter in transformer.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.02)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        for module in transformer.modules():
            if hasattr(module, "quant_method"):
                module.quant_method.process_weights_after_loading(module)
        self.pipeline = nn.ModuleDict({"transformer": transformer})
        self.layers = [block.attn1.attn for block in transformer.blocks]
        self.ours = [layer.attention for layer in self.layers]
        if compiled:
            regionally_compile(transformer, dynamic=True)

    @contextmanager
    def context(self) -> Iterator[None]:
        """In which vLLM-Omni runs a model."""
        from vllm_omni.diffusion.forward_context import set_forward_context

        with set_forward_context(vllm_config=self.worker.vllm_config, omni_diffusion_config=self.config):
            yield

    def attend_with(self, implementations: list[Any]) -> None:
        """Who computes the self-attentions from now on, by layer."""
        for layer, implementation in zip(self.layers, implementations, strict=True):
            layer.attention = implementation

    def step(self, size: Size) -> Step:
        """A denoising step of a video: a call of the transformer."""
        random = torch.Generator(self.device).manual_seed(0)
        sample, text = (
            torch.randn(shape, dtype=DTYPE, device=self.device, generator=random)
            for shape in ((1, 16, *size.latents), (1, *TEXT))
        )
        timestep = torch.tensor([500.0], device=self.device)
        transformer = self.pipeline["transformer"]
        return lambda: transformer(hidden_states=sample, timestep=timestep, encoder_hidden_states=text)


def timed(call: Step, device: torch.device) -> float:
    """Milliseconds that a call takes."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(model: Model, size: Size, masks: dict[float, Tensor], seconds: float, warm: bool) -> dict[str, list[float]]:
    """Milliseconds of a step in each round, by run: the share that is skipped, or the name of what attends.

    Args:
        masks: by the share of blocks that they skip.
        seconds: no round begins after so many.
        warm: whether a round that does not count comes first.
    """
    from lite_attention.backend.omni.execution import Request, executing
    from lite_attention.backend.omni.pool import StatePool
    from lite_attention.serving.params import DenoiseOptions

    step = model.step(size)
    options = DenoiseOptions(threshold=NEVER, enable=True, refresh_interval=0, warmup_steps=0, cooldown_steps=0)
    skipping = Request("skipping", options, 1)
    off = Request("off", options.model_copy(update={"enable": False}), 1)
    pool = StatePool()

    def run_off() -> None:
        with executing(model.pipeline, [off], pool):
            step()

    runs: dict[str, tuple[list[Any], Step, Tensor | None]] = {
        "none": ([_Nothing() for _ in model.ours], step, None),
        "stock": ([impl.stock for impl in model.ours], step, None),
        "off": (model.ours, run_off, None),
        **{f"{share:g}": (model.ours, step, mask) for share, mask in masks.items()},
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    with model.context(), executing(model.pipeline, [skipping], pool):
        model.attend_with(model.ours)
        step()
        states = [attention.skip_state for attention, _ in skipping.states.values()]
        assert len(states) == len(model.ours) and all(states), "LITE_ATTN does not skip in every layer"
        end = time.monotonic() + seconds
        while warm or not times["off"] or time.monotonic() < end:
            for name, (implementations, call, mask) in runs.items():
                model.attend_with(implementations)
                forced = states if mask is not None else []
                for state in forced:
                    state.mask.copy_(mask)
                taken = timed(call, model.device)
                assert all(torch.equal(state.mask, mask) for state in forced), "a block was cleared"
                tqdm.write(f"{size.tokens} tokens, {name}: {taken:.1f} ms")
                if not warm:
                    times[name].append(taken)
            warm = False
    return times


def kernel_speedups(model: Model, workload: Workload, masks: dict[float, Tensor]) -> dict[float, float]:
    """How many times faster the kernel alone is than stock attention, by the share that is skipped."""
    shape = (1, workload.tokens, workload.heads, HEAD_DIM)
    query, key, value = (torch.randn(shape, dtype=DTYPE, device=model.device) for _ in range(3))
    stock: Step = lambda: model.ours[0].stock.forward(query, key, value, None)  # noqa: E731
    ours = [tracking_call((query, key, value), mask.clone(), "running_max") for mask in masks.values()]
    with model.context():
        rounds = [[timed(call, model.device) for call in (stock, *ours)] for _ in range(4)][1:]
    dense, *skipping = (statistics.median(of) for of in zip(*rounds, strict=True))
    return {share: dense / taken for share, taken in zip(masks, skipping, strict=True)}


@torch.inference_mode()
def rows_of(model: Model, size: Size, workload: Workload, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one size of video."""
    masks = {share: random_mask(workload, share, 1, device=model.device) for share in args.shares}
    times = measure(model, size, masks, args.seconds, args.compile)
    speedups = kernel_speedups(model, workload, masks)
    attention = 1 - statistics.median(a / b for a, b in zip(times["none"], times["stock"], strict=True))
    rows = [
        {
            "size": "x".join(map(str, size)),
            "tokens": size.tokens,
            "attention": attention,
            "run": name,
            "rounds": len(of),
            "milliseconds": statistics.median(of),
            "speedup": statistics.median(a / b for a, b in zip(times["stock"], of, strict=True)),
        }
        for name, of in times.items()
    ]
    for row, (share, mask) in zip(rows[-len(masks) :], masks.items(), strict=True):
        skipped = 1 - unpack_bits(mask, ceil_div(size.tokens, BLOCK_K)).double().mean().item()
        row |= {"skipped": skipped, "kernel_speedup": speedups[share]}
        row |= {"ceiling": amdahl(attention, speedups[share]), "ideal": amdahl(attention, 1 / (1 - skipped))}
    return rows


def amdahl(share: float, speedup: float) -> float:
    """How many times faster the whole is, if this share of its time is so many times faster."""
    return 1 / (1 - share * (1 - 1 / speedup))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [Size(832, 480, 81), Size(1280, 720, 81)]
    parser.add_argument("--sizes", type=Size.parse, nargs="+", default=sizes, metavar="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.7], help="of the blocks skipped")
    parser.add_argument("--seconds", type=float, default=50, help="no round of a size begins after so many")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="folder for the results")
    args = parser.parse_args()

    model = Model(args.layers, args.heads, args.compile)
    setup: dict[str, Any] = {
        "layers": args.layers,
        "heads": args.heads,
        "compiled": args.compile,
        "stock": f"{type(model.ours[0].stock).__module__}.{type(model.ours[0].stock).__qualname__}",
    }
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        rows += rows_of(model, size, Workload(size.tokens, args.heads, HEAD_DIM), args)
        if model.device.type == "cuda":
            setup["peak_bytes"] = torch.cuda.max_memory_allocated()
        write_result("wan_step_time", setup, rows, args.out)
    print("| tokens | self-attention | run | ms a step | against stock | Amdahl, this kernel | Amdahl, ideal |")
    print("|---" * 7 + "|")
    for row in rows:
        cells = [f"{row['tokens']:,}", f"{row['attention']:.0%}", row["run"], f"{row['milliseconds']:.0f}"]
        cells += [f"{row[name]:.3f} x" if name in row else "" for name in ("speedup", "ceiling", "ideal")]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
