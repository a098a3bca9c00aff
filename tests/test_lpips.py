from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from teasr.errors import TeasrError, UsageError
from teasr.lpips import Lpips, convolutions, find_weights
from teasr.metrics import score

NETWORKS = ["alex", "vgg"]


def random_weights(network: str, bias: float = 0.1) -> dict[str, torch.Tensor]:
    """The network's layout with few channels."""
    generator = torch.Generator().manual_seed(0)
    if network == "alex":
        widths, kernels, taps = [4, 6, 5, 7, 3], [11, 5, 3, 3, 3], range(5)
    else:
        widths, kernels = [3, 4, 4, 5, 6, 6, 5, 7, 7, 6, 4, 4, 5], [3] * 13
        taps = [1, 3, 6, 9, 12]
    weights, before = {}, 3
    for index, (width, kernel) in enumerate(zip(widths, kernels)):
        shape = (width, before, kernel, kernel)
        weights[f"conv{index}.weight"] = torch.randn(shape, generator=generator) / kernel
        weights[f"conv{index}.bias"] = bias * torch.randn(width, generator=generator)
        before = width
    for index, tap in enumerate(taps):
        weights[f"lin{index}.weight"] = torch.rand(1, widths[tap], 1, 1, generator=generator)
    return weights


def batches(size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.rand(2, 2, 3, size, size + 5, generator=generator) * 2 - 1
    return first, second


def plain_lpips(network: str, weights: dict, first: torch.Tensor, second: torch.Tensor):
    """torchvision's `features`, written out, and the paper's equation 1 with an einsum."""
    if network == "alex":
        plan = [(0, 4, 2), "tap", "pool3", (1, 1, 2), "tap", "pool3"]
        plan += [(2, 1, 1), "tap", (3, 1, 1), "tap", (4, 1, 1), "tap"]
    else:
        plan, index = [], 0
        for block, count in enumerate([2, 2, 3, 3, 3]):
            plan += ["pool2"] if block else []
            plan += [(index + i, 1, 1) for i in range(count)] + ["tap"]
            index += count
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    x, y = ((batch.double() - shift) / scale for batch in (first, second))
    total, tap = torch.zeros(len(first), dtype=torch.float64), 0
    for step in plan:
        if step == "tap":
            unit_x = x / ((x**2).sum(1, keepdim=True).sqrt() + 1e-10)
            unit_y = y / ((y**2).sum(1, keepdim=True).sqrt() + 1e-10)
            head = weights[f"lin{tap}.weight"].flatten().double()
            positions = x.shape[2] * x.shape[3]
            total += torch.einsum("nchw,c->n", (unit_x - unit_y) ** 2, head) / positions
            tap += 1
        elif isinstance(step, str):
            x, y = (nn.MaxPool2d(int(step[-1]), stride=2)(z) for z in (x, y))
        else:
            index, stride, padding = step
            kernel = weights[f"conv{index}.weight"].double()
            bias = weights[f"conv{index}.bias"].double()
            x, y = (
                torch.clamp(F.conv2d(z, kernel, bias, stride=stride, padding=padding), min=0)
                for z in (x, y)
            )
    return total


@pytest.mark.parametrize("network", NETWORKS)
def test_equals_the_formula_written_out(network: str) -> None:
    weights = random_weights(network)
    first, second = batches()
    distance = Lpips(weights)(first, second)
    assert distance.shape == (2,) and distance.dtype == torch.float32
    expected = plain_lpips(network, weights, first, second)
    torch.testing.assert_close(distance.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
def test_zero_on_identity_symmetric_and_per_sample(network: str) -> None:
    lpips = Lpips(random_weights(network))
    assert lpips.network == network
    first, second = batches()
    assert lpips(first, first).tolist() == [0, 0]
    forth, back = lpips(first, second), lpips(second, first)
    torch.testing.assert_close(forth, back)
    torch.testing.assert_close(forth[1:], lpips(first[1:], second[1:]))
    mixed = lpips(torch.stack([first[0], first[1]]), torch.stack([first[0], second[1]]))
    assert mixed[0] == 0 and mixed[1] > 0


def test_gradient_flows_to_the_picture_and_not_to_the_weights() -> None:
    lpips = Lpips(random_weights("alex"))
    first, second = batches()
    first.requires_grad_()
    lpips(first, second).sum().backward()
    assert first.grad is not None and first.grad.abs().sum() > 0
    assert all(not p.requires_grad and p.grad is None for p in lpips.parameters())
    with torch.no_grad():
        downhill = lpips(first - 0.5 * first.grad / first.grad.abs().max(), second)
    assert downhill.sum() < lpips(first, second).sum()


def test_gradient_is_finite_where_every_feature_is_off() -> None:
    """Without biases a picture of the mean colour has only zeros behind the first ReLU."""
    lpips = Lpips(random_weights("alex", bias=0))
    flat = lpips.shift.expand(1, 3, 40, 40).clone().requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        lpips(flat, batches(40)[1][:1, :, :, :40]).sum().backward()
    assert torch.isfinite(flat.grad).all()


def test_half_precision_stays_close() -> None:
    weights = random_weights("vgg")
    first, second = batches()
    exact, half = Lpips(weights)(first, second), Lpips(weights, torch.bfloat16)(first, second)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0)


@pytest.mark.parametrize(("network", "smallest"), [("alex", 31), ("vgg", 16)])
def test_smallest_picture(network: str, smallest: int) -> None:
    lpips = Lpips(random_weights(network))
    picture = torch.zeros(1, 3, smallest, smallest)
    assert torch.isfinite(lpips(picture, picture + 0.5)).all()
    with pytest.raises(ValueError, match=f"needs {smallest} pixels"):
        lpips(picture[..., 1:], picture[..., 1:])
    assert lpips.smallest == smallest
    for side, measured in ((max(smallest, 19), True), (smallest - 1, False)):
        if side >= 19:  # that PSNR and SSIM need
            pixels = np.zeros((side, 40, 3), np.uint8)
            assert (score(pixels, pixels, lpips).lpips is not None) == measured
    with pytest.raises(ValueError, match="one shape"):
        lpips(picture, picture[..., 1:])


def test_pictures_are_brought_to_the_range_of_the_network() -> None:
    lpips = Lpips(random_weights("alex"))
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 256, (2, 40, 44, 3), dtype=np.uint8)
    tensors = [
        torch.from_numpy(p.transpose(2, 0, 1) / 255.0 * 2 - 1)[None] for p in (first, second)
    ]
    assert lpips.distance(first, second) == pytest.approx(float(lpips(*tensors)), rel=1e-5)
    assert score(first, second, lpips).lpips == lpips.distance(first, second)


