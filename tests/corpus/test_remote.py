"""Audio elsewhere: ranges of containers and files on web servers and in buckets."""

from __future__ import annotations

import http.server
import io
import itertools
import random
import re
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from spkd.corpus import remote
from spkd.corpus.audio import AudioError, decode, probe
from spkd.corpus.manifest import Manifest
from spkd.corpus.stored import read_ahead
from spkd.errors import SpkdError
from spkd.files.vectors import read_vectors
from spkd.students import Checkpoint, build, save_student


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Web server that gives ranges, and counts the bytes and the requests of each kind."""

    asked: list[tuple[int, int]]
    gives_ranges = True
    fails = 0
    cut = False
    first_alone = False  # whatever range is asked for, the one from byte 0 on comes, as it was named
    together: threading.Barrier | None = None  # that answers wait for
    short = 0  # bytes that are missing at the end of each longer answer, of which it states no more than it has
    names = staticmethod(lambda data: [("ETag", f'"{zlib.crc32(data):08x}"')])  # of the content

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        kind, path = type(self), Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if kind.fails > 0:
            kind.fails -= 1
            self.send_error(503)
            return
        if match is None or not kind.gives_ranges:
            self.send_response(200)
            part = data
        else:
            first, last = int(match[1]), int(match[2])
            first, last = (0, last - first) if kind.first_alone else (first, last)
            part = data[first : last + 1]
            kind.asked.append((first, len(part)))
            if kind.together is not None:
                kind.together.wait()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
            for name, value in kind.names(data):
                self.send_header(name, value)
        part = part[: len(part) - kind.short] if len(part) > 100 else part
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if kind.cut and len(part) > 1000 else part)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, type[Ranges]]]:
    """Address of a web server of the folder `web`, and its handler."""
    handler = type("Own", (Ranges,), {"asked": []})
    (tmp_path / "web").mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    remote._opened.cache_clear()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()
    remote._opened.cache_clear()


def shard(path: Path, count: int = 4, seed: int = 0) -> list[tuple[int, int, bytes]]:
    """A tar of FLAC files of noise. Returns offset, length and content of each."""
    noise, places = np.random.RandomState(seed), []
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            data = io.BytesIO()
            soundfile.write(data, 0.1 * noise.normal(size=16_000), 16_000, "PCM_16", format="FLAC")
            info = tarfile.TarInfo(f"{number}.flac")
            info.size = len(data.getvalue())
            tar.addfile(info, io.BytesIO(data.getvalue()))
    with tarfile.open(path) as tar:
        for info in tar:
            places.append((info.offset_data, info.size, path.read_bytes()[info.offset_data :][: info.size]))
    return places


@pytest.fixture
def data(web: tuple[str, type[Ranges]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Content of a.bin on the web server, of which blocks of 1,000 bytes are fetched."""
    monkeypatch.setattr(remote, "BLOCK", 1000)
    content = random.Random(0).randbytes(50_001)
    (tmp_path / "web" / "a.bin").write_bytes(content)
    return content


def test_ranges_are_those_of_the_file(web: tuple[str, type[Ranges]], data: bytes) -> None:
    address, handler = web
    file = remote.opened(f"{address}/a.bin")
    assert file.size == len(data)
    draw = random.Random(1)
    ranges = [(first := draw.randrange(50_000), draw.randrange(min(7000, 50_001 - first) + 1)) for _ in range(60)]
    ranges += [(0, 50_001), (50_000, 1), (999, 2), (1000, 1000)]
    with ThreadPoolExecutor(8) as pool:
        for (first, length), found in zip(ranges, pool.map(lambda each: file.read(*each), ranges), strict=True):
            assert found == data[first : first + length]
    with pytest.raises(ValueError, match="beyond the end"):
        file.read(50_000, 2)
    # In order, no byte is asked for twice; here and there, only what is wanted is.
    for step, least, most in ((100, 50_000, 50_200), (4321, 12 * 100, 12 * 100)):
        handler.asked.clear()
        fresh = remote.Remote(f"{address}/a.bin")
        handler.asked.clear()
        for first in range(0, 50_000, step):
            assert fresh.read(first, 100) == data[first : first + 100]
        assert least <= sum(count for _, count in handler.asked) <= most + 1000


def test_what_is_expected_is_fetched_once_whatever_the_order(web: tuple[str, type[Ranges]], data: bytes) -> None:
    address, handler = web
    file = remote.Remote(f"{address}/a.bin")
    handler.asked.clear()
    file.expect(5_500, 20_000)
    places = list(range(5_500, 25_000, 500))
    random.Random(1).shuffle(places)
    assert all(file.read(place, 500) == data[place : place + 500] for place in places)
    asked = sorted(handler.asked)  # blocks that are fetched ahead may still be under way
    assert asked[:20] == [(number * 1000, 1000) for number in range(5, 25)]
    assert len(asked) == len(set(asked)) <= 21 + remote.AHEAD
    # What cannot be kept is not begun.
    file = remote.Remote(f"{address}/a.bin")
    handler.asked.clear()
    file.expect(0, 49_000)
    assert handler.asked == []


