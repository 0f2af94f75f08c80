"""A lock that vLLM-Omni 0.26 lacks: two threads of a worker write to one queue.

Without it an output that is there at once can be lost, and who waits for it hears of a timeout.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

_lock = threading.Lock()


def install() -> None:
    """Entry point `vllm_omni.general_plugins`: one thread of a process writes at a time."""
    enqueue = MessageQueue.enqueue

    @functools.wraps(enqueue)
    def one_at_a_time(*args: Any, **kwargs: Any) -> None:
        with _lock:
            enqueue(*args, **kwargs)

    MessageQueue.enqueue = one_at_a_time
