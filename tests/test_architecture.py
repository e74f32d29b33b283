"""Imports run one way, as CONTRIBUTING.md draws them, and lists that are written in the docs are complete."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from spkd.eval.metrics import metrics_of
from spkd.registry import (
    CODECS,
    CONTAINERS,
    DETECTORS,
    EXPORTS,
    LAYOUTS,
    LOSSES,
    MANIFEST_READERS,
    OPTIMISERS,
    SAMPLERS,
    SCORE_FORMATS,
    STUDENTS,
    TEACHERS,
    TRIAL_FORMATS,
)

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spkd"
# A room may import from those to its right.
ORDER = (
    ("cli", "__main__"),
    ("catalogue", "completion", "demo", "doctor", "export"),
    ("voices",),
    ("model",),
    ("hub",),
    ("extract", "train", "eval"),
    ("mapping",),
    ("teachers",),
    ("students",),
    ("networks",),
    ("cache",),
    ("outputs", "pages", "voiceprint"),
    ("corpus",),
    ("config",),
    ("registry", "device"),
    ("files",),
    ("memory", "cores", "meter", "progress", "seeding", "version", "faiss_library"),
    ("errors",),
)
# The package itself only hands out the Python interface; nothing of it is imported from inside.
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


@functools.cache
def imports(path: Path, inside_functions: bool = True, root: Path = ROOT) -> set[str]:
    """Modules of spkd that a file imports, not for types alone.

    Args:
        inside_functions: also those that are imported when a function runs. root: of the checkout.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not inside_functions:
            return
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "spkd":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [n for n in names if (root / f"{n.replace('.', '/')}.py").is_file()]
            packages = [n for n in names if (root / n.replace(".", "/") / "__init__.py").is_file()]
            found.update([*modules, *packages] or [node.module])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_imports_run_one_way() -> None:
    for path in FILES:
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in imports(path) if own != "__init__" else ():
            theirs = room(module)
            assert theirs in LEVEL, f"{theirs} is not in the order"
            assert theirs == own or LEVEL[theirs] > LEVEL[own], f"{path} imports {module}"


def rooms_and_pairs(root: Path) -> tuple[set[str], set[tuple[str, str]]]:
    """Rooms of the package below a checkout, and the pairs of which the first imports from the second."""
    rooms, pairs = set(), set()
    for path in sorted((root / "spkd").rglob("*.py")):
        own = path.relative_to(root / "spkd").with_suffix("").parts[0]
        rooms.add(own)
        pairs |= {(own, room(module)) for module in imports(path, root=root)} - {(own, own)}
    return rooms, pairs


def test_every_room_and_pair_is_counted() -> None:
    """`python -m tests.test_architecture [CHECKOUT]` prints the numbers."""
    rooms, pairs = rooms_and_pairs(ROOT)
    assert rooms - {"__init__"} <= LEVEL.keys()
    assert {room for pair in pairs for room in pair} <= rooms


def test_no_import_runs_in_a_circle() -> None:
    graph = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): imports(
            p, inside_functions=False
        )
        for p in FILES
    }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"{' -> '.join(above)} -> {module}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_order_is_the_one_that_contributors_read() -> None:
    drawn = (ROOT / "CONTRIBUTING.md").read_text().split("    cli ->")[1].split("\n\n")[0]
    groups = [re.findall(r"\w+", group) for group in f"cli ->{drawn}".split("->")]
    levels = [[LEVEL[name] for name in group] for group in groups]
    assert [name for group in groups for name in group if name not in LEVEL] == []
    assert all(max(a) < min(b) for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize(
    ("names", "file"),
    [
        (list(LOSSES.ours), "docs/losses.md"),
        (list(STUDENTS.ours), "docs/students.md"),
        ([*CODECS.ours, *DETECTORS], "docs/cache.md"),
        (list(TEACHERS.ours), "docs/teachers.md"),
        (list(EXPORTS), "docs/export.md"),
        ([*OPTIMISERS, *SAMPLERS], "docs/training.md"),
        ([*TRIAL_FORMATS, *SCORE_FORMATS, *MANIFEST_READERS, *LAYOUTS, *CONTAINERS], "manifests/README.md"),
        ([form.shape for form in (*TRIAL_FORMATS.values(), *SCORE_FORMATS.values())], "manifests/README.md"),
        (
            [metric.label.split("(")[0] for metric in metrics_of(llr=True) if "threshold" not in metric.label],
            "README.md",
        ),
    ],
)
def test_the_docs_list_every_choice(names: list[str], file: str) -> None:
    text = (ROOT / file).read_text()
    assert [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)] == []


