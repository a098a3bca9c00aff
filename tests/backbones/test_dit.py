from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from teasr.backbones.base import MINIMUM_TIME, velocity_from_image
from teasr.backbones.dit import (
    PRESETS,
    DiTSettings,
    DualBranchDiT,
    _from_tokens,
    _to_tokens,
    rotary_table,
    rotate,
    upsample,
)
from teasr.images import bicubic_upsample
from teasr.restoration import RestorationSettings, restore


def network(seed: int | None = None) -> DualBranchDiT:
    """The smallest preset; with a seed, every parameter is moved off its initial value."""
    torch.manual_seed(0)
    made = DualBranchDiT(PRESETS["teasr-xs"]).eval()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in made.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def inputs(rows: int = 8, columns: int = 8, count: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    condition = torch.rand(count, 3, rows, columns, generator=generator) * 2 - 1
    x_t = torch.randn(count, 3, 4 * rows, 4 * columns, generator=generator)
    t, r = torch.full((count,), 0.8), torch.full((count,), 0.3)
    return x_t, t, r, condition


@torch.no_grad()
def residual(made: DualBranchDiT, x_t: Tensor, t: Tensor, r: Tensor, condition: Tensor) -> Tensor:
    """What the network adds to the bicubic picture: free of the t in the conversion."""
    velocity = made(x_t, t, r, condition)
    level = t.abs().clamp(min=MINIMUM_TIME).view(-1, 1, 1, 1)
    return x_t - level * velocity - upsample(condition, 4)


def test_untrained_network_is_bicubic_in_one_step(photo) -> None:
    x_t, _, _, condition = inputs()
    one, zero = torch.ones(2), torch.zeros(2)
    image = x_t - network()(x_t, one, zero, condition)
    torch.testing.assert_close(image, upsample(condition, 4), rtol=0, atol=1e-6)
    lr = photo(13, 22)
    restored = restore(network(), lr, RestorationSettings(tile=8, overlap=4))
    # Within one level of Pillow's but for overshoot, which tiles cut differently at their rims.
    whole = restore(network(), lr, RestorationSettings(tile=64))
    exact = bicubic_upsample(lr, 4).astype(int)
    assert abs(whole.astype(int) - exact)[:-16, :-16].max() <= 1
    assert abs(restored.astype(int) - exact).mean() < 1


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (4, 20), (12, 8), (28, 4)])
def test_any_size_that_is_a_multiple_of_the_patch(rows: int, columns: int) -> None:
    made = network(0)
    assert made.multiple == 4 and made.scale == 4
    x_t, t, r, condition = inputs(rows, columns)
    velocity = made(x_t, t, r, condition)
    assert velocity.shape == x_t.shape and velocity.dtype == torch.float32
    assert bool(torch.isfinite(velocity).all())


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("scale", [1, 2])
def test_other_patches_and_scales(patch: int, scale: int) -> None:
    settings = PRESETS["teasr-xs"].model_copy(update={"patch": patch, "scale": scale})
    made = DualBranchDiT(settings)
    condition = torch.zeros(1, 3, 6, 4)
    x_t = torch.zeros(1, 3, 6 * scale, 4 * scale)
    assert made(x_t, torch.ones(1), torch.zeros(1), condition).shape == x_t.shape


