"""Several stages in a process, which vLLM-Omni runs in turn: fake runners around a transformer of one attention."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from lite_attention.costs import Shape
from lite_attention.options import Rule
from lite_attention.serving.metrics import read_directory
from tests.omni.conftest import cpu_only
from tests.omni.test_joint import PICTURE, TEXT, transformer
from tests.profiles import make_denoise_profile

pytestmark = cpu_only

PIXELS = (1, 16, 1, 20, 16)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the metrics."""
    monkeypatch.setenv("LITE_ATTENTION_METRICS_DIR", str(tmp_path))
    return tmp_path


def runner(pipeline: nn.Module, **server: Any) -> Any:
    config = SimpleNamespace(additional_config={"lite_attn": server}, max_num_seqs=1)
    return SimpleNamespace(od_config=config, pipeline=pipeline)


def execute(of: Any, extra_args: Any = None) -> Any:
    """The output of a request; `options` in it is what the stage made of `extra_args`."""
    from lite_attention.backend.omni import execution, hooks

    def original(self: Any, req: Any) -> Any:
        running = execution.current()
        options = None if running is None else running.requests[0].options
        if running is not None:
            sample, text = torch.randn(PIXELS), torch.randn(1, TEXT, 16)
            for _ in range(3):
                self.pipeline["transformer"](sample, encoder_hidden_states=text)
        return SimpleNamespace(options=options)

    request = SimpleNamespace(
        request_id="one",
        sampling_params=SimpleNamespace(extra_args=extra_args, num_outputs_per_prompt=1),
        is_dummy_run_request_id=lambda name: False,
    )
    with torch.no_grad():
        return hooks._execute_model(original, of, request)


def long(name: str = "QwenImageTransformer2DModel") -> nn.Module:
    return nn.ModuleDict({"transformer": transformer(name, text_first=True)})


def test_stages_have_their_own_options_counters_and_memory(directory: Path) -> None:
    stages = [runner(long(), threshold=-3.0), runner(long(), threshold=-1.0, max_threshold=-1.0)]
    for _ in range(2):
        assert [execute(stage).options.threshold for stage in stages] == [-3.0, -1.0]
    hot = {"lite_attn": {"threshold": -0.5}}
    assert execute(stages[0], hot).options.threshold == -0.5
    assert "expected at most -1.0" in str(execute(stages[1], hot).error)

    pools = [stage.lite_attn_stage.pool for stage in stages]
    read = read_directory(directory)
    assert read.slots == 2
    assert read.state_bytes == sum(pool.memory_bytes for pool in pools) == 2 * pools[0].memory_bytes > 0
    assert read.rows.sum() == 5
    del stages[0], pools[0]
    gc.collect()
    read = read_directory(directory)
    assert (read.slots, read.state_bytes, read.rows.sum()) == (1, pools[0].memory_bytes, 5)


def test_the_rule_of_a_stage_and_the_memory_that_it_takes(directory: Path) -> None:
    taken = {}
    for rule in get_args(Rule):
        stage = runner(long(), rule=rule)
        execute(stage)
        taken[rule] = read_directory(directory).state_bytes
        shelves = stage.lite_attn_stage.pool._shelves
        assert {state.rule for shelf in shelves.values() for state in shelf.states} == {rule}
        del stage
        gc.collect()
    lse = 4 * (PICTURE + TEXT)
    assert taken["running_max"] + lse == taken["mass"] == taken["mass_summaries"]
    assert "lite_attn.rule: unknown" in str(execute(runner(long()), {"lite_attn": {"rule": "mass"}}).error)


def test_profiles_of_another_model_are_refused_at_the_first_run() -> None:
    layer, shape = "transformer.transformer_blocks.0.attn", Shape(TEXT + PICTURE, 1, 16)
    for thresholds, of_shape, message in (
        ({layer: -2.0}, shape, None),
        ({layer: -2.0}, replace(shape, tokens=99), None),
        (
            {layer: -2.0},
            replace(shape, head_dim=32),
            "'a': calibration: expected 390 keys, 1 heads of 32, .*got .* of 16",
        ),
        (
            {"transformer.blocks.0.attn1": -2.0},
            shape,
            "'a': calibration: expected the layers of some/model, .*blocks.0",
        ),
    ):
        profile = make_denoise_profile(thresholds, shape=of_shape)
        stage = runner(long(), profiles={"a": profile})
        with pytest.raises(ValueError, match=message) if message is not None else nullcontext():
            assert execute(stage, {"lite_attn": {"enable": False}}).options.profile is None


def test_a_request_alone_is_refused_where_its_profile_is_for_another_size() -> None:
    layer = "transformer.transformer_blocks.0.attn"
    sizes = {"fits": TEXT + PICTURE, "larger": 1000}
    profiles = {name: make_denoise_profile({layer: -2.0}, shape=Shape(size, 1, 16)) for name, size in sizes.items()}
    stage = runner(long(), profiles=profiles)
    assert execute(stage, {"lite_attn": {"profile": "fits"}}).options.threshold == -2.0
    refused = execute(stage, {"lite_attn": {"profile": "larger"}})
    assert refused.error_status_code == 400
    assert "lite_attn.profile: expected one for the 390 keys of this video or picture, got 'larger'" in refused.error
    assert stage.lite_attn_stage.pool.in_use == 0


