"""The command line. Every command ends by saying what was made and what to run next.

Exit codes: 0 done; 1 the work could not be done (a gate refused, a server is away, pictures
failed) or the answer is no (drift, other data); 2 the request itself is wrong; 75 a training was
asked to end, or another is running, and the same command goes on later. A user's mistake is told in
one line; a traceback is for our own bugs. Heavy libraries are imported by the command that needs
them, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import json
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from jobs import data, schedule, submit
from jobs.console import console, errors, progress_bar, say, suggest
from jobs.options import Home, Overrides
from jobs.options import home_folder as _home
from teasr.errors import TeasrError, UsageError

app = typer.Typer(
    name="teasr",
    help="Real-world image super-resolution: data synthesis, distillation, registry, serving.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(data.app)
app.add_typer(schedule.app)
app.add_typer(submit.app)
# Options after COMMAND are its own.
_AS_GIVEN = {"ignore_unknown_options": True, "allow_interspersed_args": False}
app.command(context_settings=_AS_GIVEN)(submit.submit)

OnChange = Annotated[
    str | None,
    typer.Option(help="Command to run after the champion changed [default: $TEASR_ON_CHANGE]."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and stop.")]
MODEL_HELP = (
    "Model: models:/NAME@champion, models:/NAME/VERSION, a folder of weights, or a built-in "
    "model such as teasr-s."
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Registered model, such as teasr.")]
Steps = Annotated[int, typer.Option(help="Sampling steps: 1 is fastest.", min=1, max=64)]
Seed = Annotated[int, typer.Option(help="Seed; equal seeds give equal results.", min=0)]


@app.command()
def quickstart(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where to work [default: ./teasr-home].")
    ] = None,
    photos: Annotated[
        list[str] | None,
        typer.Option("--photos", help="Your photographs, in place of the samples."),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Minutes of training.", min=0.05)] = 3.0,
    init: Annotated[
        str, typer.Option(help="Weights to start from: a model, or 'scratch'.")
    ] = "teasr-s",
    overrides: Overrides = None,
) -> None:
    """The whole journey on sample photographs: ingest, distill, evaluate, promote, serve."""
    home = _home(directory)
    from jobs.figures import table
    from jobs.quickstart import quickstart as run
    from jobs.quickstart import sample_photographs
    from jobs.recipe import load_recipe

    sources = [str(Path(p).absolute()) if Path(p).exists() else p for p in photos or []]
    recipe = load_recipe(
        "quickstart",
        [f"training.minutes={minutes}", f"init={init}", *(overrides or [])],
        photos=sources or [sample_photographs()],
    )
    result = run(recipe, home)
    retrained = result.retrained
    console.print(table(retrained.evaluation, "On the photographs that were kept out of training"))
    where = "" if directory is None else f"TEASR_HOME={home} "
    say(
        f"sheet     {retrained.files / 'sheet.png'}",
        f"pictures  {result.before}  ->  {result.after}",
        f"records   {home / 'mlflow.db'}",
    )
    suggest(
        f"{where}teasr restore models:/{recipe.model}@champion YOUR.jpg out.png --steps 1",
        f"{where}teasr history {recipe.model}",
        f"{where}teasr mlflow",
    )


@app.command()
def ingest(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SRC...", help="Folders, globs, pictures, tar files, URLs."),
    ],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="Folder of the new dataset.")],
    shard_size: Annotated[int, typer.Option(help="Photographs per shard.", min=1)] = 16,
    min_side: Annotated[int, typer.Option(help="Smallest side accepted, in pixels.", min=1)] = 64,
    max_pixels: Annotated[int, typer.Option(help="Largest picture accepted, in pixels.", min=1)] = (
        200_000_000
    ),
    shrink: Annotated[
        str,
        typer.Option(
            metavar="FLOAT|auto",
            help="Shrink by this first, against JPEG damage; auto: by each JPEG's quality.",
        ),
    ] = "1",
    duplicates: Annotated[
        str, typer.Option(metavar="keep|exact|near", help="Which copies are left out.")
    ] = "near",
    against: Annotated[
        list[str] | None,
        typer.Option(help="Benchmark whose pictures must not be learned from; repeatable."),
    ] = None,
    min_sharpness: Annotated[
        float, typer.Option(help="Leave out what is more blurred: 0 (off) to 1.", min=0, max=1)
    ] = 0.0,
    min_jpeg_quality: Annotated[
        int,
        typer.Option(help="Leave out JPEGs of a lower quality: 0 (off) to 100.", min=0, max=100),
    ] = 0,
    max_bad_share: Annotated[
        float | None, typer.Option(help="Fail when more than this share is unusable.", min=0, max=1)
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Photographs into HR shards. Bad pictures go to quarantine.jsonl; rerun to add what is new."""
    from pipelines import ingest as pipeline

    options = {
        "shard_size": shard_size,
        "min_side": min_side,
        "max_pixels": max_pixels,
        "shrink": _shrink(shrink),
        "duplicates": duplicates,
        "against": against or [],
        "min_sharpness": min_sharpness,
        "min_jpeg_quality": min_jpeg_quality,
    }
    if dry_run:
        _planned(pipeline.plan(sources, destination, **options))  # type: ignore[arg-type]
        return
    summary = pipeline.ingest(
        sources,
        destination,
        max_bad_share=max_bad_share,
        **options,  # type: ignore[arg-type]
    )
    _made(summary)
    suggest(
        f"teasr synthesize {destination} PAIRS --preset teasr",
        f"teasr distill teasr-s-cpu data={destination}",
    )


