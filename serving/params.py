"""Request parameters and server options, validated in one place for every adapter.

A request to a language model carries `lite_attn_*` keys among its extra arguments, one to a diffusion model a table
`lite_attn`; the server's defaults and limits stand under
`lite_attn` in its additional config. Both go through `RequestOptions`, so a value means the same everywhere.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Final, Self, TypeVar, cast, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from lite_attention.calibration import Calibration, DecodeCalibration
from lite_attention.options import MAX_THRESHOLD_RISE, RELATIVE_THRESHOLD, RULES_SHOWN, Rule, check_relative

PREFIX: Final = "lite_attn_"
CONFIG_KEY: Final = "lite_attn"
MAX_THRESHOLD_SIZE: Final = 1000.0
MAX_STEPS: Final = 1_000_000

_MAX_SHOWN_CHARS = 80
_MAX_SHOWN_ERRORS = 4
_MAX_SHOWN_NAMES = 20


class LiteParamError(ValueError):
    """A parameter of a request, or an option of a server, cannot be used; `parameter` is the first one at fault."""

    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


def _shown(value: object) -> str:
    """A value as an error shows it: short, whatever a client sent."""
    try:
        text = reprlib.repr(value)
    except Exception:  # an integer of too many digits to print, an object whose repr fails
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 3] + "..."


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _threshold(value: Any) -> float:
    if _is_number(value) and (value == -math.inf or abs(value) <= MAX_THRESHOLD_SIZE):
        return -abs(float(value)) or 0.0
    raise ValueError(
        f"expected a number from -{MAX_THRESHOLD_SIZE:.0f} to 0 (log2 of a share; a positive number means "
        "its negative) or -inf"
    )


def _rise(value: Any) -> float:
    if _is_number(value) and 0 <= value <= MAX_THRESHOLD_RISE:
        return float(value)
    raise ValueError(f"expected a number from 0 to {MAX_THRESHOLD_RISE:.0f} (log2 units, over all steps)")


def _switch(value: Any) -> bool:
    # An engine's own parser may have turned true into 1.
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise ValueError("expected true or false")


def _steps(value: Any) -> int:
    if _is_number(value) and 0 <= value <= MAX_STEPS and value == int(value):
        return int(value)
    raise ValueError(f"expected a whole number from 0 to {MAX_STEPS}")


def _share(value: Any) -> float:
    if _is_number(value) and 0 <= value <= 1:
        return float(value)
    raise ValueError("expected a number from 0 to 1")


def _name(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ValueError("expected the name of a profile")


def _rule(value: Any) -> Rule:
    if value in get_args(Rule):
        return cast(Rule, value)
    raise ValueError(f"expected {RULES_SHOWN}")


Profile = TypeVar("Profile", Calibration, DecodeCalibration)


def _profiles(kind: type[Profile], value: Any) -> dict[str, Profile]:
    if not isinstance(value, Mapping):
        raise ValueError("expected a table with a file of lite-attention calibrate for each name")
    profiles = {}
    for name, file in value.items():
        if not (isinstance(name, str) and name and isinstance(file, str | kind)):
            raise ValueError(f"expected a file of lite-attention calibrate for each name, got {_shown({name: file})}")
        try:
            profiles[name] = kind.load(file) if isinstance(file, str) else file
        except (OSError, ValueError) as error:
            raise ValueError(f"{_shown(name)}: {error}") from None
    return profiles


Threshold = Annotated[float, BeforeValidator(_threshold)]
Rise = Annotated[float, BeforeValidator(_rise)]
Switch = Annotated[bool, BeforeValidator(_switch)]
Steps = Annotated[int, BeforeValidator(_steps)]
Share = Annotated[float, BeforeValidator(_share)]
Name = Annotated[str | None, BeforeValidator(_name)]


class SkipOptions(BaseModel):
    """How one sequence skips.

    `threshold` is log2 of a share of the softmax, zero or less; -inf never skips. All blocks are visited in
    the first `warmup_steps` decode steps and then in every `refresh_interval`-th one (0 is never). With `profile`, the
    name of one of the server's, each layer has a threshold of its own, and `threshold` is the mean of those that skip.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    threshold: Threshold
    enable: Switch
    refresh_interval: Steps
    warmup_steps: Steps
    profile: Name = None

    @property
    def skips(self) -> bool:
        return self.enable and self.threshold > -math.inf

    @property
    def highest_threshold(self) -> float:
        """The threshold of the step that skips most."""
        return self.threshold


class RequestOptions(SkipOptions):
    """How one request to a language model skips."""


