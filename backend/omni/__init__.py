"""LITE_ATTN for the diffusion models of vLLM-Omni: name, attention class, state of each request."""
