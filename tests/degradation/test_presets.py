"""Presets: the published table, and errors that help."""

from __future__ import annotations

from pathlib import Path

import pytest

from teasr.degradation import PRESETS, BlurSettings, DegradationSettings, load_preset
from teasr.errors import UsageError

# The table, row by row: (scale_range, gaussian, poisson, jpeg) of each stage, second blur.
TABLE = {
    "realesrgan": (
        ((0.15, 1.5), (1, 30), (0.05, 3), (30, 95)),
        ((0.3, 1.2), (1, 25), (0.05, 2.5), (30, 95)),
        0.8,
    ),
    "teasr": (
        ((0.3, 1.5), (1, 15), (0.05, 2), (60, 95)),
        ((0.6, 1.2), (1, 12), (0.05, 1), (60, 100)),
        0.5,
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_presets_are_the_published_table(name: str) -> None:
    settings = load_preset(name)
    *rows, second_blur = TABLE[name]
    assert settings.name == name
    for stage, row in zip((settings.first, settings.second), rows):
        noise = stage.noise
        assert row == (
            stage.resize.scale_range,
            noise.gaussian_sigma_range,
            noise.poisson_scale_range,
            stage.jpeg.quality_range,
        )
        assert (noise.gaussian_probability, noise.grey_probability) == (0.5, 0.4)
        shapes = tuple(stage.blur.kernels.model_dump().values())
        assert shapes == (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
        assert stage.blur.sinc_probability == 0.1
        assert stage.blur.size_range == (7, 21)
        assert stage.blur.generalized_beta_range == (0.5, 4)
        assert stage.blur.plateau_beta_range == (1, 2)
    assert settings.first.blur_probability == 1
    assert settings.second.blur_probability == second_blur
    assert settings.first.blur.sigma_range == (0.2, 3)
    assert settings.second.blur.sigma_range == (0.2, 1.5)
    assert tuple(settings.first.resize.directions.model_dump().values()) == (0.2, 0.7, 0.1)
    assert tuple(settings.second.resize.directions.model_dump().values()) == (0.3, 0.4, 0.3)
    assert settings.final_sinc_probability == 0.8
    assert not settings.sharpen_ground_truth


def test_every_field_is_described() -> None:
    def descriptions(schema: dict) -> list[str]:
        return [
            f"{name}.{field}"
            for name, section in schema["$defs"].items()
            for field, spec in section["properties"].items()
            if "description" not in spec
        ]

    assert descriptions(DegradationSettings.model_json_schema()) == []


def test_unknown_preset_is_answered_with_the_accepted_ones() -> None:
    with pytest.raises(UsageError) as caught:
        load_preset("realesrgam")
    assert str(caught.value) == (
        "Unknown degradation preset 'realesrgam'. Did you mean 'realesrgan'? "
        "Accepted: realesrgan, teasr, or the path of a .yaml file."
    )


def test_yaml_extends_a_preset_field_by_field(tmp_path: Path) -> None:
    path = tmp_path / "phones.yaml"
    path.write_text("extends: teasr\nsecond: {noise: {gaussian_sigma_range: [2, 9]}}\n")
    settings = load_preset(path)
    assert settings == load_preset(str(path))
    assert settings.name == "phones"
    assert settings.second.noise.gaussian_sigma_range == (2, 9)
    expected = PRESETS["teasr"].model_dump()
    expected["name"] = "phones"
    expected["second"]["noise"]["gaussian_sigma_range"] = (2, 9)
    assert settings.model_dump() == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: tesar\n", r"Unknown degradation preset 'tesar'. Did you mean 'teasr'\?"),
        ("extends: teasr\nfirst: {jpeg: {quality_range: [95, 30]}}\n", r"first\.jpeg\.quality"),
        ("extends: teasr\nfirst: {blur: {size_range: [8, 21]}}\n", r"first\.blur\.size_range.*odd"),
        (
            "extends: teasr\nfirst: {blur: {kernels: {isotropic: 0.9}}}\n",
            r"first\.blur\.kernels.*sum to 1\.45; they must sum to 1",
        ),
        ("extends: teasr\nfirst: {noise: {gray_probability: 1}}\n", "mean 'grey_probability'"),
        ("extends: teasr\nsecond: {blur_probability: 1.2}\n", r"second\.blur_probability"),
        ("name: own\n", "first"),
    ],
)
def test_a_wrong_file_names_the_file_and_the_field(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said) as caught:
        load_preset(path)
    assert str(path) in str(caught.value)


def test_a_range_must_hold_one_where_the_rule_splits_there() -> None:
    with pytest.raises(ValueError, match="low <= 1 <= high"):
        BlurSettings(generalized_beta_range=(2, 4))
