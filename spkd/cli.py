"""The command line: parse, call, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperCommand

from spkd import config
from spkd.corpus.settings import ViewConfig
from spkd.errors import Interrupted, SpkdError, UsageError, first_line, reported
from spkd.eval.settings import CalibrateConfig, EmbedConfig, EvalConfig
from spkd.export.settings import ExportConfig
from spkd.extract.settings import CacheExportConfig, ExtractConfig, VerifyConfig
from spkd.memory import keep_large_buffers
from spkd.registry import EXPORTS, LOSSES, plug_ins, section_of
from spkd.train.settings import TrainConfig
from spkd.version import __version__

app = typer.Typer(
    help="Distil heavy speaker-verification teachers into phone-sized students, from a shared cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cache_app = typer.Typer(help="Inspect, check, estimate, merge, copy and convert teacher caches.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


def with_keys(schema: type) -> type[TyperCommand]:
    """A command whose --help ends with a table of every key of its settings."""

    class Command(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            _print_keys("Keys (key=value)", config.keys(schema))
            _print_keys("Keys of what is chosen by name", config.component_keys(schema))

    return Command


def _print_keys(title: str, keys: Iterable[config.Key]) -> None:
    """Print each key with its type and default in one line, and its meaning below over the whole width."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    keys, console = list(keys), Console()
    if title and keys:
        console.print(Text(title, "italic"))
    for key in keys:
        choices = f" ({' | '.join(key.choices)})" if key.choices else ""
        line = Text.assemble((key.name, "bold"), f"  {key.kind}, default {key.default!s}", overflow="fold")
        console.print(line)
        console.print(Padding(Text(key.meaning + choices, overflow="fold"), (0, 0, 0, 4)))


def _example(text: str) -> str:
    return f"Example: {text}"


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings; see the keys below.")]
ConfigFile = Annotated[Optional[Path], typer.Option("--config", help="YAML settings (default: ./spkd.yaml if there).")]  # noqa: UP045
Recipe = Annotated[Optional[str], typer.Option(help=f"Settings of a paper: {', '.join(config.recipes())}.")]  # noqa: UP045
CachePath = Annotated[Path, typer.Argument(help="Cache folder.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command(epilog=_example("spkd manifest /data/voxceleb2 --out vox2.csv"))
def manifest(
    path: Annotated[Path, typer.Argument(help="Folder of audio files.")],
    layout: Annotated[
        str | None, typer.Option(help="voxceleb, librispeech, cnceleb or folder (default: detected).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Manifest to write, .csv or .jsonl.")] = Path("manifest.csv"),
    suffix: Annotated[str | None, typer.Option(help="Take only files of this kind, e.g. flac.")] = None,
    workers: Annotated[int, typer.Option(help="Threads that read audio headers.", min=1, max=1024)] = 8,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a file was left out.")] = False,
) -> None:
    """Build a manifest of a folder of audio, with durations."""
    from spkd.corpus.manifest import build
    from spkd.files.atomic import check_writable

    if out.suffix not in (".csv", ".jsonl"):
        raise UsageError(f"--out {out}: manifests are written as .csv or .jsonl")
    check_writable(out)
    made, layout, left_out = build(path, layout, workers, suffix)
    made.save(out)
    print(
        f"{out}: {len(made)} utterances, {len(made.speakers)} speakers, {made.seconds / 3600:.2f} h (layout {layout})"
    )
    _list_rejected(left_out, strict)


@app.command(
    cls=with_keys(ExtractConfig),
    epilog=_example("spkd extract teacher=wavlm manifest=manifest.csv cache=cache fbank=true"),
)
def extract(
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    recipe: Recipe = None,
    also: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Another teacher in the same pass over the audio, with its keys in quotes: "
            "--also 'teacher=wespeaker teacher.weights=DIR cache=caches/resnet'. Repeat it for more.",
            metavar="KEYS",
        ),
    ] = None,
    targets: Annotated[bool, typer.Option("--targets", help="List the teacher's targets and exit.")] = False,
    slurm_script: Annotated[
        bool, typer.Option("--slurm-script", help="Print a job array for sbatch that runs this command, and exit.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if anything was rejected.")] = False,
) -> None:
    """Run a teacher once over every view of a manifest and store its outputs in a cache."""
    settings = config.load(ExtractConfig, overrides or [], config_file, base=recipe)
    more = [config.load(ExtractConfig, _of_another(overrides or [], k), config_file, base=recipe) for k in also or []]
    if slurm_script:
        from spkd.extract.slurm import script

        print(script([settings, *more], sys.argv[1:]), end="")
        return
    if targets:
        _list_targets(settings)
        return
    from spkd.extract.launch import extract_all
    from spkd.extract.run import REJECTED

    every = [settings, *more]
    reports = dict(zip([each.cache for each in every], extract_all(every), strict=False))
    for cache, report in reports.items():
        state = "complete" if report.complete else "other workers are still busy with the rest"
        print(f"{cache}: {report.views} views extracted, {len(report.rejected)} rejected; {state}")
    for cache, report in reports.items():
        _list_rejected(report.rejected, strict, Path(cache) / REJECTED)


