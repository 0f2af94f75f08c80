"""Loaded by every Python that an engine's process starts: workers import `vllm_omni` before anybody else has a say."""

import torch

from tests.omni.prepare import prepare

operators = prepare()
torch.accelerator.current_accelerator = lambda *_: torch.device("cpu")  # where their output is copied from
