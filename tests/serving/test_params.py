import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lite_attention.calibration import DecodeCalibration
from lite_attention.options import Rule
from lite_attention.serving.params import (
    DENSE,
    DenoiseOptions,
    DenoiseServerOptions,
    LiteParamError,
    RequestOptions,
    ServerOptions,
    parse_denoise_request,
    parse_request,
    parse_request_lenient,
)
from tests.profiles import make_denoise_profile, make_profile

SERVER = ServerOptions()
KNOWN = (
    "lite_attn_threshold",
    "lite_attn_enable",
    "lite_attn_refresh_interval",
    "lite_attn_warmup_steps",
    "lite_attn_profile",
)


def profile(*thresholds: float, refresh_interval: int = 0) -> DecodeCalibration:
    by_layer = {f"layer {number}": threshold for number, threshold in enumerate(thresholds)}
    return make_profile(by_layer, refresh_interval=refresh_interval)


PROFILES = {"careful": profile(-8, -6), "fast": profile(-3, -math.inf, refresh_interval=9), "dense": profile(-math.inf)}

unprintable = st.builds(lambda digits: 10**digits, st.just(5000))  # Python refuses to show so many digits
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | unprintable
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
names = st.sampled_from(KNOWN) | st.text(max_size=12).map("lite_attn_".__add__) | st.text(max_size=20)


def test_a_request_may_name_a_profile() -> None:
    server = ServerOptions(profiles=PROFILES, warmup_steps=2, max_threshold=-7)
    careful = parse_request({"lite_attn_profile": "careful"}, server)
    assert (careful.profile, careful.threshold, careful.refresh_interval, careful.warmup_steps) == ("careful", -7, 0, 2)
    fast = parse_request({"lite_attn_profile": "fast", "lite_attn_warmup_steps": 1}, server)
    assert (fast.threshold, fast.refresh_interval, fast.warmup_steps) == (-3, 9, 1)
    assert parse_request({"lite_attn_profile": "fast", "lite_attn_refresh_interval": 4}, server).refresh_interval == 4
    assert not parse_request({"lite_attn_profile": "fast", "lite_attn_enable": False}, server).skips
    assert not parse_request({"lite_attn_profile": "dense"}, server).skips


@pytest.mark.parametrize(
    ("given", "message", "field"),
    [
        ({"profile": "wild"}, "lite_attn_profile: expected one of careful, fast, dense, got 'wild'", "profile"),
        ({"profile": 3}, "lite_attn_profile: expected the name of a profile, got 3", "profile"),
        ({"profile": ["careful"]}, "lite_attn_profile: expected the name of a profile", "profile"),
        ({"profile": "careful", "threshold": -9}, "lite_attn_threshold: expected none beside lite_attn_p", "threshold"),
    ],
)
def test_a_profile_that_cannot_be_used(given: dict[str, Any], message: str, field: str) -> None:
    server = ServerOptions(profiles=PROFILES)
    extra_args = {f"lite_attn_{name}": value for name, value in given.items()}
    with pytest.raises(LiteParamError, match=re.escape(message)) as error:
        parse_request(extra_args, server)
    assert error.value.parameter == f"lite_attn_{field}"
    assert parse_request_lenient(extra_args, server) is DENSE
    with pytest.raises(LiteParamError, match="expected none, there are no profiles, got 'careful'"):
        parse_request({"lite_attn_profile": "careful"}, SERVER)


def test_the_profile_of_a_server_is_for_requests_that_say_neither() -> None:
    server = ServerOptions.from_additional_config({"lite_attn": {"profiles": PROFILES, "profile": "careful"}})
    assert parse_request({"lite_attn_warmup_steps": 1}, server).profile == "careful"
    assert parse_request({"lite_attn_profile": "fast"}, server).profile == "fast"
    own = parse_request({"lite_attn_threshold": -4}, server)
    assert (own.profile, own.threshold, own.refresh_interval) == (None, -4, 0)
    # The limit of thresholds is for requests: it does not contradict a profile.
    table = {"profiles": PROFILES, "profile": "careful", "max_threshold": -9}
    assert ServerOptions.from_additional_config({"lite_attn": table}).profile == "careful"


