"""The command line: parse, call, print. Heavy imports happen inside the commands."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperCommand

from spkd import config
from spkd.cores import limit_threads
from spkd.errors import (
    Interrupted,
    SpkdError,
    UsageError,
    bracketed,
    first_line,
    listed,
    printable,
    public_address,
    reported,
    without_secrets,
)
from spkd.eval.settings import CalibrateConfig, EmbedConfig, EvalConfig
from spkd.export.settings import ExportConfig
from spkd.extract.settings import CacheExportConfig, EstimateConfig, ExtractConfig, VerifyConfig, load_pass
from spkd.files.schema import NUMBER
from spkd.files.text import counted
from spkd.mapping.settings import MapConfig
from spkd.memory import keep_large_buffers
from spkd.progress import log
from spkd.registry import EXPORTS, LAYOUTS, LOSSES, plug_ins
from spkd.train.settings import ClusterConfig, TrainConfig
from spkd.version import __version__
from spkd.voices.settings import VOICES, EnrolVoiceConfig, IdentifyVoiceConfig, VerifyVoiceConfig

WORDS = "spkd.words"  # name under which a command keeps its words while a shell completes its line
AGAIN = 0.05  # s until an interruption is asked for again
if TYPE_CHECKING:
    from spkd.corpus.manifest import Manifest

# What commands write that are given no name.
MANIFEST, CATALOGUE, LABELS = Path("manifest.csv"), Path("catalogue.html"), Path("labels.csv")
app = typer.Typer(
    help="Distil heavy speaker-verification teachers into phone-sized students, from a shared cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
cache_app = typer.Typer(help="Inspect, check, estimate, merge, copy and convert teacher caches.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


class Command(TyperCommand):
    """A command that says where options and settings are confused.

    Attributes:
        schema: dataclass of its settings, of which --help ends with a table of every key; None without settings.
    """

    schema: type | None = None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # while a shell completes the line
            ctx.meta[WORDS] = list(args)
            return super().parse_args(ctx, args)
        options = {name for param in self.params for name in param.opts}
        numbers = {name for param in self.params if getattr(param, "min", None) is not None for name in param.opts}
        for item, following in itertools.zip_longest(args, args[1:], fillvalue=""):
            name, equals, value = item.partition("=")
            word = name.lstrip("-").replace("-", "_")
            if name.startswith("--") and name not in options and (near := self._keys_like(word)):
                ways = listed([shlex.quote(f"{key}={value or 'VALUE'}") for key in near], "or")
                raise UsageError(f"{name}: settings have no dashes; write {ways}")
            if name in numbers and not NUMBER.fullmatch(number := value if equals else following):
                raise UsageError(f"{name} must be a number, not {number!r}")
            if not item or (name in options and equals and not value):  # a folder "" would be the current one
                raise UsageError(f"{item or repr('')}: an empty argument; is a variable of the shell not set?")
            if equals and f"--{name}" in options and not self._keys_like(word) and not Path(item).exists():
                raise UsageError(f"{item}: {name} is an option; write --{name} {shlex.quote(value)}")
        return super().parse_args(ctx, args)

    def _keys_like(self, word: str) -> list[str]:
        return config.named_alike(self.schema, word) if self.schema is not None else []

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        if self.schema is not None:
            _print_keys("Keys (key=value)", config.keys(self.schema))
            _print_keys("Keys of what is chosen by name", config.component_keys(self.schema))


def with_keys(schema: type) -> type[Command]:
    """A command with settings."""
    return type("CommandWithKeys", (Command,), {"schema": schema})


def _print_keys(title: str, keys: Iterable[config.Key]) -> None:
    """Print each key with its type and default in one line, and its meaning below over the whole width.

    Keys that several components have alike are in one line.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    alike: dict[tuple[str, ...], list[str]] = {}
    for key in keys:
        choices = f" ({' | '.join(key.choices)})" if key.choices else ""
        what = (
            key.name.rpartition(".")[2],
            f"  {key.kind}, default {'none' if key.default == '' else key.default!s}",
            key.meaning + choices,
        )
        alike.setdefault(what, []).append(key.name)
    console = Console()
    if title and alike:
        console.print(Text(title, "italic"))
    for (_, kind, meaning), names in alike.items():
        console.print(Text.assemble((", ".join(names), "bold"), kind, overflow="fold"))
        console.print(Padding(Text(meaning, overflow="fold"), (0, 0, 0, 4)))


