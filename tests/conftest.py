"""Small real parts shared by the tests: audio files on disk, a tiny WavLM, the command line itself."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import importlib.util
import itertools
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import typer

from spkd import cli
from spkd.corpus.manifest import Manifest, build
from spkd.demo.synthesis import speaker, utterance
from spkd.students import Checkpoint, save_student
from spkd.students import build as build_student

try:  # a release of it imports beside some releases of torch alone; speechbrain needs it too
    import torchaudio
except (ImportError, OSError, RuntimeError):
    torchaudio = None
HAS_SPEECHBRAIN = torchaudio is not None and importlib.util.find_spec("speechbrain") is not None
# Once for all commands of this process, rather than for each, where it takes longer than many a command.
typer.main.get_command = functools.cache(typer.main.get_command)
torch.set_num_threads(1)  # each worker of the suite has a core
SHARED = Path(os.environ.get("SPKD_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """One thread of torch, as the threads that load views have: the last bit of a convolution depends on the number.

    A test before may have left another number, as a benchmark does, or a loader that is collected late.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six synthetic speakers, three utterances of 1.2 to 2 s each, FLAC and WAV, and manifest.csv beside them."""
    root = tmp_path_factory.mktemp("corpus")
    for s in range(6):
        (root / "audio" / f"spk{s}").mkdir(parents=True)
        for u in range(3):
            suffix = "wav" if u == 2 else "flac"
            wave = utterance(speaker(s), 100 * s + u, 1.2 + 0.4 * u)
            soundfile.write(root / "audio" / f"spk{s}" / f"u{u}.{suffix}", wave, 16_000)
    made, _, _ = build(root / "audio", "folder")
    made.save(root / "manifest.csv")
    pairs = [(a, b) for i, a in enumerate(made) for b in made.utterances[i + 1 :]]
    (root / "trials.txt").write_text("".join(f"{int(a.speaker == b.speaker)} {a.id} {b.id}\n" for a, b in pairs))
    return root


@dataclass(frozen=True)
class Paused:
    """A corpus of utterances with pauses.

    Attributes:
        root: folder with `whole.csv`; `cut.csv` of the same utterances without the pauses, cut and joined by hand;
            `segments` that say where their speech is; and `trials.txt` of all pairs.
        last: id of an utterance that is silent, which only `whole.csv` lists, last.
    """

    root: Path
    last: str = "silent"

    @property
    def whole(self) -> str:
        return f"manifest={self.root / 'whole.csv'}"

    @property
    def cut(self) -> str:
        return f"manifest={self.root / 'cut.csv'}"

    @property
    def segments(self) -> Path:
        return self.root / "segments"


@pytest.fixture(scope="session")
def paused(tmp_path_factory: pytest.TempPathFactory) -> Paused:
    """Four synthetic speakers, three utterances of two phrases each, between pauses with a little noise."""
    root, random = tmp_path_factory.mktemp("paused"), np.random.RandomState(0)
    tables, segments = {"whole": ["utt,path,speaker"], "cut": ["utt,path,speaker"]}, list[str]()
    for s, u in itertools.product(range(4), range(3)):
        name, place, pieces, phrases = f"s{s}-u{u}", 0, list[np.ndarray](), list[np.ndarray]()
        for part in range(2):
            quiet = (1e-4 * 32768 * random.randn(random.randint(4000, 9000))).astype(np.int16)
            phrase = (32767 * utterance(speaker(s), 100 * s + 10 * u + part, 0.6 + 0.3 * part)).astype(np.int16)
            place += len(quiet)
            segments.append(f"{name}-{part} {name} {place / 16_000} {(place + len(phrase)) / 16_000}\n")
            place += len(phrase)
            pieces += [quiet, phrase]
            phrases.append(phrase)
        for kind, parts in (("whole", [*pieces, pieces[0]]), ("cut", phrases)):
            soundfile.write(root / f"{name}-{kind}.flac", np.concatenate(parts), 16_000)
            tables[kind].append(f"{name},{name}-{kind}.flac,s{s}")
    soundfile.write(root / "silent.flac", np.zeros(32_000), 16_000)
    names = [line.split(",")[0] for line in tables["cut"][1:]]
    tables["whole"].append(f"{Paused.last},silent.flac,s0")
    for kind, lines in tables.items():
        (root / f"{kind}.csv").write_text("\n".join(lines))
    (root / "segments").write_text("".join(segments))
    pairs = itertools.combinations(names, 2)
    (root / "trials.txt").write_text("".join(f"{int(a[:2] == b[:2])} {a} {b}\n" for a, b in pairs))
    return Paused(root)


@pytest.fixture
def manifest(corpus: Path) -> Manifest:
    return Manifest.load(corpus / "manifest.csv")


# A wav2vec 2.0 of a few thousand weights with the usual convolutions, for transformers' configurations.
TINY_SSL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


@pytest.fixture(scope="session")
def tiny_wavlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real WavLM, saved as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.WavLMConfig(
        **TINY_SSL | {"num_hidden_layers": 3}, feat_extract_norm="layer", do_stable_layer_norm=True
    )
    folder = tmp_path_factory.mktemp("wavlm")
    transformers.WavLMModel(config).save_pretrained(folder)
    return folder


def save_teacher(
    folder: Path, embedding: int = 8, speakers: Sequence[str] = (), scale: float = 20.0, seed: int = 0
) -> None:
    """Save a small x-vector, with a classifier where there are speakers."""
    torch.manual_seed(seed)
    network = build_student("xvector", channels=16, embedding=embedding).eval()
    head = (torch.randn(len(speakers), embedding), list(speakers), scale) if speakers else ()
    save_student(folder, Checkpoint(network, *head))


@pytest.fixture
def extraction(corpus: Path) -> list[str]:
    """Command that extracts with a teacher that `save_teacher` put into the folder `teacher`."""
    return ["extract", "teacher=checkpoint", "teacher.weights=teacher", f"manifest={corpus / 'manifest.csv'}"]


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    def ok(self) -> Outcome:
        """Itself, where the command succeeded."""
        assert self.code == 0, self.err
        return self


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what the command line has set in this process in an earlier test."""
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)


