"""How long a decode step of vLLM takes with LITE_ATTN: against stock attention, disabled, reading part of the cache.

A model of the shape of Llama-3-8B with random weights decodes batches of long prompts. So that a share means the same
in every run, which blocks are read is forced: bits are drawn at random (benchmarks/forced_lists.py), no estimate passes
and no bit is cleared. What was really read is in the result. Each backend has an engine in a process of its own; the
runs of LITE_ATTN share one, and find their prompts in its prefix cache.

    python -m benchmarks.engine_time
    python -m benchmarks.engine_time --layers 2 --batches 2x512 --steps 5    # whether it works, also on a CPU
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.forced_lists import forced_lists, let_no_estimate_pass
from benchmarks.results import DIRECTORY, write_result
from lite_attention.ranges import pack_bits
from lite_attention.tiles import DECODE_BLOCK

STOCK = "FLASH_ATTN" if torch.cuda.is_available() else "CPU_ATTN"
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEVER = -1000.0
"""A threshold that no block's share is below."""
WARMUP_STEPS = 5


_engine: Engine
"""Of a process that has one."""


class Engine:
    """An offline engine in this process, whose steps are taken one by one."""

    def __init__(self, backend: str, layers: int, max_tokens: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(LLAMA_3_8B | {"num_hidden_layers": layers}))
        self.llm = LLM(
            str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            attention_backend=backend,
            max_model_len=max_tokens,
            seed=0,
        )

    def decode_step(
        self, batch: int, context: int, steps: int, share: float | None, options: dict[str, Any]
    ) -> tuple[float, float | None]:
        """Seconds that a decode step takes, mean over `steps`, and the share of the blocks that is read.

        Where `share` is given, it is about that one; where it is not, everything is read and None is returned.
        """
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        random = torch.Generator().manual_seed(0)
        names = [f"{time.monotonic_ns()}-{place}" for place in range(batch)]
        for name in names:
            prompt = torch.randint(100, LLAMA_3_8B["vocab_size"], (context,), generator=random).tolist()  # type: ignore[call-overload]
            params = SamplingParams(
                max_tokens=steps + 50, ignore_eos=True, temperature=0, detokenize=False, extra_args=options or None
            )
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        tokens = dict.fromkeys(names, 0)
        while min(tokens.values()) < 3:  # the first decode step reads everything
            for output in engine.step():
                tokens[output.request_id] = len(output.outputs[0].token_ids)
        if share is not None:
            force(self.llm, context // DECODE_BLOCK, share)
        for _ in range(WARMUP_STEPS):
            engine.step()
        if share is not None:
            take_share_read(self.llm)
        start = time.perf_counter()
        for _ in range(steps):
            engine.step()
        taken = (time.perf_counter() - start) / steps
        read = None if share is None else take_share_read(self.llm)
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
        return taken, read

    def memory(self) -> dict[str, Any]:
        """Tokens that the KV cache has room for, and bytes that are in use on the GPU."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        memory = {"cache_tokens": cache.num_gpu_blocks * cache.block_size}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            memory |= {"bytes_in_use": total - free, "bytes_allowed": int(cache.gpu_memory_utilization * total)}
        return memory


@torch.inference_mode()
def force(llm: Any, blocks: int, share: float) -> None:
    """Let every sequence read a random share of its blocks, the same ones in each layer, from now on."""
    from lite_attention.backend.vllm.state import skipping_layers

    states = [layer.impl.state for layer in skipping_layers(llm.llm_engine.vllm_config).values()]
    slots, kv_heads, _words = states[0].mask.shape
    bits = forced_lists(slots * kv_heads, blocks, share)
    mask = pack_bits(bits).view(slots, kv_heads, -1)
    for state in states:
        state.mask.zero_()[..., : mask.shape[2]] = mask
        let_no_estimate_pass(state.summaries)


def take_share_read(llm: Any) -> float:
    """The share of the blocks that was read since this was asked for last."""
    (of_requests,) = llm.llm_engine.collective_rpc("lite_attn_take_stats")
    visited, total = (sum(counts) for counts in zip(*of_requests.values(), strict=True))
    return visited / total


def runs_of(backend: str, shares: list[float]) -> list[tuple[str, float | None, dict[str, Any]]]:
    """Name, share of the blocks that is forced, and a request's options of each run."""
    if backend == STOCK:
        return [("stock", None, {})]
    skipping: dict[str, Any] = {"lite_attn_threshold": NEVER}
    return [
        ("disabled", None, {"lite_attn_enable": False}),
        *((f"{share:.0%} read", share, skipping) for share in shares),
    ]


def _start(*arguments: Any) -> None:
    """Before a process of its own is asked for `_decode_step` and `_memory`: its engine."""
    global _engine
    _engine = Engine(*arguments)


def _decode_step(*arguments: Any) -> tuple[float, float | None]:
    return _engine.decode_step(*arguments)


def _memory() -> dict[str, Any]:
    return _engine.memory()


def _batch(text: str) -> tuple[int, int]:
    try:
        batch, context = (int(number) for number in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected SEQUENCESxTOKENS, such as 12x32768, got {text}") from None
    return batch, context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--batches", type=_batch, nargs="+", default=[(12, 32768), (6, 65536)], metavar="SEQUENCESxTOKENS"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25], help="of the blocks that are read")
    parser.add_argument("--steps", type=int, default=40, help="decode steps that are timed")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="folder for the results")
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    memory: dict[str, Any] = {}
    stock: dict[tuple[int, int], float] = {}

    def keep() -> None:
        """After each run: who stops a long one keeps what it said."""
        setup = {"model": "the shape of Llama-3-8B", "layers": args.layers, "steps": args.steps, "stock": STOCK}
        write_result("engine_time", setup | {"memory": memory}, rows, args.out)

    longest = max(context for _, context in args.batches) + args.steps + 64
    for backend in tqdm([STOCK, "LITE_ATTN"], unit="engine"):
        engine = ProcessPoolExecutor(1, get_context("spawn"), _start, (backend, args.layers, longest))
        with engine:
            for batch, context in args.batches:
                for name, share, options in runs_of(backend, args.shares):
                    taken, read = engine.submit(_decode_step, batch, context, args.steps, share, options).result()
                    stock.setdefault((batch, context), taken)
                    row = {"batch": batch, "context": context, "run": name, "read": read, "milliseconds": 1e3 * taken}
                    rows.append(row | {"speedup": stock[batch, context] / taken})
                    tqdm.write(f"{backend}: {rows[-1]}")
                    keep()
            memory[backend] = engine.submit(_memory).result()
    keep()
    print(f"| sequences x context | run | read | ms a step | against {STOCK} |\n|---|---|---|---|---|")
    for row in rows:
        case = f"{row['batch']} x {row['context']:,}"
        blocks = "all" if row["read"] is None else f"{row['read']:.1%}"
        print(f"| {case} | {row['run']} | {blocks} | {row['milliseconds']:.2f} | {row['speedup']:.2f} x |")


if __name__ == "__main__":
    main()
