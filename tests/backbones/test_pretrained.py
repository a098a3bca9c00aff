"""From a diffusers folder to a network that trains, and every way in which that can fail."""

from __future__ import annotations

import builtins
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from teasr.backbones import pretrained
from teasr.backbones.branch_lora import (
    BRANCHES,
    branch_linears,
    load_adapters,
    merge,
    save_adapters,
    unmerge,
)
from teasr.backbones.pretrained import (
    INDEX_FILE,
    PROMPT_FILE,
    SINGLE_FILE,
    Kind,
    fingerprint,
    load_pretrained,
    meta_backbone,
    weight_files,
)
from teasr.errors import TeasrError, UsageError
from tests.backbones.latents import (
    CONFIGS,
    RANK,
    WIDTH,
    autoencoder,
    backbone,
    both_kinds,
    inputs,
    perturb,
    plain,
    prompt,
)

COMMIT = "0123456789" * 4


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A diffusers folder of each kind, written once; in shards."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            plain(kind).save_pretrained(root / "transformer", max_shard_size="200KB")
            autoencoder(kind).save_pretrained(root / "vae")
            save_file({"embedding": prompt()}, root / PROMPT_FILE)
            made[kind] = root
        return made[kind]

    return folder


@pytest.fixture
def folder(stored: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Z-Image folder to spoil."""
    return Path(shutil.copytree(stored("z-image"), tmp_path / "model"))


def load(kind: str, source: str | Path, **options: Any) -> pretrained.Pretrained:
    assert kind in ("qwen-image", "z-image")
    given: dict[str, Any] = {"rank": RANK, "dtype": torch.float32, **options}
    return load_pretrained(kind, source, **given)


# --------------------------------------------------------------------------- what is loaded


@both_kinds
@pytest.mark.parametrize("mapped", [True, False])
def test_a_loaded_network_computes_what_was_stored(
    kind: str, mapped: bool, stored: Callable[[str], Path]
) -> None:
    assert len(weight_files(stored(kind) / "transformer")) > 1
    x_t, t, r, condition = inputs()
    made = load(kind, stored(kind), mapped=mapped)
    network = made.backbone
    expected = backbone(kind)
    with torch.no_grad():
        assert torch.equal(network(x_t, t, r, None), expected(x_t, t, r, None))
        assert torch.equal(network(x_t, t, r, condition), expected(x_t, t, r, condition))
    assert network.kind == kind and network.rank == network.alpha == RANK
    assert network.scale == made.codec.scale == 4 and network.multiple == 4
    assert network.base and network.base.source == str(stored(kind))
    assert made.codec.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 2, 2)


@both_kinds
def test_weights_of_the_files_type_stay_in_the_files(
    kind: str, stored: Callable[[str], Path]
) -> None:
    """A mapped weight's address lies in the mapping of its file; a converted one's does not."""

    def in_files(**options: Any) -> int:
        made = load(kind, stored(kind), **options).backbone
        maps = [
            [int(end, 16) for end in line.split()[0].split("-")]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if str(stored(kind)) in line
        ]
        return sum(any(low <= p.data_ptr() < high for low, high in maps) for p in made.parameters())

    frozen = len(plain(kind).state_dict())
    assert in_files() == frozen
    assert in_files(mapped=False) == in_files(dtype=torch.bfloat16) == 0


@both_kinds
def test_training_and_merging_leave_the_mapped_files_alone(
    kind: str, stored: Callable[[str], Path]
) -> None:
    before = fingerprint(stored(kind) / "transformer")
    made = load(kind, stored(kind)).backbone
    made.gradient_checkpointing = True
    optimizer = torch.optim.SGD(made.trainable().values(), lr=0.1)
    made(*inputs()).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        trained = made(*inputs())
        merge(made, "noise")
        torch.testing.assert_close(made(*inputs()), trained, rtol=1e-4, atol=1e-4)
        unmerge(made)
    assert fingerprint(stored(kind) / "transformer") == before


@both_kinds
def test_blocks_may_stay_on_meta_for_who_streams_them(
    kind: str, stored: Callable[[str], Path]
) -> None:
    made = load(kind, stored(kind), blocks_on_meta=True).backbone
    within = tuple(f"{block}." for block in made.blocks)
    tensors: dict[str, Tensor] = {}
    for path in weight_files(stored(kind) / "transformer"):
        tensors |= load_file(path)
    for name, parameter in list(made.named_parameters()):
        streamed = name.startswith(within) and not parameter.requires_grad
        assert parameter.is_meta == streamed, name
        assert parameter.dtype == torch.float32
        if streamed:
            parent, _, leaf = name.rpartition(".")
            value = torch.nn.Parameter(tensors[made.stored_name(name)], requires_grad=False)
            setattr(made.get_submodule(parent), leaf, value)
    x_t, t, r, _ = inputs()
    assert torch.equal(made(x_t, t, r, None), backbone(kind)(x_t, t, r, None))


def test_a_single_file_and_bfloat16(folder: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder / "transformer"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "transformer" / INDEX_FILE).unlink()
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()},
        folder / "transformer" / SINGLE_FILE,
    )
    made = load("z-image", folder, dtype=torch.bfloat16).backbone
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16} == {made.dtype}
    expected = backbone("z-image").to(torch.bfloat16)
    assert torch.equal(made(*inputs()), expected(*inputs()))


def test_adapters_belong_to_the_weights_they_were_trained_on(folder: Path, tmp_path: Path) -> None:
    made = load("z-image", folder).backbone
    perturb(made, "condition")
    save_adapters(made, tmp_path / "adapters")
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    again = load("z-image", moved).backbone
    load_adapters(again, tmp_path / "adapters")
    assert torch.equal(again(*inputs()), made(*inputs()))
    path = weight_files(moved / "transformer")[0]
    tensors = load_file(path)
    save_file({name: tensor + 0.1 for name, tensor in tensors.items()}, path)
    with pytest.raises(TeasrError, match="trained on other weights"):
        load_adapters(load("z-image", moved).backbone, tmp_path / "adapters")


# --------------------------------------------------------------------------- 8 bits


@both_kinds
def test_8_bits_compute_nearly_the_same_in_half_the_memory(
    kind: str, stored: Callable[[str], Path]
) -> None:
    pytest.importorskip("torchao")

    def size(made: Any) -> int:
        weights = [layer.base.weight for layer in branch_linears(made).values()]
        parts = [getattr(p.data, "qdata", p.data) for p in weights]
        return sum(part.numel() * part.element_size() for part in parts)

    coarse = load(kind, stored(kind), frozen_bits=8, dtype=torch.bfloat16).backbone
    fine = load(kind, stored(kind), dtype=torch.bfloat16).backbone
    assert size(coarse.transformer) * 2 == size(fine.transformer)
    for branch in BRANCHES:
        perturb(fine, branch)
    for ours, theirs in zip(coarse.trainable().values(), fine.trainable().values()):
        ours.data.copy_(theirs)
    given = inputs()
    exact = fine(*given)
    assert float((coarse(*given) - exact).detach().std()) < 0.03 * float(exact.detach().std())
    found = []
    for made in (fine, coarse):
        made.gradient_checkpointing = True
        made(*given).square().mean().backward()
        assert {n for n, p in made.named_parameters() if p.grad is not None} == set(
            made.trainable()
        )
        found.append(torch.cat([p.grad.flatten().float() for p in made.trainable().values()]))
    assert float(torch.cosine_similarity(found[0], found[1], dim=0)) > 0.99
    with pytest.raises(TeasrError, match="8 bits; an adapter cannot be added"):
        merge(coarse, "noise")


def test_8_bits_without_torchao_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without("torchao", monkeypatch)
    with pytest.raises(TeasrError, match=r"needs torchao.*pip install 'teasr\[large\]'"):
        load("z-image", folder, frozen_bits=8)


# --------------------------------------------------------------------------- shapes without values


@pytest.mark.parametrize(
    ("kind", "frozen", "layers"),
    [("qwen-image", 20_430_401_088, 60 * 6), ("z-image", 6_154_908_736, 32 * 7)],
)
def test_parameter_counts_of_the_published_models(kind: Kind, frozen: int, layers: int) -> None:
    made = meta_backbone(kind)
    parameters = list(made.parameters())
    assert all(p.is_meta for p in parameters)
    assert sum(p.numel() for p in parameters if not p.requires_grad) == frozen
    linears = branch_linears(made.transformer).values()
    assert len(linears) == layers
    pairs = sum(2 * 128 * (layer.base.in_features + layer.base.out_features) for layer in linears)
    embedder = sum(p.numel() for p in made.target_embedder.parameters())
    assert sum(p.numel() for p in made.trainable().values()) == pairs + embedder
    within = sum(
        p.numel()
        for block in made.blocks
        for p in made.get_submodule(block).parameters()
        if not p.requires_grad
    )
    assert within > 0.99 * frozen
    assert made.multiple == 4 and made.scale == 4


@both_kinds
def test_a_planner_may_change_the_shape(kind: Kind) -> None:
    made = meta_backbone(kind, CONFIGS[kind], rank=2)
    frozen = [p for p in made.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) == sum(p.numel() for p in plain(kind).parameters())
    assert made.rank == 2


# --------------------------------------------------------------------------- the empty prompt


def tokenizer(folder: Path) -> None:
    """Bytes as tokens, with a chat template like Qwen's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    vocabulary = {letter: i for i, letter in enumerate([*letters, *special])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|endoftext|>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n{% if not enable_thinking %}<think>{% endif %}"
    )
    fast.save_pretrained(folder / "tokenizer")


