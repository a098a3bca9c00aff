from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from pydantic import ValidationError

from teasr.backbones.base import MINIMUM_TIME, velocity_from_image
from teasr.backbones.dit import (
    PRESETS,
    DiTSettings,
    DualBranchDiT,
    Magnifier,
    Windows,
    _from_tokens,
    _to_tokens,
    rotary_table,
    rotate,
    upsample,
)
from teasr.images import bicubic_upsample
from teasr.restoration import RestorationSettings, restore
from tests.backbones.networks import CHANGES, inputs, network, residual, with_other

PATCH, WINDOW = PRESETS["teasr-xs"].patch, PRESETS["teasr-xs"].window
PERIOD = PATCH * WINDOW


def reach(side: int, pixel: int, depth: int, local: int = 3) -> set[int]:
    """Low-resolution pixels along an axis of `side` that `pixel` can move in the picture.

    Args:
        local: pixels that the convolutions of the stem reach, and again those of the head.
    """

    def spread(pixels: set[int]) -> set[int]:
        near = {p + step for p in pixels for step in range(-local, local + 1)}
        return {p for p in near if 0 <= p < padded}

    padded = side if side <= PERIOD else -(-side // PERIOD) * PERIOD
    moved = {pixel} if pixel < side - 1 else set(range(pixel, padded))
    tokens = {p // PATCH for p in spread(moved)}
    for block in range(depth):
        shift = WINDOW // 2 * (block % 2) if side > PERIOD else 0
        windows = {
            (token - shift) // WINDOW for token in tokens
        }  # of the first, -1: what is cut off
        tokens = {t for t in range(padded // PATCH) if (t - shift) // WINDOW in windows}
    # Bilinear between the middles of tokens: half a token further than their own pixels.
    reached = {PATCH * t + p for t in tokens for p in range(-PATCH // 2, PATCH + PATCH // 2)}
    return {p for p in spread({p for p in reached if 0 <= p < padded}) if p < side}


def test_untrained_network_is_bicubic_in_one_step(photo) -> None:
    x_t, _, _, condition = inputs()
    one, zero = torch.ones(2), torch.zeros(2)
    image = x_t - network()(x_t, one, zero, condition)
    torch.testing.assert_close(image, upsample(condition, 4), rtol=0, atol=1e-6)
    lr = photo(13, 22)
    restored = restore(network(), lr, RestorationSettings(tile=8, overlap=4))
    # Within one level of Pillow's but for overshoot, which tiles cut differently at their rims.
    whole = restore(network(), lr, RestorationSettings())
    exact = bicubic_upsample(lr, 4).astype(int)
    assert abs(whole.astype(int) - exact)[:-16, :-16].max() <= 1
    assert abs(restored.astype(int) - exact).mean() < 1


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(4, 4), (4, 20), (12, 8), (32, 32), (36, 4), (32, 64), (44, 60), (100, 36)],
)
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


@pytest.mark.parametrize("changed", CHANGES)
def test_output_depends_on_each_input_alone(changed: str) -> None:
    made, (x_t, t, r, condition) = network(0), inputs()
    base = residual(made, x_t, t, r, condition)
    assert float(base.std()) > 0.01
    other = with_other(changed, x_t, t, r, condition)
    moved = residual(made, *other)
    assert float((moved - base).std()) > 1e-3 * float(base.std())


def test_the_noise_branch_sees_the_level_and_not_its_sign() -> None:
    made, (x_t, t, r, condition) = network(0), inputs()
    assert torch.equal(made(x_t, t, r, condition), made(x_t, -t, r, condition))


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (4, 12), (8, 4), (12, 8)])
def test_windows_are_undone_and_hold_neighbours(rows: int, columns: int, shift: int) -> None:
    windows = Windows(rows, columns, 4, 4, shift)
    tokens = torch.arange(2 * rows * columns * 3.0).view(2, rows * columns, 3)
    parts = windows.split(tokens)
    assert parts.shape == (2 * windows.count, 16, 3)
    assert torch.equal(windows.join(parts), tokens)
    down, across = shift * (rows > 4), shift * (columns > 4)
    grid = tokens.view(2, rows, columns, 3)
    first = grid[0, down : down + 4, across : across + 4]
    assert torch.equal(parts[0], first.reshape(16, 3))


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize(("rows", "columns"), [(4, 12), (8, 4), (12, 8)])
def test_the_mask_parts_what_only_wraps_around(rows: int, columns: int, shift: int) -> None:
    """In a window a token sees those of both streams that lie less than a window away from it."""
    windows = Windows(rows, columns, 4, 4, shift)
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    parts = windows.split(places.view(2, -1).T[None].repeat(3, 1, 1))
    mask = windows.mask(2, 2, parts.float())
    assert mask is not None and mask.shape == (3 * windows.count, 1, 32, 32)
    near = ((parts[:, :, None] - parts[:, None]).abs() < 4).all(dim=-1).repeat(1, 2, 2)
    assert torch.equal(mask[:, 0] == 0, near)
    assert bool((mask[:, 0][~near] == -math.inf).all())
    assert Windows(4, 4, 4, 4, shift).mask(2, 2, parts.float()) is None
    assert Windows(rows, columns, 4, 4, 0).mask(2, 2, parts.float()) is None


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (20, 28), (4, 32)])
def test_a_grid_that_fits_a_window_is_attended_to_as_a_whole(rows: int, columns: int) -> None:
    made, wide = network(0, depth=3), network(0, depth=3, window=64)
    arguments = inputs(rows, columns)
    assert torch.equal(residual(made, *arguments), residual(wide, *arguments))
    base = residual(made, *arguments)
    x_t, t, r, condition = arguments
    corner, noise = condition.clone(), x_t.clone()
    corner[:, :, :4, :4] *= -1
    noise[:, :, :16, :16] *= -1
    for moved in (residual(made, x_t, t, r, corner), residual(made, noise, t, r, condition)):
        assert float((moved - base)[:, :, -8:, -8:].abs().max()) > 1e-6


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("place", [(0, 0), (13, 30), (40, 70), (63, 127), (35, 96)])
def test_what_a_pixel_moves_is_what_its_windows_reach(place: tuple[int, int], depth: int) -> None:
    """Nothing beyond the windows, nothing across the edges, and the whole of what is allowed."""
    made, (x_t, t, r, condition) = network(0, depth=depth), inputs(64, 128, count=1)
    base = residual(made, x_t, t, r, condition)
    row, column = place
    other = condition.clone()
    other[:, :, row, column] += 20
    moved = residual(made, x_t, t, r, other) != base
    got = functional.max_pool2d(moved.any(1, keepdim=True).float(), 4)[0, 0].numpy().astype(bool)
    down, across = reach(64, row, depth), reach(128, column, depth)
    allowed = np.zeros((64, 128), bool)
    allowed[np.ix_(sorted(down), sorted(across))] = True
    assert not (got & ~allowed).any()
    assert got[allowed].mean() > 0.95  # convolutions fade towards the corners of their reach
    # Of the noise the same, but that its convolutions are in the head alone.
    noise = x_t.clone()
    noise[:, :, 4 * row, 4 * column] += 20
    moved = residual(made, noise, t, r, condition) != base
    got = functional.max_pool2d(moved.any(1, keepdim=True).float(), 4)[0, 0].numpy().astype(bool)
    assert got.any() and not (got & ~allowed).any()


