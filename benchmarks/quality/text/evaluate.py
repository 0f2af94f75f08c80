"""What skipping costs in quality: SmolLM2 over source code and prose, teacher forced, against dense decoding.

For each threshold the model decodes the same tokens behind a prompt, once dense and once skipping, through
`lite_attention::decode`. Reported for each length of the prompt are the share of the KV cache that was read (visited
blocks plus the summaries of all blocks, as in a bfloat16 cache), the mean KL divergence of the next-token
distributions to the dense ones, how often the most likely token is the same, and the perplexity of the text.

    python -m benchmarks.quality.text.evaluate
    python -m benchmarks.quality.text.evaluate --contexts 4096 --texts argparse --thresholds -6 -7   # some minutes
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from benchmarks.quality.text.model import (
    CACHE_DTYPES,
    DEFAULT_MODEL,
    NAME,
    PROSE,
    decode,
    load,
    prefill,
    read_text,
    share_read,
)
from benchmarks.results import DIRECTORY, write_result

TEXTS = ("argparse", "typing", "inspect", PROSE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder from `lite-attention model smollm2`")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096, 8000], help="tokens of the prompts")
    parser.add_argument("--steps", type=int, default=128, help="teacher-forced steps a text")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[-5, -6, -7, -7.5, -8, -9])
    parser.add_argument(
        "--texts", nargs="+", default=list(TEXTS), help=f"modules of the standard library, or {PROSE}: Python's manual"
    )
    parser.add_argument("--name", default="text_quality", help="of the result (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="folder of NAME.json (default: %(default)s)")
    args = parser.parse_args()

    model, tokenizer, attention = load(args.model, max(args.contexts) + args.steps)
    settings = [(context, threshold) for context in args.contexts for threshold in [-math.inf, *args.thresholds]]
    sums = {setting: [0.0] * 4 for setting in settings}
    progress = tqdm(total=len(args.texts) * len(settings), unit="run")
    for text in args.texts:
        for context in args.contexts:
            tokens = read_text(tokenizer, text, context + args.steps + 1)
            forced, following = tokens[context:-1], tokens[context + 1 :]
            attention.restart(-math.inf)
            prompt = prefill(model, tokens[:context])
            dense: Tensor | None = None
            for threshold in [-math.inf, *args.thresholds]:
                attention.restart(threshold)
                logs, _ = decode(model, prompt, forced)
                dense = logs if dense is None else dense
                total = sums[context, threshold]
                total[0] += (dense.exp() * (dense - logs)).sum(-1).mean().item()
                total[1] += (dense.argmax(-1) == logs.argmax(-1)).float().mean().item()
                total[2] += share_read(model, attention)
                total[3] += -logs.gather(1, following[:, None]).mean().item()
                progress.update()
    progress.close()

    rows = []
    for context, threshold in settings:
        kl, top1, read, loss = (part / len(args.texts) for part in sums[context, threshold])
        if threshold > -math.inf:
            row = {"context": context, "threshold": threshold, "read": read, "kl": kl, "top1": top1}
            dense_perplexity = math.exp(sums[context, -math.inf][3] / len(args.texts))
            rows.append(row | {"perplexity": math.exp(loss), "dense_perplexity": dense_perplexity})
    print("| context | threshold | KV read | mean KL | same top-1 | perplexity (dense) |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['context']} | {row['threshold']:g} | {row['read']:.3f} | {row['kl']:.4f} "
            f"| {row['top1']:.3f} | {row['perplexity']:.3f} ({row['dense_perplexity']:.3f}) |"
        )
    cache = str(CACHE_DTYPES[model.device.type]).removeprefix("torch.")
    setup = {"model": NAME, "cache": cache, "steps": args.steps, "texts": args.texts}
    write_result(args.name, setup, rows, args.out)


if __name__ == "__main__":
    main()