def _settings(ctx: Any, incomplete: str) -> list[str]:
    """Settings with which a shell completes a word of a command line."""
    from spkd.completion import completed, of_bash

    schema, words = ctx.command.schema, ctx.meta.get(WORDS, [])
    if schema is None:
        return []
    if "COMP_WORDS" not in os.environ:
        return completed(schema, words, incomplete)
    return of_bash(schema, os.environ["COMP_WORDS"].split(), int(os.environ["COMP_CWORD"]))


def _starting(names: Iterable[str]) -> Any:
    """Function that completes the value of an option: the names that begin with it."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def _example(text: str) -> str:
    return f"Example: {text}"


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings; see the keys below.", autocompletion=_settings),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML settings (default: ./spkd.yaml if there).")]
Recipe = Annotated[
    str | None,
    typer.Option(
        help=f"Settings of a paper: {', '.join(config.recipes())}.", autocompletion=_starting(config.recipes())
    ),
]
CachePath = Annotated[Path, typer.Argument(help="Cache folder.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command(cls=Command, epilog=_example("spkd manifest /data/voxceleb2 --out vox2.csv"))
def manifest(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATHS...",
            help="Folder of audio files; or containers of audio (tar, zip, ...), patterns such as {000..127}.tar, "
            "a shard.list, or a folder of containers; also their URLs; or a manifest of another tool.",
        ),
    ],
    layout: Annotated[
        str | None, typer.Option(help=f"{', '.join(LAYOUTS)} (default: detected).", autocompletion=_starting(LAYOUTS))
    ] = None,
    out: Annotated[Path, typer.Option(help="Manifest to write, .csv or .jsonl.")] = MANIFEST,
    suffix: Annotated[str | None, typer.Option(help="Take only files of this kind, e.g. flac.")] = None,
    speaker: Annotated[
        str, typer.Option(help="What names speakers in containers: a suffix beside the audio, a JSON key, a column.")
    ] = "",
    utt: Annotated[str, typer.Option(help="Column with the ids of a table (parquet).")] = "",
    audio: Annotated[str, typer.Option(help="Column with the audio of a table (parquet).")] = "",
    workers: Annotated[int, typer.Option(help="Threads that read audio headers.", min=1, max=1024)] = 8,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a file was left out.")] = False,
) -> None:
    """Build a manifest of a folder of audio, of containers of audio, or from one of another tool, with durations."""
    from spkd.corpus import shards
    from spkd.corpus.manifest import build, check_replaces_manifest, check_suffix, converted, is_manifest
    from spkd.files.atomic import check_not_among, check_writable

    check_suffix(out)
    check_writable(out)
    check_replaces_manifest(out)
    options = {"speaker": speaker, "utt": utt, "audio": audio}
    given = next((f"--{name} {value}" for name, value in options.items() if value), "")
    if len(paths) == 1 and is_manifest(paths[0], layout):
        if given := next((f"--{n} {v}" for n, v in ({"layout": layout, "suffix": suffix} | options).items() if v), ""):
            raise UsageError(f"{given} has no effect: {paths[0]} is a manifest, which names its utterances")
        check_not_among([out], paths)
        made, left_out = converted(paths[0], workers, shards.parts_of(out))
        _write_manifest(made, out, f"from {paths[0]}")
        _list_rejected(left_out, strict)
        return
    if containers := shards.find(paths):
        check_not_among([out], containers)
        indexed = shards.index(containers, out, layout, workers, suffix, speaker, utt, audio)
        size = f"{counted(indexed.utterances, 'utterance')}, {counted(indexed.speakers, 'speaker')}"
        log(f"{out}: {size}, {indexed.seconds / 3600:.2f} h ({indexed.origin})")
        _list_rejected(indexed.left_out, strict)
        return
    if len(paths) > 1 or given:
        what = f"{given} is for containers" if given else "give one folder"
        raise UsageError(f"{paths[0]}: a folder of audio; {what}")
    made, layout, left_out = build(paths[0], layout, workers, suffix, shards.parts_of(out))
    _write_manifest(made, out, f"layout {layout}")
    _list_rejected(left_out, strict)


def _write_manifest(made: Manifest, out: Path, origin: str) -> None:
    from spkd.corpus.shards import forget_parts

    made.save(out)
    forget_parts(out)
    size = f"{counted(len(made), 'utterance')}, {counted(len(made.speakers), 'speaker')}, {made.seconds / 3600:.2f} h"
    log(f"{out}: {size} ({origin})")


@app.command(
    cls=with_keys(ExtractConfig),
    epilog=_example("spkd extract teacher=wavlm manifest=manifest.csv cache=cache fbank=true"),
)
def extract(
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    recipe: Recipe = None,
    also: Annotated[
        list[str] | None,
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
    if targets and (slurm_script or also or strict):
        raise UsageError("--targets lists the targets of one teacher: leave out --slurm-script, --also and --strict")
    every = load_pass(overrides or [], also or [], config_file, recipe)
    if slurm_script:
        from spkd.extract.slurm import script

        print(script(every, sys.argv[1:]), end="")
        return
    if targets:
        _list_targets(every[0])
        return
    from spkd.cache.folder import REJECTED
    from spkd.extract.launch import extract_all

    reports = dict(zip([each.cache for each in every], extract_all(every), strict=False))
    for cache, report in reports.items():
        log(f"{cache}: {counted(report.views, 'view')} extracted, {len(report.rejected)} rejected; {report.state}")
    damaged = [report.damaged for report in reports.values() if report.damaged]
    for cache, report in reports.items():
        _list_rejected(report.rejected, strict and not damaged, Path(cache) / REJECTED)
    if damaged:
        raise SpkdError("\n".join(damaged))


@app.command(
    cls=with_keys(TrainConfig),
    epilog=_example("spkd train --loss contrastive cache=cache student=xvector steps=2000 out=student"),
)
def train(
    overrides: Overrides = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(LOSSES)}; several add up. As loss=[NAME,NAME].", autocompletion=_starting(LOSSES)
        ),
    ] = None,
    config_file: ConfigFile = None,
    recipe: Recipe = None,
    losses: Annotated[
        bool, typer.Option("--losses", help="List the losses with the settings of each (loss.NAME.KEY) and exit.")
    ] = False,
    from_run: Annotated[
        Path | None,
        typer.Option("--from", help="Repeat the run of a folder with its settings; give another out=FOLDER."),
    ] = None,
    multirun: Annotated[
        bool,
        typer.Option("-m", "--multirun", help="Sweep: KEY=A,B,C is a run with each; several keys, every combination."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End the output with one line of JSON.")] = False,
) -> None:
    """Train a student from a teacher cache."""
    given = list(overrides or [])
    if losses:
        if given or loss or config_file or recipe or from_run or multirun or as_json:
            raise UsageError("--losses lists every loss: leave out the other options and settings")
        _list_losses()
        return
    if loss and any(item.startswith(("loss=", "loss.names=")) for item in given):
        raise UsageError("name the losses by --loss or by loss=[...], not by both")
    if several := next((name for name in loss or () if "," in name), None):
        raise UsageError(f"--loss {several}: one loss for each --loss{bracketed('loss', several)}")
    given += [f"loss=[{','.join(loss)}]"] if loss else []
    from spkd.train.sweep import load_runs

    runs = load_runs(given, config_file, recipe, from_run, multirun)
    from spkd.eval.validate import validation
    from spkd.train.launch import train_each

    results, failed = [], False
    for settings, result in train_each(runs, validation, multirun, recipe):
        if isinstance(result, SpkdError):
            failed = True
            print(printable(f"error: {settings.out}: {result}"), file=sys.stderr)
            results.append({"out": settings.out, "error": without_secrets(str(result))})
            continue
        log(result.line())
        results.append(result.to_json())
    if as_json or multirun:
        print(json.dumps(results if multirun else results[0]))
    if failed:
        raise typer.Exit(1)


Scores = Annotated[
    list[Path] | None,
    typer.Option(
        "--scores",
        help="Scores of another system (`a b score`, with or without a label) instead of a model's; several "
        "are fused by a calibration.",
        metavar="FILE",
    ),
]
TrialList = Annotated[
    str | None,
    typer.Argument(
        help="Trial list, - for standard input; may be left out where --scores has labels.", autocompletion=_settings
    ),
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
    settings = config.load(EvalConfig, given, config_file)
    from spkd.eval.report import PAGE, REPORT, SCORES
    from spkd.eval.run import evaluate_trials

    report = evaluate_trials(settings, trials, scores or [])
    if line := report.line():
        log(line)
    log(f"{settings.out}/: {SCORES}, {REPORT}, {PAGE}")
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
    from spkd.eval.train_calibration import calibrate_trials

    out, calibration = calibrate_trials(settings, trials, scores or [])
    log(f"{out}: " + "\n".join(calibration.lines()))


def _trials_and_keys(trials: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """The trial list and the settings. A first argument `key=value` that is not a file is a setting."""
    if trials is not None and "=" in trials and not Path(trials).exists():
        return None, [trials, *(overrides or [])]
    return trials, list(overrides or [])


@app.command(cls=Command, epilog=_example("spkd report eval/ours eval/teacher --out comparison"))
def report(
    evaluations: Annotated[list[str], typer.Argument(help="Folders that `spkd eval` wrote; LABEL=FOLDER names one.")],
    out: Annotated[Path, typer.Option(help="Folder of the page and the tables.")] = Path("comparison"),
    bootstrap: Annotated[
        int, typer.Option(help="Resamplings of the speakers for the comparison with the first (0: none).", min=0)
    ] = 1000,
    seed: Annotated[int | None, typer.Option(help="Seed of the resampling (default: 0).", min=0)] = None,
) -> None:
    """Put several evaluations on one page: DET curves, paired differences, training curves, the table of a paper."""
    if seed is not None and not bootstrap:
        raise UsageError(f"--seed {seed} has no effect: --bootstrap 0 draws nothing")
    from spkd.eval.compare import compare_systems, in_words, load_systems

    systems = load_systems(evaluations)
    for name, differences in compare_systems(systems, out, bootstrap, seed or 0).items():
        for label, difference in differences.items():
            log(f"{name}: EER of {label} less that of {systems[0].label} {in_words(difference)}")
    log(f"{out}/: comparison.html, .md, .csv, .tex, .json")


@app.command("export", cls=with_keys(ExportConfig), epilog=_example("spkd export student --to onnx waveform=true"))
def export_student(
    student: Annotated[str, typer.Argument(help="Folder of the student, or bundled, which comes with spkd.")],
    overrides: Overrides = None,
    to: Annotated[
        str | None, typer.Option(help=f"{', '.join(EXPORTS)}; as to=FORMAT.", autocompletion=_starting(EXPORTS))
    ] = None,
    config_file: ConfigFile = None,
) -> None:
    """Write a student for another runtime, and measure it there."""
    given = list(overrides or [])
    if to is not None and any(item.startswith("to=") for item in given):
        raise UsageError("name the format by --to or by to=FORMAT, not by both")
    given += [] if to is None else [f"to={to}"]
    settings = config.load(ExportConfig, given, config_file)
    from spkd.export.run import export

    out, rows = export(student, settings)
    for row in rows:
        log(row.line())
    log(f"{out}: written")


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
    log(f"{settings.out}: {counted(count, 'embedding')}, {len(rejected)} rejected")
    _list_rejected(rejected, strict)


@app.command("map", cls=with_keys(MapConfig), epilog=_example("spkd map old-cache new-cache out=map"))
def map_spaces(
    old: Annotated[str, typer.Argument(metavar="OLD_CACHE", help="Cache with the embeddings of the old model.")],
    new: Annotated[
        str, typer.Argument(metavar="NEW_CACHE", help="Cache with those of the new model, of the same views.")
    ],
    overrides: Overrides = None,
    config_file: ConfigFile = None,
) -> None:
    """Train a map from the embeddings of an old model to those of a new one: nobody need be enrolled anew."""
    settings = config.load(MapConfig, overrides or [], config_file)
    from spkd.mapping.fit import train_map

    for line in train_map(old, new, settings):
        log(line)


@app.command(cls=with_keys(EnrolVoiceConfig), epilog=_example("spkd enrol ann ann1.wav ann2.wav"))
def enrol(
    name: Annotated[str, typer.Argument(help="Name of the person.")],
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="AUDIO... [KEY=VALUE]...", help="Recordings of the person, and settings.", autocompletion=_settings
        ),
    ],
    config_file: ConfigFile = None,
) -> None:
    """Enrol a person: keep a voiceprint of one recording or several in the file of voices."""
    recordings, overrides = _files_and_keys(given)
    settings = config.load(EnrolVoiceConfig, overrides, config_file)
    from spkd.voices.run import enrol as enrol_voice

    for line in enrol_voice(name, recordings, settings):
        log(line)


@app.command(cls=with_keys(VerifyVoiceConfig), epilog=_example("spkd verify ann new.wav"))
def verify(
    first: Annotated[str, typer.Argument(help="Recording, or the name of an enrolled person.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    overrides: Overrides = None,
    config_file: ConfigFile = None,
) -> None:
    """Decide whether two recordings are of one speaker, or a recording of an enrolled person."""
    settings = config.load(VerifyVoiceConfig, overrides or [], config_file)
    from spkd.voices.run import verify as verify_sides

    for line in verify_sides(first, second, settings):
        log(line)


@app.command(cls=with_keys(IdentifyVoiceConfig), epilog=_example("spkd identify new.wav"))
def identify(
    given: Annotated[
        list[str],
        typer.Argument(metavar="AUDIO... [KEY=VALUE]...", help="Recordings, and settings.", autocompletion=_settings),
    ],
    config_file: ConfigFile = None,
) -> None:
    """Find out which of the enrolled people spoke a recording."""
    recordings, overrides = _files_and_keys(given)
    settings = config.load(IdentifyVoiceConfig, overrides, config_file)
    from spkd.voices.run import identify as identify_voice

    for line in identify_voice(recordings, settings):
        log(line)


def _files_and_keys(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files and settings of a command line. An argument `key=value` that is not a file is a setting."""
    keys = [item for item in given if re.match(r"[\w.]+=", item) and not Path(item).exists()]
    return [item for item in given if item not in keys], keys


