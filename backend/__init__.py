"""Adapters that plug LiteAttention into inference engines, one folder an engine."""
