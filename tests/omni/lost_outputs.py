"""vLLM-Omni 0.26 loses an output that is there at once, and who waits for it hears of a timeout: two races, mended.

In a worker two threads write to one queue without a lock. And the engine looks whether somebody waits for an output,
unpacks it, and keeps it for later if nobody did, while somebody may have begun to wait.
"""

from __future__ import annotations

import functools
import threading
import time
from concurrent.futures import Future
from typing import Any

from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm_omni.diffusion.executor.multiproc_executor import MultiprocDiffusionExecutor

LOOK_EVERY_S = 0.01

_lock = threading.Lock()


def install() -> None:
    """Entry point `vllm_omni.general_plugins`."""
    enqueue, wait = MessageQueue.enqueue, MultiprocDiffusionExecutor.wait_output_ready

    @functools.wraps(enqueue)
    def one_at_a_time(*args: Any, **kwargs: Any) -> None:
        with _lock:
            enqueue(*args, **kwargs)

    @functools.wraps(wait)
    def wait_and_look(self: Any, output_id: str) -> Future[Any]:
        future: Future[Any] = wait(self, output_id)
        threading.Thread(target=_look, args=(self, output_id, future), daemon=True).start()
        return future

    MessageQueue.enqueue = one_at_a_time
    MultiprocDiffusionExecutor.wait_output_ready = wait_and_look


def _look(executor: Any, output_id: str, future: Future[Any]) -> None:
    """Hand over what was kept after somebody began to wait."""
    while not future.done():
        with executor._futures_lock:
            kept = executor._completed_outputs.pop(output_id, None)
        if kept is not None:
            future.set_result(kept.result())
        time.sleep(LOOK_EVERY_S)
