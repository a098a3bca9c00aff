"""DISTS by closed forms: no published weights are at hand."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from teasr.dists import TAPS, Dists, find_weights, l2_pool
from teasr.errors import TeasrError, UsageError
from teasr.metrics import score

WIDTHS = [4, 5, 3, 4, 6, 5, 4, 3, 5, 6, 4, 5, 3]
CHANNELS = 3 + sum(WIDTHS[tap] for tap in TAPS)


def random_weights() -> dict[str, Tensor]:
    """The network's layout with few channels."""
    generator = torch.Generator().manual_seed(0)
    weights, before = {}, 3
    for index, width in enumerate(WIDTHS):
        weights[f"conv{index}.weight"] = torch.randn(width, before, 3, 3, generator=generator) / 3
        weights[f"conv{index}.bias"] = 0.1 * torch.randn(width, generator=generator)
        before = width
    for name in ("alpha", "beta"):
        weights[name] = torch.rand(1, CHANNELS, 1, 1, generator=generator)
    return weights


def only(name: str, channels: list[int]) -> dict[str, Tensor]:
    """Weights that look at some channels of one term."""
    weights = random_weights()
    for term in ("alpha", "beta"):
        weights[term] = torch.zeros(1, CHANNELS, 1, 1)
    weights[name][:, channels] = 1
    return weights


def batches(height: int = 37, width: int = 42) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.rand(2, 2, 3, height, width, generator=generator)
    return first, second


def test_zero_on_identity_symmetric_and_per_sample() -> None:
    dists = Dists(random_weights())
    first, second = batches()
    assert dists(first, first).tolist() == [0, 0]
    forth, back = dists(first, second), dists(second, first)
    assert forth.shape == (2,) and (forth > 0).all()
    torch.testing.assert_close(forth, back)
    torch.testing.assert_close(forth[1:], dists(first[1:], second[1:]))


def test_equals_the_formula_written_out() -> None:
    """Every channel of every stage by NumPy's moments, in float64."""
    weights = random_weights()
    first, second = batches()
    stages = []
    for batch in (first.double(), second.double()):
        shift = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
        scale = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
        kept, features, index = [batch], (batch - shift) / scale, 0
        for block, count in enumerate([2, 2, 3, 3, 3]):
            features = plain_l2_pool(features) if block else features
            for _ in range(count):
                kernel, bias = (weights[f"conv{index}.{k}"].double() for k in ("weight", "bias"))
                features = F.conv2d(features, kernel, bias, padding=1).clamp(min=0)
                index += 1
            kept.append(features)
        stages.append(kept)
    alpha, beta = (weights[name].flatten().double().numpy() for name in ("alpha", "beta"))
    expected = np.zeros(2)
    for sample in range(2):
        channel, total = 0, 0.0
        for x, y in zip(*stages):
            for a, b in zip(x[sample].numpy(), y[sample].numpy()):
                covariance = np.cov(a.ravel(), b.ravel(), bias=True)
                texture = (2 * a.mean() * b.mean() + 1e-6) / (a.mean() ** 2 + b.mean() ** 2 + 1e-6)
                structure = (2 * covariance[0, 1] + 1e-6) / (np.trace(covariance) + 1e-6)
                total += alpha[channel] * texture + beta[channel] * structure
                channel += 1
        assert channel == CHANNELS
        expected[sample] = 1 - total / (alpha.sum() + beta.sum())
    actual = Dists(weights)(first, second)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_the_picture_terms_by_hand() -> None:
    """Red of 0.2 against 0.6: texture 2 * 0.12 / 0.4. Stripes against inverted: structure -1."""
    dark, light = torch.full((1, 3, 4, 4), 0.2), torch.full((1, 3, 4, 4), 0.6)
    assert Dists(only("alpha", [0]))(dark, light).item() == pytest.approx(1 - 0.24 / 0.4, abs=1e-5)
    assert Dists(only("beta", [0]))(dark, light).item() == pytest.approx(0, abs=1e-6)
    stripes = torch.tensor([0.0, 1.0]).repeat(1, 3, 4, 2)
    assert Dists(only("alpha", [1]))(stripes, 1 - stripes).item() == pytest.approx(0, abs=1e-6)
    assert Dists(only("beta", [1]))(stripes, 1 - stripes).item() == pytest.approx(2, abs=1e-4)
    both = only("beta", [1])
    both["alpha"][:, 1] = 3  # weights are shares: 3/4 of 0 and 1/4 of 2
    assert Dists(both)(stripes, 1 - stripes).item() == pytest.approx(0.5, abs=1e-4)