@app.command()
def synthesize(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC", help="HR dataset, from teasr ingest.")],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="Folder of the new pairs.")],
    preset: Annotated[
        str, typer.Option(help="Degradation: teasr, realesrgan, or a YAML file.")
    ] = "teasr",
    copies: Annotated[int, typer.Option(help="Variants of each photograph.", min=1)] = 1,
    seed: Seed = 0,
    crop: Annotated[
        int | None, typer.Option(help="Side of a random HR crop [default: the whole picture].")
    ] = None,
    replay: Annotated[
        str | None,
        typer.Option(help="Make this pair dataset again from its recipes, to the byte."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """HR shards into LR/HR pair shards, with every drawn parameter kept beside each pair."""
    if replay is not None:
        _refuse(context, "preset", "copies", "seed", "crop", with_option="--replay")
        _replay(source, destination, replay, dry_run)
        return
    from pipelines import synthesize as pipeline

    options = {"preset": preset, "copies": copies, "seed": seed, "crop": crop}
    if dry_run:
        _planned(pipeline.plan(source, destination, **options))  # type: ignore[arg-type]
        return
    _made(pipeline.synthesize(source, destination, **options))  # type: ignore[arg-type]
    suggest(f"teasr evaluate teasr-s --data {destination}")


def _refuse(context: typer.Context, *names: str, with_option: str) -> None:
    """Refuse options that were given although `with_option` settles them."""
    sources = {name: context.get_parameter_source(name) for name in names}
    # By name: Typer's releases differ in whose enumeration it is.
    given = [f"--{name}" for name, by in sources.items() if by and by.name != "DEFAULT"]
    if given:
        raise UsageError(
            f"{' and '.join(given)} cannot be given with {with_option}.",
            "The recipes of the pairs say all of it.",
        )


def _replay(source: str, destination: str, pairs: str, dry_run: bool) -> None:
    from pipelines import replay as pipeline

    if dry_run:
        _planned(pipeline.plan(source, destination, pairs))
        return
    replayed = pipeline.replay(source, destination, pairs)
    _made(replayed.summary)
    if not replayed.exact:
        data.tell_comparison(replayed.comparison, show=10)
        raise TeasrError(
            f"{destination} is not {pairs} to the byte (A is {pairs}, B is {destination}).",
            "Another release of teasr or of a library, or another processor, may round otherwise.",
        )
    say(f"the same data as {pairs}: fingerprint {replayed.summary.manifest.fingerprint}")
    suggest(f"teasr data validate {destination} --replay")


@app.command()
def distill(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file or a shipped recipe.")
    ],
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run [default: the recipe's name].")
    ] = None,
    home: Home = None,
    dry_run: DryRun = False,
) -> None:
    """Train with the TEASR objective as a Ray Train job; the same command resumes a run."""
    root = _home(home)
    from jobs.distill import distill as run
    from jobs.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    folder = root / "runs" / (name or Path(recipe).stem)
    if dry_run:
        console.print_json(loaded.model_dump_json())
        say(f"would train in {folder}")
        return
    result = run(loaded, folder)
    done = "was finished before" if result.reused else "finished"
    say(
        f"run {result.run_id} {done}: {result.position['steps']} steps, "
        f"{result.position['samples']} pairs, {result.position['seconds'] / 60:.1f} min",
        f"model in {result.model}",
    )
    if result.best:
        best = result.best
        say(f"best preview: {best['psnr_y']:.2f} dB at step {best['step']}, in {best['model']}")
    if result.spilled:
        say(f"Ray moved {result.spilled / 1e6:.0f} MB from the object store to disk meanwhile")
    suggest(f"teasr evaluate {result.model} --data PAIRS", f"teasr restore {result.model} IN OUT")


@app.command()
def plan(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file or a shipped recipe.")
    ],
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs [default: this machine's].", min=0)] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Of each, such as 24GB [default: this machine's].")
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Such as 64GB [default: this machine's].")
    ] = None,
    disk: Annotated[str | None, typer.Option(help="Free room, such as 500GB.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="In place of the recipe's [default: one per --gpus].", min=1)
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="TFLOP/s of large matrix products, per worker.")
    ] = None,
    host_bandwidth: Annotated[
        str | None, typer.Option(help="Per second, host memory to GPU, such as 25GB.")
    ] = None,
    disk_bandwidth: Annotated[str | None, typer.Option(help="Per second, such as 3GB.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
    home: Home = None,
) -> None:
    """Does a recipe fit, with which offload, and how long is a step; exit code 1 if it does not."""
    root = _home(home)
    from jobs import plan as planner
    from jobs.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    machine = planner.machine_of(
        root,
        gpus=gpus,
        gpu_memory=gpu_memory,
        host_memory=host_memory,
        disk=disk,
        tflops=tflops,
        host_bandwidth=host_bandwidth,
        disk_bandwidth=disk_bandwidth,
    )
    planned = planner.plan(loaded, machine, workers or (gpus or None))
    if as_json:
        console.print_json(data=planner.document(planned))
    else:
        console.print(planner.parts_table(planned.given))
        console.print(planner.choices_table(planned))
        say(planner.rates(machine), f"{recipe} {planner.sentence(planned)}")
    if not planned.given.fits:
        raise typer.Exit(1)
    if not as_json:
        suggest(f"teasr distill {recipe} {' '.join(overrides or [])}".rstrip())


@app.command()
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option("--data", help="Pair dataset, from teasr synthesize.")],
    steps: Annotated[str, typer.Option(help="Numbers of sampling steps.")] = "1,4",
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("evaluation"),
    metrics: Annotated[
        str,
        typer.Option(
            help="What is measured; psnr_y and ssim_y always are. With the package pyiqa also "
            "musiq,maniqa,clipiqa."
        ),
    ] = "psnr_y,ssim_y,lpips,dists,niqe",
    lpips: Annotated[
        str | None, typer.Option(help="LPIPS weights [default: $TEASR_LPIPS].")
    ] = None,
    dists: Annotated[
        str | None, typer.Option(help="DISTS weights [default: $TEASR_DISTS].")
    ] = None,
    pictures: Annotated[
        str, typer.Option(metavar="N|all", help="Pictures on the page, worst first.")
    ] = "4",
    home: Home = None,
) -> None:
    """Measure a model on a benchmark: table with intervals, per-image CSV, sheet and page."""
    _home(home)
    from jobs.evaluate import checked_metrics
    from jobs.evaluate import evaluate as run
    from jobs.figures import table
    from teasr import registry

    counts, chosen, shown = _numbers(steps), checked_metrics(metrics), _pictures(pictures)
    label = registry.describe(model)
    result = run(
        registry.resolve(model),
        data,
        out,
        steps=counts,
        metrics=chosen,
        lpips=lpips,
        dists=dists,
        pictures=shown,
        title=label,
    )
    console.print(table(result.evaluation, label))
    say(f"figures and pictures in {out}", f"to look at: {result.page}")
    suggest(f"teasr restore {model} IN OUT --steps 1")


@app.command()
def ablate(
    data: Annotated[str, typer.Option("--data", help="HR dataset, from teasr ingest.")],
    pairs: Annotated[str, typer.Option("--pairs", help="Pair dataset to measure on.")],
    out: Annotated[Path, typer.Option(help="Folder for runs, figures and the table.")],
    only: Annotated[
        str, typer.Option(metavar="NAME,...", help="Variants, full among them [default: all].")
    ] = "",
    seeds: Annotated[str, typer.Option(help="Seeds of each variant.")] = "0",
    minutes: Annotated[
        float | None, typer.Option(help="Minutes of training per variant and seed.", min=0.01)
    ] = None,
    start_minutes: Annotated[
        float | None, typer.Option(help="Minutes of training of what all start from.", min=0.01)
    ] = None,
    overrides: Overrides = None,
    home: Home = None,
    dry_run: DryRun = False,
) -> None:
    """What each part of the method is worth: variants at one budget. Rerun to go on, or to add."""
    _home(home)
    from jobs import ablate as job

    budget = job.Budget(data, pairs, minutes, start_minutes, tuple(overrides or []))
    names = [name.strip() for name in only.split(",") if name.strip()]
    numbers = _numbers(seeds, "--seeds")
    folder = out.expanduser().absolute()
    if dry_run:
        for one in job.plan(budget, folder, names, numbers):
            training = one.recipe.training
            length = f"{training.minutes:g} min" if training.minutes else f"{training.steps} steps"
            say(f"{one.name}: {length} from {one.recipe.init}")
        say(f"would train and measure these in {folder}; what is finished there is kept")
        return
    outcomes = job.ablate(budget, folder, names, numbers)
    say(f"{len(outcomes)} trainings measured: {folder / job.MARKDOWN_FILE}, {job.CSV_FILE}")
    suggest(f"cat {folder / job.MARKDOWN_FILE}")


@app.command()
def promote(
    name: Name,
    version: Annotated[int | None, typer.Option(help="[default: the challenger]")] = None,
    gate: Annotated[
        Path | None, typer.Option(help="YAML file of rules [default: the built-in ones].")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe whose gate to use.")] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(help="The pairs it was measured on, for the report [default: as noted]."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the report here too; with --dry-run, only here.")
    ] = None,
    on_change: OnChange = None,
    home: Home = None,
    dry_run: DryRun = False,
) -> None:
    """Put a version through the gate; when it passes, it becomes the champion."""
    if gate and recipe:
        raise UsageError("--gate and --recipe both name a gate.", "Give one of them.")
    root = _home(home)
    from jobs import gate_report
    from jobs.recipe import load_recipe
    from teasr import promotion, tracking
    from teasr.gate import GateSettings
    from teasr.shards import write_bytes

    rules = GateSettings.load(gate) if gate else load_recipe(recipe).gate if recipe else None
    client = tracking.connect(root)
    page = None
    if dry_run and report is None:
        result = promotion.promote(client, name, version, rules, dry_run=True)
    else:
        result, page = gate_report.promote(client, name, version, rules, benchmark, dry_run)
    assert result.verdict is not None
    for check in result.verdict.checks:
        mark = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[dim]-[/]"}[check.passed]
        told = escape(f"{check.name}: {check.detail}")
        console.print(f"{mark} {told}", highlight=False, soft_wrap=True)
    if page is not None and report is not None:
        write_bytes(str(report.absolute()), page.html.encode())
        say(f"report in {report}")
    if page is not None and page.no_pictures:
        say(f"the report shows no pictures: {page.no_pictures}")
    if dry_run:
        say("nothing was changed (dry run)")
        return
    if not result.promoted:
        raise TeasrError(
            f"Version {result.version} of '{name}' was refused by the gate.",
            f"Version {result.replaced} stays the champion."
            if result.replaced
            else "There is no champion yet.",
        )
    say(f"version {result.version} of '{name}' is the champion (was: {result.replaced or 'none'})")
    _tell_hook(promotion.run_hook(client, result, on_change))
    suggest(f"teasr serve models:/{name}@champion", f"teasr rollback {name}")


