"""The feed: one stream whatever runs it, taken up at any pair, and the pairs that the degradation
promises."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import albumentations as A
import numpy as np
import pytest

from pipelines.feed import (
    FeedPosition,
    FeedSettings,
    LockStep,
    block_size,
    feed,
    locate,
    samples_per_epoch,
    shard_order,
    split,
    training_pass,
)
from pipelines.ingest import ingest
from pipelines.runtime import quiet_ray_data
from teasr.degradation import Degradation, sample_seed
from teasr.errors import TeasrError, UsageError
from teasr.images import encode
from teasr.shards import Manifest, ShardInfo, read_manifest, read_shard, write_manifest, write_shard

SETTINGS = FeedSettings(crop=32, crops_per_photo=4, seed=3)
PHOTOS = 5
EPOCH = PHOTOS * 4

Pair = tuple[int, bytes, bytes]
"""Number, HR and LR of one training pair."""


@pytest.fixture(scope="module")
def data(
    tmp_path_factory: pytest.TempPathFactory, photo: Callable[..., np.ndarray], ray_session: None
) -> str:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(PHOTOS):
        (folder / f"p{i}.png").write_bytes(encode(photo(80 + i, 90, seed=i)))
    target = tmp_path_factory.mktemp("data") / "hr"
    ingest([str(folder)], str(target), shard_size=2)
    return str(target)


@pytest.fixture(scope="module")
def stream(data: str) -> list[Pair]:
    """Three epochs of the stream by a plain loop, without Ray."""
    make = training_pass(data, SETTINGS)
    pairs = []
    for number in range(3 * len(make.shards)):
        for block in make({"pass": np.array([number])}):
            pairs += _pairs(block)
    return pairs


def _pairs(block: dict[str, np.ndarray]) -> list[Pair]:
    return [
        (int(number), hr.tobytes(), lr.tobytes())
        for number, hr, lr in zip(block["number"], block["hr"], block["lr"])
    ]


def _consume(
    data: str, consumers: int, batch: int, steps: int, state: str | None = None
) -> tuple[list[list[Pair]], str]:
    """What each of `consumers` reads in `steps` batches from `state` on, and the state then."""
    manifest = read_manifest(data)
    position = FeedPosition.model_validate_json(state) if state else None
    start = position.number(manifest, SETTINGS) if position else 0
    read: list[list[Pair]] = [[] for _ in range(consumers)]
    rows = block_size(batch, SETTINGS, consumers=consumers, number=start)
    places = [LockStep(start, rank, consumers, batch, rows) for rank in range(consumers)]
    failures: list[BaseException] = []

    def consume(rank: int, batches: object) -> None:
        try:
            for block in itertools.islice(batches, steps):  # type: ignore[call-overload]
                places[rank].check(block["number"])
                read[rank] += _pairs(block)
        except BaseException as error:
            failures.append(error)

    with quiet_ray_data():
        dataset = feed(data, SETTINGS, batch=batch, consumers=consumers, position=position)
        shares = split(dataset, consumers)
        threads = [
            threading.Thread(target=consume, args=(rank, share.iter_batches(batch_size=batch)))
            for rank, share in enumerate(shares)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures, failures
    (number,) = {place.number for place in places}
    return read, FeedPosition.after(number, manifest, SETTINGS).model_dump_json()


def test_the_stream_of_ray_is_that_of_a_plain_loop(data: str, stream: list[Pair]) -> None:
    (read,), _ = _consume(data, consumers=1, batch=4, steps=12)
    assert read == stream[:48]
    assert [number for number, _, _ in read] == list(range(48))


@pytest.mark.parametrize("consumers", [1, 2, 4])
def test_interrupted_anywhere_each_consumer_goes_on_with_its_very_next_pair(
    data: str, stream: list[Pair], consumers: int
) -> None:
    steps = 12 // consumers
    first = int(np.random.default_rng(consumers).integers(1, steps))
    begun, state = _consume(data, consumers, 4, first)
    assert set(json.loads(state)) == {"dataset", "seed", "epoch", "consumed"}
    resumed, _ = _consume(data, consumers, 4, steps - first, state)
    for rank in range(consumers):
        # Batches are dealt out in turn: of 48 pairs each consumer has every so-manieth four.
        batches = [stream[i : i + 4] for i in range(4 * rank, 48, 4 * consumers)]
        assert begun[rank] + resumed[rank] == list(itertools.chain(*batches))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 1), (2, 4)])
def test_another_number_of_consumers_gets_each_pair_of_the_epoch_once(
    data: str, stream: list[Pair], before: int, after: int
) -> None:
    begun, state = _consume(data, before, 2, steps=2)
    left = EPOCH - 2 * 2 * before
    resumed, state = _consume(data, after, 2, -(-left // (2 * after)), state)
    read = sorted(pair for share in begun + resumed for pair in share)
    assert read[:EPOCH] == stream[:EPOCH]
    assert FeedPosition.model_validate_json(state).epoch == 1


def test_a_position_inside_a_pass_and_an_odd_batch(data: str, stream: list[Pair]) -> None:
    (begun,), state = _consume(data, 1, 3, steps=9)  # 27 pairs: in the second epoch, in a pass
    (resumed,), _ = _consume(data, 1, 4, steps=2, state=state)
    assert begun + resumed == stream[:35]


def test_epochs_differ_and_each_photo_comes_equally_often(
    data: str, stream: list[Pair], photo: Callable[..., np.ndarray]
) -> None:
    assert len({hr for _, hr, _ in stream}) == len(stream) == 3 * EPOCH
    assert [shard_order(3, epoch, 100).tolist() for epoch in (0, 0)] == [
        shard_order(3, 0, 100).tolist()
    ] * 2
    assert shard_order(3, 0, 100).tolist() != shard_order(3, 1, 100).tolist()


def test_pairs_are_those_of_the_degradation(
    stream: list[Pair], photo: Callable[..., np.ndarray]
) -> None:
    """Crop and degrade again, outside Ray, from the keys alone: the same bytes."""
    expected = {}
    place = A.Compose([A.RandomCrop(32, 32), A.D4(p=1.0)])
    degradation = Degradation("teasr", seed=SETTINGS.seed)
    for i in range(PHOTOS):
        for variant in range(4):
            place.set_random_seed(sample_seed(SETTINGS.seed, "place", f"p{i}", variant))
            hr = np.ascontiguousarray(place(image=photo(80 + i, 90, seed=i))["image"])
            expected[hr.tobytes()] = degradation(hr, f"p{i}", variant).lr.tobytes()
    for _, hr, lr in stream[:EPOCH]:
        assert lr == expected.pop(hr)
    assert not expected


def test_its_workers_do_without_torch(data: str) -> None:
    script = f"""