def _of_another(overrides: list[str], keys: str) -> list[str]:
    """The settings of `--also`, and those of the run for everything but teacher and cache.

    Args:
        overrides: settings of the run.
        keys: text of `--also`.
    Raises:
        UsageError: a key that only the whole pass can have.
    """
    try:
        given = shlex.split(keys)
    except ValueError as error:
        raise UsageError(f"--also {keys!r}: {error}") from error
    for item in given:
        if not item.startswith(("teacher=", "teacher.", "cache=", "storage.codec")):
            raise UsageError(f"--also: {item!r} is none of teacher, teacher.*, cache, storage.codec, storage.codecs")
    return [item for item in overrides if not item.startswith(("teacher=", "teacher.", "cache="))] + given


@app.command(
    cls=with_keys(TrainConfig),
    epilog=_example("spkd train --loss contrastive cache=cache student=xvector steps=2000 out=student"),
)
def train(
    overrides: Overrides = None,
    loss: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help=f"{', '.join(LOSSES)}; several add up. As loss=[NAME,NAME]."),
    ] = None,
    config_file: ConfigFile = None,
    recipe: Recipe = None,
    losses: Annotated[
        bool, typer.Option("--losses", help="List the losses with the settings of each (loss.NAME.KEY) and exit.")
    ] = False,
    from_run: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--from", help="Repeat the run of a folder with its settings; give another out=FOLDER."),
    ] = None,
    multirun: Annotated[
        bool,
        typer.Option("-m", "--multirun", help="Sweep: KEY=A,B,C is a run with each; several keys, every combination."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End the output with one line of JSON.")] = False,
) -> None:
    """Train a student from a teacher cache."""
    if losses:
        _list_losses()
        return
    given = list(overrides or [])
    if loss and any(item.startswith(("loss=", "loss.names=")) for item in given):
        raise UsageError("name the losses by --loss or by loss=[...], not by both")
    if recipe is not None and from_run is not None:
        raise UsageError("--recipe and --from: choose one")
    given += [f"loss=[{','.join(loss)}]"] if loss else []
    base = recipe if from_run is None else _settings_of(from_run)
    from spkd.train.sweep import runs_of

    def load(keys: list[str]) -> TrainConfig:
        return config.load(TrainConfig, keys, config_file, base=base)

    runs = runs_of(given, load) if multirun else [load(given)]
    views = None if recipe is None else _views_of(recipe)
    from spkd.eval.validate import validation
    from spkd.train.launch import train_each

    results, failed = [], None
    for settings, result in train_each(runs, validation, multirun, views):
        if isinstance(result, SpkdError):
            failed = result
            print(f"error: {settings.out}: {result}", file=sys.stderr)
            results.append({"out": settings.out, "error": str(result)})
            continue
        terms = ", ".join(f"{name} {value:.4f}" for name, value in result.terms.items())
        best = "" if result.best is None else f"; lowest EER {result.best[0]:.3f} % after {result.best[1]} steps"
        print(f"{result.out}: {result.parameters:,} parameters; mean of the last steps: {terms}{best}")
        results.append(result.to_json())
    if as_json or multirun:
        print(json.dumps(results if multirun else results[0]))
    if failed is not None:
        raise typer.Exit(failed.exit_code)


def _views_of(recipe: str) -> ViewConfig:
    """The views that a recipe extracts; its notes belong to `spkd extract`."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return config.load(ExtractConfig, file=config.recipe(recipe), environ={}).view


def _settings_of(run: Path) -> Path:
    """File of the settings of a training.

    Raises:
        UsageError: there is none.
    """
    from spkd.train.record import SETTINGS

    path = run / SETTINGS
    if not path.is_file():
        raise UsageError(f"--from {run}: no training was there ({SETTINGS})")
    return path


Scores = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option(
        "--scores",
        help="Scores of another system (`a b score`, with or without a label) instead of a model's; several "
        "are fused by a calibration.",
        metavar="FILE",
    ),
]
TrialList = Annotated[
    Optional[str],  # noqa: UP045
    typer.Argument(help="Trial list, - for standard input; may be left out where --scores has labels."),
]


@app.command(
    "eval",
    cls=with_keys(EvalConfig),
    epilog=_example("spkd eval trials.txt model=student manifest=test.csv out=eval"),
)
def evaluate(
    trials: TrialList = None,
    overrides: Overrides = None,
    scores: Scores = None,
    config_file: ConfigFile = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if an utterance could not be used.")] = False,
) -> None:
    """Score a trial list: scores, error rates with confidence intervals, DET curve, report."""
    trials, given = _trials_and_keys(trials, overrides)
    settings, started = config.load(EvalConfig, given, config_file), time.time()
    from spkd.eval.report import PAGE, REPORT, SCORES
    from spkd.eval.run import check, in_use, run_trials
    from spkd.eval.run import evaluate as run

    settings = in_use(settings, trials, scores or [])
    check(settings, len(scores or []))
    report = run(settings, run_trials(settings, trials, scores or []), started)
    if line := report.line():
        print(line)
    print(f"{settings.out}/: {SCORES}, {REPORT}, {PAGE}")
    _list_rejected(report.rejected, strict)


@app.command(
    cls=with_keys(CalibrateConfig),
    epilog=_example("spkd calibrate dev-trials.txt model=student manifest=dev.csv"),
)
def calibrate(
    trials: TrialList = None,
    overrides: Overrides = None,
    scores: Scores = None,
    config_file: ConfigFile = None,
) -> None:
    """Learn to turn scores into log-likelihood ratios, and their thresholds, on trials of other speakers."""
    trials, given = _trials_and_keys(trials, overrides)
    settings = config.load(CalibrateConfig, given, config_file)
    from spkd.eval.run import in_use, run_trials
    from spkd.eval.train_calibration import calibrate as run
    from spkd.eval.train_calibration import place

    settings = in_use(settings, trials, scores or [])
    out = place(settings, bool(scores))
    calibration = run(settings, run_trials(settings, trials, scores or []))
    calibration.save(out)
    print(f"{out}: {calibration.line()}")


def _trials_and_keys(trials: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """The trial list and the settings. A first argument `key=value` that is not a file is a setting."""
    if trials is not None and "=" in trials and not Path(trials).exists():
        return None, [trials, *(overrides or [])]
    return trials, list(overrides or [])


@app.command(epilog=_example("spkd report eval/ours eval/teacher --out comparison"))
def report(
    evaluations: Annotated[list[str], typer.Argument(help="Folders that `spkd eval` wrote; LABEL=FOLDER names one.")],
    out: Annotated[Path, typer.Option(help="Folder of the page and the tables.")] = Path("comparison"),
    bootstrap: Annotated[
        int, typer.Option(help="Resamplings of the speakers for the comparison with the first (0: none).", min=0)
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the resampling.", min=0)] = 0,
) -> None:
    """Put several evaluations on one page: DET curves, paired differences, training curves, the table of a paper."""
    from spkd.eval.compare import compare_systems, in_words, load_systems

    for name, differences in compare_systems(load_systems(evaluations), out, bootstrap, seed).items():
        for label, difference in differences.items():
            _print(f"{name}: EER of {label} less that of the first {in_words(difference)}")
    print(f"{out}/: comparison.html, .md, .csv, .tex, .json")


@app.command("export", cls=with_keys(ExportConfig), epilog=_example("spkd export student --to onnx waveform=true"))
def export_student(
    student: Annotated[str, typer.Argument(help="Folder of the student.")],
    overrides: Overrides = None,
    to: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help=f"{', '.join(EXPORTS)}; as to=FORMAT."),
    ] = None,
    config_file: ConfigFile = None,
) -> None:
    """Write a student for another runtime, and measure it there."""
    given = [*(overrides or []), *([f"to={to}"] if to else [])]
    settings = config.load(ExportConfig, given, config_file)
    from spkd.export.run import export
    from spkd.files.text import format_bytes

    out, rows = export(student, settings)
    for row in rows:
        cosine = "" if row.cosine is None else f"   cosine with the student {row.cosine:.6f}"
        rate = "" if row.eer_percent is None else f"   EER {row.eer_percent:.3f} %"
        speed = f"real-time factor {row.real_time_factor:.5f} on one thread"
        print(f"{row.name:12} {format_bytes(row.bytes):>9}   {speed}{cosine}{rate}")
    print(f"{out}: written")


@app.command(cls=with_keys(EmbedConfig), epilog=_example("spkd embed test.csv model=student out=test.ark"))
def embed(
    manifest: Annotated[Path, typer.Argument(help="Manifest of the utterances.")],
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if an utterance could not be used.")] = False,
) -> None:
    """Embed every utterance with a student or a teacher: Kaldi's ark and scp, or an array with its names."""
    settings = config.load(EmbedConfig, overrides or [], config_file)
    from spkd.eval.embed import embed_to_file

    count, rejected = embed_to_file(settings, manifest)
    print(f"{settings.out}: {count} embeddings, {len(rejected)} rejected")
    _list_rejected(rejected, strict)


@app.command(epilog=_example("spkd demo --out spkd-demo"))
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo's corpus, models and report.")] = Path("spkd-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the corpus and of training.", min=0, max=2**31)] = 0,
) -> None:
    """The whole pipeline in minutes, on synthetic speech: no data, no network."""
    from spkd.demo.run import run_demo

    run_demo(out, seed)