@app.command()
def rollback(
    name: Name,
    to: Annotated[
        int | None, typer.Option(help="Version [default: the previous champion].")
    ] = None,
    on_change: OnChange = None,
    home: Home = None,
    dry_run: DryRun = False,
) -> None:
    """Make the previous champion the champion again; recorded like a promotion."""
    root = _home(home)
    from teasr import lineage, promotion, tracking

    client = tracking.connect(root)
    result = promotion.rollback(client, name, to, dry_run)
    if not dry_run:
        lineage.describe(client, name, result.version, result.replaced)
    verb = "would become" if dry_run else "is"
    say(f"version {result.version} of '{name}' {verb} the champion (was: {result.replaced})")
    _tell_hook(promotion.run_hook(client, result, on_change))
    suggest(f"teasr history {name}")


@app.command()
def history(
    name: Name,
    version: Annotated[int | None, typer.Option(help="Show where this version came from.")] = None,
    home: Home = None,
) -> None:
    """What was live, when, why, and who decided."""
    root = _home(home)
    from rich.table import Table

    from teasr import lineage, promotion, registry, tracking

    client = tracking.connect(root)
    if version is not None:
        from jobs.history import screen

        console.print(screen(lineage.version_details(client, name, version)))
        return
    versions = registry.list_versions(client, name)
    listing = Table("version", "aliases", title=f"Versions of {name}", title_justify="left")
    for number, aliases in versions.items():
        listing.add_row(str(number), ", ".join(aliases))
    console.print(listing)
    records = Table(
        "when (UTC)",
        "action",
        "version",
        "replaced",
        "verdict",
        "state",
        "by",
        title="Promotions",
        title_justify="left",
    )
    for record in promotion.history(client, name):
        records.add_row(
            record.at[:16].replace("T", " "),
            record.action,
            str(record.version),
            str(record.replaced or "-"),
            record.verdict,
            record.state,
            record.by,
        )
    console.print(records)
    suggest(f"teasr history {name} --version {next(iter(versions), 1)}")