@pytest.mark.parametrize("network", NETWORKS)
def test_load_tells_the_network_from_the_tensors(network: str, tmp_path: Path) -> None:
    weights = random_weights(network)
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor.half() for name, tensor in weights.items()}, path)
    lpips = Lpips.load(path)
    assert lpips.network == network
    first, second = batches()
    torch.testing.assert_close(
        lpips(first, second), Lpips(weights)(first, second), rtol=0.02, atol=0
    )


def test_wrong_files_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights = random_weights("alex")
    del weights["lin3.weight"]
    save_file(weights, path)
    with pytest.raises(TeasrError, match=r"weights\.safetensors.*lin3\.weight missing"):
        Lpips.load(path)
    save_file(random_weights("alex") | {"head": torch.zeros(1)}, path)
    with pytest.raises(TeasrError, match="head unknown"):
        Lpips.load(path)
    save_file(random_weights("alex") | {"lin1.weight": torch.zeros(1, 9, 1, 1)}, path)
    with pytest.raises(TeasrError, match=r"lin1\.weight has shape \(1, 9, 1, 1\); \(1, 6, 1, 1\)"):
        Lpips.load(path)
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(TeasrError, match="Cannot read LPIPS weights"):
        Lpips.load(path)
    with pytest.raises(TeasrError, match="Cannot read LPIPS weights"):
        Lpips.load(tmp_path / "absent")