def test_files_of_profiles_are_read_and_refused_with_the_reason(tmp_path: Path) -> None:
    PROFILES["careful"].save(tmp_path / "careful.toml")
    (tmp_path / "bad.toml").write_text("stage = 3")
    table = {"profiles": {"a": str(tmp_path / "careful.toml")}}
    assert ServerOptions.from_additional_config({"lite_attn": table}).profiles == {"a": PROFILES["careful"]}
    for profiles, message in (
        (
            {"a": str(tmp_path / "bad.toml")},
            r"lite_attn\.profiles: 'a': calibration .*bad\.toml: model: Field required",
        ),
        ({"a": str(tmp_path / "none.toml")}, r"'a': .*No such file.*none\.toml"),
        ({"a": 3}, r"expected a file of lite-attention calibrate for each name, got {'a': 3}"),
        ({"": str(tmp_path / "careful.toml")}, r"expected a file of lite-attention calibrate for each name, got {'':"),
        ("careful", r"expected a table with a file"),
    ):
        with pytest.raises(ValueError, match=message):
            ServerOptions.from_additional_config({"lite_attn": {"profiles": profiles}})
    for more, message in (
        ({"profile": "b"}, r"additional_config\.lite_attn\.profile: expected one of a, got 'b'"),
        ({"profile": "a", "threshold": -3}, r"lite_attn\.threshold: expected none beside .*profile, got -3"),
        ({"check_share": 2}, r"lite_attn\.check_share: expected a number from 0 to 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            ServerOptions.from_additional_config({"lite_attn": table | more})


def test_the_rule_is_the_servers() -> None:
    for rule in get_args(Rule):
        assert DenoiseServerOptions.from_additional_config({"lite_attn": {"rule": rule}}).rule == rule
    assert DenoiseServerOptions().rule == "running_max"
    for wrong in ("max", 1, ["mass"]):
        with pytest.raises(ValueError, match=r"lite_attn\.rule: expected 'running_max', 'mass' or .*, got"):
            DenoiseServerOptions.from_additional_config({"lite_attn": {"rule": wrong}})
    with pytest.raises(LiteParamError, match=r"lite_attn\.rule: unknown; expected one of lite_attn.threshold"):
        parse_denoise_request({"lite_attn": {"rule": "mass"}}, DenoiseServerOptions())


def test_options_of_language_models_are_not_those_of_diffusion_models() -> None:
    for table, server in (({"check_share": 0.1}, DenoiseServerOptions), ({"cooldown_steps": 1}, ServerOptions)):
        with pytest.raises(ValueError, match="unknown; expected one of"):
            server.from_additional_config({"lite_attn": table})


def test_profiles_of_diffusion_models(tmp_path: Path) -> None:
    make_denoise_profile({"a": -8, "b": -4}, refresh_interval=5).save(tmp_path / "careful.toml")
    make_profile({"a": -8}).save(tmp_path / "text.toml")
    table = {"profiles": {"careful": str(tmp_path / "careful.toml")}, "profile": "careful", "max_threshold": -9}
    server = DenoiseServerOptions.from_additional_config({"lite_attn": table})
    expected = {"enable": True, "warmup_steps": 0, "cooldown_steps": 0}
    for asked, options in (
        ({}, {"profile": "careful", "threshold": -6.0, "refresh_interval": 5}),
        ({"profile": "careful", "refresh_interval": 0}, {"profile": "careful", "threshold": -6, "refresh_interval": 0}),
        ({"threshold": -10}, {"threshold": -10.0, "refresh_interval": 0}),
    ):
        assert parse_denoise_request({"lite_attn": asked}, server) == DenoiseOptions(**expected | options)
    for asked, message in (
        ({"profile": "fast"}, r"lite_attn\.profile: expected one of careful, got 'fast'"),
        ({"profile": 3}, r"lite_attn\.profile: expected the name of a profile, got 3"),
        ({"profile": "careful", "threshold": -9}, r"lite_attn\.threshold: expected none beside lite_attn\.profile"),
        ({"threshold": -8}, r"lite_attn\.threshold: expected at most -9"),
    ):
        with pytest.raises(LiteParamError, match=message):
            parse_denoise_request({"lite_attn": asked}, server)
    for more, message in (
        (
            {"rule": "mass"},
            r"lite_attn\.profiles: 'careful': expected one for the rule mass, .*got one for running_max",
        ),
        (
            {"profiles": {"text": str(tmp_path / "text.toml")}},
            r"'text': calibration .*stage: Input should be 'forward'",
        ),
        ({"profile": "fast"}, r"lite_attn\.profile: expected one of careful, got 'fast'"),
        ({"threshold": -8}, r"lite_attn\.threshold: expected none beside .*profile"),
    ):
        with pytest.raises(ValueError, match=message):
            DenoiseServerOptions.from_additional_config({"lite_attn": table | more})


def test_defaults_of_the_server() -> None:
    expected = RequestOptions(threshold=-7.5, enable=True, refresh_interval=0, warmup_steps=0)
    assert parse_request(None, SERVER) == expected
    assert parse_request({}, SERVER) == expected
    assert parse_request({"top_a": 1, "liteattn": "x", 3: 4}, SERVER) == expected
    assert expected.skips


@pytest.mark.parametrize(
    ("key", "value", "field", "expected"),
    [
        ("lite_attn_threshold", -6, "threshold", -6.0),
        ("lite_attn_threshold", 6.5, "threshold", -6.5),
        ("lite_attn_threshold", 0, "threshold", 0.0),
        ("lite_attn_threshold", -1000, "threshold", -1000.0),
        ("lite_attn_threshold", -math.inf, "threshold", -math.inf),
        ("lite_attn_enable", False, "enable", False),
        ("lite_attn_enable", 0, "enable", False),
        ("lite_attn_enable", 1, "enable", True),
        ("lite_attn_refresh_interval", 8, "refresh_interval", 8),
        ("lite_attn_refresh_interval", 8.0, "refresh_interval", 8),
        ("lite_attn_warmup_steps", 1_000_000, "warmup_steps", 1_000_000),
    ],
)
def test_accepted(key: str, value: Any, field: str, expected: Any) -> None:
    got = getattr(parse_request({key: value}, SERVER), field)
    assert got == expected
    assert type(got) is type(expected)


def test_zero_threshold_has_no_sign() -> None:
    assert math.copysign(1, parse_request({"lite_attn_threshold": 0}, SERVER).threshold) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("lite_attn_threshold", value)
            for value in (math.nan, math.inf, True, "hot", "-6", None, [-6], {"a": 1}, -1000.5, 1001, 10**400)
        ),
        *(("lite_attn_enable", value) for value in (2, -1, "true", "false", None, [True], math.nan, 0.5)),
        *(
            (key, value)
            for key in ("lite_attn_refresh_interval", "lite_attn_warmup_steps")
            for value in (-1, 1.5, math.nan, math.inf, True, "4", None, [4], 1_000_001, 10**400)
        ),
    ],
)
def test_rejected_by_name(key: str, value: Any) -> None:
    with pytest.raises(LiteParamError, match=f"^{key}: expected .*, got ") as caught:
        parse_request({key: value}, SERVER)
    assert caught.value.parameter == key
    assert len(str(caught.value)) < 250
    assert parse_request_lenient({key: value}, SERVER) is DENSE