class CommandLine:
    """The real command line in this process: spkd("eval", "trials.txt", "out=x")."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], made: Path) -> None:
        """
        Args:
            made: folder of what `once` has made for the tests of this process.
        """
        self._monkeypatch, self._capsys, self._made = monkeypatch, capsys, made

    def __call__(self, *arguments: object) -> Outcome:
        self._monkeypatch.setattr(sys, "argv", ["spkd", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = self._capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    def once(self, name: str, *arguments: object) -> None:
        """Run a command that makes a file or a folder: spkd.once("c", "extract", "cache=c"). Where it makes a new one,
        and an earlier test has run the same command beside the same files, what it made is copied."""
        found = sorted((str(path), path.read_bytes()) for path in Path().rglob("*") if path.is_file())
        kept = self._made / hashlib.sha256(repr((arguments, found)).encode()).hexdigest() / Path(name).name
        is_new = not Path(name).exists()
        if is_new and kept.exists():
            _copy(kept, Path(name))
            return
        self(*arguments).ok()
        if is_new:
            _copy(Path(name), kept)


def _copy(a: Path, b: Path) -> None:
    b.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(a, b) if a.is_dir() else shutil.copy2(a, b)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def spkd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path
) -> CommandLine:
    """The command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return CommandLine(monkeypatch, capsys, made)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path, handler: type[http.server.SimpleHTTPRequestHandler] = Quiet) -> Iterator[str]:
    """A folder over plain HTTP, without ranges."""
    on_folder = functools.partial(handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), on_folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The test's folder over HTTP."""
    with served(tmp_path) as url:
        yield url


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket on a server of its own."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    kept = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    # File systems that another test opened are kept by fsspec, with the address of its own server.
    S3FileSystem.clear_instance_cache()
    S3FileSystem().mkdir("lab")
    yield "s3://lab"
    S3FileSystem.clear_instance_cache()
    server.stop()
    os.environ.clear()
    os.environ.update(kept)
