"""A small video diffusion transformer of our own, trained on scenes that are drawn, and what skipping costs in it.

    python -m benchmarks.quality.video.evaluate    # every method at several thresholds, against dense
    python -m benchmarks.quality.video.plot        # the pictures in docs/
    python -m benchmarks.quality.video.trace       # what each layer skips in one video, for lite-attention plot
    python -m benchmarks.quality.video.calibrate   # thresholds by layer for several targets, judged on other videos
    python -m benchmarks.quality.video.train       # 8 minutes on an H100: a checkpoint, and a picture of samples

All five take `--help`; `on_device.sh` runs those that need a GPU. The checkpoint in this folder is that of
`train --minutes 7` on one H200: 4,794 steps, loss 0.0184, sha256 857c251a; docs/video_samples.png shows what it draws.
`train --tiny` makes one in minutes on a CPU.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "model.safetensors"
FOLDER = Path("benchmarks/out/video")
"""Where another training's checkpoint, and stills, are kept, not part of the repository."""
