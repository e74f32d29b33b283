"""Models on the Hugging Face hub, against a stand-in on this machine that speaks its protocol."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import spkd as package
from spkd.corpus.manifest import Manifest
from spkd.errors import UsageError
from spkd.hub import model_card
from tests.eval.students import save_untrained

pytest.importorskip("huggingface_hub")
flask = pytest.importorskip("flask")


class Hub:
    """Repositories as dictionaries: what the hub's client asks for to make one, to commit and to load."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.sent = 0  # bytes of files
        self.asked: list[str] = []  # files of data sets

    def app(self) -> Any:
        app = flask.Flask(__name__)
        revision = "a" * 40

        @app.post("/api/repos/create")
        def create() -> Any:
            given = flask.request.get_json()
            name = f"{given.get('organization') or 'lab'}/{given['name']}"
            self.files.setdefault(name, {})
            self.private[name] = given.get("private") or given.get("visibility") == "private"
            return {"url": f"{flask.request.host_url}{name}", "name": name, "id": name}

        @app.post("/api/validate-yaml")
        def validate() -> Any:
            return {"errors": [], "warnings": []}

        @app.post("/api/models/<user>/<name>/preupload/<branch>")
        def preupload(user: str, name: str, branch: str) -> Any:
            paths = [file["path"] for file in flask.request.get_json()["files"]]
            return {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}

        @app.post("/api/models/<user>/<name>/commit/<branch>")
        def commit(user: str, name: str, branch: str) -> Any:
            for line in flask.request.get_data().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[f"{user}/{name}"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return {"commitUrl": f"{flask.request.host_url}{user}/{name}/commit/{revision}", "commitOid": revision}

        @app.get("/api/models/<user>/<name>")
        @app.get("/api/models/<user>/<name>/revision/<branch>")
        def info(user: str, name: str, branch: str = "main") -> Any:
            if f"{user}/{name}" not in self.files:
                return {"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"}
            names = [{"rfilename": path} for path in self.files[f"{user}/{name}"]]
            return {"id": f"{user}/{name}", "sha": revision, "siblings": names, "private": False, "tags": []}

        @app.get("/api/models/<user>/<name>/tree/<branch>")
        def tree(user: str, name: str, branch: str) -> Any:
            files = self.files[f"{user}/{name}"].items()
            return [{"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for p, d in files]

        @app.get("/<user>/<name>/resolve/<branch>/<path:path>")
        def resolve(user: str, name: str, branch: str, path: str) -> Any:
            data = self.files[f"{user}/{name}"][path]
            response = flask.Response(data)
            response.headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
            response.headers["X-Repo-Commit"] = revision
            response.make_conditional(flask.request, accept_ranges=True, complete_length=len(data))
            self.sent += response.calculate_content_length() or 0
            return response

        @app.get("/test/swap")
        def swap() -> Any:
            files = self.files["lab/data"]
            files["0.tar"], files["1.tar"] = files["1.tar"], files["0.tar"]
            return {}

        @app.get("/api/datasets/<user>/<name>")
        @app.get("/api/datasets/<user>/<name>/revision/<branch>")
        def data_set(user: str, name: str, branch: str = "main") -> Any:
            return info("datasets/" + user, name, branch)

        @app.get("/api/datasets/<user>/<name>/tree/<branch>")
        @app.get("/api/datasets/<user>/<name>/tree/<branch>/<path:folder>")
        def data_tree(user: str, name: str, branch: str, folder: str = "") -> Any:
            below = f"{folder}/" if folder else ""
            listed = {one["path"]: one for one in tree("datasets/" + user, name, branch)}
            for path in [path for path in listed if path.startswith(below) and "/" in path[len(below) :]]:
                within = below + path[len(below) :].partition("/")[0]
                listed[within] = {"type": "directory", "path": within, "oid": hashlib.sha1(b"").hexdigest()}
            return [one for path, one in listed.items() if path.rpartition("/")[0] == folder]

        @app.get("/datasets/<user>/<name>/resolve/<branch>/<path:path>")
        def data_file(user: str, name: str, branch: str, path: str) -> Any:
            self.asked.append(path)
            return resolve("datasets/" + user, name, branch, path)

        return app


@pytest.fixture
def hub() -> Iterator[tuple[Hub, str]]:
    from werkzeug.serving import make_server

    hub = Hub()
    server = make_server("127.0.0.1", 0, hub.app(), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def python(code: str, address: str, folder: Path) -> subprocess.CompletedProcess:
    """Run code in a process that takes the stand-in for the hub."""
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(folder / "hf"), "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", f"import spkd\n{code}"],
        cwd=folder,
        env=os.environ | environment | {"PYTHONPATH": str(Path(package.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_a_student_goes_to_the_hub_and_comes_back(
    request: pytest.FixtureRequest, hub: tuple[Hub, str], corpus: Path, tmp_path: Path
) -> None:
    run: Callable = request.getfixturevalue("spkd")
    store, address = hub
    audio, path = f"manifest={corpus / 'manifest.csv'}", Manifest.load(corpus / "manifest.csv")[3].path
    assert run("extract", "teacher=none", audio, "cache=c").code == 0
    small = ["student.channels=16", "student.embedding=8", "steps=2", "batch_size=4", "crop=0.5"]
    assert run("train", "--loss", "aam", "cache=c", *small).code == 0
    assert run("eval", corpus / "trials.txt", audio, "bootstrap=20").code == 0
    assert run("calibrate", corpus / "trials.txt", audio, "force=true").code == 0
    done = python(
        'print(spkd.load("student").push_to_hub("lab/small", ["eval"], licence="apache-2.0", private=True))',
        address,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    files = store.files["lab/small"]
    assert set(files) == {"model.json", "model.safetensors", "calibration.json", "README.md"}
    assert store.private["lab/small"]
    own, sent = json.loads(Path("student/calibration.json").read_text()), files["calibration.json"].decode()
    names = [*own["trained_on"]["speakers"], str(corpus)]
    assert len(names) > 2
    assert not [name for name in names if name in sent]
    assert json.loads(sent)["weights"] == own["weights"]
    assert files["model.safetensors"] == Path("student/model.safetensors").read_bytes()
    card = files["README.md"].decode()
    rate = json.loads(Path("eval/report.json").read_text())["results"]["eer_percent"]
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: spkd\n")
    assert f"| eval | {rate:.3f} (" in card
    assert json.loads(Path("student/model.json").read_text())["training"]["settings"]["caches"][0] in card
    assert "Losses: aam" in card
    code = f'm = spkd.load("lab/small"); print(m.embed({path!r}).tolist(), m.verify({path!r}, {path!r}).same)'
    done = python(code, address, tmp_path)
    assert done.returncode == 0, done.stderr
    embedding, _, same = done.stdout.strip().rpartition(" ")
    assert np.allclose(json.loads(embedding), package.load("student").embed(path), atol=1e-5)
    assert same == "True"


def test_a_card_shows_error_rates_of_its_own_weights_alone(spkd: Callable, corpus: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("ours", "other")):
        save_untrained(tmp_path / name, corpus, seed)
        given = [f"model={name}", f"manifest={corpus / 'manifest.csv'}", f"out=of-{name}", "bootstrap=0"]
        spkd("eval", corpus / "trials.txt", *given).ok()
    rate = json.loads(Path("of-ours/report.json").read_text())["results"]["eer_percent"]
    assert f"| of-ours | {rate:.3f} |" in model_card(tmp_path / "ours", "lab/ours", ["of-ours"], "")
    for wrong in (["of-other"], ["of-ours", "of-other"]):
        with pytest.raises(UsageError, match="of-other: error rates of another model"):
            package.load(tmp_path / "ours").push_to_hub("lab/ours", evaluations=wrong)


@pytest.mark.slow
def test_ranges_of_a_file_on_the_hub(hub: tuple[Hub, str], tmp_path: Path) -> None:
    store, address = hub
    data = np.random.RandomState(0).bytes(6_000_000)
    store.files["lab/data"] = {"0.tar": data}
    code = (
        "from spkd.corpus.remote import opened\nfile = opened('hf://lab/data/0.tar')\n"
        "print(file.size, file.read(5_000_000, 10).hex(), file.read(70, 10).hex(), file.read(5_999_990, 10).hex())\n"
    )
    done = python(code, address, tmp_path)
    assert done.returncode == 0, done.stderr
    places = (5_000_000, 70, 5_999_990)
    assert done.stdout.split() == ["6000000", *(data[place : place + 10].hex() for place in places)]
    # The last range lies in a block that was touched, so that the whole block comes: 5,999,990 and 5,000,000.
    assert store.sent <= 20 + 6_000_000 - (1 << 22)


@pytest.mark.slow
def test_a_file_of_the_hub_that_changes_while_it_is_read_is_an_error(hub: tuple[Hub, str], tmp_path: Path) -> None:
    store, address = hub
    store.files["lab/data"] = {"0.tar": bytes(20_000), "1.tar": b"other" * 4000}
    code = (
        "from spkd.corpus import remote\nimport urllib.request\nremote.AGAIN = 0\n"
        "file = remote.opened('hf://lab/data/0.tar')\nprint(file.read(0, 4) == bytes(4))\n"
        f"urllib.request.urlopen('{address}/test/swap').read()\n"
        "try:\n    file.read(10_000, 4)\nexcept OSError as error:\n    print(error)\n"
    )
    done = python(code, address, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\nhas changed since it was opened; index it again (spkd manifest)\n"


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_a_corpus(hub: tuple[Hub, str], tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    store, address = hub
    files = store.files.setdefault("datasets/lab/speech", {"README.md": b"x"})
    for split, ids in (("data/train-00000-of-00001.parquet", "abcd"), ("data/more/test-00000-of-00001.parquet", "ef")):
        cells = [{"bytes": wave(ord(name)), "path": f"{name}.wav"} for name in ids]
        table = {"audio": cells, "client": [f"spk-{name}" for name in ids], "name": [f"{name}-1" for name in ids]}
        parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet", row_group_size=2)
        files[split] = (tmp_path / "x.parquet").read_bytes()
    done = python(
        "import sys\nfrom spkd.cli import main\nsys.argv = ['spkd', 'manifest', 'hf://datasets/lab/speech', "
        "'--speaker', 'client', '--utt', 'name', '--out', 'm.csv']\nmain()",
        address,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "m.csv").open()))
    assert [(row["utt"], row["speaker"]) for row in rows] == [(f"{n}-1", f"spk-{n}") for n in "efabcd"]
    assert rows[0]["path"].startswith("hf://datasets/lab/speech/data/more/test-00000-of-00001.parquet#0+")
    code = "from spkd.corpus.audio import decode\nimport csv, zlib\n"
    code += "print([zlib.crc32(decode(row['path']).wave.tobytes()) for row in csv.DictReader(open('m.csv'))])"
    done = python(code, address, tmp_path)
    assert done.returncode == 0, done.stderr
    expected = [zlib.crc32(soundfile.read(io.BytesIO(wave(ord(n))), dtype="float32")[0].tobytes()) for n in "efabcd"]
    assert json.loads(done.stdout) == expected
    for url, message in (
        ("hf://datasets/lab/none", "lab/none"),
        ("hf://datasets/lab/speech/data/more/x", "no containers|not found|No such"),
    ):
        failed = python(
            f"import sys\nfrom spkd.cli import main\nsys.argv = ['spkd', 'manifest', '{url}']\nmain()",
            address,
            tmp_path,
        )
        assert failed.returncode in (1, 2)
        assert re.search(message, failed.stderr)
        assert "Traceback" not in failed.stderr


def wave(seed: int) -> bytes:
    """A WAV file of noise."""
    data = io.BytesIO()
    soundfile.write(data, 0.1 * np.random.RandomState(seed).normal(size=4000), 16_000, "PCM_16", format="WAV")
    return data.getvalue()


def test_what_is_not_there_is_a_line(hub: tuple[Hub, str], tmp_path: Path, corpus: Path) -> None:
    store, address = hub
    store.files["lab/other"] = {"README.md": b"x"}
    code = (
        "from spkd.errors import SpkdError\nfor name in ('lab/none', 'lab/other'):\n    try:\n        spkd.load(name)\n"
        "    except SpkdError as error:\n        print(f'{type(error).__name__}: {error}')\n"
    )
    none, other = python(code, address, tmp_path).stdout.splitlines()
    assert none.startswith("SpkdError: lab/none: cannot be loaded from the hub")
    assert other.startswith("UsageError: lab/other: no student of spkd there")
    model = package.load(save_untrained(tmp_path / "student", corpus))
    with pytest.raises(UsageError, match="no evaluation"):
        model.push_to_hub("lab/small", evaluations=["none"])
