"""Drawing and replay: the rules' probabilities, the order of steps, equal bytes anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from scipy.stats import kstest

from teasr.degradation import (
    PRESETS,
    ColourSettings,
    Degradation,
    DegradationSettings,
    Step,
    apply,
    draw,
    replay,
    sample_seed,
    unsharp_mask,
)
from teasr.degradation.operators import to_float, to_uint8
from teasr.degradation.steps import draw_blur, draw_colour, draw_noise
from teasr.errors import UsageError


def chi_square(counts: Counter, probabilities: dict[str, float]) -> float:
    total = sum(counts.values())
    return sum(
        (counts[name] - total * share) ** 2 / (total * share)
        for name, share in probabilities.items()
    )


def test_kernel_mixture_has_the_stated_probabilities() -> None:
    generator = np.random.default_rng(0)
    blur = PRESETS["realesrgan"].first.blur
    steps = [draw_blur(blur, generator).params for _ in range(8000)]
    expected = {name: 0.9 * share for name, share in blur.kernels.model_dump().items()}
    counts = Counter(params["shape"] for params in steps)
    assert chi_square(counts, expected | {"sinc": 0.1}) < 22.5  # 6 degrees of freedom, p = 0.001
    sizes = Counter(str(params["size"]) for params in steps)
    assert chi_square(sizes, {str(size): 1 / 8 for size in range(7, 22, 2)}) < 24.3  # 7, p = 0.001
    for params in steps:
        if params["shape"] == "sinc":
            assert params["cutoff"] >= np.pi / (3 if params["size"] < 13 else 5)
        else:
            equal = params["sigma_x"] == params["sigma_y"]
            assert equal == ("anisotropic" not in params["shape"])
            assert ("beta" in params) == ("_" in params["shape"])
    betas = [params["beta"] for params in steps if params["shape"] == "generalized_isotropic"]
    assert min(betas) < 0.6 and max(betas) > 3.5
    assert np.mean(np.array(betas) < 1) == pytest.approx(0.5, abs=0.06)  # not U(0.5, 4): 0.14
    plateaus = [params["beta"] for params in steps if params["shape"] == "plateau_isotropic"]
    assert np.mean(np.array(plateaus) == 1) == pytest.approx(0.5, abs=0.06)


def test_noise_has_the_stated_probabilities() -> None:
    generator = np.random.default_rng(1)
    steps = [draw_noise(PRESETS["teasr"].first.noise, generator) for _ in range(4000)]
    assert np.mean([s.operator == "gaussian_noise" for s in steps]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([s.params["grey"] for s in steps]) == pytest.approx(0.4, abs=0.03)
    assert len({s.params["seed"] for s in steps}) == 4000


def test_colour_has_the_stated_probabilities_and_range() -> None:
    generator = np.random.default_rng(4)
    settings = ColourSettings(jitter_probability=0.3, grey_probability=0.1)
    drawn = [draw_colour(settings, generator) for _ in range(4000)]
    names = Counter(" ".join(step.operator for step in steps) for steps in drawn)
    expected = {
        "": 0.63, "colour_jitter": 0.27, "greyscale": 0.07, "colour_jitter greyscale": 0.03,
    }  # fmt: skip
    assert set(names) == set(expected)
    assert chi_square(names, expected) < 16.3  # 3 degrees of freedom, p = 0.001
    steps = [step for some in drawn for step in some if step.operator == "colour_jitter"]
    shifts = np.array([step.params["shift"] for step in steps])
    assert kstest(shifts.ravel(), "uniform", args=(-20, 40)).pvalue > 0.001
    assert np.abs(np.corrcoef(shifts.T) - np.eye(3)).max() < 0.12  # channels on their own


@pytest.mark.parametrize("name", PRESETS)
def test_colour_comes_last_and_changes_nothing_before_it(name: str) -> None:
    """What is off draws nothing from the generator, so earlier seeds keep their bytes."""
    settings = PRESETS[name]
    colour = ColourSettings(jitter_probability=1, grey_probability=1, jitter_shift=5)
    coloured = settings.model_copy(update={"colour": colour})
    for seed in range(20):
        generator = np.random.default_rng(seed)
        steps = draw(settings, 64, 64, generator)
        state = generator.bit_generator.state
        assert draw_colour(settings.colour, generator) == []
        assert generator.bit_generator.state == state
        *same, jitter, grey = draw(coloured, 64, 64, np.random.default_rng(seed))
        assert same == steps
        assert jitter.operator == "colour_jitter" and grey == Step("greyscale", {})
        # The generator goes on where it stood: not one number was drawn for what was off.
        generator.random()
        assert jitter.params["shift"] == generator.uniform(-5, 5, 3).tolist()


@pytest.mark.parametrize("name", PRESETS)
def test_steps_follow_the_reference_order(name: str) -> None:
    """Stage one, stage two, then [resize, sinc] and JPEG in either order."""
    settings = PRESETS[name]
    generator = np.random.default_rng(2)
    tails: Counter = Counter()
    second_blurs = 0
    ratios: list[float] = []
    for _ in range(1500):
        steps = draw(settings, 120, 200, generator)
        names = ["noise" if "noise" in step.operator else step.operator for step in steps]
        assert names[:4] == ["blur", "resize", "noise", "jpeg"]
        rest, names = steps[4:], names[4:]
        if names[:3] == ["blur", "resize", "noise"]:
            second_blurs += 1
            rest, names = rest[1:], names[1:]
        assert names[:2] == ["resize", "noise"]
        low, high = settings.second.resize.scale_range
        assert int(30 * low) <= rest[0].params["height"] <= 30 * high
        assert int(50 * low) <= rest[0].params["width"] <= 50 * high
        ratios.append(steps[1].params["width"] / 200)
        tail = names[2:]
        tails[" ".join(tail)] += 1
        last = next(step for step in rest[2:] if step.operator == "resize")
        assert (last.params["height"], last.params["width"]) == (30, 50)
        for step in rest[2:]:
            if step.operator == "blur":
                assert step.params["shape"] == "sinc" and step.params["cutoff"] >= np.pi / 3
    expected = {
        "resize blur jpeg": 0.4, "jpeg resize blur": 0.4, "resize jpeg": 0.1, "jpeg resize": 0.1,
    }  # fmt: skip
    assert set(tails) == set(expected)
    assert chi_square(tails, expected) < 16.3  # 3 degrees of freedom, p = 0.001
    share = settings.second.blur_probability
    assert second_blurs / 1500 == pytest.approx(share, abs=0.05)
    scales = np.array(ratios)
    assert np.mean(scales > 1) == pytest.approx(0.2, abs=0.04)
    assert np.mean(scales == 1) == pytest.approx(0.1, abs=0.03)
    assert scales.max() <= settings.first.resize.scale_range[1]


@pytest.mark.parametrize("name", PRESETS)
def test_a_pair_replays_from_its_recipe_as_json(photo, name: str) -> None:
    hr = photo(64, 96, 3)
    degrade = Degradation(name, seed=5)
    for variant in range(12):
        pair = degrade(hr, "a/photo é", variant)
        assert pair.lr.shape == (16, 24, 3) and pair.lr.dtype == np.uint8
        assert pair.hr is hr
        text = json.dumps(pair.recipe)
        assert json.loads(text) == pair.recipe  # floats come back to the last bit
        np.testing.assert_array_equal(replay(pair.hr, json.loads(text)), pair.lr)


def test_equal_samples_are_equal_and_others_differ(photo) -> None:
    hr = photo(64, 64, 4)
    first = Degradation("teasr", seed=1)
    reference = first(hr, "k").lr
    first(hr, "another")  # leaves no trace in what follows
    np.testing.assert_array_equal(first(hr, "k").lr, reference)
    np.testing.assert_array_equal(Degradation("teasr", seed=1)(hr, "k", 0).lr, reference)
    others = [
        first(hr, "k", 1), first(hr, "l"), Degradation("teasr", 2)(hr, "k"),
        Degradation("realesrgan", 1)(hr, "k"),
    ]  # fmt: skip
    assert all(not np.array_equal(pair.lr, reference) for pair in others)
    assert len({json.dumps(pair.recipe["steps"]) for pair in others}) == 4


def test_another_process_makes_the_same_bytes(photo) -> None:
    """Two fresh interpreters with different hash seeds, in reverse order, and this one."""
    script = (
        "import sys, hashlib, numpy as np\n"
        "from teasr.degradation import Degradation\n"
        "hr = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(64, 64, 3)\n"
        "d = Degradation('realesrgan', 9)\n"
        "for key in sys.argv[1:]:\n"
        "    print(key, hashlib.sha256(d(hr, key).lr.tobytes()).hexdigest())\n"
    )
    hr = photo(64, 64, 5)
    keys = [f"p{index}" for index in range(8)]
    results = []
    for hash_seed, order in (("1", keys), ("2", keys[::-1])):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONHASHSEED": hash_seed,
        }
        done = subprocess.run(
            [sys.executable, "-c", script, *order],
            input=hr.tobytes(), capture_output=True, check=True, env=environment,
        )  # fmt: skip
        results.append(sorted(done.stdout.decode().split("\n")))
    degrade = Degradation("realesrgan", 9)
    here = [f"{k} {hashlib.sha256(degrade(hr, k).lr.tobytes()).hexdigest()}" for k in keys]
    assert results[0] == results[1] == sorted([*here, ""])


def test_a_worker_that_degrades_imports_neither_albumentations_nor_torch() -> None:
    script = (
        "import sys; from teasr.degradation import Degradation\n"
        "assert not {'albumentations', 'torch', 'ray', 'mlflow'} & set(sys.modules)\n"
        "from teasr.degradation import RealESRGAN\n"
        "assert 'albumentations' in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_sample_seeds_are_unambiguous_and_63_bits() -> None:
    """Joined without quotes or without separators, pairs of these would be one sample."""
    samples = [
        (1, "a", "b,0", 0), (1, "a,b", "0", 0), (1, "a", 'b","0', 0),
        (1, "ab", "c", 0), (1, "a", "bc", 0), (1, "a", "bc0", 0), (1, "1a", "bc", 0),
    ]  # fmt: skip
    seeds = {sample_seed(*sample) for sample in samples}
    assert len(seeds) == len(samples)
    many = [sample_seed(0, "teasr", "k", variant) for variant in range(2000)]
    assert all(0 <= seed < 2**63 for seed in many) and max(many) > 2**62
    assert len(set(many)) == 2000


def test_sharpened_ground_truth_is_the_pair_and_replays(photo) -> None:
    hr = photo(64, 64, 6)
    hr[:, 32:] //= 3  # an edge to sharpen
    settings = PRESETS["realesrgan"].model_copy(update={"sharpen_ground_truth": True})
    pair = Degradation(settings, 1)(hr, "k")
    np.testing.assert_array_equal(pair.hr, to_uint8(unsharp_mask(to_float(hr))))
    assert not np.array_equal(pair.hr, hr)
    assert pair.recipe["sharpened"] is True
    np.testing.assert_array_equal(replay(pair.hr, pair.recipe), pair.lr)
    np.testing.assert_array_equal(Degradation("realesrgan", 1)(pair.hr, "k").lr, pair.lr)
    steps = draw(settings, 64, 64, np.random.default_rng(0))
    assert steps[0] == Step("unsharp_mask", {})


@pytest.mark.parametrize("size", [(62, 64), (64, 63), (2, 4)])
def test_sizes_that_have_no_quarter_are_refused(photo, size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=r"multiples of 4"):
        Degradation("teasr")(photo(*size), "k")


def test_the_smallest_picture_and_an_odd_stride_degrade(photo) -> None:
    for variant in range(20):
        assert Degradation("realesrgan")(photo(4, 4), "k", variant).lr.shape == (1, 1, 3)
    strided = photo(128, 128)[::2, ::2]
    copied = Degradation("teasr")(np.ascontiguousarray(strided), "k").lr
    np.testing.assert_array_equal(Degradation("teasr")(strided, "k").lr, copied)


def test_the_ground_truth_is_not_written_to(photo) -> None:
    hr = photo(64, 64)
    before = hr.copy()
    hr.setflags(write=False)
    for variant in range(10):
        Degradation("realesrgan")(hr, "k", variant)
    np.testing.assert_array_equal(hr, before)
    floats = to_float(before)
    kept = floats.copy()
    apply(floats, draw(PRESETS["realesrgan"], 64, 64, np.random.default_rng(0)))
    np.testing.assert_array_equal(floats, kept)


def test_a_recipe_that_does_not_fit_is_refused(photo) -> None:
    pair = Degradation("teasr")(photo(64, 64), "k")
    with pytest.raises(UsageError, match="64x64"):
        replay(photo(64, 96), pair.recipe)
    with pytest.raises(UsageError, match="version 99"):
        replay(pair.hr, pair.recipe | {"version": 99})
    with pytest.raises(UsageError, match="'blurr'"):
        replay(pair.hr, pair.recipe | {"steps": [{"operator": "blurr", "params": {}}]})
    with pytest.raises(UsageError, match="jpeg"):
        replay(pair.hr, pair.recipe | {"steps": [{"operator": "jpeg", "params": {"q": 1}}]})
    with pytest.raises(UsageError, match="float64"):
        Degradation("teasr")(np.zeros((8, 8, 3)), "k")


def test_settings_change_what_they_say() -> None:
    """Each probability at its ends: no setting is read and then ignored."""

    def drawn(**stage: object) -> list[Step]:
        first = PRESETS["teasr"].model_dump()["first"] | stage
        settings = DegradationSettings.from_mapping(
            PRESETS["teasr"].model_dump() | {"first": first, "final_sinc_probability": 0}, "test"
        )
        return draw(settings, 64, 64, np.random.default_rng(3))

    assert drawn(blur_probability=0)[0].operator == "resize"
    assert drawn(blur={"sinc_probability": 1})[0].params["shape"] == "sinc"
    assert drawn(resize={"directions": {"up": 0, "down": 0, "keep": 1}})[1].params["width"] == 64
    assert drawn(noise={"gaussian_probability": 0})[2].operator == "poisson_noise"
    assert drawn(noise={"grey_probability": 1})[2].params["grey"] is True
    assert drawn(jpeg={"quality_range": [77, 77]})[3].params == {"quality": 77}
    assert all(step.params.get("shape") != "sinc" for step in drawn()[-2:])
