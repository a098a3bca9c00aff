"""Two branches on one frozen network: whose tokens get what, what is trained, what is stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from teasr.backbones.branch_lora import (
    ADAPTERS_FILE,
    BRANCHES,
    EMBEDDER_FILE,
    LORA_FILE,
    BaseReference,
    Branch,
    BranchLinear,
    BranchTokens,
    adapter_tensors,
    branch_linears,
    branch_tokens,
    load_adapters,
    merge,
    save_adapters,
    unmerge,
)
from teasr.backbones.latent import LatentBackbone, from_tokens, to_tokens
from teasr.errors import TeasrError, UsageError
from teasr.objective import Objective, ObjectiveSettings
from tests.backbones.latents import (
    FIRST_BLOCK,
    RANK,
    backbone,
    both_kinds,
    inputs,
    perturb,
    plain,
    prompt,
)
from tests.backbones.networks import CHANGES, with_other


def close(first: Tensor, second: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------- the layer


def layer(alpha: float = 6.0) -> BranchLinear:
    torch.manual_seed(0)
    made = BranchLinear(nn.Linear(8, 5), 3, alpha)
    for branch in BRANCHES:
        nn.init.normal_(getattr(made, branch).lora_B.weight)
    return made


def test_each_kind_of_tokens_gets_its_own_pair_and_the_rest_none() -> None:
    made, x = layer(), torch.randn(2, 9, 8)
    with branch_tokens(BranchTokens(4, 3)):
        output = made(x)
    frozen = made.base(x)
    parts: tuple[tuple[Branch, slice], ...] = (
        ("noise", slice(0, 4)),
        ("condition", slice(4, 7)),
    )
    for branch, part in parts:
        pair = getattr(made, branch)
        added = 6 / 3 * x[:, part] @ pair.lora_A.weight.T @ pair.lora_B.weight.T
        assert float(added.detach().std()) > 0.1
        close(output[:, part], frozen[:, part] + added)
    assert torch.equal(output[:, 7:], frozen[:, 7:])


def test_the_division_of_tokens_ends_with_its_block() -> None:
    made, x = layer(), torch.randn(1, 4, 8)
    with branch_tokens(BranchTokens(2, 2)):
        outer = made(x)
        with branch_tokens(BranchTokens(4, 0)):
            assert not torch.equal(made(x), outer)
        assert torch.equal(made(x), outer)
    with pytest.raises(RuntimeError, match="outside of branch_tokens"):
        made(x)


def test_an_untrained_pair_adds_nothing_and_starts_as_in_peft() -> None:
    from peft.tuners.lora import Linear as PeftLinear
    from peft.tuners.lora import LoraConfig

    torch.manual_seed(0)
    base = nn.Linear(400, 50)
    made = BranchLinear(base, 16, 16.0)
    with branch_tokens(BranchTokens(2, 2)):
        x = torch.randn(1, 4, 400)
        assert torch.equal(made(x), base(x))
    config = LoraConfig(r=16, lora_alpha=16)
    theirs = PeftLinear(base, "default", config, r=16, lora_alpha=16)
    expected = theirs.lora_A["default"].weight
    for branch in BRANCHES:
        weight = getattr(made, branch).lora_A.weight
        assert float(weight.abs().max()) == pytest.approx(1 / 20, rel=0.01)
        assert float(weight.std()) == pytest.approx(float(expected.std()), rel=0.05)
        assert not getattr(made, branch).lora_B.weight.any()
    assert not torch.equal(made.noise.lora_A.weight, made.condition.lora_A.weight)


# --------------------------------------------------------------------------- in a network


def at_block(made: LatentBackbone, block: str, layer: str, given: tuple[Any, ...]) -> Tensor:
    """What `layer` of `block` says in a forward."""
    seen: list[Tensor] = []
    module = made.transformer.get_submodule(f"{block}.{layer}")
    hook = module.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        made(*given)
    hook.remove()
    return seen[0]


@both_kinds
@pytest.mark.parametrize("branch", BRANCHES)
def test_an_adapter_touches_its_own_tokens_only(kind: str, branch: Branch) -> None:
    made, given, block = backbone(kind), inputs(), FIRST_BLOCK[kind]
    attention = "attn" if kind == "qwen-image" else "attention"
    names = [f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v"]
    if kind == "qwen-image":
        names += ["attn.add_q_proj", "attn.add_k_proj"]
    before = {name: at_block(made, block, name, given) for name in names}
    perturb(made, branch, only=block)
    count = 24 if kind == "qwen-image" else 32
    own = slice(0, count) if branch == "noise" else slice(count, 2 * count)
    for name, old in before.items():
        new = at_block(made, block, name, given)
        if "add_" in name:  # the prompt's own layers
            assert torch.equal(new, old)
            continue
        assert bool((new[:, own] != old[:, own]).any(2).all())
        others = torch.ones(new.shape[1], dtype=torch.bool)
        others[own] = False
        assert torch.equal(new[:, others], old[:, others])


@both_kinds
def test_condition_tokens_are_treated_like_noise_tokens_until_something_is_trained(
    kind: str,
) -> None:
    """One picture in both branches, r = t: equal states after every block, so modulation, weights
    and positions are shared. Trained, or with another r, they part."""
    x_t, t, r, _ = inputs()
    stage = "transformer_blocks.1" if kind == "qwen-image" else "layers.1"

    def states(made: LatentBackbone, r: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Any] = []
        hook = made.transformer.get_submodule(stage).register_forward_hook(
            lambda _m, _i, output: seen.append(output)
        )
        with torch.no_grad():
            made(x_t, t, r, x_t)
        hook.remove()
        image = seen[0][1] if isinstance(seen[0], tuple) else seen[0]
        count = 24 if kind == "qwen-image" else 32
        return image[:, :count], image[:, count : 2 * count]

    noise, condition = states(backbone(kind), t)
    close(condition, noise, 1e-5)
    for made, target in ((backbone(kind), r), (backbone(kind, live=True), t)):
        noise, condition = states(made, target)
        assert float((condition - noise).std()) > 1e-3 * float(noise.std())


@both_kinds
def test_the_second_embedder_starts_as_a_copy_of_its_own(kind: str) -> None:
    made = backbone(kind)
    first, second = made._level_embedder(), made.target_embedder
    weights = dict(first.named_parameters())
    assert weights.keys() == dict(second.named_parameters()).keys()
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, weights[name]) and parameter is not weights[name]
        assert parameter.requires_grad and not weights[name].requires_grad


@both_kinds
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("changed", CHANGES)
def test_output_depends_on_each_input_alone(kind: str, live: bool, changed: str) -> None:
    made, (x_t, t, r, condition) = backbone(kind, live=live), inputs()
    other = with_other(changed, x_t, t, r, condition)
    with torch.no_grad():
        base = made(x_t, t, r, condition)
        assert base.dtype == torch.float32 and base.shape == x_t.shape
        least = 1e-5 if changed in ("r", "sign of r") else 1e-3
        assert float((made(*other) - base).std()) > least * float(base.std())
        assert torch.equal(made(x_t, -t, r, condition), base)  # the sign is in r


@both_kinds
def test_zero_is_where_the_twin_trajectory_begins(kind: str) -> None:
    """r is continuous through zero, which belongs to the real trajectory; there is no other
    place where a real and a twin target are told alike."""
    made = backbone(kind, live=True)
    zero, r = torch.zeros(2), torch.tensor([0.02, 0.98])
    x_t, t, _, condition = inputs()
    with torch.no_grad():
        at_zero = made(x_t, t, zero, condition)
        assert torch.equal(made(x_t, t, -zero, condition), at_zero)
        near = float((made(x_t, t, zero - 1e-5, condition) - at_zero).std())
        apart = made(x_t, t, -r, condition) - made(x_t, t, r, condition)
    assert 10 * near < float(apart.flatten(1).std(1).min())


@both_kinds
def test_samples_of_a_batch_do_not_meet(kind: str) -> None:
    made, (x_t, _, _, condition) = backbone(kind, live=True), inputs()
    t, r = torch.tensor([0.8, -0.4]), torch.tensor([0.3, -0.4])
    with torch.no_grad():
        together = made(x_t, t, r, condition)
        for i in range(2):
            part = slice(i, i + 1)
            close(together[part], made(x_t[part], t[part], r[part], condition[part]), 1e-4)


@both_kinds
def test_blocks_are_called_once_in_their_order(kind: str) -> None:
    made = backbone(kind)
    called: list[str] = []
    for name in made.blocks:
        made.get_submodule(name).register_forward_pre_hook(
            lambda _m, _i, name=name: called.append(name)
        )
    made(*inputs())
    assert called == made.blocks and len(set(called)) == len(called)
    inside = {f"transformer.{name}" for name in branch_linears(made.transformer)}
    assert all(name.startswith(tuple(f"{block}." for block in made.blocks)) for name in inside)


@both_kinds
def test_stored_names_are_those_of_the_plain_network(kind: str) -> None:
    made = backbone(kind)
    names = {
        made.stored_name(name)
        for name, parameter in made.named_parameters()
        if not parameter.requires_grad
    }
    assert names == set(plain(kind).state_dict())


@both_kinds
def test_wrong_inputs_are_named(kind: str) -> None:
    made, (x_t, t, r, condition) = backbone(kind), inputs()
    with pytest.raises(UsageError, match="8x11 do not divide into patches of 2"):
        made(x_t[..., :11], t, r, condition[..., :11])
    with pytest.raises(UsageError, match=r"condition is \(2, 4, 8, 8\), x_t is \(2, 4, 8, 12\)"):
        made(x_t, t, r, condition[..., :8])
    with pytest.raises(UsageError, match="rank is 0"):
        backbone(kind, rank=0)


@both_kinds
def test_bfloat16_computes_close_to_float32_with_times_in_float32(kind: str) -> None:
    x_t, _, _, condition = inputs()
    t, r = torch.tensor([0.8013, 0.8017]), torch.tensor([0.3001, 0.3003])
    with torch.no_grad():
        exact = backbone(kind, live=True)(x_t, t, r, condition)
        made = backbone(kind, live=True).to(torch.bfloat16)
        coarse = made(x_t, t, r, condition)
        assert coarse.dtype == torch.float32 and made.dtype == torch.bfloat16
        assert float((coarse - exact).std()) < 0.05 * float(exact.std())
        # 0.8013 and 0.8017 are one number in bfloat16.
        same = made(x_t[:1], t[:1], r[:1], condition[:1])
        assert not torch.equal(made(x_t[:1], t[1:], r[:1], condition[:1]), same)


# --------------------------------------------------------------------------- training


def gradients(made: LatentBackbone, *calls: tuple[Any, ...]) -> dict[str, Tensor]:
    made.zero_grad()
    losses = [made(*given).square().mean() for given in calls]
    torch.stack(losses).sum().backward()
    return {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}


@both_kinds
def test_adapters_and_second_embedder_are_trained_and_nothing_else(kind: str) -> None:
    made = backbone(kind, live=True)
    found = gradients(made, inputs())
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    expected = {f"target_embedder.{name}" for name, _ in made.target_embedder.named_parameters()}
    for branch in BRANCHES:
        expected |= {
            f"transformer.{name}.{branch}.{side}.weight"
            for name in branch_linears(made.transformer)
            for side in ("lora_A", "lora_B")
        }
    assert trained == set(made.trainable()) == set(found) == expected
    # Nothing reads the condition tokens after the last attention.
    last = made.blocks[-1]
    unread = {name for name, gradient in found.items() if not gradient.any()}
    assert all(name.startswith(last) and ".condition." in name for name in unread)
    assert not any("to_k" in name or "to_v" in name for name in unread)


@both_kinds
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    """Two forwards of different divisions wait for one backward; each repeats its own."""
    x_t, t, r, condition = inputs()
    calls = ((x_t, t, r, condition), (x_t[..., :8], t, t, None), (x_t, t, -r, condition))
    made = backbone(kind, live=True)
    plainly = gradients(made, *calls)
    count = 0

    def counted(_m: nn.Module, _i: Any) -> None:
        nonlocal count
        count += 1

    made.get_submodule(made.blocks[-1]).register_forward_pre_hook(counted)
    made.gradient_checkpointing = True
    again = gradients(made, *calls)
    assert count == 2 * len(calls)
    assert plainly.keys() == again.keys()
    for name, gradient in plainly.items():
        close(again[name], gradient, 1e-6)


@both_kinds
def test_a_step_of_the_objective_is_finite_and_stacked_equals_sequential(kind: str) -> None:
    x, _, _, condition = inputs()
    made = backbone(kind, live=True)
    made.gradient_checkpointing = True
    found = []
    for passes in ("stacked", "sequential"):
        settings = ObjectiveSettings(passes=passes, pixel_lpips=0)
        losses = Objective(settings)(made, x, condition, torch.Generator().manual_seed(0))
        assert not losses.not_finite() and len(losses.terms) == 6
        made.zero_grad()
        losses.total.backward()
        found.append({name: p.grad.clone() for name, p in made.trainable().items()})
    for name, gradient in found[0].items():
        scale = float(gradient.abs().max()) + 1e-6
        close(found[1][name] / scale, gradient / scale, 1e-3)


# --------------------------------------------------------------------------- merged


@both_kinds
@pytest.mark.parametrize("branch", BRANCHES)
def test_a_merged_branch_computes_the_same_and_comes_out_again(kind: str, branch: Branch) -> None:
    made, given = backbone(kind, live=True), inputs()
    frozen = {n: layer.base.weight.clone() for n, layer in branch_linears(made.transformer).items()}
    with torch.no_grad():
        before = made(*given)
        merge(made, branch)
        close(made(*given), before, 1e-4)
        for name, layer in branch_linears(made.transformer).items():
            assert float((layer.base.weight - frozen[name]).abs().max()) > 0.01
        with pytest.raises(TeasrError, match=f"{branch} branch is merged already"):
            merge(made, "condition")
        unmerge(made)
        close(made(*given), before, 1e-5)
    for name, layer in branch_linears(made.transformer).items():
        close(layer.base.weight, frozen[name], 1e-6)


@pytest.mark.parametrize("kind", ["qwen-image"])  # Z-Image's prompt shares the merged layers
def test_with_the_noise_branch_merged_the_plain_network_is_the_noise_branch(kind: str) -> None:
    made, (x_t, t, r, _) = backbone(kind, live=True), inputs()
    with torch.no_grad():
        expected = made(x_t, t, r, None)
        merge(made, "noise")
        stored = {
            made.stored_name(name): parameter
            for name, parameter in made.named_parameters()
            if not parameter.requires_grad
        }
        bare = plain(kind)
        bare.load_state_dict(stored)
        close(plain_velocity(kind, bare), expected, 1e-4)


# --------------------------------------------------------------------------- on disk

BASE = BaseReference(source="owner/name", revision="0" * 40, fingerprint="aa")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapters(backbone("z-image", live=True, base=BASE), tmp_path / "a" / "b")
    return tmp_path / "a" / "b"


@both_kinds
@pytest.mark.parametrize("alpha", [None, 6.5])
def test_adapters_round_trip(kind: str, alpha: float | None, tmp_path: Path) -> None:
    trained = backbone(kind, live=True, alpha=alpha, base=BASE)
    save_adapters(trained, tmp_path, training={"steps": 3})
    fresh = backbone(kind, alpha=alpha, base=BASE)
    for parameter in fresh.trainable().values():
        parameter.data += 1.0
    description = load_adapters(fresh, tmp_path)
    assert description.training == {"steps": 3} and description.base == BASE
    assert description.rank == RANK and {"torch", "diffusers"} <= description.versions.keys()
    for name, parameter in trained.trainable().items():
        assert torch.equal(fresh.trainable()[name], parameter), name
    assert torch.equal(fresh(*inputs()), trained(*inputs()))


def test_given_weights_are_saved_in_place_of_the_networks_own(tmp_path: Path) -> None:
    trained = backbone("z-image", live=True)
    weights = {name: p.detach() + 1 for name, p in trained.trainable().items()}
    save_adapters(trained, tmp_path, weights=weights)
    fresh = backbone("z-image")
    load_adapters(fresh, tmp_path)
    for name, parameter in fresh.trainable().items():
        assert torch.equal(parameter, weights[name])


def plain_velocity(kind: str, network: Any) -> Tensor:
    """The velocity by a network of diffusers' own, adapters and all, for the default inputs."""
    x_t, t, _, _ = inputs()
    if kind == "z-image":
        output = network(list(x_t.unsqueeze(2)), 1 - t, [prompt()] * 2, return_dict=False)[0]
        return -torch.stack(output).squeeze(2)
    output = network(
        to_tokens(x_t, 2),
        prompt().expand(2, -1, -1),
        timestep=t,
        img_shapes=[[(1, 4, 6)]] * 2,
        return_dict=False,
    )[0]
    return from_tokens(output, 4, 6, 2)