@app.command(cls=Command, epilog=_example("spkd voices"))
def voices(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File of the voices.")] = Path(VOICES),
    remove: Annotated[str | None, typer.Option(help="Remove the person of this name.")] = None,
    map_by: Annotated[
        str | None, typer.Option("--map", help="Map all voices to a new model, by the map in this folder (`spkd map`).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New file of the mapped voices.")] = None,
) -> None:
    """List the enrolled people, remove one, or map all to a new model."""
    from spkd.voices.run import lines_of_voice, map_voices
    from spkd.voices.run import remove as remove_voice
    from spkd.voices.store import Voices

    if str(path).startswith("voices="):
        raise UsageError(f"{path}: here the file is named alone: `spkd voices {str(path).removeprefix('voices=')}`")
    if (map_by is None) != (out is None) or (map_by is not None and remove is not None):
        raise UsageError("voices are mapped by --map MAP and --out FILE together, and without --remove")
    if map_by is not None and out is not None:
        for line in map_voices(path, map_by, out):
            log(line)
        return
    if remove is not None:
        remove_voice(remove, path)
        log(f"{path}: {remove} removed")
        return
    for name, made in Voices.load(path).items():
        for line in lines_of_voice(name, made):
            log(line)


@app.command(cls=Command, epilog=_example("spkd demo --out spkd-demo"))
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo's corpus, models and report.")] = Path("spkd-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the corpus and of training.", min=0, max=2**31)] = 0,
) -> None:
    """The whole pipeline in minutes, on synthetic speech: no data, no network."""
    from spkd.demo.run import run_demo

    run_demo(out, seed)