@cache_app.command("info", epilog=_example("spkd cache info cache"))
def cache_info(path: CachePath) -> None:
    """Print what a cache holds."""
    from spkd.cache.describe import describe

    _print(describe(path))


@cache_app.command(
    "verify",
    cls=with_keys(VerifyConfig),
    epilog=_example("spkd cache verify cache --live 100 teacher=wavlm manifest=manifest.csv"),
)
def cache_verify(
    path: CachePath,
    overrides: Overrides = None,
    live: Annotated[
        int,
        typer.Option(
            help="Re-run the teacher on so many random views and compare (needs teacher, manifest, noise folders).",
            min=0,
        ),
    ] = 0,
    config_file: ConfigFile = None,
) -> None:
    """Read everything and compare it with the recorded checksums; with --live, with the teacher too."""
    from spkd.cache import Cache, verify
    from spkd.cache.verify import note_verified

    settings = config.load(VerifyConfig, overrides or [], config_file)
    if overrides and not live:
        raise UsageError(f"{overrides[0]}: used with --live only")
    damaged = verify(path)
    if damaged:
        raise SpkdError("\n".join([f"{path}: {len(damaged)} damaged", *damaged]))
    note_verified(path)
    print(f"{path}: all checksums match")
    if live:
        from spkd.corpus.manifest import Manifest
        from spkd.device import resolve
        from spkd.extract.recheck import compare
        from spkd.teachers import load_teacher

        teacher = load_teacher(settings.teacher, resolve(settings.device))
        agreements = compare(Cache.open(path), teacher, Manifest.load(settings.manifest), settings, live)
        for target in agreements:
            print(f"live: {target.target} ({target.codec}): cosine at least {target.least:.6f}, mean {target.mean:.6f}")
        for target in agreements:
            if not target.holds:
                raise SpkdError(
                    f"{path}: {target.target} differs from the teacher's output (cosine below {target.asked:.6f})"
                )


