"""Which slot of the pooled skip state, which options and which resets each request has.

Pure Python, no engine: an adapter reports what the scheduler did (`finish`, `preempt`, `start`), then asks for
every decode token that it is about to compute (`decode_token`).

A decode token is one whose position lies behind the prompt. How it is computed depends only on the request's
options and on its position, so a preempted request that computes its tokens again gets the same ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

from lite_attention.serving.params import RequestOptions

SCRATCH_SLOT = 0
"""The slot of rows that hold no sequence: padding and dummy runs."""


@dataclass(frozen=True, slots=True)
class DecodeToken:
    """How the decode operator computes one token of one request.

    With a profile, each layer has the threshold that it says.
    """

    request_id: str
    position: int
    slot: int
    threshold: float
    visit_all: bool
    profile: str | None = None


@dataclass(slots=True)
class _Request:
    options: RequestOptions
    prompt_tokens: int
    slot: int | None = None
    next_position: int | None = None


@dataclass
class RequestTable:
    """Requests known to a worker, and the slots that they hold.

    Args:
        slots: rows of the pooled state, the scratch slot included; at least 2.
    """

    slots: int
    _requests: dict[str, _Request] = field(default_factory=dict)
    _free: list[int] = field(init=False)
    _holders: OrderedDict[str, None] = field(default_factory=OrderedDict)  # least recently used first

    def __post_init__(self) -> None:
        if self.slots < 2:
            raise ValueError(f"slots: expected at least 2 (one is scratch), got {self.slots}")
        self._free = list(range(self.slots - 1, SCRATCH_SLOT, -1))

    @property
    def active_slots(self) -> int:
        return len(self._holders)

    def start(self, request_id: str, options: RequestOptions, prompt_tokens: int) -> None:
        """A request begins, or begins again with a longer prompt."""
        self.preempt(request_id)
        self._requests[request_id] = _Request(options, prompt_tokens)

    def preempt(self, request_id: str) -> None:
        """A request lost its keys and values; its options are kept for when it resumes."""
        request = self._requests.get(request_id)
        if request is not None and request.slot is not None:
            self._free.append(request.slot)
            request.slot = request.next_position = None
            del self._holders[request_id]

    def finish(self, request_id: str) -> None:
        """A request ended or was aborted; unknown requests are ignored."""
        self.preempt(request_id)
        self._requests.pop(request_id, None)

    def skips_from(self, request_id: str) -> int | None:
        """First position at which a request skips; None if it never does or is unknown."""
        request = self._requests.get(request_id)
        return request.prompt_tokens if request is not None and request.options.skips else None

    def decode_token(self, request_id: str, position: int, batch: Collection[str]) -> DecodeToken:
        """Plan the token at `position` of a request that skips there, and remember that it was computed.

        `batch` names the requests of this step, whose slots are not taken away should slots run out.
        """
        request = self._requests[request_id]
        step = position - request.prompt_tokens
        if not request.options.skips or step < 0:
            raise ValueError(f"position: expected a decode token of a request that skips, got {position}")
        if request.slot is None:
            request.slot = self._take_slot(batch)
        self._holders[request_id] = None
        self._holders.move_to_end(request_id)
        options = request.options
        visit_all = (
            request.next_position != position
            or step < options.warmup_steps
            or (options.refresh_interval > 0 and step % options.refresh_interval == 0)
        )
        request.next_position = position + 1
        return DecodeToken(request_id, position, request.slot, options.threshold, visit_all, options.profile)

    def _take_slot(self, batch: Collection[str]) -> int:
        if not self._free:
            idle = next((holder for holder in self._holders if holder not in batch), None)
            if idle is None:
                raise RuntimeError(f"slots: {self.slots - 1} are too few for the requests of one step")
            self.preempt(idle)
        return self._free.pop()
