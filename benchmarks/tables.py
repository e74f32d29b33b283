"""Every measurement that README and docs quote: runs the benchmarks, and writes the tables from their results.

    python benchmarks/tables.py --list
    python benchmarks/tables.py --run quick --data DIR --teacher FILE
    python benchmarks/tables.py

--list prints every benchmark with the date and commit of its result; --run takes names or groups: `quick` (all together
less than 25 minutes on 2 cores), `long` (some minutes each) and `hours`. A benchmark whose result is of the commit that
is checked out is not run again: after an interruption the same command continues. Then, and without options, the tables
of README.md and docs/ are written from benchmarks/results/. DIR holds the corpora, FILE is the weights of the GE2E
d-vector; a benchmark that needs what is not given is skipped by name. The last line is one JSON object: the date and
commit of every result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import bundled
import cache_codecs
import export_agree
import export_students
import install
import interval_coverage
import mapping
import nested
import papers
import pseudo_label
import quality
import recipe
import record
import silence
import students
import web

HERE = Path(__file__).parent
ROOT = HERE.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
LOGS = HERE / "work" / "logs"
END = "<!-- end -->"
GROUPS = ("quick", "long", "hours")
LOADER = ("--data", "{data}")
SPEECH = ("--data", "{data}", "--teacher", "{teacher}")
FORMANTS = (
    "--manifest",
    *("{data}/librispeech-mini/test-short.csv", "{data}/speechocean-mini/test.csv"),
)
CLONES = ("--wespeaker", "{wespeaker}", "--3d-speaker", "{three_d_speaker}")
IN_README = ("cache_read", "cache_crash", "train_overhead")  # whose first row stands there, too
Row = tuple[str, str]  # what was measured, and what was found


@dataclass(frozen=True)
class Benchmark:
    """A script and the rows of docs/benchmarks.md that its result gives.

    Attributes:
        group: how long it takes.
        arguments: of its command line; a name in braces is an option of this script.
        rows: from its result; none where the result has a table of its own.
    """

    group: str
    arguments: tuple[str, ...] = ()
    rows: Callable[[dict], Iterator[Row]] = lambda result: iter(())


def cache_read_rows(result: dict) -> Iterator[Row]:
    others = ("h5py contiguous", "tensorstore batched", "zarr-python")
    ratios = ", ".join(f"{name.split()[0]} {result['ratios'][name]:.2g}" for name in others if name in result["ratios"])
    yield (
        "random 200-frame windows of fp16 x 512, one process",
        f"{result['ratio_to_memmap']:.2f} of the speed of a plain memory map ({ratios})",
    )
    yield "the same through 2 loader workers", f"{result['loader_ratio_to_memmap']:.1f} times the memory map"
    yield "the same with nothing in the page cache", f"{result['cold_times_memmap']:.0f} times the memory map"


def cache_write_rows(result: dict) -> Iterator[Row]:
    ratios = ", ".join(f"{row['ratio_to_raw_write']:.1f}" for row in result["writers"].values())
    what = f"{', '.join(result['writers'])} writers of {result['bytes'] / 1e9:.2f} GB"
    yield what, f"{ratios} of the speed of writing the same bytes raw with fsync"


def cache_crash_rows(result: dict) -> Iterator[Row]:
    what = f"{result['kills'] - result['stops']} kills, and {result['stops']} stops with take-over, among three writers"
    found = f"of {result['units']:,} units {result['lost']} lost and {result['duplicated']} written twice; content "
    found += "equal to" if result["content_identical"] else "other than"
    yield what, f"{found} an uninterrupted run's, {result['zero_rows']} rows of zeros"


def power_cut_rows(result: dict) -> Iterator[Row]:
    what = f"{result['cuts']:,} power cuts within {result['commands']} commands that write, each then run again"
    yield what, f"{result['lost']} lost something, {result['wrong']} gave another result, {result['stuck']} stuck"


def flips_rows(result: dict) -> Iterator[Row]:
    what = f"{result['flips']:,} single flipped bits in caches, students, training states, evaluations and exports"
    found = f"{result['detected'] + result['not_named']:,} an error of the command that loads the file"
    yield what, f"{found}, {result['harmless']:,} without effect, {result['silent']} unnoticed"


def beside(result: dict) -> str:
    """Words on the other processes that wanted a core; "" where there were hardly any."""
    return f" (beside {result['load']:.0f} other processes)" if result["load"] > 2 else ""


def scale_rows(result: dict) -> Iterator[Row]:
    rows = result["rows"]
    views = " and ".join(f"{row['views'] // 10**6}" for row in rows)
    seconds = " and ".join(f"{row['open']['seconds']:.2f}" for row in rows)
    memory = " and ".join(f"{row['open']['mb']}" for row in rows)
    load = beside(result)
    yield f"opening {views} million views", f"{seconds} s, {memory} MB in each process{load}"
    last = result["commands"][-1]
    found = (
        f"{last[n]['seconds']:.1f} s and {last[n]['mb']} MB" for n in ("estimate", "claim", "finalize", "catalogue")
    )
    yield f"{last['utterances']:,} utterances: estimate, claims, completion, catalogue", f"{', '.join(found)}{load}"
    yield from members_of(result)


def members_of(result: dict) -> Iterator[Row]:
    last, far, load = result["members"][-1], result["ten_million"], beside(result)
    steps = {
        "index": "indexed",
        "load_members": "manifest read for the first time",
        "open_members": "manifest opened by each process then",
        "plan_members": "planned",
    }
    for step, what in steps.items():
        found, by_growth = last[step], far[step]
        yield (
            f"{last['members']:,} members of tars: {what} (10 million by the growth)",
            f"{found['seconds']:.1f} s, {found['cpu_seconds']:.1f} s of a core, {found['most_private_mb']} MB, and "
            f"{max(found['mb'] - found['most_private_mb'], 0)} MB of mapped files "
            f"({by_growth['cpu_seconds']:,.0f} s of a core, {by_growth['most_private_mb']:,.0f} MB){load}",
        )


def cache_scale_rows(result: dict) -> Iterator[Row]:
    shards = f"{result['shards_under_256_descriptors']:,} shards under a limit of 256 open files"
    yield shards, "trained from, exported and verified"


def mining_rows(result: dict) -> Iterator[Row]:
    row = next(row for row in result["rows"] if row["nprobe"] == 32)
    what = f"a FAISS index of {row['instances']:,} synthetic embeddings of {result['dimension']} numbers"
    rate = f"{row['queries_per_second']:,} queries/s at recall@50 {row['recall_at_50']:.2f}"
    yield what, f"built in {row['build_seconds']:.0f} s, {row['memory_mb']} MB; {rate}"
    row = next(row for row in result["labelled"] if row["per_speaker"] == 182)
    found = f"{row['ratio']:.2f} of their cosine, {row['forbidden']} forbidden; {row['seconds']:.0f} s"
    yield "110,000 embeddings, 182 of each speaker: drawn negatives against the hardest other speakers", found


def eval_scale_rows(result: dict) -> Iterator[Row]:
    what = f"{result['trials']:,} trials over {result['utterances']:,} utterances"
    found = f"{result['beyond_embeddings_mb'] / 1000:.2f} GB beyond libraries and embeddings, {result['seconds']} s"
    yield what, found


def train_overhead_rows(result: dict) -> Iterator[Row]:
    ratios = result["step_time_ratio_cached_vs_no_teacher"]
    found = (
        f"{ratios['embedding']:.2f} with embeddings, {ratios['logits']:.2f} with logits, {ratios['frames']:.2f} with"
    )
    found += (
        f" frames as wide as the student's; {result['times_online_teacher']:.1f} times as fast as with an ECAPA-TDNN"
    )
    yield (
        "time of a training step from the cache, over that of the same student without a teacher",
        found + " run in every step",
    )
    ours, plain = result["loader_utterances_per_s"], result["memory_map_utterances_per_s"]
    yield "the loader alone", f"{ours:,} utterances of 2 s a second (a plain memory map {plain:,})"


def train_resume_rows(result: dict) -> Iterator[Row]:
    ranks = " and ".join(
        f"{row['kills']} times on {name} rank{'s' * (name != '1')}" for name, row in result["ranks"].items()
    )
    same = all(row["losses_equal"] and row["weights_equal"] for row in result["ranks"].values())
    yield (
        f"a training killed {ranks}",
        f"losses and weights {'equal' if same else 'differ from'} those of an uninterrupted run",
    )


def train_ddp_rows(result: dict) -> Iterator[Row]:
    losses = len(result["by_loss"])
    found = f"at most {record.figure(result['max_gradient_difference'])} of the greatest gradient"
    yield f"gradients of two ranks against one process, {losses} sets of losses", found


def inference_rows(result: dict) -> Iterator[Row]:
    models = dict(result["models"])
    teacher = models.pop("teacher")
    what = f"waveform to embedding, one thread, {result['seconds']:g} s, over the time of the teacher (GE2E d-vector, "
    what += f"{teacher['parameters'] / 1e6:.2f} M parameters, {teacher['ms']:.1f} ms)"
    shares = [
        f"{name.rpartition('_')[0]} of {row['parameters'] / 1e6:.2g} M {row['of_teacher_time']:.2f}"
        for name, row in models.items()
    ]
    yield what, ", ".join(shares)


def buffers_rows(result: dict) -> Iterator[Row]:
    extract, train = (result[command]["time_ratio"] for command in ("extract", "train"))
    found = f"{extract:.2f} of the time of an extraction, {train:.2f} of a training's"
    yield "freed buffers kept for the next batch, over glibc's own way", found


def busy_rows(result: dict) -> Iterator[Row]:
    for what in ("training", "extraction"):
        ours, torchs = (
            next(row for row in result["rows"] if (row["what"], row["spins"]) == (what, spins))
            for spins in ("spkd", "torch")
        )
        found = f"{ours['kept']['median']:.2f} of the fair share is kept (with torch's own way to wait "
        found += f"{torchs['kept']['median']:.2f}); "
        found += f"alone {ours['alone_over_torch']['median']:.2f} of the speed with that"
        yield f"{what} beside {result['others']} processes that keep all cores busy", found
    if (share := result["share_kept_half_core"]) is not None:
        yield "training in a control group of half a core", f"{share:.2f} of half of the speed on one core"


def score_trials_rows(result: dict) -> Iterator[Row]:
    whats = {
        "cosine": "10 million cosine trials over 100,000 x 256",
        "as_norm": "AS-norm of 580,000 trials, cohort 6,000, top 300",
    }
    for name, what in whats.items():
        row = result[name]
        found = f"{row['seconds']:.1f} s: {row['ratio_to_blas_floor']:.2f} of the speed of BLAS on the same products, "
        found += f"{row['times_python_loop']:,} times a loop over trials ({row['times_numpy_loop']} times NumPy's)"
        yield what, found


def metrics_agree_rows(result: dict) -> Iterator[Row]:
    what = f"{result['sets']} score sets, {result['real_sets']} of them real: metrics, PLDA and calibration"
    yield what, f"at most {record.figure(result['max_difference'])} from brute force, scikit-learn and SpeechBrain"


def export_agree_rows(result: dict) -> Iterator[Row]:
    found = f"least cosine {result['cosine_onnx']:.7f} in onnxruntime and {result['cosine_sherpa']:.7f} in sherpa-onnx"
    yield "a student in other runtimes ([all](export.md#measured))", found


def teachers_equal_rows(result: dict) -> Iterator[Row]:
    libraries = len({row["oracle"].rpartition(" ")[0] for row in result["rows"]})
    found = f"embeddings at most {record.figure(result['max_cosine_distance'])} apart (1 - cosine), "
    found += f"in padded batches of 32 at most {record.figure(result['max_batched_distance'])} from the views alone"
    yield f"{len(result['rows'])} models of {libraries} libraries, spkd against the library", found


def extract_overhead_rows(result: dict) -> Iterator[Row]:
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["name"] == name]
        found = ", ".join(f"{row['ratio_to_forward_only']:.2f} ({row['view']})" for row in rows)
        yield f"extraction over the teacher's forward passes alone, {name}", f"{found} of the speed"


def loader_speed_rows(result: dict) -> Iterator[Row]:
    what = f"views of recipe best (crops of {result['crop_seconds']:g} s of FLAC) in an hour of one core"
    found = f"{result['hours_per_hour_core_best']:,} hours, {result['hours_per_hour_core_features']:,} with fbank; "
    found += (
        f"two workers {result['two_workers_over_one']:.2f} times one, as threads {result['two_threads_over_one']:.2f}"
    )
    if result["load"]:
        found += f" (beside {result['load']} other processes)"
    yield what, found
    yield "a process that loads them", f"{result['mb_of_process']} MB; two start in {result['start_seconds']:g} s"
    stages = ", ".join(f"{name} {speed:,}" for name, speed in result["stages"].items())
    yield "its stages, each on the views that it changes", f"{stages} hours"


def operations_rows(result: dict) -> Iterator[Row]:
    students, recipes = result["students"], result["recipes"]
    found = ", ".join(f"{name} {counts['step']:,}" for name, counts in students.items())
    yield "operations of a training step, students of default width with the losses of best-mini", found
    found = ", ".join(f"{name} {counts['step']:,}" for name, counts in recipes.items() if not name.endswith("-mini"))
    yield "the same for the recipes", found


def silence_rows(result: dict) -> Iterator[Row]:
    speed = result["audio_hours_per_core_hour"]
    found = ", ".join(f"{name} {speed[name]:,} hours" for name in ("silero", "energy"))
    yield "finding speech in WAV in an hour of one core", f"{found}; decoding alone {speed['decoding']:,}"


def quality_rows(result: dict) -> Iterator[Row]:
    test = [row["refused"] for row in result["speech"] if row["part"] == "test"]
    shares = [sum(row[i][0] for row in test) / max(sum(row[i][1] for row in test), 1) for i in (0, 2)]
    found = f"{100 * shares[0]:.2f} %; {100 * shares[1]:.2f} % at 5 dB over noise; {result['ms_per_second']:.1f} ms"
    yield "speech of the test lists that gets no decision, and the time for a second of it", found


def audio_in_rows(result: dict) -> Iterator[Row]:
    of = {(row["format"], row["kind"]): row for row in result["rows"]}
    for form in ("flac", "wav"):
        ratios = [f"{kind} {row['over_files']:.2f}" for (f, kind), row in of.items() if f == form and kind != "files"]
        same = "the same bytes" if result["bit_equal"] else "other bytes"
        load = beside(result)
        speed = f"{of[form, 'files']['hours_per_hour']:,} hours in an hour of one core"
        what = f"features of {form.upper()} from containers, over the speed from files ({speed})"
        yield what, f"{', '.join(ratios)}; {same}{load}"
    index = [
        f"{kind} {row['members_per_second']:,} ({row['share_read']:.0%})"
        for (f, kind), row in of.items()
        if f == "flac"
    ]
    yield "members that an index reads in a second of one core, and its share of the bytes", ", ".join(index)


def audio_remote_rows(result: dict) -> Iterator[Row]:
    ratios = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in result["ratios"].items())
    same = "the same bytes" if result["bit_equal"] else "other bytes"
    what = f"features from shards elsewhere, {result['latency'] * 1000:.0f} ms away, over the speed from local shards"
    yield what, f"{ratios}; {same}{beside(result)}"


def extract_scale_rows(result: dict) -> Iterator[Row]:
    whats, seconds = zip(*result["seconds"].items(), strict=True)
    same = "the same bytes" if result["content_identical"] else "other bytes"
    found = f"{same}; {', '.join(f'{s:.0f}' for s in seconds)} s with their start; "
    found += f"{result['lost_after_kill']} units lost when a rank is killed"
    yield ", ".join(whats), found


def interval_coverage_rows(result: dict) -> Iterator[Row]:
    for suffix, kind in (("", "balanced"), ("_unbalanced", "unbalanced")):
        cells = []
        for name, key in (("EER", "eer"), ("minDCF", "min_dcf"), ("Cllr", "cllr"), ("min Cllr", "min_cllr")):
            shares = [f"{100 * result[f'{key}_coverage_{count}{suffix}']:.0f}" for count in (10, 30, 60, 200)]
            cells.append(f"{name} {' '.join(shares)}")
        what = f"{result['lists']} simulated {kind} lists of 10, 30, 60 and 200 speakers"
        yield f"{what}: lists whose 95 % interval covers the true value", f"{', '.join(cells)} %"


def formants_rows(result: dict) -> Iterator[Row]:
    found = f"formants F1 to F3 at most {100 * result['worst_factor_error']:.1f} % from the factor, F0 "
    found += f"{100 * result['worst_f0_error']:.1f} %"
    yield f"voices of {sum(result['speakers'].values())} speakers with moved formants, by Praat's tracker", found


def frame_times_rows(result: dict) -> Iterator[Row]:
    for name in ("tiny", "xvector", "resnet34"):
        rows = ", ".join(f"{view} {row['use']:.3f}" for view, row in result[name].items())
        yield f"{name} against its own cached frames: 1 - cosine, context included", rows


def fuzz_rows(result: dict) -> Iterator[Row]:
    found = ", ".join(f"{result[key]} {key}" for key in ("tracebacks", "hangs", "crashes"))
    yield f"{result['tried']:,} damaged inputs of every kind through the commands", found


BENCHMARKS = {
    "cache_read": Benchmark("quick", (), cache_read_rows),
    "cache_write": Benchmark("quick", (), cache_write_rows),
    "cache_crash": Benchmark("long", (), cache_crash_rows),
    "power_cut": Benchmark("long", (), power_cut_rows),
    "flips": Benchmark("long", (), flips_rows),
    "scale": Benchmark("long", (), scale_rows),
    "cache_scale": Benchmark("quick", (), cache_scale_rows),
    "cache_codecs": Benchmark("long", SPEECH),
    "mining": Benchmark("quick", ("--per-label", "182"), mining_rows),
    "extract_overhead": Benchmark("long", (), extract_overhead_rows),
    "loader_speed": Benchmark("quick", LOADER, loader_speed_rows),
    "audio_in": Benchmark("quick", LOADER, audio_in_rows),
    "audio_remote": Benchmark("quick", LOADER, audio_remote_rows),
    "extract_scale": Benchmark("quick", (), extract_scale_rows),
    "silence": Benchmark("long", SPEECH, silence_rows),
    "quality": Benchmark("long", LOADER, quality_rows),
    "train_overhead": Benchmark("quick", (), train_overhead_rows),
    "operations": Benchmark("quick", (), operations_rows),
    "train_resume": Benchmark("long", (), train_resume_rows),
    "train_ddp": Benchmark("long", (), train_ddp_rows),
    "eval_scale": Benchmark("quick", (), eval_scale_rows),
    "score_trials": Benchmark("quick", (), score_trials_rows),
    "interval_coverage": Benchmark("long", (), interval_coverage_rows),
    "formants": Benchmark("quick", FORMANTS, formants_rows),
    "frame_times": Benchmark("quick", (), frame_times_rows),
    "metrics_agree": Benchmark("quick", SPEECH, metrics_agree_rows),
    "inference": Benchmark("quick", SPEECH, inference_rows),
    "buffers": Benchmark("quick", SPEECH, buffers_rows),
    "busy": Benchmark("quick", (), busy_rows),
    "students": Benchmark("quick"),
    "teachers_equal": Benchmark("long", CLONES, teachers_equal_rows),
    "export_agree": Benchmark("long", SPEECH, export_agree_rows),
    "export_students": Benchmark("long", ("--data", "{data}", "--runtime", "{runtime}")),
    "web": Benchmark("long", (*SPEECH, "--runtime", "{runtime}")),
    "fuzz": Benchmark("long", (), fuzz_rows),
    "install": Benchmark("long"),
    "papers": Benchmark("hours", SPEECH),
    "papers_why": Benchmark("hours", SPEECH),
    "recipe": Benchmark("hours", SPEECH),
    "nested": Benchmark("hours", SPEECH),
    "mapping": Benchmark("hours", SPEECH),
    "pseudo_label": Benchmark("hours", SPEECH),
    "bundled": Benchmark("long", SPEECH),
}


def rows() -> dict[str, list[Row]]:
    """The rows of docs/benchmarks.md, by benchmark."""
    return {name: list(benchmark.rows(record.kept(name))) for name, benchmark in BENCHMARKS.items()}


def table() -> str:
    """Of docs/benchmarks.md."""
    lines = ["| script | measured | found | date, commit |", "|---|---|---|---|"]
    for name, found in rows().items():
        result = record.kept(name)
        for number, (what, value) in enumerate(found):
            script = "" if number else f"[`{name}.py`](../benchmarks/{name}.py)"
            lines.append(f"| {script} | {what} | {value} | {'' if number else when(result)} |")
    return "\n".join(lines)


def readme_table() -> str:
    """Of README.md: some of these rows."""
    made = rows()
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {what} | {value} |" for name in IN_README for what, value in made[name][:1])]
    )


def when(result: dict) -> str:
    return f"{result['date']}, {result['commit']}"


def texts() -> dict[Path, dict[str, str]]:
    """What stands between the marks of each file, by the name in the mark."""
    codecs, ours, shipped = record.kept("cache_codecs"), record.kept("papers"), record.kept("bundled")
    return {
        README: {"tables.py": readme_table(), "papers.py": papers.readme_table(ours)},
        DOCS / "benchmarks.md": {"tables.py": table()},
        DOCS / "bundled.md": {
            "bundled.py, speech": bundled.speech_table(shipped),
            "bundled.py, lists": bundled.table(shipped),
            "bundled.py, enrolments": bundled.enrolments_table(shipped),
            "bundled.py, identification": bundled.identification(shipped),
        },
        DOCS / "cache.md": {
            "cache_codecs.py, embeddings": cache_codecs.embeddings_table(codecs),
            "cache_codecs.py, frames": cache_codecs.frames_table(codecs),
        },
        DOCS / "evaluation.md": {"interval_coverage.py": interval_coverage.table(record.kept("interval_coverage"))},
        DOCS / "students.md": {
            "students.py": students.table(record.kept("students")),
            "students.py, time": students.time_table(record.kept("students")["steps"]),
            "students.py, shapes": students.time_table(record.kept("students")["shapes"]),
        },
        DOCS / "install.md": {"install.py": install.table(record.kept("install"))},
        DOCS / "export.md": {
            "export_students.py": export_students.table(record.kept("export_students")),
            "export_agree.py": export_agree.table(record.kept("export_agree")),
            "web.py": web.sentence(record.kept("web")),
            "quality.py": quality.table(record.kept("quality")),
        },
        DOCS / "results.md": {
            "papers.py": papers.tables(ours),
            "recipe.py": recipe.choice(record.kept("recipe")),
            "silence.py": silence.table(record.kept("silence")),
            "nested.py": nested.tables(record.kept("nested")),
            "pseudo_label.py": pseudo_label.rounds(record.kept("pseudo_label")),
            "mapping.py": mapping.table(record.kept("mapping")),
        },
    }


def written(path: Path) -> str:
    """A file of the docs with its tables as the results give them."""
    text = path.read_text()
    for name, made in texts()[path].items():
        mark = f"<!-- made by benchmarks/{name} -->"
        before, found, rest = text.partition(mark)
        if not found:
            raise SystemExit(f"{path}: the mark {mark} is gone")
        text = f"{before}{mark}\n\n{made}\n\n{END}{rest.partition(END)[2]}"
    return text


def run(names: list[str], given: argparse.Namespace) -> list[str]:
    """Run benchmarks that are not of this commit, their output into files. Returns the names of those that failed."""
    LOGS.mkdir(parents=True, exist_ok=True)
    failed = []
    for number, name in enumerate(names, 1):
        head = f"[{number}/{len(names)}] {name}"
        if (record.RESULTS / f"{name}.json").is_file() and record.kept(name)["commit"] == record.commit():
            print(f"{head}: is of this commit", flush=True)
            continue
        values = {key: value for key, value in vars(given).items() if value is not None}
        try:
            arguments = [argument.format(**values) for argument in BENCHMARKS[name].arguments]
        except KeyError as missing:
            print(f"{head}: skipped, needs --{str(missing.args[0]).replace('_', '-')}", flush=True)
            continue
        print(f"{head} ...", end=" ", flush=True)
        start, log = time.monotonic(), LOGS / f"{name}.txt"
        with open(log, "w") as output:
            command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
            code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
        print(f"{(time.monotonic() - start) / 60:.1f} min{f', failed: {log}' if code else ''}", flush=True)
        failed += [name] * bool(code)
    return failed


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--list", action="store_true", help="print every benchmark with the date of its result")
    options.add_argument("--run", nargs="+", default=[], choices=[*GROUPS, *BENCHMARKS], metavar="NAME")
    options.add_argument("--data", type=Path, help="folder of the corpora")
    options.add_argument("--teacher", type=Path, help="weights of the GE2E d-vector")
    options.add_argument("--wespeaker", type=Path, help="a clone of github.com/wenet-e2e/wespeaker")
    options.add_argument("--3d-speaker", dest="three_d_speaker", type=Path, help="a clone of modelscope/3D-Speaker")
    options.add_argument("--runtime", type=Path, help="npm package onnxruntime-web")
    given = options.parse_args()
    chosen = [name for name, benchmark in BENCHMARKS.items() if {name, benchmark.group} & set(given.run)]
    failed = run(chosen, given)
    if given.list:
        for name, benchmark in BENCHMARKS.items():
            result = record.kept(name)
            minutes = "" if result["minutes"] is None else f"{result['minutes']} min"
            print(f"{name:18} {benchmark.group:6} {when(result):22} {minutes}")
            for what, value in benchmark.rows(result):
                print(f"    {what}: {value}")
    else:
        for path in texts():
            path.write_text(written(path))
    print(json.dumps({name: when(record.kept(name)) for name in BENCHMARKS}))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