def text_encoder(kind: str, folder: Path) -> Any:
    import transformers

    torch.manual_seed(0)
    shape = {
        "vocab_size": 300,
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    if kind == "z-image":
        made: Any = transformers.Qwen3Model(transformers.Qwen3Config(**shape, head_dim=8))
    else:
        rope = {"rope_type": "default", "mrope_section": [2, 2, 2]}
        vision = {
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
        }
        config = transformers.Qwen2_5_VLConfig(
            text_config={**shape, "rope_scaling": rope}, vision_config=vision
        )
        made = transformers.Qwen2_5_VLForConditionalGeneration(config)
    made.eval().save_pretrained(folder / "text_encoder")
    return made


@both_kinds
def test_the_prompt_is_computed_once_as_the_pipeline_does_and_kept(
    kind: str, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder, cache = Path(shutil.copytree(stored(kind), tmp_path / "model")), tmp_path / "cache"
    (folder / PROMPT_FILE).unlink()
    encoder = text_encoder(kind, folder)
    tokenizer(folder)
    made = load(kind, folder, cache=cache).backbone

    read = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    if kind == "qwen-image":
        text = (
            "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
            "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
        ) + text
    tokens = read(text, return_tensors="pt").input_ids
    with torch.no_grad():
        states = encoder(input_ids=tokens, output_hidden_states=True).hidden_states
    expected = states[-2][0] if kind == "z-image" else states[-1][0, 34:]
    torch.testing.assert_close(made.prompt, expected, rtol=1e-4, atol=1e-4)

    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    again = load(kind, folder, cache=cache).backbone
    assert torch.equal(again.prompt, made.prompt)
    with pytest.raises(TeasrError, match=f"neither {PROMPT_FILE} nor text_encoder/"):
        load(kind, folder)


def test_a_text_encoder_of_another_model_is_refused(folder: Path) -> None:
    (folder / PROMPT_FILE).unlink()
    text_encoder("z-image", folder)
    tokenizer(folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    with pytest.raises(TeasrError, match=r"the\s+transformer takes \(tokens, 25\)"):
        pretrained.empty_prompt("z-image", folder, WIDTH + 1, None)


# --------------------------------------------------------------------------- what is refused


def spoil_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importing(name: str, *rest: Any, **options: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named '{package}'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", importing)


def rename_first_tensor(folder: Path) -> None:
    path = weight_files(folder / "transformer")[0]
    tensors = load_file(path)
    tensors["other.weight"] = tensors.pop(min(tensors))
    save_file(tensors, path)


def cut_last_shard(folder: Path) -> None:
    path = weight_files(folder / "transformer")[-1]
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f / "vae"), "vae/config.json is missing"),
        (lambda f: shutil.rmtree(f / "transformer"), "transformer/config.json is missing"),
        (
            lambda f: weight_files(f / "transformer")[1].unlink(),
            r"lacks 1 of \d+ shards, first diffusion_pytorch_model-00002-of",
        ),
        (
            lambda f: (f / "transformer" / INDEX_FILE).unlink(),
            "lacks the index of diffusion_pytorch_model-00001-of",
        ),
        (
            lambda f: [p.unlink() for p in (f / "transformer").glob("*.safetensors*")],
            f"transformer lacks weights. {SINGLE_FILE}",
        ),
        (lambda f: (f / "transformer" / INDEX_FILE).write_text("{}"), "maps no weights"),
        (lambda f: (f / "transformer" / "config.json").write_text("{"), "is not valid JSON"),
        (
            lambda f: spoil_json(f / "transformer" / "config.json", n_layers=3),
            r"lacks layers\.2\..* and \d+ more: its config.json describes another network",
        ),
        (
            lambda f: spoil_json(f / "transformer" / "config.json", n_layers=1),
            r"also holds layers\.1\.",
        ),
        (
            lambda f: spoil_json(f / "transformer" / "config.json", cap_feat_dim=32),
            r"cap_embedder.0.weight is \(24,\), its config.json says \(32,\)",
        ),
        (rename_first_tensor, "lacks "),
        (
            lambda f: weight_files(f / "transformer")[0].write_bytes(b"\x08\0\0"),
            "is damaged: its header does not fit",
        ),
        (cut_last_shard, r"is cut off: '.*' ends at byte"),
        (lambda f: save_file({"x": torch.zeros(1)}, f / PROMPT_FILE), "no tensor 'embedding'"),
        (
            lambda f: save_file({"embedding": torch.zeros(5, 3)}, f / PROMPT_FILE),
            r"holds \(5, 3\); an embedding \(tokens, 24\) is expected",
        ),
        (lambda f: (f / PROMPT_FILE).write_bytes(b"x"), f"{PROMPT_FILE} is damaged"),
        (lambda f: (f / PROMPT_FILE).unlink(), "neither empty_prompt.safetensors nor text_encod"),
    ],
)
def test_what_is_wrong_is_named_before_weights_are_read(
    folder: Path, spoil: Callable[[Path], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(folder)
    monkeypatch.setattr(pretrained, "_assign", lambda *_a, **_k: pytest.fail("weights were read"))
    with pytest.raises(TeasrError, match=message):
        load("z-image", folder)


def test_a_damaged_autoencoder_is_named(folder: Path) -> None:
    path = folder / "vae" / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(TeasrError, match=r"autoencoder in .*vae cannot be read"):
        load("z-image", folder)


def test_another_model_than_asked_is_named_with_both(stored: Callable[[str], Path]) -> None:
    message = "holds a ZImageTransformer2DModel; a QwenImageTransformer2DModel is asked for"
    with pytest.raises(UsageError, match=message):
        load("qwen-image", stored("z-image"))


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("nowhere", None, "no folder nowhere, and it is no hub repository"),
        ("owner/name", None, "it has no revision.*40 hex digits"),
        ("owner/name", "main", "it has the revision 'main'.*40 hex digits"),
        ("owner/name", COMMIT[:12], "40 hex digits"),
    ],
)
def test_hub_repositories_must_be_pinned(source: str, revision: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load("z-image", source, revision=revision)


def test_other_wrong_requests(folder: Path) -> None:
    with pytest.raises(UsageError, match="is a folder; it has no revision"):
        load("z-image", folder, revision=COMMIT)
    with pytest.raises(UsageError, match="frozen_bits is 4"):
        load("z-image", folder, frozen_bits=4)
    with pytest.raises(UsageError, match="Known: qwen-image, z-image"):
        load_pretrained("flux", folder)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Known: qwen-image, z-image"):
        meta_backbone("flux")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="leave out frozen_bits"):
        load("z-image", folder, frozen_bits=8, blocks_on_meta=True)