def test_find_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEASR_LPIPS", raising=False)
    assert find_weights("alex") is None
    explicit, ambient = tmp_path / "explicit", tmp_path / "ambient"
    for folder in (explicit, ambient):
        folder.mkdir()
        (folder / "lpips_alex.safetensors").touch()
    monkeypatch.setenv("TEASR_LPIPS", str(ambient))
    assert find_weights("alex") == ambient / "lpips_alex.safetensors"
    assert find_weights("vgg") is None
    assert find_weights("alex", explicit) == explicit / "lpips_alex.safetensors"
    file = explicit / "lpips_alex.safetensors"
    assert find_weights("alex", str(file)) == file
    with pytest.raises(UsageError, match=r"lpips_vgg\.safetensors"):
        find_weights("vgg", explicit)


def test_heads_alone_take_torchvisions_convolutions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for torchvision, with the layers of its AlexNet and weights in its cache."""
    plan = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1)]
    plan += [(384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]

    def alexnet() -> SimpleNamespace:
        layers: list[nn.Module] = []
        for index, (before, width, *numbers) in enumerate(plan):
            layers += [nn.Conv2d(before, width, *numbers), nn.ReLU()]
            layers += [nn.MaxPool2d(3, 2)] if index in (0, 1, 4) else []
        return SimpleNamespace(features=nn.Sequential(*layers))

    module = ModuleType("torchvision")
    address = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url="https://host/alexnet-1.pth"))
    module.models = SimpleNamespace(  # type: ignore[attr-defined]
        alexnet=alexnet, AlexNet_Weights=address
    )
    with pytest.raises(UsageError, match=r"lack AlexNet's convolutions.*not installed"):
        monkeypatch.setitem(sys.modules, "torchvision", None)
        convolutions("alex")
    monkeypatch.setitem(sys.modules, "torchvision", module)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    heads = {f"lin{i}.weight": torch.rand(1, row[1], 1, 1) for i, row in enumerate(plan)}
    path = tmp_path / "heads.safetensors"
    save_file(heads, path)
    with pytest.raises(UsageError, match=r"none at .*alexnet-1\.pth.*alexnet\(weights="):
        Lpips.load(path)

    (tmp_path / "checkpoints").mkdir()
    features = alexnet().features
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save(state, tmp_path / "checkpoints" / "alexnet-1.pth")
    lpips, picture = Lpips.load(path), torch.rand(1, 3, 64, 64)
    assert lpips.network == "alex"
    first = F.conv2d(picture, lpips.kernels[0], lpips.biases[0], stride=4, padding=2)
    torch.testing.assert_close(first, features[0](picture))
    assert len(lpips.kernels) == 5 and torch.equal(lpips.kernels[4], features[10].weight)


@pytest.mark.skipif(not os.environ.get("TEASR_LPIPS"), reason="TEASR_LPIPS names no weights")
@pytest.mark.parametrize("network", NETWORKS)
def test_published_weights_judge_as_people_do(network: str) -> None:
    path = find_weights(network)
    if path is None:
        pytest.skip(f"no weights of {network}")
    lpips = Lpips.load(path)
    generator = torch.Generator().manual_seed(2)
    # Blocks of colour at several scales: edges and texture, without shipping a photograph.
    picture = sum(
        F.interpolate(torch.randn(1, 3, n, n, generator=generator), size=128) / 3
        for n in (4, 16, 64)
    )
    picture = picture.clamp(-1, 1)
    noisy = picture + 0.01 * torch.randn(picture.shape, generator=generator)
    blurred = F.avg_pool2d(F.pad(picture, [4] * 4, mode="reflect"), 9, stride=1)
    blurred_less = F.avg_pool2d(F.pad(picture, [1] * 4, mode="reflect"), 3, stride=1)
    other = torch.rand(picture.shape, generator=generator) * 2 - 1
    slight, mild, strong, unrelated = (
        float(lpips(candidate, picture)) for candidate in (noisy, blurred_less, blurred, other)
    )
    assert 0 < slight < mild < strong < unrelated
    assert slight < 0.1 and strong > 0.3