class DenoiseOptions(SkipOptions):
    """How one generation of a diffusion model skips; steps are denoising steps.

    The first `warmup_steps` visit everything, the last two of them to decide what the next step skips, and the last
    `cooldown_steps` are dense. `threshold` is that of the first step, the strictest; it rises evenly over the steps, by
    `threshold_rise` up to the last one, but never above 0 (relative to 1, also on servers whose thresholds are relative
    to 1 / blocks).
    """

    cooldown_steps: Steps = 0
    threshold_rise: Rise = 0.0

    @property
    def highest_threshold(self) -> float:
        """See `SkipOptions`; as a limit counts it, at most 0."""
        return min(self.threshold + self.threshold_rise, 0.0)


Options = TypeVar("Options", bound=SkipOptions)

DENSE: Final = RequestOptions(threshold=-math.inf, enable=False, refresh_interval=0, warmup_steps=0)


class _ServerOptions(SkipOptions):
    """What a request gets that does not say, and what it may ask for.

    That is a threshold that is nowhere above `max_threshold`, or one of `profiles`; one that names neither gets
    `profile`.
    """

    threshold: Threshold = -math.inf
    enable: Switch = True
    refresh_interval: Steps = 0
    warmup_steps: Steps = 0
    max_threshold: Threshold | None = None
    profiles: Mapping[str, Calibration | DecodeCalibration] = {}

    @classmethod
    def from_additional_config(cls, config: object) -> Self:
        """Reads `lite_attn` of an engine's additional config; raises ValueError that names the key."""
        given = config.get(CONFIG_KEY) if isinstance(config, Mapping) else None
        place = f"additional_config.{CONFIG_KEY}"
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise ValueError(f"{place}: expected a table of options, got {_shown(given)}")
        try:
            options = cls.model_validate(dict(given))
        except ValidationError as error:
            raise ValueError(_describe(error, f"{place}.", cls)) from None
        options.check(f"{place}.")
        return options

    def check(self, prefix: str) -> None:
        """Raises ValueError where options contradict each other; it names them behind `prefix`."""
        if self.profile is None:
            if self.max_threshold is not None:
                _check_limit(self, self.max_threshold, f"{prefix}max_threshold = {self.max_threshold}", prefix)
        elif "threshold" in self.model_fields_set:
            raise ValueError(f"{prefix}threshold: expected none beside {prefix}profile, got {self.threshold}")
        elif self.profile not in self.profiles:
            raise ValueError(f"{prefix}profile: expected {self.known_profiles()}, got {_shown(self.profile)}")

    def known_profiles(self) -> str:
        """The names that requests may give, as an error shows them."""
        names = ", ".join(list(self.profiles)[:_MAX_SHOWN_NAMES])
        more = len(self.profiles) - _MAX_SHOWN_NAMES
        return f"one of {names}" + (f" and {more} more" if more > 0 else "") if names else "none, there are no profiles"


class ServerOptions(_ServerOptions):
    """Of a server of a language model.

    What skipping costs is measured in a share of the decode tokens that skip, `check_share`.
    """

    threshold: Threshold = -7.5
    profiles: Annotated[dict[str, DecodeCalibration], BeforeValidator(partial(_profiles, DecodeCalibration))] = {}
    check_share: Share = 0.0