def test_audio_that_lies_apart_is_asked_for_at_once(web: tuple[str, type[Ranges]], tmp_path: Path) -> None:
    """Random views: one by one, each would wait for an answer, and blocks would bring what nobody reads."""
    address, handler = web
    places = shard(tmp_path / "web" / "s.tar", 40)
    chosen = [places[number] for number in (3, 11, 24, 39)]
    remote.opened(f"{address}/s.tar")
    handler.asked.clear()
    handler.together = threading.Barrier(4, timeout=20)  # no answer before all four are asked for
    paths = [f"{address}/s.tar#{offset}+{length}.flac" for offset, length, _ in chosen]
    read_ahead(paths)
    for path, (_, _, content) in zip(paths, chosen, strict=True):
        (tmp_path / "here.flac").write_bytes(content)
        assert decode(path).wave.tobytes() == decode(str(tmp_path / "here.flac")).wave.tobytes()
    assert sorted(handler.asked) == [(offset, length) for offset, length, _ in chosen]


def test_audio_elsewhere_is_that_of_the_file(web: tuple[str, type[Ranges]], tmp_path: Path, s3: str) -> None:
    import fsspec

    places = shard(tmp_path / "web" / "s.tar")
    (tmp_path / "web" / "one.flac").write_bytes(places[0][2])
    fsspec.filesystem("s3").put(str(tmp_path / "web"), f"{s3}/audio/", recursive=True)
    (tmp_path / "here.flac").write_bytes(places[0][2])
    expected = decode(str(tmp_path / "here.flac"), 0.25, 0.5)
    bucket = f"{s3}/audio/web" if fsspec.filesystem("s3").exists(f"{s3}/audio/web/s.tar") else f"{s3}/audio"
    for base in (web[0], bucket):
        offset, length, _ = places[0]
        for path in (f"{base}/s.tar#{offset}+{length}.flac", f"{base}/one.flac"):
            assert probe(path) == 1.0
            assert decode(path, 0.25, 0.5).wave.tobytes() == expected.wave.tobytes()


def test_rows_of_a_table_elsewhere_are_read(web: tuple[str, type[Ranges]], tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    contents = [content for _, _, content in shard(tmp_path / "s.tar")]
    table = pyarrow.table({"audio": [{"bytes": content, "path": "a.flac"} for content in contents]})
    parquet.write_table(table, tmp_path / "web" / "a.parquet", row_group_size=2)
    for row, content in enumerate(contents):
        (tmp_path / "a.flac").write_bytes(content)
        found = decode(f"{web[0]}/a.parquet#{row}+{len(content)}.flac.row")
        assert found.wave.tobytes() == decode(str(tmp_path / "a.flac")).wave.tobytes()


def test_a_manifest_of_addresses_elsewhere_gives_the_same_embeddings(
    web: tuple[str, type[Ranges]], spkd: Callable, tmp_path: Path
) -> None:
    places, address = shard(tmp_path / "web" / "s.tar"), web[0]
    rows = {"remote.csv": [f"{address}/s.tar#{offset}+{length}.flac" for offset, length, _ in places], "here.csv": []}
    for number, (_, _, content) in enumerate(places):
        Path(f"{number}.flac").write_bytes(content)
        rows["here.csv"].append(f"{number}.flac")
    save_student("student", Checkpoint(build("tiny", channels=8, embedding=4)))
    for name, paths in rows.items():
        Path(name).write_text("utt,path\n" + "".join(f"{n},{path}\n" for n, path in enumerate(paths)))
        spkd("embed", name, "model=student", f"out={name}.npy").ok()
    far, near = (np.stack([vector for _, vector in read_vectors(Path(f"{name}.npy"))]) for name in rows)
    assert far.shape == (4, 4)
    assert far.tobytes() == near.tobytes()


@pytest.mark.parametrize("place", ["web", "s3"])
def test_shards_elsewhere_are_indexed_as_those_here(
    web: tuple[str, type[Ranges]], spkd: Callable, tmp_path: Path, s3: str, place: str
) -> None:
    import fsspec

    folder = tmp_path / "web" / "shards"
    folder.mkdir()
    for number in range(3):
        shard(folder / f"{number}.tar", 3, number)
    with zipfile.ZipFile(folder / "vox.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for number in range(3):
            file.writestr(f"wav/id1027{number}/v/00001.wav", wav(number))
    (folder / "shard.list").write_text("0.tar\n2.tar\n")
    base = f"{web[0]}/shards"
    if place == "s3":
        base = f"{s3}/{tmp_path.name}"
        fsspec.filesystem("s3").put([str(path) for path in folder.iterdir()], f"{base}/")
    for name, names in {
        "tars": ["{0..2}.tar"],
        "list": ["shard.list"],
        "zip": ["vox.zip"],
        "all": [""] if place == "s3" else ["0.tar", "1.tar", "2.tar", "vox.zip"],
    }.items():
        spkd("manifest", *(f"{base}/{each}" for each in names), "--out", f"far-{name}.csv").ok()
        here = [f"{folder}/{each}" for each in names]
        spkd("manifest", *here, "--out", f"near-{name}.csv").ok()
        far, near = Manifest.load(Path(f"far-{name}.csv")), Manifest.load(Path(f"near-{name}.csv"))
        assert [(u.id, u.speaker, u.duration) for u in far] == [(u.id, u.speaker, u.duration) for u in near]
        assert [u.path for u in far] == [u.path.replace("web/shards", base) for u in near]
        for one, two in zip(far, near, strict=True):
            assert decode(one.path).wave.tobytes() == decode(two.path).wave.tobytes()


def wav(seed: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.random.RandomState(seed).normal(size=8000), 16_000, "PCM_16", format="WAV")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.tar", "not found"),
        ("text.bin", "neither a folder of audio nor a container"),
        ("s.tar?token=1", "would be written into the manifest"),
    ],
)
def test_what_is_no_container_elsewhere_is_refused(
    web: tuple[str, type[Ranges]], spkd: Callable, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "web" / "text.bin").write_text("no tar\n" * 300)
    done = spkd("manifest", f"{web[0]}/{name}", "--out", "m.csv")
    assert (done.code, message in done.err, "token" in done.err) == (2, True, False), done.err
    assert not Path("m.csv").exists()