# Test file -> modules that it tests together with others; `*` stands for any characters.
TESTED_TOGETHER = {
    "test_cli": "version",
    "test_config": "*/settings",
    "cache/exchange/test_exchange": (
        "cache/exchange/formats cache/exchange/hdf5 cache/exchange/stream cache/exchange/tars cache/exchange/transfer"
    ),
    "cache/exchange/test_remote": "files/remote_folder",
    "cache/test_card": "cache/folder outputs/teacher_card",
    "cache/test_claims": "cache/owner",
    "cache/test_layout": "outputs/target",
    "cache/test_read": "cache/describe cache/source outputs/head",
    "cache/test_write": "cache/background",
    "corpus/test_audio": "corpus/ffmpeg",
    "corpus/test_containers": "corpus/ark corpus/containers/* corpus/rows",
    "corpus/test_foreign_manifests": "corpus/manifests/*",
    "corpus/test_manifest": "corpus/layouts/* corpus/utterance corpus/written",
    "corpus/test_stored": "corpus/kept corpus/local corpus/ranges",
    "corpus/test_view": "corpus/loader",
    "corpus/vad/test_find": "corpus/vad/base",
    "doctor/test_report": "doctor/*",
    "eval/test_compare": "eval/training",
    "eval/test_formats": "eval/*_formats/*",
    "eval/test_run": "eval/efficiency eval/embed eval/page eval/plots pages/figures pages/html",
    "eval/test_score": "eval/backend eval/cohort",
    "export/test_beside": "export/coreml export/ort export/pte",
    "export/test_run": "export/base export/int8 export/litert export/onnx export/pt2",
    "extract/test_engines": "extract/launch extract/ranks extract/ray_engine extract/slurm",
    "extract/test_recheck": "extract/estimate",
    "extract/test_run": "cache/codebook device extract/fit_codecs extract/targets teachers/checkpoint",
    "files/test_vectors": "cache/exchange/vectors files/kaldi",
    "networks/test_networks": "networks/*",
    "teachers/test_dvector": "teachers/base",
    "teachers/test_onnx": "teachers/onnx_child teachers/onnx_file teachers/onnx_probe teachers/onnx_session",
    "teachers/test_redimnet": "teachers/redimnet_features",
    "teachers/test_speechbrain": "teachers/hyperpyyaml teachers/speechbrain_features",
    "teachers/test_wespeaker": "networks/toolkits/* teachers/three_d_speaker teachers/toolkit",
    "voices/test_run": "voices/store",
    "train/test_batches": "teachers/none train/labels train/specaugment",
    "train/test_caches": "cache/exchange/merge",
    "train/test_losses": "train/losses/*",
    "train/test_memo": "train/losses/memo",
    "train/test_onestep": "train/losses/onestep",
    "train/test_phases": "eval/validate",
    "train/test_sweep": "train/launch",
    "train/test_teacher_logits": "train/ceiling",
    "train/test_trainer": "train/log train/module train/optim train/resume",
}


def test_every_module_has_its_tests() -> None:
    """`spkd/a/b.py` is tested by `tests/a/test_b.py`, or by a file of the table above."""
    modules = [path.relative_to(PACKAGE).with_suffix("") for path in FILES if path.stem != "__init__"]
    together = {(pattern, file) for file, patterns in TESTED_TOGETHER.items() for pattern in patterns.split()}
    for pattern, _ in together:
        assert any(fnmatch(str(module), pattern) for module in modules), f"{pattern}: no such module"
    for module in modules:
        files = [file for pattern, file in together if fnmatch(str(module), pattern)]
        tests = [ROOT / "tests" / f"{name}.py" for name in (module.with_name(f"test_{module.name}"), *files)]
        assert any(test.is_file() for test in tests), f"{module}: has no tests"


# Files that nobody keeps: locks; the log of an unexpected error and the output of a process, in the system's folder.
TEMPORARY = {
    "cache/claims.py": ['open(path, "w", opener=without_links)'],
    "cache/lock.py": ['open(path, "r+b"', 'open(root / PULLED, "r+b"', ".rename("],
    "cache/owner.py": ['open(path, "r+b", opener=without_links)', 'open(probe, "xb")'],
    "errors.py": ['open(descriptor, "w", errors="backslashreplace")'],
    "teachers/onnx_probe.py": ["wb"],
}
MOVES = {
    "os": ("replace", "rename", "renames", "link", "symlink", "truncate"),
    "shutil": ("copy", "copy2", "copyfile", "copytree", "move"),
}


def other_writes(source: str) -> list[str]:
    """Calls of a module that open a file for writing, copy or move one in another way than `spkd.files.atomic`."""

    def writes(call: ast.Call) -> bool:
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        of = getattr(getattr(call.func, "value", None), "id", "")
        values = (*call.args, *(keyword.value for keyword in call.keywords))
        if name == "open" and "os.devnull" not in (given := [ast.unparse(value) for value in values]):
            return any(
                re.fullmatch(r"'[rwxabt+]*[wxa+][rwxabt+]*'|.*\bO_(WRONLY|RDWR|CREAT)\b.*", text) for text in given
            )
        if of in MOVES:
            return name in MOVES[of]
        is_method = isinstance(call.func, ast.Attribute)
        return is_method and (
            name in ("write_text", "write_bytes", "touch", "rename", "symlink_to", "hardlink_to")
            or (name == "replace" and len(values) == 1)  # of a path; that of a text takes two
        )

    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [ast.get_source_segment(source, call) or "" for call in calls if writes(call)]


def test_files_are_written_in_one_way() -> None:
    sources = {str(path.relative_to(PACKAGE)): path.read_text() for path in FILES if path.name != "atomic.py"}
    found = [(name, call) for name, source in sources.items() for call in other_writes(source)]
    assert [(name, call) for name, call in found if not any(known in call for known in TEMPORARY.get(name, ()))] == []


@pytest.mark.parametrize(
    "call",
    [
        *("open(out, 'w')", "open(out, mode='ab')", "path.open('r+')", "os.open(path, os.O_RDWR | os.O_CREAT)"),
        *("path.write_text(text)", "path.write_bytes(data)", "os.replace(a, b)", "path.replace(other)"),
        *("path.rename(other)", "shutil.copyfile(a, b)", "shutil.move(a, b)", "os.link(a, b)", "path.touch()"),
    ],
)
def test_another_way_to_write_is_found(call: str) -> None:
    assert other_writes(f"x = {call}") == [call]
    assert (
        other_writes("open(a); open(a, 'rb'); text.replace('a', 'b'); write_bytes(a, b); open(os.devnull, 'w')") == []
    )


if __name__ == "__main__":
    checkout = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    counted, found = rooms_and_pairs(checkout)
    print(json.dumps({"rooms": len(counted), "import_pairs": len(found)}))
