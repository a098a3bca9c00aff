from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from teasr.config import Settings, apply_overrides, read_yaml
from teasr.errors import UsageError


class Feed(Settings):
    crop: int = Field(96, ge=16)
    preset: str = "teasr"
    betas: tuple[float, float] = (0.9, 0.99)


class Recipe(Settings):
    name: str
    feed: Feed = Feed()
    spare: Feed | None = None


def test_nested_settings_from_a_file_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\nfeed:\n  crop: 64\n  preset: x\n")
    recipe = Recipe.load(path, ["feed.crop=32", "spare.preset=y", "feed.betas=[0.5, 1e-3]"])
    assert recipe == Recipe(
        name="a", feed=Feed(crop=32, preset="x", betas=(0.5, 0.001)), spare=Feed(preset="y")
    )
    with pytest.raises(ValidationError, match="frozen"):
        recipe.name = "b"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"name": "a", "fed": {}}, ["unknown key 'fed'", "Did you mean 'feed'?", "name, spare"]),
        (
            {"name": "a", "feed": {"corp": 1}},
            ["'feed.corp'", "mean 'crop'?", "betas, crop, preset"],
        ),
        ({"name": "a", "spare": {"corp": 1}}, ["'spare.corp'", "Did you mean 'crop'?"]),
        ({"name": "a", "feed": {"zzzz": 1}}, ["unknown key 'feed.zzzz'", "Known keys: betas"]),
        ({"name": "a", "feed": {"crop": "big"}}, ["'feed.crop'", "integer", "'big'"]),
        ({"name": "a", "feed": {"crop": 8}}, ["'feed.crop'", "greater than or equal to 16", "8"]),
        ({"name": "a", "feed": {"betas": [1, "q"]}}, ["'feed.betas.1'", "valid number", "'q'"]),
        ({"name": "a", "feed": 3}, ["'feed'", "3"]),
        ({"name": "a", "feed": {1: 2}}, ["feed", "strings"]),
        ({}, ["'name'", "required"]),
    ],
)
def test_errors_name_source_field_and_what_is_accepted(data: dict, expected: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_mapping(data, "recipe.yaml")
    message = str(caught.value)
    assert message.startswith("recipe.yaml: ")
    for part in expected:
        assert part in message
    assert ("Did you mean" in message) == any("mean" in part for part in expected)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-2.5", -2.5),
        ("1e-4", 1e-4),
        ("2E3", 2000.0),
        ("1.5e+2", 150.0),
        ("true", True),
        ("null", None),
        ("", None),
        ("[1, 2]", [1, 2]),
        ("{a: 1}", {"a": 1}),
        ("/a=b/c", "/a=b/c"),
        ("realesrgan", "realesrgan"),
        ("'3'", "3"),
        ("'1e4'", "1e4"),
        ("nan", "nan"),  # a word that float() would take for a number
        ("infinity", "infinity"),
    ],
)
def test_override_values_are_parsed_as_yaml(text: str, value: object) -> None:
    parsed = apply_overrides({}, [f"a.b={text}"])["a"]["b"]
    assert parsed == value and type(parsed) is type(value)


def test_overrides_leave_their_input_alone_and_the_last_one_wins() -> None:
    data = {"a": {"b": 1, "c": 2}}
    assert apply_overrides(data, ["a.b=3", "a.b=4", "d=5"]) == {"a": {"b": 4, "c": 2}, "d": 5}
    assert data == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize("override", ["a", "=1", "a..b=1", ".a=1", "a.b.c=1", "a.b=[1", "a.b=@x"])
def test_overrides_that_cannot_be_read_are_named(override: str) -> None:
    with pytest.raises(UsageError) as caught:
        apply_overrides({"a": {"b": 1}}, [override])
    assert override.partition("=")[0] in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(UsageError, match=r"Cannot read.*recipe\.yaml"):
        read_yaml(path)
    path.write_text("a: 1\nb: [2\nc: 3\n")
    with pytest.raises(UsageError, match=r"recipe.yaml is not valid YAML at line \d"):
        read_yaml(path)
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UsageError, match="not valid YAML"):
        read_yaml(path)
    path.write_text("- 1\n")
    with pytest.raises(UsageError, match="holds a list"):
        read_yaml(path)
    path.write_text("# nothing yet\n")
    assert read_yaml(path) == {}


def test_defaults_are_checked_too() -> None:
    class Wrong(Settings):
        crop: int = Field(8, ge=16)

    with pytest.raises(ValidationError):
        Wrong()