@cache_app.command(
    "estimate",
    cls=with_keys(ExtractConfig),
    epilog=_example("spkd cache estimate teacher=wavlm manifest=voxceleb2.csv view=crops:8,2.0"),
)
def cache_estimate(
    overrides: Overrides = None,
    hour: Annotated[float, typer.Option(help="Price of an hour of this machine.", min=0)] = 2.0,
    terabyte: Annotated[float, typer.Option(help="Price of a terabyte stored for a month.", min=0)] = 20.0,
    config_file: ConfigFile = None,
) -> None:
    """Bytes, hours and money of an extraction, from the manifest and a short run of the teacher."""
    settings = config.load(ExtractConfig, overrides or [], config_file)
    from spkd.corpus.manifest import Manifest
    from spkd.device import resolve
    from spkd.extract.estimate import estimate
    from spkd.files.text import format_bytes
    from spkd.teachers import load_teacher

    where = resolve(settings.device)
    cost = estimate(settings, load_teacher(settings.teacher, where), Manifest.load(settings.manifest), where)
    print(f"{cost.views:,} views, {cost.hours:,.1f} hours of audio, {cost.units:,} units")
    for target in cost.targets:
        sizes = "   ".join(f"{codec} {format_bytes(size)}" for codec, size in cost.bytes[target.name].items())
        print(f"{target.name:20} {sizes}")
    month, hours = cost.total / 1e12 * terabyte, cost.seconds / 3600
    print(f"cache as set         {format_bytes(cost.total)}: {month:,.2f} a month at {terabyte:g} per TB")
    print(f"teacher on {cost.device:9} {hours:,.2f} h: {hours * hour:,.2f} at {hour:g} an hour (decoding not counted)")