@app.command()
def serve(
    model: Model,
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 5001,
    host: Annotated[
        str, typer.Option(help="Address; anything but loopback is open to the network.")
    ] = "127.0.0.1",
    replicas: Annotated[
        int, typer.Option(help="Processes, by Ray Serve when more than one.", min=1)
    ] = 1,
    poll: Annotated[
        float | None,
        typer.Option(help="Seconds between looks at where an alias points. [default: 5]"),
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Of a picture that comes in. [default: 4 million]")
    ] = None,
    max_megabytes: Annotated[
        float | None, typer.Option(help="Of a request, in MiB. [default: 32]")
    ] = None,
    queue: Annotated[
        int | None, typer.Option(help="Pictures accepted at a time. [default: 32]")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds that a request may take. [default: 120]")
    ] = None,
    record_inputs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep statistics of the pictures that come in."),
    ] = None,
    home: Home = None,
) -> None:
    """Serve a model over HTTP until interrupted: a page at /, batches, reloading, metrics."""
    _home(home)
    from teasr import registry
    from teasr.server.settings import ServerSettings
    from teasr.serving import check_port

    given = {
        "poll": poll,
        "max_pixels": max_pixels,
        "max_megabytes": max_megabytes,
        "queue": queue,
        "timeout": timeout,
        "record_inputs": record_inputs and record_inputs.expanduser().absolute(),
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = ServerSettings.from_mapping(chosen, "command line")
    check_port(host, port)
    url = f"http://{host}:{port}"

    def started(version: str) -> None:
        say(
            f"{version} answers at {url} (Ctrl-C ends)",
            f"curl --data-binary @YOUR.jpg '{url}/restore?steps=1' -o restored.png",
        )

    if replicas == 1:
        from teasr.server.run import serve as run

        run(model, settings, host, port, started)
        return
    from jobs.serve_replicas import serve_replicas

    version = registry.describe(model)
    serve_replicas(model, settings, host, port, replicas, lambda: started(version))


@app.command()
def mlflow(
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 5000,
    host: Annotated[
        str, typer.Option(help="Address; anything but loopback needs --auth.")
    ] = "127.0.0.1",
    auth: Annotated[
        bool,
        typer.Option(
            help="Ask for passwords; the administrator's name and password are "
            "$MLFLOW_TRACKING_USERNAME and $MLFLOW_TRACKING_PASSWORD."
        ),
    ] = False,
    home: Home = None,
) -> None:
    """MLflow's server and pages on the runs of the working folder, until interrupted."""
    root = _home(home)
    from teasr.tracking_server import TrackingServer

    with TrackingServer(root, port, host=host, auth=auth) as server:
        say(f"runs and models of {root} at {server.url} (Ctrl-C ends)")
        suggest(f"MLFLOW_TRACKING_URI={server.url} teasr distill teasr-s-cpu data=DATA")
        server.wait()


@app.command()
def restore(
    model: Model,
    source: Annotated[str, typer.Argument(metavar="IN", help="A picture, a folder, or HR shards.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A picture, or a folder.")],
    steps: Steps = 1,
    seed: Seed = 0,
    tile: Annotated[
        int | None,
        typer.Option(
            help="Longest side of a tile in LR pixels; less takes less memory. [default: the "
            "model's own]"
        ),
    ] = None,
    colour: Annotated[
        str,
        typer.Option(
            help="none, or what is taken from IN: wavelet, the lowest frequencies; adain, each "
            "channel's mean and deviation."
        ),
    ] = "none",
    overwrite: Annotated[bool, typer.Option(help="Replace an OUT that exists.")] = False,
    home: Home = None,
) -> None:
    """Restore a picture of any size, or a folder of pictures, four times larger."""
    _home(home)
    from pipelines.restore import output_format, restore_many
    from teasr import registry
    from teasr.restoration import RestorationSettings

    settings = RestorationSettings.from_mapping(
        {"steps": steps, "seed": seed, "tile": tile, "colour": colour}, "command line"
    )
    folder = registry.resolve(model)
    if Path(source).is_file():
        if target.exists() and not overwrite:
            raise UsageError(f"{target} exists.", "Choose another name, or add --overwrite.")
        _restore_one(folder, Path(source), target, settings, output_format(target))
        return
    if target.suffix and not target.is_dir():
        raise UsageError(f"{source} is not a picture, so OUT must be a folder, not {target}.")
    with progress_bar("restore", total=1.0) as update:
        result = restore_many(
            folder,
            source,
            target,
            settings,
            progress=lambda done, total: update(done / total, f"{done} of {total} pictures"),
        )
    for failure in result.failed:
        told = escape(f"{failure.name}: {failure.message}")
        errors.print(f"[red]✗[/] {told}", highlight=False, soft_wrap=True)
    say(
        f"{len(result.done)} restored to {target} in {result.seconds:.1f} s "
        f"({result.megapixels_per_second:.2f} megapixels/s), "
        f"{len(result.skipped)} were there before"
    )
    if result.failed:
        reasons = ", ".join(f"{n} {reason}" for reason, n in result.failed_by_reason.items())
        raise TeasrError(f"{len(result.failed)} picture(s) could not be restored: {reasons}.")


def _restore_one(folder: Path, source: Path, target: Path, settings, format: str) -> None:  # type: ignore[no-untyped-def]
    from teasr.backbones import load_model
    from teasr.images import BadPicture, decode
    from teasr.restoration import restore_picture
    from teasr.shards import write_bytes

    if not target.parent.is_dir():
        raise UsageError(f"The folder {target.parent} does not exist.")
    try:
        picture = decode(source.read_bytes())
    except BadPicture as error:
        raise UsageError(f"{source}: {error.message}", error.hint) from None
    with progress_bar("restore", total=1.0) as update:
        model = load_model(folder)
        restored = restore_picture(
            model.network,
            picture,
            settings,
            format,
            progress=lambda done, total: update(done / total, f"{done} of {total} tiles"),
            codec=model.codec,
        )
    write_bytes(str(target.absolute()), restored)
    height, width = (side * model.network.scale for side in picture.rgb.shape[:2])
    note = " (read as 8 bits)" if picture.bits > 8 else ""
    say(f"{target}: {width} x {height} from {source.name}{note}, {settings.steps} step(s)")


@app.command()
def retrain(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file or a shipped recipe.")
    ],
    overrides: Overrides = None,
    result_file: Annotated[
        Path | None, typer.Option("--result", help="JSON file for what it came to.")
    ] = None,
    home: Home = None,
) -> None:
    """The journey from photographs to promotion, once; does nothing when there is nothing new."""
    root = _home(home)
    from jobs.figures import table
    from jobs.recipe import load_recipe
    from jobs.retrain import retrain as run
    from teasr.shards import write_bytes

    loaded = load_recipe(recipe, overrides or [])
    result = run(loaded, root, recipe)
    if result_file is not None:
        document = {"version": result.version, "promoted": result.promoted, "new": result.new}
        write_bytes(str(result_file.absolute()), (json.dumps(document) + "\n").encode())
    if not result.new:
        became = "became the champion" if result.promoted else "was refused by the gate"
        say(f"nothing new to learn from; version {result.version} {became} before")
        return
    console.print(table(result.evaluation))
    if not result.promoted:
        raise TeasrError(
            f"Version {result.version} was registered but refused by the gate.",
            f"See: teasr history {loaded.model}",
        )
    say(f"version {result.version} of '{loaded.model}' is the champion")
    suggest(f"teasr serve models:/{loaded.model}@champion")


