"""Whether skipping finds a needle in a haystack as often as dense decoding does.

A sentence with a number is planted at a random depth of Python's manual. The question is decoded token by token behind
it, skipping, so that the step that needs the needle is not the first; then five tokens are generated.

    python -m benchmarks.quality.text.needle
"""

from __future__ import annotations

import argparse
import math
import random
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.quality.text.model import DEFAULT_MODEL, NAME, PROSE, decode, load, prefill, read_text
from benchmarks.results import write_result

CITIES = ("Amsterdam", "Cairo", "Lima", "Oslo", "Delhi", "Rome", "Quito", "Paris", "Tokyo", "Accra")
ANSWER_TOKENS = 5


def plant(tokenizer: Any, haystack: Tensor, city: str, number: int, depth: float) -> tuple[Tensor, Tensor]:
    """The prompt with a needle at a depth from 0 to 1, and the question behind it."""
    needle = tokenizer(f"\n\nThe secret number of {city} is {number}.\n\n", return_tensors="pt").input_ids[0]
    place = int(depth * len(haystack))
    question = f"\n\nQuestion: What is the secret number of {city}?\nAnswer: The secret number of {city} is"
    prompt = torch.cat((haystack[:place], needle, haystack[place:]))
    return prompt, tokenizer(question, return_tensors="pt").input_ids[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder from `lite-attention model smollm2`")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096, 7900], help="tokens of the haystack")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[-5, -6, -7, -7.5], help="beside dense decoding")
    parser.add_argument("--needles", type=int, default=10, help=f"for each context, at most {len(CITIES)}")
    parser.add_argument("--seed", type=int, default=0, help="of numbers and depths")
    args = parser.parse_args()

    chosen = random.Random(args.seed)
    thresholds = [-math.inf, *args.thresholds]
    model, tokenizer, attention = load(args.model, max(args.contexts) + 128)
    found = {(context, threshold): 0 for context in args.contexts for threshold in thresholds}
    progress = tqdm(total=len(found) * args.needles, unit="answer")
    for context in args.contexts:
        haystack = read_text(tokenizer, PROSE, context)
        for city in CITIES[: args.needles]:
            number, depth = chosen.randrange(1000, 10000), chosen.random()
            prompt, question = plant(tokenizer, haystack, city, number, depth)
            attention.restart(-math.inf)
            cache = prefill(model, prompt)
            for threshold in thresholds:
                attention.restart(threshold)
                _, answer = decode(model, cache, question, ANSWER_TOKENS)
                found[context, threshold] += str(number) in tokenizer.decode(answer)
                progress.update()
    progress.close()

    rows = [
        {
            "context": context,
            "threshold": threshold,
            "found": found[context, threshold],
            "found_dense": found[context, -math.inf],
        }
        for context in args.contexts
        for threshold in args.thresholds
    ]
    print("| context | threshold | found | found by dense decoding |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['context']} | {row['threshold']:g} | {row['found']} | {row['found_dense']} |")
    write_result("text_needle", {"model": NAME, "needles": args.needles, "seed": args.seed}, rows)


if __name__ == "__main__":
    main()