def test_unknown_key_lists_the_known_ones() -> None:
    with pytest.raises(LiteParamError, match="^lite_attn_treshold: unknown") as caught:
        parse_request({"lite_attn_treshold": -6}, SERVER)
    assert all(name in str(caught.value) for name in KNOWN)


def test_each_error_is_told() -> None:
    with pytest.raises(LiteParamError) as caught:
        parse_request({"lite_attn_threshold": "hot", "lite_attn_warmup_steps": -1}, SERVER)
    assert str(caught.value).count("expected") == 2


def test_a_huge_value_is_not_echoed() -> None:
    for extra_args in (
        {"lite_attn_threshold": "x" * 10**6},
        {"lite_attn_threshold": list(range(10**5))},
        {"lite_attn_" + "x" * 10**6: 1},
        {f"lite_attn_{index}": 1 for index in range(1000)},
    ):
        with pytest.raises(LiteParamError) as caught:
            parse_request(extra_args, SERVER)
        assert len(str(caught.value)) < 1500


def test_disabled_or_minus_infinity_does_not_skip() -> None:
    assert not parse_request({"lite_attn_enable": False}, SERVER).skips
    assert not parse_request({"lite_attn_threshold": -math.inf}, SERVER).skips
    assert not DENSE.skips


def test_limit_of_the_server() -> None:
    server = ServerOptions.from_additional_config({"lite_attn": {"max_threshold": -5}})
    assert parse_request({"lite_attn_threshold": -5}, server).threshold == -5
    with pytest.raises(LiteParamError, match="^lite_attn_threshold: expected at most -5.0"):
        parse_request({"lite_attn_threshold": -4.9}, server)