class DenoiseServerOptions(_ServerOptions, DenoiseOptions):
    """Of a server of a diffusion model.

    All requests skip by the same `rule`, which decides what memory their states take. Where `relative`, all thresholds,
    `max_threshold` too, are relative to 1 / blocks of keys (see `LiteAttention`), and `threshold` is -1 by default.
    """

    threshold: Threshold = -8.0
    rule: Annotated[Rule, BeforeValidator(_rule)] = "running_max"
    relative: Switch = False
    profiles: Annotated[dict[str, Calibration], BeforeValidator(partial(_profiles, Calibration))] = {}

    @model_validator(mode="before")
    @classmethod
    def _default_threshold(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {"threshold": RELATIVE_THRESHOLD} | given if given.get("relative") else given

    def check(self, prefix: str) -> None:
        check_relative(self.relative, self.rule, f"{prefix}relative")
        if self.relative and self.profiles:
            raise ValueError(f"{prefix}relative: expected False beside {prefix}profiles, which are absolute, got True")
        super().check(prefix)
        for name, profile in self.profiles.items():
            if profile.rule != self.rule:
                wanted = f"one for the rule {self.rule}, which is {prefix}rule"
                raise ValueError(f"{prefix}profiles: {_shown(name)}: expected {wanted}, got one for {profile.rule}")


def parse_request(extra_args: object, server: ServerOptions) -> RequestOptions:
    """The options of a request from its extra arguments; those that it leaves out are the server's.

    A request that names a profile gets its thresholds, and its refresh interval unless it asks for another one; the
    limit of thresholds is for those that requests bring themselves. Keys that do not begin with `lite_attn_` belong to
    others. Raises LiteParamError.
    """
    extra_args = _mapping(extra_args, "extra_args")
    given = {
        key.removeprefix(PREFIX): value
        for key, value in extra_args.items()
        if isinstance(key, str) and key.startswith(PREFIX)
    }
    return _parse(RequestOptions, given, server, PREFIX)


def parse_denoise_request(extra_args: object, server: DenoiseServerOptions) -> DenoiseOptions:
    """As `parse_request` for a diffusion model, whose options stand together under the key `lite_attn`.

    The limit of thresholds is also for the rise that a request brings beside a profile.
    """
    extra_args = _mapping(extra_args, "extra_args")
    given = _mapping(extra_args.get(CONFIG_KEY), CONFIG_KEY)
    # One that a language model would have understood must not be passed over in silence.
    unknown = {key: value for key, value in extra_args.items() if isinstance(key, str) and key.startswith(PREFIX)}
    prefix = f"{CONFIG_KEY}."
    options = _parse(DenoiseOptions, {**given, **unknown}, server, prefix)
    limit = server.max_threshold
    if limit is not None and options.profile is not None and options.threshold_rise > server.threshold_rise:
        highest = min(max(server.profiles[options.profile].thresholds.values()) + options.threshold_rise, 0.0)
        if highest > limit:
            message = f"expected a rise to at most {limit}, the limit of this server, got one to {highest}"
            raise LiteParamError(f"{prefix}threshold_rise: {message}", f"{prefix}threshold_rise")
    return options


def _parse(model: type[Options], given: Mapping[Any, Any], server: _ServerOptions, prefix: str) -> Options:
    name = given.get("profile", None if "threshold" in given else server.profile)
    if not isinstance(name, str):  # none, or what validation refuses
        return _options(model, {**given, "profile": name}, server, prefix, server.max_threshold)
    if "threshold" in given:
        message = f"expected none beside {prefix}profile, which says it, got {_shown(given['threshold'])}"
        raise LiteParamError(f"{prefix}threshold: {message}", f"{prefix}threshold")
    profile = server.profiles.get(name)
    if profile is None:
        message = f"{prefix}profile: expected {server.known_profiles()}, got {_shown(name)}"
        raise LiteParamError(message, f"{prefix}profile")
    threshold = profile.mean_threshold
    if threshold > -math.inf:
        threshold = max(threshold, -MAX_THRESHOLD_SIZE)
    of_profile = {"profile": name, "threshold": threshold}
    return _options(model, {"refresh_interval": profile.refresh_interval, **given, **of_profile}, server, prefix, None)


def _mapping(value: object, name: str) -> Mapping[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise LiteParamError(f"{name}: expected a table of options, got {_shown(value)}", name)
    return value


def _options(
    model: type[Options], given: Mapping[Any, Any], server: _ServerOptions, prefix: str, limit: float | None
) -> Options:
    """Options of a request, with a threshold of at most `limit`; errors name them behind `prefix`."""
    defaults = {name: getattr(server, name) for name in model.model_fields}
    named = {name if isinstance(name, str) else _shown(name): value for name, value in given.items()}
    try:
        options = model.model_validate(defaults | named)
    except ValidationError as error:
        raise LiteParamError(_describe(error, prefix, model), f"{prefix}{error.errors()[0]['loc'][0]}") from None
    if limit is not None:
        _check_limit(options, limit, f"{limit}, the limit of this server", prefix)
    return options


def _check_limit(options: SkipOptions, limit: float, shown: str, prefix: str) -> None:
    """Raises LiteParamError if a threshold is, or rises, above a limit, which the error shows as `shown`."""
    if options.threshold > limit:
        message = f"expected at most {shown}, got {options.threshold}"
        raise LiteParamError(f"{prefix}threshold: {message}", f"{prefix}threshold")
    if options.highest_threshold > limit:
        message = f"expected a rise to at most {shown}, got one from {options.threshold} to {options.highest_threshold}"
        raise LiteParamError(f"{prefix}threshold_rise: {message}", f"{prefix}threshold_rise")


def parse_request_lenient(extra_args: object, server: ServerOptions) -> RequestOptions:
    """As `parse_request` where raising would end an engine: what cannot be read gets `DENSE` itself."""
    try:
        return parse_request(extra_args, server)
    except LiteParamError:
        return DENSE


def _describe(error: ValidationError, prefix: str, model: type[SkipOptions]) -> str:
    """Pydantic's errors as ours: the parameter, what was expected, what came."""
    messages = []
    for item in error.errors(include_url=False)[:_MAX_SHOWN_ERRORS]:
        name = str(item["loc"][0])
        if item["type"] == "extra_forbidden":
            known = ", ".join(f"{prefix}{field}" for field in model.model_fields)
            messages.append(f"{prefix}{_shown(name)[1:-1]}: unknown; expected one of {known}")
        else:
            messages.append(f"{prefix}{name}: {item['ctx']['error']}, got {_shown(item['input'])}")
    return "; ".join(messages)
