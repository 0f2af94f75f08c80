"""LiteAttention in pipelines of the library diffusers.

from lite_attention.backend.diffusers import enable

report = enable(pipeline, threshold=-8.0)
video = pipeline(prompt).frames
report.plot("sparsity.png")
"""

from lite_attention.backend.diffusers.session import calibrate, disable, enable, measure, skipping
from lite_attention.report import Report

__all__ = ["Report", "calibrate", "disable", "enable", "measure", "skipping"]
