"""Loaded by every Python that an engine starts: workers import `vllm_omni` before anybody else has a say."""

from tests.omni.cpu import prepare

operators = prepare()