import sys
import numpy as np
from pipelines.feed import FeedSettings, training_pass
list(training_pass({data!r}, FeedSettings(crop=32))({{"pass": np.array([0])}}))
print("albumentations" in sys.modules, "torch" in sys.modules)
import torch
print(torch.ones(2).sum().item())
"""
    said = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert said.stdout.split() == ["True", "False", "2.0"]


@pytest.mark.parametrize("bad", ["p1", "p2"])  # p2 is the only one of its shard
def test_an_unusable_photograph_moves_no_other_pair(
    data: str, stream: list[Pair], tmp_path: Path, bad: str
) -> None:
    """Damage one photograph in its shard: only its own four pairs of an epoch change."""
    manifest = read_manifest(data)
    shards = []
    for shard in manifest.shards:
        samples = list(read_shard(f"{data}/{shard.name}"))
        for sample in samples:
            if sample.key == bad:
                sample.members["png"] = sample.members["png"][:200]
        shards.append(write_shard(str(tmp_path / shard.name), samples))
    write_manifest(str(tmp_path), manifest.model_copy(update={"shards": tuple(shards)}))
    make = training_pass(str(tmp_path), SETTINGS)
    pairs = [p for i in range(3) for block in make({"pass": np.array([i])}) for p in _pairs(block)]
    assert [number for number, _, _ in pairs] == list(range(EPOCH))
    assert sum(a != b for a, b in zip(pairs, stream)) == 4
    assert len({hr for _, hr, _ in pairs}) == EPOCH


def test_photographs_that_are_all_too_small_are_told(data: str) -> None:
    make = training_pass(data, SETTINGS.model_copy(update={"crop": 96}))
    with pytest.raises(TeasrError, match="as large as a crop"):
        list(make({"pass": np.array([0])}))


def test_locate_agrees_with_counting() -> None:
    shards = tuple(
        ShardInfo(name=f"{i}", samples=n, bytes=1, sha256="") for i, n in enumerate((3, 1, 2))
    )
    manifest = Manifest(kind="hr", shards=shards)
    settings = FeedSettings(crops_per_photo=2, seed=5)
    ends, total = [], 0
    for epoch in range(3):
        for index in shard_order(5, epoch, 3):
            total += 2 * shards[index].samples
            ends.append(total)
    for number in range(30):
        passes = sum(end <= number for end in ends)
        into = number - (ends[passes - 1] if passes else 0)
        assert locate(manifest, settings, number) == (passes, into)
        position = FeedPosition.after(number, manifest, settings)
        assert position.epoch == number // samples_per_epoch(manifest, settings)
        assert position.number(manifest, settings) == number


def test_lock_step_numbers_are_a_stretch_without_a_gap_and_refuse_any_other() -> None:
    places = [LockStep(start=8, rank=rank, consumers=3, batch=4, rows=2) for rank in range(3)]
    seen: list[int] = []
    for _ in range(2):
        for place in places:
            numbers = place.expected()
            seen += numbers.tolist()
            place.check(numbers)
    assert sorted(seen) == list(range(8, 8 + 24)) and {place.number for place in places} == {32}
    with pytest.raises(TeasrError, match="worker 1 of 3 the pairs from 36 on where 34"):
        places[1].check(places[1].expected() + 2)


def test_a_position_in_another_stream_is_refused(data: str) -> None:
    manifest = read_manifest(data)
    position = FeedPosition.after(8, manifest, SETTINGS)
    for change, words in (
        ({"dataset": "0" * 64}, "data set 000000000000"),
        ({"seed": 4}, "seed 4, not 3"),
        ({"consumed": EPOCH}, f"more than {EPOCH} pairs"),
    ):
        with pytest.raises(UsageError, match=words):
            feed(data, SETTINGS, batch=4, position=position.model_copy(update=change))


def test_unknown_preset_and_missing_dataset_are_told(data: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="teasr"):
        feed(data, FeedSettings(preset="tease"), batch=4)
    with pytest.raises(UsageError, match="ingest"):
        feed(str(tmp_path), SETTINGS, batch=4)


def _plain(data: str, passes: int, **changes: object) -> list[Pair]:
    make = training_pass(data, SETTINGS.model_copy(update=changes))
    return [
        pair
        for number in range(passes)
        for block in make({"pass": np.array([number])})
        for pair in _pairs(block)
    ]


def test_a_mixture_degrades_each_crop_as_one_of_its_presets_would(data: str) -> None:
    mixture = {"teasr": 3.0, "realesrgan": 1.0}
    mixed = _plain(data, 60, preset=mixture)
    light, heavy = (_plain(data, 60, preset=name) for name in mixture)
    heavier = [pair == second for pair, second in zip(mixed, heavy)]
    assert all(
        pair == (second if is_heavy else first)
        for pair, first, second, is_heavy in zip(mixed, light, heavy, heavier)
    )
    # 400 draws of 1/4: four standard deviations are 0.087.
    assert len(mixed) == 400 and sum(heavier) / 400 == pytest.approx(0.25, abs=0.087)


def test_of_several_candidates_the_most_detailed_is_taken(data: str) -> None:
    def detail(pair: Pair) -> float:
        grey = np.frombuffer(pair[1], np.uint8).reshape(16, 2, 16, 2, 3).mean((1, 3))
        return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())

    one, four = (_plain(data, 9, candidates=count) for count in (1, 4))
    gains = np.array([detail(b) - detail(a) for a, b in zip(one, four)])
    # The first candidate is the crop that is taken without the others; means are rounded to levels.
    assert gains.min() > -0.6 and gains.max() > 0.6 and gains.mean() > 0


@pytest.mark.parametrize("preset", [{}, {"teasr": 0.0}, {"teasr": 1.0, "realesrgan": -1.0}])
def test_shares_of_presets_must_be_above_0(preset: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"preset.*shares above 0"):
        FeedSettings.from_mapping({"preset": preset}, "recipe.yaml")


def test_a_benchmark_is_made_with_the_preset_of_the_largest_share() -> None:
    settings = FeedSettings(preset={"realesrgan": 1, "teasr": 3})
    assert settings.presets == {"realesrgan": 0.25, "teasr": 0.75}
    assert settings.main_preset == "teasr" and FeedSettings().main_preset == "teasr"
