"""Imports run one way, as CONTRIBUTING.md draws them, and lists that are written in the docs are complete."""

from __future__ import annotations

import ast
import itertools
import json
import re
import sys
from pathlib import Path

import pytest

from spkd.eval.metrics import metrics_of
from spkd.registry import (
    CODECS,
    EXPORTS,
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
    ("catalogue", "demo", "export"),
    ("model",),
    ("hub",),
    ("extract", "train", "eval"),
    ("teachers",),
    ("students",),
    ("networks",),
    ("cache",),
    ("outputs", "pages"),
    ("corpus",),
    ("config",),
    ("registry", "device"),
    ("files",),
    ("errors", "memory", "meter", "progress", "seeding", "version"),
)
# The package itself only hands out the Python interface; nothing of it is imported from inside.
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


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


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = parts[0]
    for module in imports(path):
        theirs = room(module)
        if own == "__init__":
            continue
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
        (list(CODECS.ours), "docs/cache.md"),
        (list(TEACHERS.ours), "docs/teachers.md"),
        (list(EXPORTS), "docs/export.md"),
        ([*OPTIMISERS, *SAMPLERS], "docs/training.md"),
        ([*TRIAL_FORMATS, *SCORE_FORMATS, *MANIFEST_READERS], "manifests/README.md"),
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


def test_every_module_has_its_tests() -> None:
    """`spkd/a/b.py` is tested by `tests/a/test_b.py`, or by the file named here."""
    tested_together = {
        "cache/background": "cache/test_write",
        "cache/describe": "cache/test_read",
        "cache/exchange/formats": "cache/exchange/test_exchange",
        "extract/launch": "extract/test_engines",
        "train/launch": "train/test_sweep",
        "cache/exchange/hdf5": "cache/exchange/test_exchange",
        "cache/exchange/remote_folder": "cache/exchange/test_remote",
        "cache/exchange/tars": "cache/exchange/test_exchange",
        "cache/exchange/transfer": "cache/exchange/test_exchange",
        "cache/exchange/merge": "train/test_caches",
        "version": "test_cli",
        "outputs/teacher_card": "cache/test_card",
        "outputs/head": "cache/test_read",
        "cache/lock": "cache/exchange/test_remote",
        "cache/source": "cache/test_read",
        "cache/exchange/stream": "cache/exchange/test_exchange",
        "cache/codebook": "extract/test_run",
        "cache/folder": "cache/test_card",
        "extract/fit_codecs": "extract/test_run",
        "extract/estimate": "extract/test_recheck",
        "extract/targets": "extract/test_run",
        "extract/ranks": "extract/test_engines",
        "extract/ray_engine": "extract/test_engines",
        "extract/slurm": "extract/test_engines",
        "eval/embed": "eval/test_run",
        "eval/cohort": "eval/test_score",
        "eval/efficiency": "eval/test_run",
        "eval/page": "eval/test_run",
        "eval/plots": "eval/test_run",
        "eval/backend": "eval/test_score",
        "eval/training": "eval/test_compare",
        "eval/validate": "train/test_phases",
        "export/base": "export/test_run",
        "export/int8": "export/test_run",
        "export/litert": "export/test_run",
        "export/onnx": "export/test_run",
        "export/pt2": "export/test_run",
        "pages/figures": "eval/test_run",
        "pages/html": "eval/test_run",
        "teachers/base": "teachers/test_dvector",
        "teachers/checkpoint": "extract/test_run",
        "teachers/none": "train/test_batches",
        "teachers/hyperpyyaml": "teachers/test_speechbrain",
        "teachers/speechbrain_features": "teachers/test_speechbrain",
        "teachers/onnx_child": "teachers/test_onnx",
        "teachers/onnx_file": "teachers/test_onnx",
        "teachers/onnx_probe": "teachers/test_onnx",
        "teachers/toolkit": "teachers/test_wespeaker",
        "teachers/three_d_speaker": "teachers/test_wespeaker",
        "train/ceiling": "train/test_teacher_logits",
        "train/labels": "train/test_batches",
        "train/loading": "train/test_trainer",
        "train/log": "train/test_trainer",
        "train/module": "train/test_trainer",
        "train/optim": "train/test_trainer",
        "train/resume": "train/test_trainer",
        "train/specaugment": "train/test_batches",
        "outputs/target": "cache/test_layout",
        "device": "extract/test_run",
        "corpus/ffmpeg": "corpus/test_audio",
        "cache/exchange/vectors": "files/test_vectors",
        "corpus/loader": "corpus/test_view",
        "corpus/utterance": "corpus/test_manifest",
    }
    readers = {
        f"corpus/manifests/{p.stem}": "corpus/test_foreign_manifests"
        for p in (PACKAGE / "corpus" / "manifests").glob("*.py")
    }
    formats = {
        f"eval/{folder}/{p.stem}": "eval/test_formats"
        for folder in ("trial_formats", "score_formats")
        for p in (PACKAGE / "eval" / folder).glob("*.py")
    }
    networks = {f"networks/{p.stem}": "networks/test_networks" for p in (PACKAGE / "networks").glob("*.py")}
    losses = {f"train/losses/{p.stem}": "train/test_losses" for p in (PACKAGE / "train" / "losses").glob("*.py")}
    theirs = {
        f"networks/toolkits/{p.stem}": "teachers/test_wespeaker"
        for p in (PACKAGE / "networks" / "toolkits").glob("*.py")
    }
    settings = {str(p.relative_to(PACKAGE).with_suffix("")): "test_config" for p in PACKAGE.rglob("settings.py")}
    known = (
        networks
        | settings
        | theirs
        | readers
        | formats
        | losses
        | {"train/losses/memo": "train/test_memo", "train/losses/onestep": "train/test_onestep"}
    )
    modules = {str(path.relative_to(PACKAGE).with_suffix("")) for path in FILES}
    assert tested_together.keys() <= modules, "a module of this table is gone"
    missing = []
    for path in FILES:
        name = str(path.relative_to(PACKAGE).with_suffix(""))
        if path.stem == "__init__":
            continue
        folder, _, stem = name.rpartition("/")
        own = f"{folder}/test_{stem}".lstrip("/")
        if not any((ROOT / "tests" / f"{t}.py").is_file() for t in (own, (tested_together | known).get(name, own))):
            missing.append(name)
    assert not missing, ", ".join(missing)


if __name__ == "__main__":
    checkout = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    counted, found = rooms_and_pairs(checkout)
    print(json.dumps({"rooms": len(counted), "import_pairs": len(found)}))