@cache_app.command("ls", epilog=_example("spkd cache ls s3://lab/caches"))
def cache_ls(root: Annotated[str, typer.Argument(help="Folder or URL (s3://, http://).")] = ".") -> None:
    """List all caches below a folder or bucket."""
    from spkd.cache.describe import summary
    from spkd.cache.exchange.remote import find

    count = 0
    for cache in find(root):
        count += 1
        _print(f"{cache.url}: {cache.error}" if cache.card is None else summary(cache.url, cache.card, cache.bytes))
    if not count:
        print(f"{root}: no caches")


@cache_app.command("catalogue", epilog=_example("spkd cache catalogue /lab/caches --out catalogue.html"))
def cache_catalogue(
    root: Annotated[str, typer.Argument(help="Folder or URL (s3://, http://).")] = ".",
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("catalogue.html"),
    students: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Another folder or URL with students and evaluations. Repeat it for more."),
    ] = None,
) -> None:
    """Write one page of all caches below a folder or bucket, with the students that were trained from them."""
    from spkd.catalogue import catalogue
    from spkd.files.atomic import check_writable, write_bytes

    check_writable(out)
    page, count = catalogue(root, students or [])
    write_bytes(out, page.encode())
    print(f"{out}: {count} cache{'' if count == 1 else 's'}")


@cache_app.command("merge", epilog=_example("spkd cache merge share0 share1 cache"))
def cache_merge(
    paths: Annotated[list[Path], typer.Argument(metavar="CACHE... OUT", help="Caches, and the new folder.")],
) -> None:
    """Merge caches of one teacher: shares of one extraction, or extractions of other utterances."""
    from spkd.cache.exchange.merge import merge

    *sources, out = paths
    if len(sources) < 2:
        raise UsageError("name at least two caches and the new folder")
    complete = merge(sources, out)
    print(f"{out}: {len(sources)} caches merged; {'complete' if complete else 'units are still missing'}")


@cache_app.command("push", epilog=_example("spkd cache push cache s3://lab/caches/wavlm"))
def cache_push(
    path: Annotated[Path, typer.Argument(help="Cache folder, or an export's.")],
    url: Annotated[str, typer.Argument(help="Where to: a folder or s3://bucket/name.")],
) -> None:
    """Copy a complete cache, or an export, elsewhere and read back what arrived; the same command continues."""
    from spkd.cache.exchange import remote, tars
    from spkd.files.text import format_bytes

    push = tars.push_tars if (path / tars.INDEX).is_file() else remote.push
    print(f"{url}: {format_bytes(push(path, url))}, all read back")


@cache_app.command("pull", epilog=_example("spkd cache pull s3://lab/caches/wavlm /scratch/wavlm --limit 500"))
def cache_pull(
    url: Annotated[str, typer.Argument(help="Where from: a folder, s3://bucket/name or http://host/name.")],
    path: Annotated[Path, typer.Argument(help="New cache folder.")],
    limit: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Most GB of pulled copies next to it; those used longest ago make room.", min=0),
    ] = None,
) -> None:
    """Copy a cache here, checking every file; the same command continues."""
    from spkd.cache.exchange.remote import pull
    from spkd.files.text import format_bytes

    size = pull(url, path, None if limit is None else int(limit * 1e9))
    print(f"{path}: {format_bytes(size)}, all checksums match")


