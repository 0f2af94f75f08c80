"""A small video diffusion transformer of our own, trained on scenes that are drawn, and what skipping costs in it.

    python -m benchmarks.quality.video.train       # 8 minutes on an H100: the checkpoint, and a picture of samples
    python -m benchmarks.quality.video.evaluate    # every method at several thresholds, against dense
    python -m benchmarks.quality.video.plot        # the pictures in docs/

All three take `--help`. `train --tiny` makes a checkpoint in minutes on a CPU, for trying out the commands.
"""

from pathlib import Path

FOLDER = Path("benchmarks/out/video")
"""Where checkpoint and stills are kept, not part of the repository."""
