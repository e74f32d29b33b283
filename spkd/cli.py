"""The command line: parse, call, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import errno
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperCommand

from spkd import __version__, config
from spkd.errors import SpkdError

if TYPE_CHECKING:
    from spkd.extract.teacher import Teacher

HDF5 = (".h5", ".hdf5")

app = typer.Typer(
    help="Distil heavy speaker-verification teachers into phone-sized students, from a shared cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cache_app = typer.Typer(help="Look at, check, plan, join, move and convert teacher caches.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


def with_keys(schema: type) -> type[TyperCommand]:
    """A command whose --help ends with a table of every key of its settings."""

    class Command(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            from rich.console import Console
            from rich.table import Table

            table = Table(title="Keys (key=value)", title_justify="left", box=None, padding=(0, 2, 0, 0))
            for column in ("key", "type", "default", "meaning"):
                table.add_column(column, overflow="fold", no_wrap=column == "key")
            for key in config.keys(schema):
                choices = f" ({' | '.join(key.choices)})" if key.choices else ""
                table.add_row(key.name, key.kind, str(key.default), key.meaning + choices)
            Console().print(table, markup=False)

    return Command


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, e.g. teacher=wavlm.")]
ConfigFile = Annotated[Optional[Path], typer.Option("--config", help="YAML settings (default: ./spkd.yaml if there).")]  # noqa: UP045


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def manifest(
    path: Annotated[Path, typer.Argument(help="Folder of audio files.")],
    layout: Annotated[
        str | None, typer.Option(help="voxceleb, librispeech, cnceleb or folder (default: detected).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Manifest to write, .csv or .jsonl.")] = Path("manifest.csv"),
    workers: Annotated[int, typer.Option(help="Threads that read audio headers.")] = 8,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a file was left out.")] = False,
) -> None:
    """Build a manifest of a folder of audio, with durations."""
    from spkd.errors import UsageError
    from spkd.manifest import build

    if out.suffix not in (".csv", ".jsonl"):
        raise UsageError(f"--out {out}: manifests are written as .csv or .jsonl")
    made, layout, left_out = build(path, layout, workers)
    made.save(out)
    print(
        f"{out}: {len(made)} utterances, {len(made.speakers)} speakers, {made.seconds / 3600:.2f} h (layout {layout})"
    )
    _list_rejected(left_out, strict)


Recipe = Annotated[Optional[str], typer.Option(help=f"Settings of a paper: {', '.join(config.recipes())}.")]  # noqa: UP045


@app.command(cls=with_keys(config.ExtractConfig))
def extract(
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    recipe: Recipe = None,
    targets: Annotated[bool, typer.Option("--targets", help="List what the teacher can say, and stop.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if anything was rejected.")] = False,
) -> None:
    """Run a teacher once over every view of a manifest and keep what it said."""
    settings = config.load(config.ExtractConfig, overrides or [], config_file, base=recipe)
    from spkd import device
    from spkd.extract import load_teacher

    if targets:
        _list_targets(load_teacher(settings.teacher, device.resolve(settings.device)))
        return
    from spkd.extract.run import REJECTED, run
    from spkd.files import writable_folder
    from spkd.manifest import Manifest

    audio = Manifest.load(settings.manifest)
    writable_folder(settings.cache)
    report = run(settings, load_teacher(settings.teacher, device.resolve(settings.device)), audio)
    state = "complete" if report.complete else "other workers are still busy with the rest"
    print(f"{settings.cache}: {report.views} views extracted, {len(report.rejected)} rejected; {state}")
    _list_rejected(report.rejected, strict, Path(settings.cache) / REJECTED)


@app.command(cls=with_keys(config.TrainConfig))
def train(
    overrides: Overrides = None,
    loss: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="aam, cosine, mse, contrastive, relational, ntxent, multilevel, kld, nontarget, one-step or memo; "
            "several add up."
        ),
    ] = None,
    config_file: ConfigFile = None,
    recipe: Recipe = None,
) -> None:
    """Train a student from a teacher cache."""
    settings = config.load(config.TrainConfig, overrides or [], config_file, base=recipe)
    from spkd.train.trainer import run

    result = run(settings, loss or ([] if recipe is None else config.recipe(recipe)[1]))
    terms = ", ".join(f"{name} {value:.4f}" for name, value in result.terms.items())
    print(f"{result.out}: {result.parameters:,} parameters; mean of the last steps: {terms}")


@app.command("eval", cls=with_keys(config.EvalConfig))
def evaluate(
    trials: Annotated[Path, typer.Argument(help="Trial list.")],
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if an utterance could not be used.")] = False,
) -> None:
    """Score a trial list: scores, EER, minDCF, DET curve, report."""
    settings = config.load(config.EvalConfig, overrides or [], config_file)
    from spkd import device
    from spkd.eval import trials as trial_lists
    from spkd.eval.run import run
    from spkd.extract import load_teacher
    from spkd.manifest import Manifest

    listed = trial_lists.read(trials, settings.format)
    audio = Manifest.load(settings.manifest)
    is_family = settings.model in config.TEACHERS
    family, weights = (settings.model, settings.weights) if is_family else ("checkpoint", settings.model)
    teacher = config.TeacherConfig(name=family, weights=weights, layer=settings.layer)
    report = run(settings, load_teacher(teacher, device.resolve(settings.device)), audio, listed)
    if report["results"]:
        values = report["results"]
        print(
            f"EER {values['eer_percent']:.3f} %   minDCF(0.01) {values['min_dcf_0.01']:.4f}   "
            f"minDCF(0.05) {values['min_dcf_0.05']:.4f}   ({report['trials']['scored']} trials)"
        )
    print(f"{settings.out}/: scores.txt, report.json, report.html")
    _list_rejected(report["rejected"], strict)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo's corpus, models and report.")] = Path("spkd-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the corpus and of training.")] = 0,
) -> None:
    """The whole way in minutes, on synthetic speech: no data, no network."""
    from spkd.demo.run import run

    run(out, seed)


@cache_app.command("info")
def cache_info(path: Annotated[Path, typer.Argument(help="Cache folder.")]) -> None:
    """Print what a cache holds."""
    from spkd.cache.describe import describe

    print(describe(path))


@cache_app.command("verify", cls=with_keys(config.ExtractConfig))
def cache_verify(
    path: Annotated[Path, typer.Argument(help="Cache folder.")],
    overrides: Overrides = None,
    live: Annotated[
        int, typer.Option(help="Also hear so many views again and compare (needs teacher, manifest, noise folders).")
    ] = 0,
    config_file: ConfigFile = None,
) -> None:
    """Read everything and compare it with the recorded checksums; with --live, with the teacher too."""
    from spkd.cache import Cache, verify

    settings = config.load(config.ExtractConfig, overrides or [], config_file)
    damaged = verify(path)
    if damaged:
        raise SpkdError("\n".join([f"{path}: {len(damaged)} damaged", *damaged]))
    print(f"{path}: every checksum fits")
    if live:
        from spkd import device
        from spkd.extract import load_teacher
        from spkd.extract.live import compare
        from spkd.manifest import Manifest

        teacher = load_teacher(settings.teacher, device.resolve(settings.device))
        found = compare(Cache.open(path), teacher, Manifest.load(settings.manifest), settings, live)
        for one in found:
            print(f"live: {one.target} ({one.codec}): cosine at least {one.least:.6f}, mean {one.mean:.6f}")
        for one in found:
            if not one.holds:
                raise SpkdError(f"{path}: {one.target} is not what the teacher says (cosine below {one.asked:.6f})")


@cache_app.command("plan", cls=with_keys(config.ExtractConfig))
def cache_plan(
    overrides: Overrides = None,
    hour: Annotated[float, typer.Option(help="Price of an hour of this machine.")] = 2.0,
    terabyte: Annotated[float, typer.Option(help="Price of a terabyte stored for a month.")] = 20.0,
    config_file: ConfigFile = None,
) -> None:
    """Bytes, hours and money of an extraction, from the manifest and a short run of the teacher."""
    settings = config.load(config.ExtractConfig, overrides or [], config_file)
    from spkd import device
    from spkd.cache.describe import amount
    from spkd.extract import load_teacher
    from spkd.extract.estimate import estimate
    from spkd.manifest import Manifest

    where = device.resolve(settings.device)
    found = estimate(settings, load_teacher(settings.teacher, where), Manifest.load(settings.manifest), where)
    print(f"{found.views:,} views, {found.heard_hours:,.1f} h heard, {found.units:,} units")
    for target in found.targets:
        sizes = "   ".join(f"{codec} {amount(size)}" for codec, size in found.bytes[target.name].items())
        print(f"{target.name:20} {sizes}")
    month, hours = found.total / 1e12 * terabyte, found.seconds / 3600
    print(f"cache as set         {amount(found.total)}: {month:,.2f} a month at {terabyte:g} per TB")
    print(f"teacher on {found.device:9} {hours:,.2f} h: {hours * hour:,.2f} at {hour:g} an hour (decoding not counted)")


@cache_app.command("ls")
def cache_ls(root: Annotated[str, typer.Argument(help="Folder or URL (s3://, http://).")] = ".") -> None:
    """List all caches below a folder or bucket."""
    from spkd.cache.describe import amount
    from spkd.cache.remote import find

    count = 0
    for found in find(root):
        count += 1
        if "error" in found:
            print(f"{found['url']}: {found['error']}")
            continue
        card, record = found["card"], found["record"]
        targets = " ".join(f"{t['name']}:{t['codec']}" for t in card["targets"])
        state = amount(record["bytes"]) if record else "not complete"
        views = sum(part["views"] for part in card["parts"])
        print(
            f"{found['url']}  {card['fingerprint'][:12]}  {card['teacher']['family']}  "
            f"{views} views ({card['views']['plan']})  {targets}  {state}"
        )
    if not count:
        print(f"{root}: no caches")


@cache_app.command("merge")
def cache_merge(
    paths: Annotated[list[Path], typer.Argument(metavar="CACHE... OUT", help="Caches, and the new folder.")],
) -> None:
    """Join caches of one teacher: shares of one extraction, or extractions of other utterances."""
    from spkd.cache.merge import merge
    from spkd.errors import UsageError

    *sources, out = paths
    if len(sources) < 2:
        raise UsageError("name at least two caches and the new folder")
    complete = merge(sources, out)
    print(f"{out}: {len(sources)} caches merged; {'complete' if complete else 'units are still missing'}")


@cache_app.command("push")
def cache_push(
    path: Annotated[Path, typer.Argument(help="Cache folder, or an export's.")],
    url: Annotated[str, typer.Argument(help="Where to: a folder or s3://bucket/name.")],
) -> None:
    """Copy a complete cache, or an export, elsewhere and read back what arrived; the same command continues."""
    from spkd.cache import remote, tars
    from spkd.cache.describe import amount

    push = tars.push if (path / tars.INDEX).is_file() else remote.push
    print(f"{url}: {amount(push(path, url))}, all read back")


@cache_app.command("pull")
def cache_pull(
    url: Annotated[str, typer.Argument(help="Where from: a folder, s3://bucket/name or http://host/name.")],
    path: Annotated[Path, typer.Argument(help="New cache folder.")],
    limit: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Most GB of pulled copies beside it; those used longest ago make room."),
    ] = None,
) -> None:
    """Copy a cache here, checking every file; the same command continues."""
    from spkd.cache.describe import amount
    from spkd.cache.remote import pull

    print(f"{path}: {amount(pull(url, path, None if limit is None else int(limit * 1e9)))}, every checksum fits")


@cache_app.command("export", cls=with_keys(config.ExtractConfig))
def cache_export(
    path: Annotated[Path, typer.Argument(help="Cache folder.")],
    out: Annotated[Path, typer.Argument(help="FILE.h5, or a folder for WebDataset tars.")],
    overrides: Overrides = None,
    audio: Annotated[bool, typer.Option("--audio", help="Put every view's audio into the tars (manifest=).")] = False,
) -> None:
    """Write a cache as one HDF5 file, or as WebDataset tars to stream from."""
    from spkd.cache import Cache

    settings, cache = config.load(config.ExtractConfig, overrides or []), Cache.open(path)
    if out.suffix in HDF5:
        from spkd.cache import hdf5

        hdf5.export(cache, out)
    else:
        from spkd.cache import tars
        from spkd.manifest import Manifest

        view = settings.view
        player = cache.player(Manifest.load(settings.manifest), view.noise, view.rir) if audio else None
        tars.export(cache, out, player)
    print(f"{out}: {len(cache.rows)} views, targets {', '.join(cache.targets)}")


@cache_app.command("import")
def cache_import(
    source: Annotated[str, typer.Argument(help="FILE.h5, or a folder or URL of WebDataset tars.")],
    path: Annotated[Path, typer.Argument(help="New cache folder.")],
) -> None:
    """Make a cache from an export; it appears whole or not at all."""
    if Path(source).suffix in HDF5:
        from spkd.cache import hdf5

        hdf5.load(Path(source), path)
    else:
        from spkd.cache import tars

        tars.load(source, path)
    print(f"{path}: imported from {source}")


def _list_rejected(rejected: dict[str, str], strict: bool, listing: Path | None = None) -> None:
    for name, reason in list(rejected.items())[:10]:
        print(f"  rejected {name}: {reason}", file=sys.stderr)
    if len(rejected) > 10:
        rest = f", all in {listing}" if listing else ""
        print(f"  ... and {len(rejected) - 10} more{rest}", file=sys.stderr)
    if rejected and strict:
        raise typer.Exit(1)


def _list_targets(teacher: Teacher) -> None:
    for target in teacher.targets.values():
        rate = "one per view" if target.rate is None else f"{target.rate:g} Hz"
        print(f"{target.name:24} {target.dim:6}  {rate}")


class Interrupted(SpkdError):
    exit_code = 130


def _interrupt(*_: object) -> None:
    raise Interrupted("interrupted; everything committed stays valid, and the same command continues")


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and exit code 1 (failed) or 2 (usage)."""
    # Typer would turn KeyboardInterrupt into a silent abort.
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except SpkdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            print(
                f"error: {error.filename or 'output'}: the disk is full; everything committed stays valid; "
                "free some room and run the same command again",
                file=sys.stderr,
            )
        else:
            where = f"{error.filename}: " if error.filename else ""
            print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGINT, before)
