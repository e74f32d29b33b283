"""A page for browsers: the student, onnxruntime-web and the page itself, as a folder that any static server serves."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from spkd.corpus import quality
from spkd.errors import UsageError
from spkd.eval.calibration import Calibration
from spkd.export.base import CHECKED, Export, Exported, checked
from spkd.export.graph import Embedder
from spkd.export.onnx import Session, write_onnx
from spkd.export.settings import WebSettings
from spkd.files import digest
from spkd.files.atomic import write_bytes
from spkd.files.reading import read_bytes, read_json
from spkd.networks.network import Network
from spkd.outputs.target import EMBEDDING
from spkd.students.description import EXPORT_KEY, EXPORT_RECORD
from spkd.teachers.onnx import CARD
from spkd.teachers.onnx_file import CALIBRATION

PACKAGE = "onnxruntime-web"
# The smallest build in the package; it needs no GPU, and no headers of the server.
SCRIPT, BINARY = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
MODEL, RUNTIME, PACKED, README = "model.onnx", "ort.js", "ort.wasm.packed", "README.md"
PAGE, STYLE, WORKER = "index.html", "style.css", "sw.js"
PARTS = (
    *("app.js", "audio.js", "capture.js", "icon.png", "icon.svg", "manifest.webmanifest", "model.js", "speaker.js"),
    *("store.js", README, STYLE),
)
LIMITS = {
    "frame": quality.FRAME,
    "level": quality.LEAST_LEVEL,
    "seconds": quality.LEAST_SECONDS,
    "silence": quality.SILENCE,
    "correlation": quality.VOICED,
    "faint": quality.FAINT,
    "voiced": quality.LEAST_VOICED,
    "voiced_share": quality.VOICED_SHARE,
    "variation": quality.VARIATION,
    "much_voiced": quality.MUCH_VOICED,
    "less_variation": quality.LESS_VARIATION,
}
HOW = f"run `npm install {PACKAGE}` here, or name a folder of it by web.runtime=FOLDER"


class Web(Export):
    """A folder with a page that enrols and verifies speakers in a browser, without a server and without a network."""

    Settings = WebSettings
    file = "web"
    folder = ((*PARTS, PAGE, WORKER, MODEL, RUNTIME, PACKED, EXPORT_RECORD), {EXPORT_RECORD: EXPORT_KEY})
    takes_waveform = True
    lacks: ClassVar = {**Export.lacks, "waveform": "the page takes the waveform in any case"}

    def check(self, network: Network) -> None:
        runtime_of(self.settings.runtime)

    def check_calibration(self, calibration: Calibration) -> None:
        if vad := calibration.system.vad:
            raise UsageError(
                f"to=web: the calibration is with vad={vad}, and the page takes recordings whole; run `spkd calibrate` "
                "without vad, or name such a file by calibration=FILE"
            )

    def write(self, embedder: Embedder, out: Path, metadata: dict[str, str]) -> list[Exported]:
        package, version = runtime_of(self.settings.runtime)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / MODEL
            write_onnx(embedder, path, False, metadata)
            # The shortest recording with which a decision is made, too.
            measured = checked("web", path, embedder, Session(path), (quality.LEAST_SECONDS, *CHECKED))
            files = {MODEL: path.read_bytes()}
        files |= {name: _template(name) for name in PARTS}
        files[RUNTIME] = _part(package, SCRIPT)
        # Few static servers compress what they send, and the runtime is four times as large as most students.
        files[PACKED] = gzip.compress(_part(package, BINARY), mtime=0)
        card = json.loads(metadata[CARD])
        embedding = {
            "weights": card["weights_sha256"],
            "features": embedder.network.input_kind.name,
            "settings": embedder.network.settings,
            "dimension": embedder.network.levels[EMBEDDING].dim,
        }
        record = {
            EXPORT_KEY: 1,
            "student": card["weights_sha256"],
            "model": digest.of_tree(embedding),
            "dim": embedder.network.levels[EMBEDDING].dim,
            "seconds": self.settings.seconds,
            "quality": LIMITS,
            "calibration": _map(json.loads(metadata[CALIBRATION])) if CALIBRATION in metadata else None,
            "runtime": version,
            "card": card,
        }
        record["sha256"] = {name: digest.of_bytes(content) for name, content in files.items()}
        # The page has the digests of all that it loads, and its worker that of the page, too.
        files = {EXPORT_RECORD: json.dumps(record, indent=1).encode(), **files}
        files[PAGE] = _page(files)
        files[WORKER] = _worker(files)
        for name, content in files.items():
            write_bytes(out / name, content)
        return [replace(measured, bytes=sum(map(len, files.values())))]


def runtime_of(folder: str) -> tuple[Path, str]:
    """Folder of the npm package onnxruntime-web, and its version.

    Args:
        folder: the package, its folder `dist`, or a folder node_modules with it; "" takes that of the current folder.
    Raises:
        UsageError: there is no such package.
    """
    root = Path(folder or "node_modules")
    if not folder and not (root / PACKAGE).is_dir():
        raise UsageError(f"to=web: there is no {root / PACKAGE}; {HOW}")
    for place in (root, root / PACKAGE, root.parent if root.name == "dist" else root):
        description = place / "package.json"
        content = read_json(description) if description.is_file() else None
        if not isinstance(content, dict) or content.get("name") != PACKAGE:
            continue
        version = content.get("version")
        if not isinstance(version, str) or not re.fullmatch(r"[\w.+-]{1,60}", version):
            raise UsageError(f"web.runtime: {description}: states no version; {HOW}")
        for name in (SCRIPT, BINARY):
            if not (place / "dist" / name).is_file():
                raise UsageError(f"web.runtime: {place / 'dist' / name}: no such file; take a newer {PACKAGE}: {HOW}")
        return place, version
    raise UsageError(f"web.runtime={folder}: no package {PACKAGE} there; {HOW}")


def _part(package: Path, name: str) -> bytes:
    return read_bytes(package / "dist" / name)


def _map(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Map from cosines to log-likelihood ratios, with its thresholds. A student's takes nothing but the cosine."""
    (weight,) = calibration["weights"]
    return {"weight": weight, "offset": calibration["offset"], "thresholds": calibration["thresholds"]}


def _template(name: str) -> bytes:
    return resources.files(__package__).joinpath("page", name).read_bytes()


def _integrity(content: bytes) -> str:
    """Digest as browsers take it: W3C, Subresource Integrity, section 3.1."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}"


def _page(files: Mapping[str, bytes]) -> bytes:
    """The page, with the digests of the files that it loads, and those of its inline scripts in its policy."""
    digests = {f"./{name}": _integrity(content) for name, content in files.items() if name != README}
    text = _filled(PAGE, {"@files@": json.dumps({"integrity": digests}), "@style@": _integrity(files[STYLE])})
    inline = re.findall(r"<script[^>]*>(.+?)</script>", text, re.S)
    return text.replace("@scripts@", " ".join(f"'{_integrity(script.encode())}'" for script in inline)).encode()


def _worker(files: Mapping[str, bytes]) -> bytes:
    """The service worker, with the files that it keeps, and a version that changes with any of them."""
    digests = {name: _integrity(files[name]) for name in sorted(files) if name != README}
    kept = {"./": digests[PAGE], **digests}
    return _filled(WORKER, {"@version@": digest.of_tree(kept)[:16], '"@files@"': json.dumps(kept)}).encode()


def _filled(name: str, values: Mapping[str, str]) -> str:
    """A file of the page, with values in the place of words that are there once."""
    text = _template(name).decode()
    for word, value in values.items():
        assert text.count(word) == 1, word
        text = text.replace(word, value)
    return text