def test_sleep_empties_the_memory_of_states(directory: Path) -> None:
    from lite_attention.backend.omni import hooks

    stage = runner(long())
    execute(stage)
    assert read_directory(directory).state_bytes > 0
    seen = []

    def original(self: Any, level: int) -> int:
        seen.append(read_directory(directory).state_bytes)
        return level

    worker = SimpleNamespace(model_runner=stage)
    assert hooks._sleep(original, worker, level=1) == 1
    assert seen == [0]
    execute(stage)
    assert read_directory(directory).state_bytes > 0
    assert hooks._sleep(original, SimpleNamespace(model_runner=runner(nn.ModuleDict())), level=1) == 1


def test_an_engine_in_another_process_says_and_counts_what_was_skipped(directory: Path) -> None:
    # It makes no layer: all it knows of us is what a worker sends.
    stage = runner(long())
    output = execute(stage)
    engine = """
import pickle, sys
from types import SimpleNamespace
from tests.omni.prepare import prepare
operators = prepare()
from prometheus_client import REGISTRY
from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
result = SimpleNamespace(custom_output={})
DiffusionEngine.postprocess_output = lambda self, request, output: [result]
assert "lite_attention.backend.omni.hooks" not in sys.modules
output = pickle.loads(sys.stdin.buffer.read())
DiffusionEngine.postprocess_output(None, None, output)
print(result.custom_output["lite_attn"])
print(REGISTRY.get_sample_value("lite_attn_blocks_total", {"threshold": "-8"}))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", engine], input=pickle.dumps(output), capture_output=True, cwd=root)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    said, counted = done.stdout.decode().splitlines()[-2:]
    assert said == str(dict(output.lite_attn)) and output.lite_attn["blocks_total"] > 0
    assert float(counted) == output.lite_attn["blocks_total"]


def test_a_stage_without_our_layers_is_left_alone(directory: Path) -> None:
    stock = runner(nn.ModuleDict({"transformer": nn.Linear(1, 1)}), banana=1)
    output = execute(stock, {"lite_attn": {"banana": 1}})
    assert output.options is None
    assert not hasattr(output, "lite_attn")
    assert not list(directory.iterdir())


def test_start_up_says_which_layers_stay_on_stock_attention_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = long()
    module = pipeline["transformer"]
    from vllm_omni.diffusion.attention.layer import Attention

    from lite_attention.backend.omni import execution
    from lite_attention.backend.omni.attention import LiteAttentionImpl

    def add(name: str, impl: Any, of: type[nn.Module] = nn.Module) -> None:
        layer = of.__new__(of)
        nn.Module.__init__(layer)
        layer.attention = impl
        module.register_module(name, layer)

    ours = [LiteAttentionImpl(num_heads=1, head_size=16, softmax_scale=1.0) for _ in range(2)]
    for number, impl in enumerate(ours):
        add(f"cross{number}", impl)
    add("stock", object(), Attention)
    causal = nn.ModuleDict({"attn": nn.ModuleDict({"attn": nn.Module()})})
    causal["attn"]["attn"].attention = LiteAttentionImpl(1, 16, 1.0, causal=True)
    module.transformer_blocks.append(causal)

    said: list[str] = []
    monkeypatch.setattr(execution.logger, "info", lambda message, *args: said.append(message % args))
    for _ in range(2):
        execute(runner(pipeline))
    assert said == [
        "LITE_ATTN acts on 1 attention layers of ModuleDict; "
        "2 on stock attention (no long self-attention of a transformer that it knows); "
        "1 on stock attention (a layer is causal); 1 on stock attention (another backend was asked for)"
    ]


@pytest.mark.parametrize("enable", [True, False])
@pytest.mark.parametrize(
    ("mask", "dtype", "reason"),
    [
        (torch.arange(PICTURE + TEXT).ne(5)[None], torch.float32, "an attention mask hides other keys than the last"),
        (None, torch.float64, "query: expected float32, bfloat16 or float16, got torch.float64"),
    ],
)
def test_start_up_says_what_a_mask_or_a_dtype_stops(
    monkeypatch: pytest.MonkeyPatch, enable: bool, mask: Tensor | None, dtype: torch.dtype, reason: str
) -> None:
    from lite_attention.backend.omni import execution

    pipeline = long()
    impl: Any = pipeline["transformer"].impl
    inner = impl.forward

    def forward(query: Tensor, key: Tensor, value: Tensor, metadata: Any) -> Tensor:
        metadata.attn_mask = mask
        out: Tensor = inner(query.to(dtype), key.to(dtype), value.to(dtype), metadata)
        return out

    impl.forward = forward
    said: list[str] = []
    monkeypatch.setattr(execution.logger, "info", lambda message, *args: said.append(message % args))
    execute(runner(pipeline, enable=enable))
    (line,) = said
    assert line.startswith(f"LITE_ATTN acts on 0 attention layers of ModuleDict; 1 on stock attention ({reason}")
