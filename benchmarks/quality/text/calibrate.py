"""Calibration of SmolLM2 in vLLM's engine: thresholds by layer for several targets, and what they cost elsewhere.

Prompts are pieces of source code and prose. For each target thresholds are found behind some of them, then measured
behind pieces of other texts; `lite_attention.backend.vllm.calibration` says how.

    python -m benchmarks.quality.text.calibrate
    python -m benchmarks.quality.text.calibrate --context 512 --pieces 1 --max-tokens 16    # some minutes on a CPU
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.quality.calibration import RELATIVE, Row, compare, print_rows
from benchmarks.quality.text.model import DEFAULT_MODEL, NAME, PROSE, read_text
from benchmarks.results import DIRECTORY, write_result
from lite_attention.calibration import Target

TARGETS = ("error=0.05", "error=0.1", "error=0.2")
TEXTS = ("argparse", "inspect", PROSE)
HELD_OUT = ("typing", "difflib", "pydoc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder from `lite-attention model smollm2`")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help="as those of lite-attention calibrate")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--pieces", type=int, default=2, help="prompts of each text")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), help=f"modules of Python, or {PROSE}: its manual")
    parser.add_argument("--held-out", nargs="+", default=list(HELD_OUT), help="other texts, to judge")
    parser.add_argument("--name", default="text_calibration", help="of the result")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="folder of NAME.json")
    args = parser.parse_args()
    try:
        targets = [Target.parse(target) for target in args.targets]
    except ValueError as error:
        parser.error(f"--{error}")

    # GiB, where there is no GPU: vLLM would take most of the memory, and a process that grows beside it ends both.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    from lite_attention.backend.vllm import calibration

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    llm = LLM(
        args.model,
        attention_backend="LITE_ATTN",
        max_model_len=args.context + args.max_tokens + 1,
        **calibration.ENGINE_ARGS,
    )

    def answered(names: list[str]) -> list[calibration.Text]:
        prompts = []
        for name in names:
            tokens = read_text(tokenizer, name, args.pieces * args.context)
            prompts += [piece.tolist() for piece in tokens.split(args.context)]
        return calibration.answer(llm, prompts, args.max_tokens)

    texts, others = answered(args.texts), answered(args.held_out)
    setup: dict[str, Any] = {
        "model": NAME, "context": args.context, "max_tokens": args.max_tokens, "texts": args.texts,
        "held_out": args.held_out, "pieces": args.pieces, "within": RELATIVE,
        "dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
    }  # fmt: skip
    rows: list[Row] = []
    for target in targets:
        text = f"{target.quantity}={target.value}"
        found = calibration.calibrate(llm, texts, text, model=NAME, inputs=", ".join(args.texts))
        rows.append(compare(target, found.thresholds, found.reached, calibration.measure(llm, others, found)))
        write_result(args.name, setup, rows, args.out)
    print_rows(rows)


if __name__ == "__main__":
    main()
