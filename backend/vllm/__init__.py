"""LITE_ATTN for vLLM: name, hooks, attention backends."""