@app.command()
def drift(
    name: Name,
    inputs: Annotated[
        Path | None,
        typer.Option(help="Recorded inputs [default: those of NAME in the working folder]."),
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Look back so far: 12h, 7d [default: all].")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Compare with these recorded inputs, not with the training."),
    ] = None,
    significance: Annotated[
        float, typer.Option(help="Chance of a false alarm.", min=1e-9, max=0.5)
    ] = 0.01,
    stability: Annotated[
        float, typer.Option(help="Population stability index above which it matters.", min=0)
    ] = 0.25,
    pictures: Annotated[int, typer.Option(help="Fewest pictures.", min=10)] = 50,
    out: Annotated[Path | None, typer.Option(help="HTML page with the distributions.")] = None,
    home: Home = None,
) -> None:
    """Do inputs look like what the champion learned from? Exit code 1 when they do not."""
    root = _home(home)
    from jobs import drift as job
    from teasr.drift import DriftSettings
    from teasr.shards import write_bytes
    from teasr.tracking import connect

    limits = DriftSettings(significance=significance, stability=stability, pictures=pictures)
    start = None if since is None else job.ago(since)
    result = job.drift(
        connect(root), name, root, inputs=inputs, since=start, reference=reference, settings=limits
    )
    console.print(job.table(result))
    if out is not None:
        write_bytes(str(out.absolute()), job.page(result).encode())
        say(f"to look at: {out}")
    if result.figures:
        raise TeasrError(f"The inputs of '{name}' drifted: {', '.join(result.figures)}.")
    say(f"no drift in {result.inputs.pictures} pictures")