def read_by_diffusers(kind: str, folder: Path) -> Any:
    network = plain(kind)
    network.load_lora_adapter(folder, prefix="transformer", use_safetensors=True)
    return network


def read_by_peft(kind: str, folder: Path) -> Any:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    network = inject_adapter_in_model(LoraConfig.from_pretrained(folder), plain(kind))
    tensors = load_file(folder / LORA_FILE)
    state = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert not set_peft_model_state_dict(network, state).unexpected_keys
    return network


@both_kinds
@pytest.mark.parametrize("alpha", [None, 6.5])
@pytest.mark.parametrize("read", [read_by_diffusers, read_by_peft])
def test_the_plain_network_with_the_noise_branchs_adapter_is_the_noise_branch(
    kind: str, alpha: float | None, read: Callable[[str, Path], Any], tmp_path: Path
) -> None:
    trained = backbone(kind, live=True, alpha=alpha)
    x_t, t, r, _ = inputs()
    if kind == "z-image":  # where prompt tokens share the layers, the plain network adapts them too
        for name, layer in branch_linears(trained.transformer).items():
            if name.startswith("layers"):
                layer.noise.lora_B.weight.data *= 0
    save_adapters(trained, tmp_path)
    with torch.no_grad():
        expected = trained(x_t, t, r, None)
        assert float((plain_velocity(kind, plain(kind)) - expected).std()) > 1e-3
        close(plain_velocity(kind, read(kind, tmp_path / "noise")), expected, 1e-5)