@app.command(cls=Command, epilog=_example("spkd doctor"))
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, devices, what is missing for what, and what is broken: a block for a bug report."""
    from spkd.doctor.report import examine

    report = examine()
    print(json.dumps(report.to_json()) if as_json else report.text())
    if report.problems:
        raise typer.Exit(1)


@cache_app.command("info", cls=Command, epilog=_example("spkd cache info cache"))
def cache_info(path: CachePath) -> None:
    """Print what a cache holds."""
    from spkd.cache.describe import describe

    log(describe(path))


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
    older_than: Annotated[
        str | None,
        typer.Option(help="Read only shards that were not found whole within this time, such as 12h or 30d."),
    ] = None,
    config_file: ConfigFile = None,
) -> None:
    """Read everything and compare it with the recorded checksums; with --live, with the teacher too."""
    settings = config.load(VerifyConfig, overrides or [], config_file)
    if overrides and not live:
        raise UsageError(f"{overrides[0]}: used with --live only")
    from spkd.cache.verify import check
    from spkd.files.text import seconds_of

    check(path, None if older_than is None else seconds_of(older_than, "--older-than"))
    log(f"{path}: all checksums match")
    if live:
        from spkd.extract import recheck

        recheck.check(path, settings, live)


@cache_app.command(
    "estimate",
    cls=with_keys(EstimateConfig),
    epilog=_example("spkd cache estimate teacher=wavlm manifest=voxceleb2.csv view=crops:8,2.0"),
)
def cache_estimate(
    overrides: Overrides = None,
    hour: Annotated[float, typer.Option(help="Price of an hour of this machine.", min=0, max=1e9)] = 2.0,
    terabyte: Annotated[float, typer.Option(help="Price of a terabyte stored for a month.", min=0, max=1e9)] = 20.0,
    config_file: ConfigFile = None,
) -> None:
    """Bytes, hours and money of an extraction, from the manifest and a short run of the teacher."""
    settings = config.load(EstimateConfig, overrides or [], config_file)
    from spkd.extract.estimate import estimate

    log("\n".join(estimate(settings).lines(hour, terabyte)))


@cache_app.command(
    "cluster", cls=with_keys(ClusterConfig), epilog=_example("spkd cache cluster cache --out labels.csv")
)
def cache_cluster(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="CACHE... [KEY=VALUE]...", help="Caches with embeddings, and settings.", autocompletion=_settings
        ),
    ],
    out: Annotated[Path, typer.Option(help="File of the labels to write: a table of utt,speaker.")] = LABELS,
    config_file: ConfigFile = None,
) -> None:
    """Group the utterances of a cache by voice, into labels for `spkd train labels=FILE`."""
    paths, overrides = _files_and_keys(given)
    settings = config.load(ClusterConfig, overrides, config_file)
    from spkd.files.atomic import check_writable
    from spkd.train.cluster import labels_of
    from spkd.train.label_file import write_labels

    check_writable(out)
    if out.exists():
        raise UsageError(f"{out}: exists already; choose another --out FILE, or remove it")
    rows, lines = labels_of(paths, settings)
    if out.exists():
        raise UsageError(f"{out}: made by another process meanwhile; choose another --out FILE")
    write_labels(out, rows)
    for line in lines:
        log(f"{out}: {line}")


@cache_app.command("ls", cls=Command, epilog=_example("spkd cache ls s3://lab/caches"))
def cache_ls(root: Annotated[str, typer.Argument(help="Folder or URL (s3://, http://).")] = ".") -> None:
    """List all caches below a folder or bucket."""
    from spkd.cache.describe import summary
    from spkd.cache.exchange.remote import find

    count = 0
    for cache in find(root):
        count += 1
        log(summary(cache))
    if not count:
        log(f"{public_address(root)}: no caches")


@cache_app.command("catalogue", cls=Command, epilog=_example("spkd cache catalogue /lab/caches --out catalogue.html"))
def cache_catalogue(
    root: Annotated[str, typer.Argument(help="Folder or URL (s3://, http://).")] = ".",
    out: Annotated[Path, typer.Option(help="Page to write.")] = CATALOGUE,
    students: Annotated[
        list[str] | None, typer.Option(help="Another folder or URL with students and evaluations. Repeat it for more.")
    ] = None,
) -> None:
    """Write one page of all caches below a folder or bucket, with the students that were trained from them."""
    from spkd.catalogue import TITLE, catalogue
    from spkd.files.atomic import check_is_own, check_writable, write_bytes

    check_writable(out)
    if out == CATALOGUE:
        check_is_own(out, TITLE.encode(), "--out FILE")
    page, count = catalogue(root, students or [])
    write_bytes(out, page.encode())
    log(f"{out}: {counted(count, 'cache')}")


@cache_app.command("merge", cls=Command, epilog=_example("spkd cache merge share0 share1 cache"))
def cache_merge(
    paths: Annotated[list[Path], typer.Argument(metavar="CACHE... OUT", help="Caches, and the new folder.")],
) -> None:
    """Merge caches of one teacher: shares of one extraction, or extractions of other utterances."""
    from spkd.cache.exchange.merge import merge

    *sources, out = paths
    complete = merge(sources, out)
    log(f"{out}: {counted(len(sources), 'cache')} merged; {'complete' if complete else 'units are still missing'}")


@cache_app.command("push", cls=Command, epilog=_example("spkd cache push cache s3://lab/caches/wavlm"))
def cache_push(
    path: Annotated[Path, typer.Argument(help="Cache folder, or an export's.")],
    url: Annotated[str, typer.Argument(help="Where to: a folder or s3://bucket/name.")],
) -> None:
    """Copy a complete cache, or an export, elsewhere and read back what arrived; the same command continues."""
    from spkd.cache.exchange.formats import push
    from spkd.files.text import format_bytes

    log(f"{public_address(url)}: {format_bytes(push(path, url))}, all read back")


@cache_app.command(
    "pull", cls=Command, epilog=_example("spkd cache pull s3://lab/caches/wavlm /scratch/wavlm --limit 500")
)
def cache_pull(
    url: Annotated[str, typer.Argument(help="Where from: a folder, s3://bucket/name or http://host/name.")],
    path: Annotated[Path, typer.Argument(help="New cache folder.")],
    limit: Annotated[
        float | None,
        typer.Option(help="Most GB of pulled copies next to it; those used longest ago make room.", min=0, max=1e9),
    ] = None,
) -> None:
    """Copy a cache here, checking every file; the same command continues."""
    from spkd.cache.exchange.remote import pull
    from spkd.files.text import format_bytes

    size = pull(url, path, None if limit is None else int(limit * 1e9))
    log(f"{path}: {format_bytes(size)}, all checksums match")


@cache_app.command("repair", epilog=_example("spkd cache repair cache --from s3://lab/caches/wavlm"))
def cache_repair(
    path: CachePath,
    source: Annotated[
        str, typer.Option("--from", help="Another copy: a folder, s3://bucket/name or http://host/name.")
    ],
) -> None:
    """Fetch what is missing or damaged in a cache from another copy of it; the same command continues."""
    from spkd.cache.exchange.repair import repair
    from spkd.files.text import format_bytes

    done = repair(path, source)
    size = f"{counted(done.shards, 'shard')} ({format_bytes(done.bytes)})"
    fetched = f"{size} and {counted(done.files, 'other file')} fetched from {public_address(source)}"
    log(f"{path}: {fetched if done.shards or done.files else 'nothing is damaged'}; all checksums match")


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
    target: Annotated[
        str | None, typer.Option(help="The target that an ark, scp or npy file gets (default: embedding).")
    ] = None,
    audio: Annotated[bool, typer.Option("--audio", help="Put every view's audio into the tars (manifest=).")] = False,
    config_file: ConfigFile = None,
) -> None:
    """Write a cache as one HDF5 file, as WebDataset tars to stream from, or one target for other tools."""
    from spkd.cache.exchange.formats import export_cache

    settings = config.load(CacheExportConfig, overrides or [], config_file)
    if overrides and not audio:
        raise UsageError(f"{overrides[0]}: used with --audio only")
    log(f"{out}: {export_cache(path, out, target, settings if audio else None)}")


@cache_app.command("import", cls=Command, epilog=_example("spkd cache import out.h5 cache"))
def cache_import(
    source: Annotated[
        str, typer.Argument(help="FILE.h5, a folder or URL of WebDataset tars, or vectors: FILE.ark, .scp, .npy.")
    ],
    path: Annotated[Path, typer.Argument(help="New cache folder.")],
    manifest: Annotated[
        Path | None, typer.Option(help="Of the utterances that the vectors belong to; only for ark, scp and npy.")
    ] = None,
) -> None:
    """Make a cache from an export, or from vectors of another toolkit; it appears whole or not at all."""
    from spkd.cache.exchange.formats import import_cache

    log(f"{path}: {import_cache(source, path, manifest)}")


def _list_rejected(rejected: dict[str, str], strict: bool, listing: Path | None = None) -> None:
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
        log(f"{target.name:24} {target.dim:6}  {rate}")


def _list_losses() -> None:
    slot = next(slot for slot in config.slots(TrainConfig) if slot.registry is LOSSES)
    for name in LOSSES:
        try:
            kind, keys = LOSSES[name], slot.keys(name).values()
            learns_from, needs_labels = kind.learns_from, kind.needs_labels
        except Exception as error:
            if name in LOSSES.ours:
                raise
            log(f"{name}: cannot be used: {first_line(error)}")  # code of another package
            continue
        labels = "; needs speaker labels" if needs_labels else ""
        labels += ", of some views at least" if needs_labels == "some" else ""
        log(f"{name}: learns from {learns_from}{labels}")
        if keys:
            _print_keys("", keys)


def _interrupt(*_: object) -> None:
    raise Interrupted("interrupted; what was committed stays, and the same command goes on or starts anew")


def _ask_again(unraisable: Any) -> None:
    """Hook for errors that Python cannot raise, as in a finaliser: of an interruption, the process is asked again."""

    def ask() -> None:
        if signal.getsignal(signal.SIGTERM) is _interrupt:  # the command still runs
            os.kill(os.getpid(), signal.SIGTERM)

    if isinstance(unraisable.exc_value, Interrupted):
        again = threading.Timer(AGAIN, ask)
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def _leave_the_folder_out() -> None:
    """Import nothing from the current folder, which may be anybody's: not here, nor in a process that is started."""
    os.environ["PYTHONSAFEPATH"] = "1"
    sys.path[:] = [place for place in sys.path if place]