def plain_l2_pool(features: Tensor) -> Tensor:
    """The root of squares weighed by [1, 2, 1] x [1, 2, 1] / 16 at every second position."""
    padded = F.pad(features**2, (1, 1, 1, 1))
    height, width = (-(-side // 2) for side in features.shape[2:])
    total = torch.zeros(*features.shape[:2], height, width, dtype=features.dtype)
    for down, vertical in enumerate((1, 2, 1)):
        for across, horizontal in enumerate((1, 2, 1)):
            rows = slice(down, down + 2 * height - 1, 2)
            columns = slice(across, across + 2 * width - 1, 2)
            total += vertical * horizontal / 16 * padded[:, :, rows, columns]
    return total.sqrt()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 8)])
def test_l2_pool_against_the_direct_formula(size: tuple[int, int]) -> None:
    features = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(l2_pool(features), plain_l2_pool(features), rtol=0, atol=1e-6)


def test_pictures_of_any_size_and_of_one_colour() -> None:
    dists = Dists(random_weights())
    for size in ((1, 1), (3, 40)):
        black, white = np.zeros((*size, 3), np.uint8), np.full((*size, 3), 255, np.uint8)
        assert dists.distance(black, black) == 0
        assert np.isfinite(dists.distance(black, white))
    with pytest.raises(ValueError, match="one shape"):
        dists(batches()[0], batches(36)[0])


def test_score_has_it() -> None:
    dists = Dists(random_weights())
    first, second = np.random.default_rng(0).integers(0, 256, (2, 24, 20, 3), np.uint8)
    assert score(first, second, dists=dists).dists == dists.distance(first, second) > 0
    assert score(first, second).dists is None


def test_wrong_files_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "dists.safetensors"
    weights = random_weights()
    del weights["beta"]
    save_file(weights, path)
    with pytest.raises(TeasrError, match=r"dists\.safetensors.*beta missing"):
        Dists.load(path)
    save_file(random_weights() | {"alpha": torch.zeros(1, 9, 1, 1)}, path)
    with pytest.raises(TeasrError, match=rf"alpha has shape \(1, 9, 1, 1\); \(1, {CHANNELS}, 1, 1"):
        Dists.load(path)
    save_file(random_weights() | {"lin0.weight": torch.zeros(1)}, path)
    with pytest.raises(TeasrError, match=r"lin0\.weight unknown"):
        Dists.load(path)
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(TeasrError, match="Cannot read DISTS weights"):
        Dists.load(path)


def test_find_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEASR_DISTS", raising=False)
    assert find_weights() is None
    with pytest.raises(UsageError, match=r"dists\.safetensors"):
        find_weights(tmp_path)
    file = tmp_path / "dists.safetensors"
    file.touch()
    assert find_weights(tmp_path) == find_weights(str(file)) == file
    monkeypatch.setenv("TEASR_DISTS", str(tmp_path))
    assert find_weights() == file


def vgg16() -> SimpleNamespace:
    """What torchvision's function gives, with few channels."""
    layers: list[nn.Module] = []
    before = 3
    for index, width in enumerate(WIDTHS):
        if index in (2, 4, 7, 10):
            layers.append(nn.MaxPool2d(2, 2))
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
        before = width
    return SimpleNamespace(features=nn.Sequential(*layers))


def test_convolutions_may_come_from_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights()
    path = tmp_path / "dists.safetensors"
    save_file({name: weights[name] for name in ("alpha", "beta")}, path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UsageError, match="not installed"):
        Dists.load(path)

    module = ModuleType("torchvision")
    address = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url="https://host/vgg16-1.pth"))
    module.models = SimpleNamespace(vgg16=vgg16, VGG16_Weights=address)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", module)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(UsageError, match=r"none at .*vgg16-1\.pth"):
        Dists.load(path)

    features = vgg16().features
    convolutions = [layer for layer in features if isinstance(layer, nn.Conv2d)]
    for index, layer in enumerate(convolutions):
        layer.load_state_dict({k: weights[f"conv{index}.{k}"] for k in ("weight", "bias")})
    (tmp_path / "checkpoints").mkdir()
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save(state, tmp_path / "checkpoints" / "vgg16-1.pth")
    first, second = batches()
    assert torch.equal(Dists.load(path)(first, second), Dists(weights)(first, second))