def test_server_options_are_read() -> None:
    config = {
        "lite_attn": {"threshold": 6, "enable": False, "refresh_interval": 8, "warmup_steps": 2},
        "other": 1,
    }
    server = ServerOptions.from_additional_config(config)
    assert parse_request({"lite_attn_enable": True}, server) == RequestOptions(
        threshold=-6.0, enable=True, refresh_interval=8, warmup_steps=2
    )


@pytest.mark.parametrize("config", [None, {}, {"other": {}}, {"lite_attn": None}, {"lite_attn": {}}, object()])
def test_no_server_options(config: object) -> None:
    assert ServerOptions.from_additional_config(config) == SERVER


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"threshold": "hot"}, r"additional_config\.lite_attn\.threshold: expected a number"),
        ({"treshold": -6}, r"additional_config\.lite_attn\.treshold: unknown.*max_threshold"),
        ({"enable": "yes"}, r"additional_config\.lite_attn\.enable: expected true or false, got 'yes'"),
        ({"max_threshold": math.nan}, r"additional_config\.lite_attn\.max_threshold: expected a number"),
        (
            {"threshold": -3, "max_threshold": -5},
            r"additional_config\.lite_attn\.threshold: expected at most",
        ),
        ([1], r"additional_config\.lite_attn: expected a table"),
    ],
)
def test_server_options_rejected(table: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ServerOptions.from_additional_config({"lite_attn": table})


@given(st.dictionaries(names, json_values, max_size=5) | json_values)
def test_only_our_error_whatever_comes(extra_args: Any) -> None:
    lenient = parse_request_lenient(extra_args, SERVER)
    try:
        options = parse_request(extra_args, SERVER)
    except LiteParamError as error:
        assert lenient is DENSE
        assert len(str(error)) < 1500
        str(error).encode("utf-8")
    else:
        assert lenient == options
        assert options.threshold <= 0
        assert options.refresh_interval >= 0 and options.warmup_steps >= 0


@given(json_values)
def test_server_config_raises_only_value_error(table: Any) -> None:
    try:
        ServerOptions.from_additional_config({"lite_attn": table})
    except ValueError as error:
        assert "additional_config.lite_attn" in str(error)


def test_options_of_diffusion_stand_together() -> None:
    server = DenoiseServerOptions.from_additional_config({"lite_attn": {"cooldown_steps": 3, "max_threshold": -2}})
    expected = DenoiseOptions(threshold=-8.0, enable=True, refresh_interval=0, warmup_steps=0, cooldown_steps=3)
    for nothing in (None, {}, {"lite_attn": None}, {"lite_attn": {}}, {"other": 1, 2: 3}):
        assert parse_denoise_request(nothing, server) == expected
    assert parse_denoise_request({"lite_attn": {"threshold": 4, "cooldown_steps": 0}}, server).threshold == -4.0


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"lite_attn": {"threshold": "hot"}}, r"^lite_attn\.threshold: expected a number"),
        ({"lite_attn": {"threshold": -1}}, r"^lite_attn\.threshold: expected at most -2\.0"),
        ({"lite_attn": {"cooldown_steps": -1}}, r"^lite_attn\.cooldown_steps: expected a whole number"),
        ({"lite_attn": {"banana": 1}}, r"^lite_attn\.banana: unknown; expected one of .*lite_attn\.cooldown_steps"),
        ({"lite_attn": {5: 1}}, r"^lite_attn\.5: unknown|^lite_attn\.: unknown"),
        ({"lite_attn": [1]}, r"^lite_attn: expected a table of options, got \[1\]"),
        ({"lite_attn_threshold": -4}, r"^lite_attn\.lite_attn_threshold: unknown"),
        ([1], r"^extra_args: expected"),
    ],
)
def test_bad_options_of_diffusion_are_named(extra_args: Any, message: str) -> None:
    server = DenoiseServerOptions(max_threshold=-2)
    with pytest.raises(LiteParamError, match=message):
        parse_denoise_request(extra_args, server)


@given(json_values)
def test_only_our_error_whatever_comes_to_diffusion(value: Any) -> None:
    try:
        options = parse_denoise_request({"lite_attn": value}, DenoiseServerOptions())
    except LiteParamError as error:
        assert len(str(error)) < 1500
    else:
        assert options.threshold <= 0


def test_cooldown_is_unknown_to_language_models() -> None:
    with pytest.raises(LiteParamError, match="^lite_attn_cooldown_steps: unknown"):
        parse_request({"lite_attn_cooldown_steps": 1}, SERVER)