@cache_app.command(
    "export",
    cls=with_keys(CacheExportConfig),
    epilog=_example("spkd cache export cache tars --audio manifest=manifest.csv"),
)
def cache_export(
    path: CachePath,
    out: Annotated[
        Path, typer.Argument(help="FILE.h5, a folder for WebDataset tars, or FILE.ark, .scp, .npy for one target.")
    ],
    overrides: Overrides = None,
    target: Annotated[str, typer.Option(help="The target that an ark, scp or npy file gets.")] = "embedding",
    audio: Annotated[bool, typer.Option("--audio", help="Put every view's audio into the tars (manifest=).")] = False,
    config_file: ConfigFile = None,
) -> None:
    """Write a cache as one HDF5 file, as WebDataset tars to stream from, or one target for other tools."""
    from spkd.cache.exchange.formats import export_cache

    settings = config.load(CacheExportConfig, overrides or [], config_file)
    if overrides and not audio:
        raise UsageError(f"{overrides[0]}: used with --audio only")
    print(f"{out}: {export_cache(path, out, target, settings if audio else None)}")


@cache_app.command("import", epilog=_example("spkd cache import out.h5 cache"))
def cache_import(
    source: Annotated[
        str,
        typer.Argument(help="FILE.h5, a folder or URL of WebDataset tars, or vectors: FILE.ark, .scp, .npy."),
    ],
    path: Annotated[Path, typer.Argument(help="New cache folder.")],
    manifest: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Of the utterances that the vectors belong to; only for ark, scp and npy."),
    ] = None,
) -> None:
    """Make a cache from an export, or from vectors of another toolkit; it appears whole or not at all."""
    from spkd.cache.exchange.formats import import_cache

    print(f"{path}: {import_cache(source, path, manifest)}")


def _print(text: str) -> None:
    """Print text that came from a file, without characters that a terminal would obey."""
    from spkd.errors import printable

    print("\n".join(printable(line) for line in text.split("\n")))


def _list_rejected(rejected: dict[str, str], strict: bool, listing: Path | None = None) -> None:
    from spkd.errors import printable

    for name, reason in list(rejected.items())[:10]:
        print(printable(f"  rejected {name}: {reason}"), file=sys.stderr)
    if len(rejected) > 10:
        rest = f", all in {listing}" if listing else ""
        print(f"  ... and {len(rejected) - 10} more{rest}", file=sys.stderr)
    if rejected and strict:
        raise typer.Exit(1)


def _list_targets(settings: ExtractConfig) -> None:
    from spkd.device import resolve
    from spkd.teachers import load_teacher

    teacher = load_teacher(settings.teacher, resolve(settings.device))
    for target in teacher.targets.values():
        rate = "one per view" if target.rate is None else f"{target.rate:g} Hz"
        print(f"{target.name:24} {target.dim:6}  {rate}")


def _list_losses() -> None:
    for name in LOSSES:
        try:
            kind = LOSSES[name]
            keys = list(config.keys(kind.Settings, f"loss.{section_of(name)}."))
            learns_from, needs_labels = kind.learns_from, kind.needs_labels
        except Exception as error:
            if name in LOSSES.ours:
                raise
            print(f"{name}: cannot be used: {first_line(error)}")  # code of another package
            continue
        labels = "; needs speaker labels" if needs_labels else ""
        labels += ", of some views at least" if needs_labels == "some" else ""
        print(f"{name}: learns from {learns_from}{labels}")
        if keys:
            _print_keys("", keys)


def _interrupt(*_: object) -> None:
    raise Interrupted("interrupted; everything committed stays valid, and the same command continues")


def main() -> None:
    """Run the command.

    An error is printed as one line on stderr. The exit code is then 1 (failed), 2 (usage) or 130 (interrupted).
    """
    keep_large_buffers()
    # Handled here, because Typer would turn KeyboardInterrupt into a silent abort.
    before = {which: signal.signal(which, _interrupt) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        app()
    except Exception as error:
        sys.exit(reported(error, sys.argv, plug_ins()))
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