@app.command()
def status(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON alone, a line for each look.")
    ] = False,
    watch: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Look again and again, until interrupted.", min=1),
    ] = None,
    home: Home = None,
) -> None:
    """Cluster, jobs, trainings, retrainings, champions and data on one screen."""
    root = _home(home)
    from jobs.status_screen import show

    show(root, as_json, watch)


@app.command()
def doctor(home: Home = None) -> None:
    """What is installed, reachable and compiled here; what to do about what is not."""
    root = _home(home)
    from jobs.doctor import Finding, examine

    findings: list[Finding] = examine(root)
    for finding in findings:
        mark = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[yellow]![/]"}[finding.good]
        console.print(f"{mark} {finding.name}: {finding.detail}", highlight=False)
        if finding.advice:
            console.print(f"    {finding.advice}", highlight=False)
    if any(finding.good is False for finding in findings):
        raise TeasrError("Something that teasr needs is missing, see above.")


def _tell_hook(result: str | None) -> None:
    if result is not None:
        say(f"the command for changes: {result}")


def _numbers(text: str, option: str = "--steps") -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: whole numbers such as 1,2,4 are expected.") from None


def _pictures(text: str) -> int | None:
    """A count; None for all."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise UsageError(f"--pictures {text}: a number from 0, or all, is expected.")
    return int(text)


def _shrink(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise UsageError(f"--shrink {text}: a number of 1 or more, or auto, is expected.") from None


def _planned(plan) -> None:  # type: ignore[no-untyped-def]
    say(
        f"would write {len(plan.missing)} of {len(plan.tasks)} shards ({plan.samples} samples) to "
        f"{plan.destination}; the others are there"
    )
    if plan.set_aside:
        say(f"would set aside: {_counts(Counter(entry.reason for entry in plan.set_aside))}")
    if plan.unseen:
        say(
            f"{plan.unseen} pictures have not been looked at: copies and what the filters keep "
            "out are found, and left out, when this runs"
        )


def _made(summary) -> None:  # type: ignore[no-untyped-def]
    rate = f" ({summary.rate:.1f} samples/s)" if summary.written else ""
    say(
        f"{summary.samples} samples in {len(summary.manifest.shards)} shards, "
        f"{summary.bytes / 1e6:.1f} MB, in {summary.destination}",
        f"this run: {summary.written} samples in {summary.shards} shards written in "
        f"{summary.seconds:.1f} s{rate}; {summary.skipped_shards} shards were there",
    )
    if summary.quarantined:
        say(
            f"quarantined: {_counts(summary.quarantined)}; each is named in "
            f"{summary.destination.rstrip('/')}/quarantine.jsonl"
        )


def _counts(by_reason: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(by_reason.items()))


def main() -> None:
    """Entry point of the `teasr` command."""
    # Asked to end: leave through the clean-up that an interrupt runs, so that no server stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except TeasrError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("Interrupted. The same command goes on where it stopped.", 130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        _fail(f"{error.filename or 'Writing'}: {error.strerror}.", 1)
    except Exception as error:
        if not type(error).__module__.startswith("mlflow."):
            raise
        _fail(f"MLflow: {str(error).splitlines()[0]}", 1)


def _fail(message: str, code: int) -> None:
    errors.print(f"[red]teasr:[/] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
