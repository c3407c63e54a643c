"""Settings come from options, then the environment, then the defaults, and are checked."""

from __future__ import annotations

import pytest

from onebase_edge.settings import Settings, SettingsError, environment_name, load_settings, parse_size
from onebase_engine.engine.messages import EngineConfig
from onebase_server.app.wiring import engine_config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1000000", 1_000_000),
        ("2GB", 2_000_000_000),
        ("2 gb", 2_000_000_000),
        ("1.5G", 1_500_000_000),
        ("512MiB", 512 * 1024**2),
        ("4kB", 4000),
        ("1TiB", 1024**4),
    ],
)
def test_sizes_are_bytes_with_decimal_or_binary_suffixes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "two", "-1GB", "1XB", "1GB2", "NaN", "1e9", "1GBB"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SettingsError, match="2GB"):
        parse_size(text)


def test_an_option_wins_over_the_environment_and_that_over_the_default() -> None:
    environ = {"ONEBASE_PORT": "9000", "ONEBASE_MAX_SEQUENCES": "7"}

    settings = load_settings({"port": 9001, "max_sequences": None}, environ)

    assert (settings.port, settings.max_sequences, settings.max_slots) == (9001, 7, Settings().max_slots)


def test_the_environment_takes_sizes_switches_and_several_adapters() -> None:
    environ = {
        "ONEBASE_KV_MEMORY": "2GB",
        "ONEBASE_DOUBLE_QUANT": "no",
        "ONEBASE_ADAPTER": "a=/x/a, b=/x/b",
        "UNRELATED": "1",
    }

    settings = load_settings({}, environ)

    assert settings.kv_memory == 2_000_000_000
    assert settings.double_quant is False
    assert settings.adapter == (("a", "/x/a"), ("b", "/x/b"))


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"ONEBASE_PORT": "eighty"}, "ONEBASE_PORT"),
        ({"ONEBASE_PORT": "70000"}, "--port"),
        ({"ONEBASE_QUANTIZATION": "fp4"}, "nf4, int8, none"),
        ({"ONEBASE_STALL_TIMEOUT": "nan"}, "--stall-timeout"),
        ({"ONEBASE_ADAPTER": "nofolder"}, "NAME=FOLDER"),
        ({"ONEBASE_DETERMINISTIC": "perhaps"}, "ONEBASE_DETERMINISTIC"),
        ({"ONEBASE_MAX_SEQUENCES": "0"}, "--max-sequences"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(environ: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({}, environ)
    assert named in str(caught.value)


def test_the_server_listens_on_loopback_unless_told_otherwise() -> None:
    assert Settings().host == "127.0.0.1"


def test_every_engine_setting_reaches_the_engine() -> None:
    settings = Settings(quantization="none", max_sequences=3, kv_memory=5, kv_dtype="int8", threads=2)

    config = engine_config(settings, "/base")

    assert config == EngineConfig(
        base_folder="/base",
        quantization="none",
        max_sequences=3,
        kv_memory=5,
        kv_dtype="int8",
        threads=2,
        max_slots=settings.max_slots,
        max_rank=settings.max_rank,
    )
    missing = set(EngineConfig.__struct_fields__) - set(vars(settings)) - {"base_folder", "block_size"}
    missing -= {"prefix_memory"}  # a part of host_memory
    assert not missing


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("allowed_host", "gpu.example, *", ("gpu.example", "*")),
        (
            "allowed_origin",
            "https://a.example,http://b.example:8080",
            ("https://a.example", "http://b.example:8080"),
        ),
        ("trusted_proxy", "10.0.0.7,10.1.0.0/16,fd00::/8", ("10.0.0.7", "10.1.0.0/16", "fd00::/8")),
    ],
)
def test_who_may_ask_is_a_list_in_the_environment(name: str, text: str, expected: tuple[str, ...]) -> None:
    settings = load_settings({}, {environment_name(name): text})

    assert getattr(settings, name) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("allowed_origin", "tools.example"),
        ("allowed_origin", "https://a.example/"),
        ("allowed_origin", "*"),
        ("trusted_proxy", "proxy.lan"),
        ("docs_url", "docs.example.com"),
        ("docs_url", "javascript:alert(1)"),
    ],
)
def test_a_site_or_an_address_in_another_form_is_refused_with_an_example(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match="as in"):
        load_settings({}, {environment_name(name): text})