def main() -> None:
    """Run the command.

    An error is printed as one line on stderr. The exit code is then 1 (failed), 2 (usage) or 130 (interrupted).
    """
    keep_large_buffers()
    limit_threads()
    _leave_the_folder_out()
    # Handled here, because Typer would turn KeyboardInterrupt into a silent abort.
    before = {which: signal.signal(which, _interrupt) for which in (signal.SIGINT, signal.SIGTERM)}
    sys.unraisablehook = _ask_again
    try:
        code = app(prog_name="spkd", standalone_mode=False)
    except (Exception, Interrupted) as error:
        sys.exit(reported(_as_ours(error), sys.argv, plug_ins))
    finally:
        sys.unraisablehook = sys.__unraisablehook__
        for which, handler in before.items():
            signal.signal(which, handler)
    if code:
        sys.exit(code)


def _as_ours(error: Any) -> Exception | Interrupted:
    """An error in the words and options of the command line, which typer raises, as one of ours."""
    if not hasattr(error, "format_message"):
        return cast(Exception | Interrupted, error)
    if not (text := error.format_message()):  # its message was the help
        sys.exit(error.exit_code)
    command = error.ctx.command_path if error.ctx is not None else "spkd"
    return UsageError(f"{text.rstrip('.')}; see `{command} --help`")