def test_a_pinned_repository_is_downloaded_without_what_is_not_needed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, list[str]]] = []

    def download(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    made = load("z-image", "owner/name", revision=COMMIT).backbone
    assert made.base and (made.base.source, made.base.revision) == ("owner/name", COMMIT)
    assert [entry[:2] for entry in asked] == [("owner/name", COMMIT)]
    assert not any("text_encoder" in pattern for pattern in asked[0][2])
    assert {"transformer/*.safetensors", "vae/*.safetensors", PROMPT_FILE} <= set(asked[0][2])

    (folder / PROMPT_FILE).unlink()
    with pytest.raises(TeasrError, match="neither"):
        load("z-image", "owner/name", revision=COMMIT)
    assert any("text_encoder" in pattern for pattern in asked[-1][2])


def test_a_failed_download_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_a: Any, **_k: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(TeasrError, match=f"owner/name at {COMMIT} cannot be downloaded: no route"):
        load("z-image", "owner/name", revision=COMMIT)


def test_without_diffusers_it_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without("diffusers", monkeypatch)
    for call in (lambda: load("z-image", folder), lambda: meta_backbone("z-image")):
        with pytest.raises(TeasrError, match=r"diffusers.*pip install 'teasr\[large\]'"):
            call()


def test_the_package_imports_without_what_large_backbones_need() -> None:
    code = (
        "import sys\n"
        "for name in ('diffusers', 'peft', 'transformers', 'torchao', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"
        "import teasr.backbones, teasr.backbones.pretrained\n"
    )
    paths = [path for path in sys.path if path.endswith("platform")]
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(paths)})
