"""The video diffusion transformer: patches as tokens, 3-D rotary positions, time and labels through adaptive norms."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu

from benchmarks.quality.methods import dense_attention
from benchmarks.quality.video.scenes import LABELS

HEAD_DIM = 64
AXES = (16, 24, 24)
"""Channels of a head that turn with frame, row and column."""
PATCH = 4
"""Rows and columns of a patch; each frame has its own patches."""
PIXELS = 3 * PATCH * PATCH

LayerAttention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of layer number ..., of query, key and value, (batch, tokens, heads, head_dim) each."""


@dataclass(frozen=True)
class Config:
    """Size of a model, and of the clips that it is trained for."""

    dim: int = 384
    layers: int = 8
    frames: int = 16
    size: int = 112
    """Rows and columns of a frame, in pixels."""

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM

    @property
    def tokens(self) -> int:
        return self.frames * (self.size // PATCH) ** 2


TINY = Config(dim=128, layers=3, frames=4, size=32)
"""A model of 0.8 M parameters over 256 tokens, for a CPU."""


class Block(nn.Module):
    """One layer: self-attention and an MLP."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim = config.dim
        self.qkv = nn.Linear(dim, 3 * dim)
        self.query_norm, self.key_norm = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)
        self.attention_out = nn.Linear(dim, dim)
        self.mlp_in = nn.Linear(dim, 4 * dim)
        self.mlp_out = nn.Linear(4 * dim, dim)
        self.modulation = nn.Parameter(torch.zeros(6, dim))

    def forward(
        self,
        tokens: Tensor,
        modulation: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Tokens (batch, tokens, dim); ``modulation`` is (batch, 6, dim), ``rotation`` that of `rotary`."""
        parts = (modulation + self.modulation)[:, :, None].unbind(1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        query, key, value = self.qkv(_normed(tokens, shift, scale)).unflatten(2, (3, -1, HEAD_DIM)).unbind(2)
        query = rotate(self.query_norm(query.float()), rotation).to(value.dtype)
        key = rotate(self.key_norm(key.float()), rotation).to(value.dtype)
        attended = attention(query, key, value)
        tokens = tokens + gate * self.attention_out(attended.flatten(2))
        hidden = gelu(self.mlp_in(_normed(tokens, mlp_shift, mlp_scale)), approximate="tanh")
        return tokens + mlp_gate * self.mlp_out(hidden)


class VideoTransformer(nn.Module):
    """Velocity of a clip on its straight way from scene to noise (rectified flow)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_in = nn.Linear(PIXELS, dim)
        self.time_in, self.time_out = nn.Linear(256, dim), nn.Linear(dim, dim)
        # The last row of each stands for no label.
        self.labels = nn.ModuleList(nn.Embedding(values + 1, dim) for values in LABELS)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.last_modulation = nn.Linear(dim, 2 * dim)
        self.patch_out = nn.Linear(dim, PIXELS)
        # Every block begins as the identity, and the whole as zero.
        for layer in (self.modulation, self.last_modulation, self.patch_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, clips: Tensor, time: Tensor, labels: Tensor, attention: LayerAttention | None = None) -> Tensor:
        """Velocity, noise less scene, float32, shape of the clips.

        Args:
            clips: (batch, 3, frames, height, width), any frames and multiples of `PATCH`; the positions of a clip
                smaller than those of the config are spread out over the same scene.
            time: (batch,), 0 for a scene to 1 for noise.
            labels: int64 (batch, 4); `NO_LABELS` for none.
            attention: computes the attention of each layer; None for PyTorch's.
        """
        batch, _, frames, height, width = clips.shape
        grid = (frames, height // PATCH, width // PATCH)
        patches = clips.unflatten(4, (grid[2], PATCH)).unflatten(3, (grid[1], PATCH))
        tokens = self.patch_in(patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, -1, PIXELS)).float()

        condition = self.time_out(silu(self.time_in(_sinusoids(time))))
        condition = silu(condition + sum(embed(labels[:, i]) for i, embed in enumerate(self.labels)))
        modulation = self.modulation(condition).unflatten(1, (6, -1))
        side = self.config.size // PATCH
        rotation = rotary(grid, (self.config.frames, side, side), clips.device)
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, modulation, rotation, _of_layer(number, attention))

        shift, scale = self.last_modulation(condition)[:, None].chunk(2, -1)
        patches = self.patch_out(_normed(tokens, shift, scale)).float().view(batch, *grid, 3, PATCH, PATCH)
        return patches.permute(0, 4, 1, 2, 5, 3, 6).reshape(clips.shape)


NO_LABELS = LABELS
"""Labels that say nothing, for guidance."""


def rotary(grid: tuple[int, ...], full: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (tokens, 1, HEAD_DIM / 2) each, of the tokens of ``grid`` spread over a grid ``full``."""
    angles = []
    for number, full_number, channels in zip(grid, full, AXES, strict=True):
        positions = (torch.arange(number, device=device) + 0.5) * (full_number / number) - 0.5
        frequencies = 1000.0 ** (-torch.arange(0, channels, 2, device=device) / channels)
        angles.append(positions[:, None] * frequencies)
    index = torch.cartesian_prod(*(torch.arange(number, device=device) for number in grid))
    table = torch.cat([of_axis[index[:, axis]] for axis, of_axis in enumerate(angles)], 1)[:, None]
    return table.cos(), table.sin()


def rotate(vectors: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of channels of (batch, tokens, heads, HEAD_DIM) by their angles."""
    cos, sin = rotation
    left, right = vectors.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def precision(device: torch.device) -> AbstractContextManager[None]:
    """Products in bfloat16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def save(model: VideoTransformer, path: Path) -> None:
    """Write weights in bfloat16 and the config."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.to("cpu", torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, path, metadata={"config": json.dumps(asdict(model.config))})


def load(path: Path, device: torch.device) -> VideoTransformer:
    """The model of a checkpoint, in float32, for inference.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint of this model.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint: expected a file, got {path} (python -m benchmarks.quality.video.train)")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "config" not in metadata:
        raise ValueError(f"checkpoint: expected one of benchmarks.quality.video.train, got {path} without a config")
    model = VideoTransformer(Config(**json.loads(metadata["config"])))
    model.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return model.to(device).eval().requires_grad_(False)


def _of_layer(number: int, attention: LayerAttention | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if attention is None:
        return dense_attention
    return lambda query, key, value: attention(number, query, key, value)


def _normed(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(tokens, tokens.shape[-1:]) * (1 + scale) + shift


def _sinusoids(time: Tensor) -> Tensor:
    """(batch,) as (batch, 256)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(128, device=time.device) / 128)
    angles = 1000 * time[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), 1)