def test_a_server_that_fails_is_asked_again(
    web: tuple[str, type[Ranges]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spkd.files.remote_folder.WAIT", 0.001)
    (offset, length, _), *_ = shard(tmp_path / "web" / "s.tar")
    path = f"{web[0]}/s.tar#{offset}+{length}.flac"
    assert probe(path) == 1.0
    web[1].fails = 2
    assert len(decode(path).wave) == 16_000
    # A server that ends early, or is away: the reason of one utterance.
    web[1].cut = True
    remote._opened.cache_clear()
    with pytest.raises(AudioError, match="cannot be decoded"):
        decode(path, 0.1)
    web[1].cut, web[1].fails = False, 100
    remote._opened.cache_clear()
    with pytest.raises(AudioError, match="the server answers 503"):
        decode(path, 0.2)
    with pytest.raises(AudioError, match="s.tar"):
        decode("http://127.0.0.1:9/s.tar#0+10.flac")


def test_a_server_without_ranges_is_refused(web: tuple[str, type[Ranges]], tmp_path: Path) -> None:
    (offset, length, _), *_ = shard(tmp_path / "web" / "s.tar")
    web[1].gives_ranges = False
    with pytest.raises(AudioError, match="gives whole files alone"):
        decode(f"{web[0]}/s.tar#{offset}+{length}.flac")


@pytest.mark.parametrize("name", ["ETag", "Last-Modified"])
def test_a_server_that_names_no_content_is_refused(
    web: tuple[str, type[Ranges]], spkd: Callable, tmp_path: Path, name: str
) -> None:
    """Either of both is enough; without them, a file of the same size with other audio would be read as the first."""
    (offset, length, _), *_ = shard(tmp_path / "web" / "s.tar")
    path = f"{web[0]}/s.tar#{offset}+{length}.flac"
    web[1].names = staticmethod(lambda data: [(name, "Tue, 01 Dec 2026 00:00:00 GMT")])
    assert probe(path) == 1.0
    web[1].names = staticmethod(lambda data: [])
    with pytest.raises(OSError, match="or its server gives another ETag"):
        remote.opened(f"{web[0]}/s.tar").fetched(0, 10)  # it named the content before
    remote._opened.cache_clear()
    with pytest.raises(AudioError, match="its server gives neither an ETag nor Last-Modified"):
        decode(path, 0.2)
    done = spkd("manifest", f"{web[0]}/s.tar", "--out", "m.csv")
    assert (done.code, "gives neither an ETag nor Last-Modified" in done.err) == (2, True), done.err


def test_a_server_that_cannot_be_read_from_says_why(
    web: tuple[str, type[Ranges]], spkd: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spkd.files.remote_folder.WAIT", 0.001)
    shard(tmp_path / "web" / "s.tar")
    web[1].short = 7
    done = spkd("manifest", f"{web[0]}/s.tar", "--out", "m.csv")
    assert (done.code, "s.tar: 1,017 bytes came instead of 1,024" in done.err) == (1, True), done.err
    web[1].short, tags = 0, itertools.count()
    web[1].names = staticmethod(lambda data: [("ETag", f'"{next(tags)}"')])
    remote._opened.cache_clear()
    done = spkd("manifest", f"{web[0]}/s.tar", "--out", "m.csv")
    assert (done.code, "or its server gives another ETag with each answer" in done.err) == (1, True), done.err
    (tmp_path / "shard.list").write_text(f"{web[0]}/s.tar\n{web[0]}/t.tar\n")
    web[1].fails = 1000
    remote._opened.cache_clear()
    done = spkd("manifest", "shard.list", "--out", "m.csv")
    assert (done.code, "s.tar: the server answers 503" in done.err) == (2, True), done.err
    assert not Path("m.csv").exists()


def test_a_shard_that_changed_is_an_error(web: tuple[str, type[Ranges]], tmp_path: Path) -> None:
    (offset, length, _), *_ = shard(tmp_path / "web" / "s.tar")
    path = f"{web[0]}/s.tar#{offset}+{length}.flac"
    made = Manifest.load(write(tmp_path / "m.csv", f"path,utt\n{path},a\n"))
    made.save(tmp_path / "n.csv")
    assert [u.path for u in Manifest.load(tmp_path / "n.csv")] == [path]
    shard(tmp_path / "web" / "s.tar", 5)
    remote._opened.cache_clear()
    with pytest.raises(SpkdError, match="has changed since it was indexed"):
        Manifest.load(tmp_path / "n.csv")


@pytest.mark.parametrize("place", ["web", "s3"])
def test_a_shard_that_changes_while_it_is_read_is_an_error(
    web: tuple[str, type[Ranges]], tmp_path: Path, s3: str, place: str
) -> None:
    """The later shard is of the same size, so that all addresses lead to audio, but to other audio."""
    import fsspec

    files = [tmp_path / "web" / name for name in ("0.tar", "1.tar")]
    for path, seed in zip(files, (0, 1), strict=True):
        with tarfile.open(path, "w") as tar:
            for number in range(3):
                data = wav(10 * seed + number)
                info = tarfile.TarInfo(f"{number}.wav")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with tarfile.open(files[0]) as tar:
        places = [f"#{info.offset_data}+{info.size}.wav" for info in tar]
    shared = f"{s3}/changing.tar" if place == "s3" else f"{web[0]}/0.tar"

    def replace(path: Path) -> None:
        if place == "s3":
            fsspec.filesystem("s3").put(str(path), shared)
        else:
            files[0].write_bytes(path.read_bytes())

    replace(files[0])
    assert len(decode(f"{shared}{places[0]}").wave) == 8000
    replace(files[1])
    with pytest.raises(AudioError, match="has changed since it was opened"):
        decode(f"{shared}{places[2]}")


def test_another_range_than_was_asked_for_is_refused(
    web: tuple[str, type[Ranges]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spkd.files.remote_folder.WAIT", 0.001)
    for number in range(2):  # files of one length, one after the other, as a Kaldi archive without keys
        with (tmp_path / "web" / "all.tar").open("ab") as file:
            file.write(wav(number))
    size, address = len(wav(0)), f"{web[0]}/all.tar"
    assert decode(f"{address}#{size}+{size}.wav").wave.tobytes() == decode(holding(tmp_path, wav(1))).wave.tobytes()
    web[1].first_alone = True
    remote._opened.cache_clear()
    with pytest.raises(AudioError, match="another range came"):
        decode(f"{address}#{size}+{size}.wav")


def test_a_fragment_of_a_url_is_no_part_of_a_name(web: tuple[str, type[Ranges]], tmp_path: Path) -> None:
    (tmp_path / "web" / "a").write_bytes(wav(0))  # which is all of the URL that a server is sent
    (tmp_path / "web" / "a#1.wav").write_bytes(wav(1))
    with pytest.raises(AudioError, match="what follows # .* write %23"):
        decode(f"{web[0]}/a#1.wav")
    found = decode(f"{web[0]}/a%231.wav")
    assert found.wave.tobytes() == decode(holding(tmp_path, wav(1))).wave.tobytes()


def holding(folder: Path, data: bytes) -> str:
    """Path of a file with a content."""
    (folder / "expected.wav").write_bytes(data)
    return str(folder / "expected.wav")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
