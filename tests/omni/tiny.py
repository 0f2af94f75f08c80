"""A tiny Wan pipeline with random weights, saved as a folder that vLLM-Omni loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

HEIGHT, WIDTH, FRAMES, STEPS = 256, 128, 9, 6
"""A video of 384 tokens: 3 tiles of queries, 6 blocks of keys."""

HEADS, HEAD_DIM, LAYERS = 2, 128 if torch.cuda.is_available() else 24, 2

CHARACTERS = "abcdefghijklmnopqrstuvwxyz ,.:0123456789"


def _transformer(seed: int) -> Any:
    from diffusers import WanTransformer3DModel

    from tests.diffusers.conftest import sharpen

    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=LAYERS,
        rope_max_seq_len=64,
    )
    return sharpen(transformer)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def save_pipeline(folder: Path, experts: int) -> Path:
    """Write a pipeline with one or two experts; of two, the second takes the later steps."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    transformers = {"transformer": _transformer(0)}
    if experts == 2:
        transformers |= {"transformer_2": _transformer(1), "boundary_ratio": 0.9}
    torch.manual_seed(2)
    text = UMT5Config(
        vocab_size=3 + len(CHARACTERS),
        d_model=32,
        d_kv=16,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    WanPipeline(
        tokenizer=_tokenizer(),
        text_encoder=UMT5EncoderModel(text),
        vae=AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        **transformers,
    ).save_pretrained(folder)
    return folder