@pytest.mark.parametrize("depth", [2, 5])
def test_an_edge_never_moves_the_opposite_edge(depth: int) -> None:
    made, (x_t, t, r, condition) = network(0, depth=depth), inputs(32, 224, count=1)
    base = residual(made, x_t, t, r, condition)
    left = condition.clone()
    left[..., :2] += 20
    changed = (residual(made, x_t, t, r, left) != base).any(dim=(0, 1, 2))
    assert bool(changed[:8].all()) and not changed[-4 * PERIOD :].any()


@pytest.mark.parametrize(("rows", "columns"), [(36, 32), (4, 100), (44, 60), (68, 8)])
def test_a_grid_that_is_no_whole_windows_is_extended_by_its_last_pixels(
    rows: int, columns: int
) -> None:
    made, (x_t, t, r, condition) = network(0), inputs(rows, columns)
    bottom, right = (-side % PERIOD if side > PERIOD else 0 for side in (rows, columns))
    assert bottom or right
    picture = functional.pad(condition, (0, right, 0, bottom), mode="replicate")
    noise = functional.pad(x_t, (0, 4 * right, 0, 4 * bottom), mode="replicate")
    whole = made(noise, t, r, picture)
    part = made(x_t, t, r, condition)
    # The velocity's bicubic part mirrors at the edge: compare what the network adds to it.
    bicubic = [upsample(image, 4)[..., : 4 * rows, : 4 * columns] for image in (condition, picture)]
    image = whole[..., : 4 * rows, : 4 * columns] * 0.8 + bicubic[1] - bicubic[0]
    torch.testing.assert_close(part * 0.8, image, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("down", "across"), [(PERIOD, 0), (0, PERIOD), (2 * PERIOD, 2 * PERIOD)])
def test_a_picture_moved_by_whole_windows_is_restored_alike(down: int, across: int) -> None:
    """In the interior, where it sees no edge."""
    made, (x_t, t, r, condition) = network(0), inputs(7 * PERIOD, 7 * PERIOD, count=1)
    base = residual(made, x_t, t, r, condition)
    noise = x_t.roll((4 * down, 4 * across), (2, 3))
    moved = residual(made, noise, t, r, condition.roll((down, across), (2, 3)))
    inside = slice(4 * 4 * PERIOD, 4 * 5 * PERIOD)
    there = [slice(4 * (4 * PERIOD - by), 4 * (5 * PERIOD - by)) for by in (down, across)]
    torch.testing.assert_close(
        moved[..., inside, inside], base[..., there[0], there[1]], rtol=1e-4, atol=1e-5
    )
    # By less than a window the windows fall elsewhere.
    shifted = residual(made, x_t.roll(16, 3), t, r, condition.roll(4, 3))
    assert float((shifted.roll(-16, 3) - base)[..., inside, inside].abs().max()) > 1e-3