def test_samples_of_a_batch_do_not_meet() -> None:
    made, (x_t, _, _, condition) = network(0), inputs()
    t, r = torch.tensor([0.8, 0.4]), torch.tensor([0.3, -0.4])
    both = residual(made, x_t, t, r, condition)
    for i in range(2):
        part = slice(i, i + 1)
        alone = residual(made, x_t[part], t[part], r[part], condition[part])
        torch.testing.assert_close(both[part], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changed", ["x_t", "t", "r", "sign of r", "condition"])
def test_output_depends_on_each_input_alone(changed: str) -> None:
    made, (x_t, t, r, condition) = network(0), inputs()
    base = residual(made, x_t, t, r, condition)
    assert float(base.std()) > 0.01
    other = {
        "x_t": (x_t.flip(-1), t, r, condition),
        "t": (x_t, t - 0.1, r, condition),
        "r": (x_t, t, r - 0.1, condition),
        "sign of r": (x_t, t, -r, condition),
        "condition": (x_t, t, r, condition.flip(-1)),
    }[changed]
    moved = residual(made, *other)
    assert float((moved - base).std()) > 1e-3 * float(base.std())


def test_the_noise_branch_sees_the_level_and_not_its_sign() -> None:
    made, (x_t, t, r, condition) = network(0), inputs()
    assert torch.equal(made(x_t, t, r, condition), made(x_t, -t, r, condition))


def test_every_part_of_a_tile_reaches_every_other() -> None:
    """Joint attention: one corner of the picture, or of the noise, moves the opposite corner."""
    made, (x_t, t, r, condition) = network(0), inputs()
    base = residual(made, x_t, t, r, condition)
    corner = condition.clone()
    corner[:, :, :4, :4] *= -1
    noise = x_t.clone()
    noise[:, :, :16, :16] *= -1
    for moved in (residual(made, x_t, t, r, corner), residual(made, noise, t, r, condition)):
        assert float((moved - base)[:, :, -8:, -8:].abs().max()) > 1e-6


def test_gradient_reaches_every_parameter() -> None:
    made, (x_t, t, r, condition) = network(0), inputs()
    made(x_t, t, r, condition).square().mean().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert all(bool(torch.isfinite(p.grad).all()) for p in made.parameters() if p.grad is not None)


def test_gradient_starts_at_the_zero_initialised_head() -> None:
    made, (x_t, t, r, condition) = network(), inputs()
    made(x_t, t, r, condition).square().mean().backward()
    moved = {name for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    last = f"head.{len(made.head) - 1}."
    assert moved == {last + "weight", last + "bias"}


def test_rotation_preserves_norms_and_is_relative() -> None:
    rows, columns, width = 5, 7, 16
    table = rotary_table(rows, columns, width, torch.device("cpu"), torch.float32)
    assert table.shape == (2, rows * columns, 1, width // 2)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, width, generator=generator)
    queries, keys = (
        rotate(v.expand(1, rows * columns, 1, width), table)[0, :, 0] for v in (query, key)
    )
    torch.testing.assert_close(queries.norm(dim=1), query.norm().expand(rows * columns))
    scores = (queries @ keys.T).view(rows, columns, rows, columns)
    assert float(scores[0, 0, 0, 0]) == pytest.approx(float(query @ key), abs=1e-4)
    for down in range(-2, 3):
        for across in range(-2, 3):
            same = [
                scores[i, j, i + down, j + across]
                for i in range(rows)
                for j in range(columns)
                if 0 <= i + down < rows and 0 <= j + across < columns
            ]
            assert float(torch.stack(same).std()) < 1e-4
    ends = [(2, 2), (3, 2), (1, 2), (2, 3), (2, 1)]
    offsets = torch.stack([scores[2, 2, i, j] for i, j in ends])
    assert float(torch.pdist(offsets[:, None]).min()) > 1e-3  # both axes and directions count


def test_tokens_round_trip() -> None:
    features = torch.randn(2, 5, 8, 12)
    tokens = _to_tokens(features, 4)
    assert tokens.shape == (2, 6, 80)
    assert torch.equal(_from_tokens(tokens, 2, 3, 4), features)
    # Token k is the patch at row k // columns, column k % columns: the order of the rotary table.
    assert torch.equal(
        tokens[:, 4].sort().values, features[:, :, 4:8, 4:8].flatten(1).sort().values
    )


def test_velocity_from_image_round_trip_and_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    x_t, image = torch.randn(2, 5, 3, 4, 4, generator=generator)
    t = torch.tensor([1.0, 0.5, MINIMUM_TIME, -0.3, -1.0])
    velocity = velocity_from_image(x_t, image, t)
    torch.testing.assert_close(x_t - t.abs().view(-1, 1, 1, 1) * velocity, image)
    low = torch.tensor([0.0, 1e-8, 0.01, -0.05, 0.099])
    bounded = velocity_from_image(x_t, image, low)
    torch.testing.assert_close(bounded, (x_t - image) / MINIMUM_TIME)
    moved = x_t - low.abs().view(-1, 1, 1, 1) * bounded
    share = (low.abs() / MINIMUM_TIME).view(-1, 1, 1, 1)
    torch.testing.assert_close(moved, x_t + share * (image - x_t))


def test_bfloat16_computes_close_to_float32_with_times_in_float32() -> None:
    made, (x_t, _, _, condition) = network(0), inputs()
    t, r = torch.tensor([0.8013, 0.8017]), torch.tensor([0.3001, 0.3003])
    exact = residual(made, x_t, t, r, condition)
    made.to(torch.bfloat16)
    velocity = made(x_t, t, r, condition)
    assert velocity.dtype == torch.float32 and made.dtype == torch.bfloat16
    coarse = residual(made, x_t, t, r, condition)
    assert float((coarse - exact).std()) < 0.05 * float(exact.std())
    # 0.8013 and 0.8017 are one number in bfloat16; their embeddings must still differ.
    embedded = made.level_embedding(t)
    assert not torch.equal(embedded[0], embedded[1])


@pytest.mark.parametrize(
    ("preset", "low", "high"),
    [("teasr-xs", 0, 1e6), ("teasr-s", 1e6, 15e6), ("teasr-b", 75e6, 125e6)],
)
def test_parameter_budget(preset: str, low: float, high: float) -> None:
    with torch.device("meta"):
        made = DualBranchDiT(PRESETS[preset])
    assert low < sum(parameter.numel() for parameter in made.parameters()) <= high


@pytest.mark.parametrize("shape", [{"width": 100, "heads": 3}, {"width": 36, "heads": 6}])
def test_heads_that_do_not_divide_the_width_are_refused(shape: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="multiple of 4"):
        DiTSettings.model_validate(shape)