@both_kinds
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("read", [read_by_diffusers, read_by_peft])
def test_others_add_to_each_weight_what_the_branch_adds(
    kind: str, branch: Branch, read: Callable[[str, Path], Any], tmp_path: Path
) -> None:
    trained = backbone(kind, live=True, alpha=6.5)
    save_adapters(trained, tmp_path)
    network = read(kind, tmp_path / branch)
    theirs = {n: m for n, m in network.named_modules() if hasattr(m, "lora_A")}
    ours = branch_linears(trained.transformer)
    assert theirs.keys() == ours.keys()
    for name, module in theirs.items():
        (adapter,) = module.lora_A.keys()
        close(module.get_delta_weight(adapter), getattr(ours[name], branch).delta())


def test_keys_are_those_of_the_plain_transformer(folder: Path) -> None:
    names = set(plain("z-image").state_dict())
    for branch in BRANCHES:
        with safe_open(folder / branch / LORA_FILE, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                module = key.removeprefix("transformer.").rsplit(".lora_", 1)[0]
                assert key.startswith("transformer.") and f"{module}.weight" in names
        config = json.loads((folder / branch / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == RANK
        assert config["base_model_name_or_path"] == "owner/name"


def edit(folder: Path, **changes: object) -> None:
    path = folder / ADAPTERS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_first(path: Path) -> None:
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def test_a_folder_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no adapters.*adapters\.json"):
        load_adapters(backbone("z-image"), tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: edit(f, format=9), "of format 9; this version of teasr reads format 1"),
        (lambda f: edit(f, backbone="qwen-image"), "of a 'qwen-image'; this is a 'z-image'"),
        (lambda f: edit(f, rank=8), "of rank 8; the backbone was built with rank 4"),
        (lambda f: edit(f, alpha=2.5), "of alpha 2.5; the backbone was built with alpha 4"),
        (
            lambda f: edit(f, base={"source": "x/y", "revision": None, "fingerprint": "bb"}),
            "trained on other weights.*belongs to x/y .fingerprint bb; loaded is aa",
        ),
        (lambda f: (f / ADAPTERS_FILE).write_text("{"), "damaged: it is not valid JSON"),
        (lambda f: (f / "condition" / LORA_FILE).unlink(), f"condition/{LORA_FILE} is missing"),
        (lambda f: cut(f / "noise" / LORA_FILE), f"noise/{LORA_FILE} is damaged"),
        (lambda f: without_first(f / "condition" / LORA_FILE), "it lacks transformer.layers.0"),
        (lambda f: without_first(f / EMBEDDER_FILE), "it lacks mlp.0.bias"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    folder: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(folder)
    made = backbone("z-image", base=BASE)
    before = {name: p.clone() for name, p in made.trainable().items()}
    with pytest.raises(TeasrError, match=message):
        load_adapters(made, folder)
    for name, parameter in made.trainable().items():
        assert torch.equal(parameter, before[name])


def test_other_shapes_and_other_tensors_are_named(folder: Path) -> None:
    path = folder / "noise" / LORA_FILE
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.1.attention.to_q.lora_B" in name)
    save_file(tensors | {name: torch.zeros(7, RANK)}, path)
    with pytest.raises(TeasrError, match=r"to_q.lora_B.weight is \(7, 4\), \(48, 4\) is expected"):
        load_adapters(backbone("z-image", base=BASE), folder)
    save_file(tensors | {"transformer.layers.9.x.lora_A.weight": torch.zeros(1)}, path)
    with pytest.raises(TeasrError, match=r"also holds transformer\.layers\.9"):
        load_adapters(backbone("z-image", base=BASE), folder)


def test_adapters_of_weights_that_came_from_no_file_are_not_compared(folder: Path) -> None:
    load_adapters(backbone("z-image"), folder)


def test_saving_again_replaces_and_a_copy_of_the_folder_serves(folder: Path) -> None:
    made = backbone("z-image", live=True, base=BASE)
    save_adapters(made, folder)
    shutil.copytree(folder, folder.parent / "copy")
    fresh = backbone("z-image", base=BASE)
    load_adapters(fresh, folder.parent / "copy")
    for branch in BRANCHES:
        ours, theirs = adapter_tensors(fresh, branch), adapter_tensors(made, branch)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