def test_even_features_become_even_pixels() -> None:
    torch.manual_seed(0)
    magnifier = Magnifier(8, 4)
    features = torch.randn(2, 8, 1, 1).expand(2, 8, 6, 6)
    inside = magnifier(features)[..., 4:-4, 4:-4]
    torch.testing.assert_close(inside, inside[..., :1, :1].expand_as(inside))
    # It is still free to draw whatever varies.
    varied = magnifier(torch.randn(2, 8, 6, 6))
    assert (
        float(varied.unflatten(2, (6, 4)).unflatten(4, (6, 4)).std(dim=(3, 5)).detach().min())
        > 0.01
    )


def test_a_prepared_condition_gives_what_the_picture_gives() -> None:
    made, (x_t, t, r, condition) = network(0), inputs(20, 36)
    prepared = made.prepare(condition)
    for level in (t, t - 0.4):
        assert torch.equal(made(x_t, level, r, prepared), made(x_t, level, r, condition))


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


def test_tokens_hold_whole_patches() -> None:
    features = torch.randn(2, 5, 8, 12)
    tokens = _to_tokens(features, 4)
    assert tokens.shape == (2, 6, 80)
    assert torch.equal(tokens[1, 5].view(5, 4, 4), features[1, :, 4:, 8:])


def test_what_tokens_say_is_bilinear_between_their_middles() -> None:
    tokens = torch.randn(2, 6, 5)
    features = _from_tokens(tokens, 2, 3, 4)
    assert features.shape == (2, 5, 8, 12)
    first, second = tokens[:, 0], tokens[:, 1]
    torch.testing.assert_close(features[:, :, 0, 3], (5 * first + 3 * second) / 8)
    torch.testing.assert_close(features[:, :, 0, 4], (3 * first + 5 * second) / 8)
    torch.testing.assert_close(features[:, :, 0, 0], first)


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
    [("teasr-xs", 0, 1e6), ("teasr-s", 1e6, 15e6), ("teasr-b", 80e6, 120e6)],
)
def test_parameter_budget(preset: str, low: float, high: float) -> None:
    with torch.device("meta"):
        made = DualBranchDiT(PRESETS[preset])
    count = sum(parameter.numel() for parameter in made.parameters())
    assert low < count <= high
    assert preset != "teasr-s" or 2 * count < 30e6  # bytes in bfloat16
    assert not list(made.buffers())


STREAM = [
    *("modulation", "qkv.weight", "qkv.bias", "key_norm.weight", "query_norm.weight"),
    *("project.weight", "project.bias"),
    *("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"),
]
LAYERS = [
    *("stem.0", "stem.1.first", "stem.1.second", "head.0.first", "head.0.second", "head.1"),
    *("level_embedding.layers.0", "level_embedding.layers.2", "level_modulation"),
    *("target_embedding.layers.0", "target_embedding.layers.2", "target_modulation"),
    *("condition_tokens", "noise_tokens", "output_tokens", "fine_features", "fine_gain"),
]


def test_names_of_the_weights_are_those_of_the_folders_format() -> None:
    """Whoever renames one makes every stored model unreadable: raise `folder.FORMAT`."""
    names = {f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")}
    streams = itertools.product(range(2), ("noise", "condition"), STREAM)
    names |= {f"blocks.{i}.{stream}.{name}" for i, stream, name in streams}
    unread = set(STREAM) - {"modulation", "qkv.weight", "qkv.bias", "key_norm.weight"}
    names -= {f"blocks.1.condition.{name}" for name in unread}
    assert set(network().state_dict()) == names


@pytest.mark.parametrize("shape", [{"width": 100, "heads": 3}, {"width": 36, "heads": 6}])
def test_heads_that_do_not_divide_the_width_are_refused(shape: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="multiple of 4"):
        DiTSettings.model_validate(shape)


def test_fused_convolutions_are_equal_up_to_rounding() -> None:
    torch.manual_seed(0)
    network = DualBranchDiT(PRESETS["teasr-xs"]).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x_t, lr = torch.randn(2, 3, 96, 64), torch.rand(2, 3, 24, 16)
    one, zero = torch.ones(2), torch.zeros(2)
    with torch.no_grad():
        plain = network(x_t, one, zero, lr)
        network.fuse()
        assert torch.allclose(network(x_t, one, zero, lr), plain, atol=1e-4)
    network(x_t, one, zero, lr).sum().backward()  # with gradient nothing has changed
