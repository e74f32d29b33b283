"""Tables with audio, as pyarrow and `datasets` write them."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from spkd.corpus import loader, rows, shards
from spkd.corpus.audio import AudioError, decode, probe
from spkd.corpus.kept import Kept
from spkd.corpus.manifest import Manifest
from spkd.corpus.settings import ViewConfig
from spkd.corpus.view import ViewPlan
from spkd.errors import SpkdError

from .test_audio import tone, write_compressed
from .test_containers import write_tar
from .test_shards import audio, indexed

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write(path: Path, columns: dict[str, Any], group: int = 3, **options: Any) -> Path:
    table = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns)
    parquet.write_table(table, path, row_group_size=group, **options)
    return path


def structs(count: int, name: str = "u{}.flac", first: int = 0) -> list[dict[str, Any]]:
    return [{"bytes": audio(0.5, seed=first + n), "path": name.format(first + n)} for n in range(count)]


def expected(seed: int) -> np.ndarray:
    return soundfile.read(io.BytesIO(audio(0.5, seed=seed)), dtype="float32")[0]


@pytest.mark.parametrize("options", [{}, {"compression": "none"}, {"compression": "zstd", "use_dictionary": False}])
def test_rows_are_read_as_files(tmp_path: Path, options: dict[str, Any]) -> None:
    write(tmp_path / "x.parquet", {"audio": structs(8), "speaker_id": [n % 3 for n in range(8)]}, **options)
    manifest, summary = indexed(tmp_path, "x.parquet")
    assert [(u.id, u.speaker, u.duration) for u in manifest] == [(f"u{n}", str(n % 3), 0.5) for n in range(8)]
    assert manifest[4].path.endswith("x.parquet#4+0.flac.row")
    for order in (range(8), (7, 0, 5)):
        assert all(np.array_equal(decode(manifest[n].path).wave, expected(n)) for n in order)
    assert np.array_equal(decode(manifest[3].path, 0.1, 0.2).wave, expected(3)[1600:4800])
    assert (summary.origin, summary.left_out) == ("1 container, speakers from speaker_id", {})


@pytest.mark.slow
def test_tables_that_datasets_wrote(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = []
    for n in range(6):
        soundfile.write(tmp_path / f"{n}.wav", expected(n), 16_000, subtype="PCM_24")
        names.append(str(tmp_path / f"{n}.wav"))
    made = datasets.Dataset.from_dict({"audio": names, "speaker": [n % 2 for n in range(6)]})
    made = made.cast_column("audio", datasets.Audio()).cast_column("speaker", datasets.ClassLabel(names=["ann", "bob"]))
    made = made.with_format("arrow").map(datasets.table.embed_table_storage, batched=True).with_format(None)
    for shard in range(2):
        made.shard(2, shard).to_parquet(str(tmp_path / f"train-{shard:05d}-of-00002.parquet"))
    manifest, _ = indexed(tmp_path, "train-{00000..00001}-of-00002.parquet")
    assert [(u.id, u.speaker) for u in manifest] == [(str(n), ("ann", "bob")[n % 2]) for n in range(6)]
    for n, utterance in enumerate(manifest):
        assert np.array_equal(decode(utterance.path).wave, decode(str(tmp_path / f"{n}.wav")).wave)
    bare = datasets.Dataset.from_dict({"audio": names}).cast_column("audio", datasets.Audio())
    bare.to_parquet(str(tmp_path / "bare.parquet"))
    with pytest.raises(SpkdError, match=r": /.*/0.wav: no audio in this row, only its path; write the audio into"):
        indexed(tmp_path, "bare.parquet")


def test_a_flipped_bit_is_found_where_pages_have_checksums(tmp_path: Path) -> None:
    """Spark and pyarrow's `write_page_checksum` write them (parquet-format, PageHeader.crc)."""
    plain = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    path = write(tmp_path / "x.parquet", {"audio": structs(2)}, **plain)
    manifest, _ = indexed(tmp_path, "x.parquet")
    data = bytearray(path.read_bytes())
    place = data.index(audio(0.5, seed=1)) + 4000
    data[place] ^= 1
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    rows._groups, rows._tables = Kept(1 << 28, lambda values: int(values.nbytes)), Kept(64, lambda _: 1)
    with pytest.raises(AudioError, match="damaged"):
        decode(manifest[1].path)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_stretches_of_the_audio(tmp_path: Path, capsys: pytest.CaptureFixture, kind: str) -> None:
    """Columns and keys that bound audio act as in tables, unless they are times in another recording, or are noted."""

    def made(**columns: list[Any]) -> Manifest:
        count = len(next(iter(columns.values())))
        if kind == "parquet":
            cells = [{"bytes": whole, "path": f"u{n}.flac"} for n in range(count)]
            write(tmp_path / "x.parquet", {"audio": cells} | columns)
        else:
            rows = [{name: values[n] for name, values in columns.items()} for n in range(count)]
            members = [(f"u{n}.json", json.dumps(row).encode()) for n, row in enumerate(rows)]
            write_tar(tmp_path / "x.tar", [*members, *((f"u{n}.flac", whole) for n in range(count))])
        return indexed(tmp_path, f"x.{kind}")[0]

    whole = audio(5.0)
    wave, _ = soundfile.read(io.BytesIO(whole), dtype="float32")
    manifest = made(start=[0.5, 1.0, 0.0, None], end=[1.0, 3.0, 5.05, None], text=["yes"] * 4, start_ms=[1] * 4)
    assert [(u.start, u.duration) for u in manifest] == [(0.5, 0.5), (1.0, 2.0), (0.0, 5.0), (0.0, 5.0)]
    u = manifest[1]
    assert np.array_equal(decode(u.path, u.start, u.duration).wave, wave[16_000:48_000])
    out = capsys.readouterr().out
    assert "stretches of the audio, by start and end or duration beside it: 2" in out
    assert "columns and keys that nothing uses: text (4)" in out
    assert re.search(r"seem to bound the audio and are not used, .*: start_ms \(4\)", out)
    # Durations of the audio itself, and times in the recording of which it was cut.
    assert [u.duration for u in made(duration=[5.0, 4.96])] == [5.0, 5.0]
    assert "note: " not in capsys.readouterr().out
    manifest = made(start=[60.0, 70.0, 0.0], end=[65.0, 75.0, 4.0])
    assert [(u.start, u.duration) for u in manifest] == [(0.0, 5.0)] * 3
    out = capsys.readouterr().out
    assert "are not stretches of it, which is taken whole, as they lie beyond its end: 2 (within it: 1)" in out
    # Of the others, what lies beyond the audio is listed.
    names = [f"u{n}.flac" for n in range(4)]
    path = tmp_path / f"x.{kind}"
    made(onset=[1, 2, 3, 4], dur=[1.0, 1.0, 1.0, 3.0])
    summary = shards.index([path], tmp_path / "m.csv")
    reason = "its stretch, of 3 s from 4 s on, ends behind the audio of 5 s"
    assert (summary.utterances, summary.left_out) == (3, {f"{path}: {names[3]} (utterance u3)": reason})


def test_columns_that_name_no_speaker_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    structs_of_speakers = [{"id": f"s{n}"} for n in range(3)]
    write(tmp_path / "x.parquet", {"audio": structs(3), "target_audio": structs(3), "speaker": structs_of_speakers})
    assert indexed(tmp_path, "x.parquet")[0].speakers == []
    out = capsys.readouterr().out
    assert "columns and keys that nothing uses: target_audio (audio) (3), speaker (no text) (3)" in out
    paths = [f"id1027{n % 2}/5r0dWxy17C8/0000{n}.flac" for n in range(4)]
    rows = [{"bytes": audio(seed=n), "path": path} for n, path in enumerate(paths)]
    write(tmp_path / "x.parquet", {"audio": rows, "label": [0] * 4})
    assert indexed(tmp_path, "x.parquet")[0].speakers == ["id10270", "id10271"]
    assert "label is '0' for all, and passed over (--speaker)" in capsys.readouterr().out
    write(tmp_path / "x.parquet", {"audio": rows, "label": [0, 1] * 2})
    assert indexed(tmp_path, "x.parquet")[0].speakers == ["0", "1"]
    assert "ids and speakers of the layout voxceleb are not taken (--layout voxceleb)" in capsys.readouterr().out
    write(tmp_path / "x.parquet", {"audio": structs(2), "label": ["yes"] * 2})
    assert indexed(tmp_path, "x.parquet")[0].speakers == ["yes"]
    assert "all of 2 utterances are of one speaker, 'yes'" in capsys.readouterr().out


def test_configurations_that_overlap_are_refused(spkd: Callable, tmp_path: Path) -> None:
    """Data sets of the hub have a folder for each configuration, and one for all of them."""
    for config, first, count in (("all", 0, 6), ("clean", 0, 3), ("other", 3, 3)):
        (tmp_path / "hub" / config).mkdir(parents=True)
        ids = [f"u{first + n}" for n in range(count)]
        columns = {"id": ids, "audio": structs(count, first=first)}
        write(tmp_path / "hub" / config / "train-00000-of-00001.parquet", columns)
    done = spkd("manifest", "hub", "--out", "m.csv")
    assert (done.code, Path("m.csv").exists()) == (2, False)
    assert "hold the same audio of 'u0', and so it is for 6 keys, of which 3 were compared" in done.err
    assert "hub/all/train-00000-of-00001.parquet and hub/clean/train-00000-of-00001.parquet hold" in done.err
    assert "name files or folders that do not overlap" in done.err
    assert "6 utterances" in spkd("manifest", "hub/clean", "hub/other", "--out", "m.csv").ok().out
    # Keys that repeat with other audio are other utterances.
    write(tmp_path / "hub" / "other" / "test.parquet", {"id": ["u0", "u1"], "audio": structs(2, first=10)})
    done = spkd("manifest", "hub/all", "hub/other/test.parquet", "--out", "o.csv").ok()
    assert "8 utterances" in done.out
    assert "keys that repeat among the containers, whose names precede the ids: 2" in done.out
    assert "sets taken together: test, train (name the folder" in done.out
    # A few that are there twice are noted.
    write(tmp_path / "big.parquet", {"id": [f"b{n}" for n in range(20)], "audio": structs(20, first=20)})
    write(tmp_path / "one.parquet", {"id": ["b7"], "audio": structs(1, first=27)})
    done = spkd("manifest", "big.parquet", "one.parquet", "--out", "t.csv").ok()
    assert "big.parquet and one.parquet hold the same audio of 'b7'" in done.out
    assert "utterances that are there twice" in done.out


@pytest.mark.parametrize("statistics", [True, False])
def test_rows_with_a_path_alone_are_left_out(tmp_path: Path, statistics: bool) -> None:
    """`datasets` writes such rows where its files are not embedded, and some beside rows with audio."""
    cells = structs(4)
    cells[1] |= {"bytes": None, "path": "/data/a.flac"}
    cells[2] = {"bytes": None, "path": None}
    write(tmp_path / "x.parquet", {"audio": cells}, write_statistics=statistics)
    manifest, summary = indexed(tmp_path, "x.parquet")
    assert [u.id for u in manifest] == ["u0", "u3"]
    reasons = {name.partition(": ")[2]: reason for name, reason in summary.left_out.items()}
    assert reasons.keys() == {"/data/a.flac", "row 2"}
    assert reasons["/data/a.flac"].startswith("no audio in this row, only its path; write the audio into the table")
    assert "(no audio in this row)" in reasons["row 2"]


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("kind", ["structs", "texts", "other name"])
def test_a_table_of_paths_is_a_manifest(spkd: Callable, tmp_path: Path, statistics: bool, kind: str) -> None:
    (tmp_path / "in").mkdir()
    for n in range(4):
        (tmp_path / f"in/u{n}.flac").write_bytes(audio(0.5, seed=n))
    paths = [*(f"u{n}.flac" for n in range(3)), str(tmp_path / "in/u3.flac")]
    cells: list[Any] = paths if kind == "texts" else [{"bytes": None, "path": path} for path in paths]
    typed = None if kind == "texts" else pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {
        "speech" if kind == "other name" else "audio": pyarrow.array(cells, typed),
        "Client_ID": [0, 1, None, 1],
        "start": [0.0, 0.1, 0.0, 0.0],
        "end": [0.5, 0.3, 0.5, 0.5],
        "sentence": ["a", "b", "", "d"],
    }
    features = {"Client_ID": {"names": ["ann", "ben"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    write(tmp_path / "in/x.parquet", table, write_statistics=statistics)
    done = spkd("manifest", "in/x.parquet", "--out", "m.csv").ok()
    assert "columns not used: 'sentence'" in done.out
    for manifest in (Manifest.load("m.csv"), Manifest.load("in/x.parquet")):
        assert [(u.id, u.speaker, u.start, u.duration) for u in manifest] == [
            ("u0", "ann", 0.0, 0.5),
            ("u1", "ben", 0.1, pytest.approx(0.2)),
            ("u2", None, 0.0, 0.5),
            ("u3", "ben", 0.0, 0.5),
        ]
        assert all(np.array_equal(decode(u.path).wave, expected(n)) for n, u in enumerate(manifest))
    (tmp_path / "in/u1.flac").unlink()
    assert "u1: no such file" in spkd("manifest", "in/x.parquet", "--out", "m.csv").ok().err
    columns["start_ms"] = [1, 2, 3, 4]
    write(tmp_path / "in/x.parquet", columns)
    assert "x.parquet: row 1: 'start_ms' seems to bound" in spkd("manifest", "in/x.parquet", "--out", "n.csv").err


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_channels_beside_the_audio(tmp_path: Path, capsys: pytest.CaptureFixture, kind: str, form: str) -> None:
    """The channel that is given is taken, where the audio has several."""
    waves = 0.1 * np.random.RandomState(0).randn(8000, 2)

    def made(name: str, channels: list[Any]) -> shards.Summary:
        counts = [2, 2, 2, 2, 1, 1][: len(channels)]
        cells = []
        for count in counts:
            data = io.BytesIO()
            soundfile.write(data, waves[:, :count], 16_000, format="FLAC")
            cells.append(data.getvalue())
        if kind == "parquet":
            structs_of = [{"bytes": cell, "path": f"u{n}.flac"} for n, cell in enumerate(cells)]
            write(tmp_path / "x.parquet", {"audio": structs_of, name: channels})
        else:
            members = [(f"u{n}.json", json.dumps({name: each}).encode()) for n, each in enumerate(channels)]
            write_tar(tmp_path / "x.tar", [*members, *((f"u{n}.flac", cell) for n, cell in enumerate(cells))])
        return shards.index([tmp_path / f"x.{kind}"], tmp_path / f"m.{form}")

    summary = made("Channel", [0, 1, None, 2, 0, 1])
    manifest = Manifest.load(tmp_path / f"m.{form}")
    assert [(u.id, u.channel) for u in manifest] == [("u0", 0), ("u1", 1), ("u2", None), ("u4", None), ("u5", None)]
    (reason,) = summary.left_out.values()
    assert reason == "has 2 channels; channel 2 is given beside it (counted from 0)"
    for u, wave in zip(manifest, [waves[:, 0], waves[:, 1], waves.mean(1), *[waves[:, 0]] * 2], strict=True):
        np.testing.assert_allclose(decode(u.path, channel=u.channel).wave, wave, atol=4e-5)
    out = capsys.readouterr().out
    assert "channels beside audio that has one alone, which is taken as it is: 1" in out
    assert "nothing uses" not in out
    made("channel_selector", ["average", "B", "left", "0"])
    assert [u.channel for u in Manifest.load(tmp_path / f"m.{form}")] == [None, 1, None, 0]
    assert "columns and keys that nothing uses: channel_selector (no channel) (1)" in capsys.readouterr().out
    made("text", ["a", "b"])
    assert "channel" not in (tmp_path / f"m.{form}").read_text()


def test_columns_of_other_types_are_named_with_them(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", {"audio": [[cell] for cell in structs(2)], "n": [1, 2]})
    message = r"no column of bytes, or of \{bytes, path\}, among audio \(list<.*struct<bytes: binary.*\), n \(int64\)"
    with pytest.raises(SpkdError, match=message):
        indexed(tmp_path, "x.parquet")
    write(
        tmp_path / "x.parquet", {"audio": pyarrow.array([audio(0.5, seed=n) for n in range(2)], pyarrow.binary_view())}
    )
    assert [len(decode(u.path).wave) for u in indexed(tmp_path, "x.parquet")[0]] == [8000, 8000]


def test_a_package_that_is_installed_meanwhile_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of an index that failed is no reason to fail again."""
    write(tmp_path / "x.parquet", {"audio": structs(2)})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        patch.setattr(rows, "_tables", Kept(64, lambda _: 1))
        with pytest.raises(SpkdError, match="needs pyarrow"):
            indexed(tmp_path, "x.parquet")
    assert len(indexed(tmp_path, "x.parquet")[0]) == 2


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    table = {"a": structs(2), "b": structs(2, first=5), "who": ["x", "y"], "utt": ["1", "2"], "other": ["p", "q"]}
    write(tmp_path / "x.parquet", table)
    with pytest.raises(SpkdError, match="several columns of bytes; choose with --audio: a, b"):
        indexed(tmp_path, "x.parquet")
    manifest, _ = indexed(tmp_path, "x.parquet", audio="b", speaker="Who", id_column="other")
    assert [(u.id, u.speaker) for u in manifest] == [("p", "x"), ("q", "y")]
    assert manifest[1].path.endswith("x.parquet#1+0.flac.row:b")
    assert np.array_equal(decode(manifest[1].path).wave, expected(6))
    for options, message in (
        ({"audio": "c"}, "no column 'c' of bytes"),
        ({"audio": "a", "id_column": "uttt"}, "no column 'uttt'; did you mean 'utt'"),
    ):
        with pytest.raises(SpkdError, match=message):
            indexed(tmp_path, "x.parquet", **options)
    image = [{"bytes": b"\x89PNG", "path": "1.png"}] * 2
    write(tmp_path / "x.parquet", {"image": image, "audio": structs(2)})
    assert [u.id for u in indexed(tmp_path, "x.parquet")[0]] == ["u0", "u1"]


def test_bytes_without_a_name_are_told_apart_by_their_beginning(tmp_path: Path) -> None:
    kinds = {"wav": None, "flac": None, "mp3": "libmp3lame", "m4a": "aac", "webm": "libopus"}
    data = []
    for suffix, codec in kinds.items():
        path = tmp_path / f"a.{suffix}"
        if codec is None:
            soundfile.write(path, tone(300, 16_000), 16_000)
        else:
            write_compressed(path, tone(300, 16_000)[:, None], 16_000, codec)
        data.append(path.read_bytes())
    write(tmp_path / "1.parquet", {"audio": pyarrow.array(data, pyarrow.large_binary())})
    write(tmp_path / "2.parquet", {"wav": [audio(form="WAV")]})
    manifest, _ = indexed(tmp_path, "{1,2}.parquet")
    assert [u.id for u in manifest] == [*(f"1/{n:08d}" for n in range(5)), "2/00000000"]
    for suffix, utterance in zip(kinds, manifest, strict=False):
        assert np.array_equal(decode(utterance.path).wave, decode(str(tmp_path / f"a.{suffix}")).wave)
    assert len(indexed(tmp_path, "1.parquet", suffix="flac")[0]) == 1


def test_paths_in_a_table_have_layouts(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", {"audio": structs(4, "wav/id1027{}/5r0dWxy17C8/00001.wav")})
    manifest, summary = indexed(tmp_path, "x.parquet")
    assert (manifest[1].id, manifest[1].speaker) == ("id10271/5r0dWxy17C8/00001.wav", "id10271")
    assert summary.origin == "1 container, layout voxceleb"


def test_a_group_of_rows_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.parquet", {"audio": structs(12)}, group=4)
    read = list[int]()
    original = rows.Table.read
    monkeypatch.setattr(rows.Table, "read", lambda s, group, columns: read.append(group) or original(s, group, columns))
    manifest, _ = indexed(tmp_path, "x.parquet")
    assert (read[:3], sorted(read[3:])) == ([0, 1, 2], [0, 1, 2])  # names, then headers of audio, by several threads
    read.clear()
    monkeypatch.setattr(rows, "_groups", Kept(1, lambda values: values.nbytes, least=1))  # room for one
    for utterance in manifest:
        decode(utterance.path)
    assert read == [0, 1, 2]


def test_whole_tables_are_loaded_in_the_order_of_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by length, as files are: then each batch would read all groups of rows."""
    cells = [{"bytes": audio(0.5 + 0.25 * (n % 3), seed=n), "path": f"{n}.flac"} for n in range(12)]
    write(tmp_path / "x.parquet", {"audio": cells}, group=4)
    manifest, _ = indexed(tmp_path, "x.parquet")
    monkeypatch.setattr(rows, "_groups", Kept(1, lambda values: values.nbytes, least=1))  # room for one
    read = list[int]()
    original = rows.Table.read
    monkeypatch.setattr(rows.Table, "read", lambda s, group, columns: read.append(group) or original(s, group, columns))
    plan = ViewPlan.parse(ViewConfig())
    views = loader.ViewLoader(manifest, plan.views(manifest), plan)
    mixed = np.random.RandomState(0).permutation(12)
    batches = list(loader.iterate_batches(views, mixed, 2, 1, lambda *_: None))
    assert read == [0, 1, 2]
    assert sorted(int(view) for batch in batches for view in batch.views) == list(range(12))


def test_rows_are_counted_one_by_one(tmp_path: Path) -> None:
    """Names and ids repeat, and speakers are numbers of pandas, which are floats where some are missing."""
    good = [{"bytes": audio(seed=number), "path": "audio.flac"} for number in range(3)]
    bad = [{"bytes": b"none", "path": "audio.flac"}] * 3
    table = pyarrow.table({"audio": [*good, *bad], "speaker": [1.0, 2.0, None, 1.0, 1.0, 1.0]})
    parquet.write_table(table, tmp_path / "x.parquet")
    manifest, summary = indexed(tmp_path, "x.parquet")
    assert [(u.id, u.speaker) for u in manifest] == [("audio", "1"), ("audio@1", "2"), ("audio@2", None)]
    assert len(summary.left_out) == 3
    parquet.write_table(pyarrow.table({"audio": good, "id": [1, 1, 2]}), tmp_path / "y.parquet")
    with pytest.raises(SpkdError, match="would both be the utterance '1'"):
        indexed(tmp_path, "y.parquet")


def test_what_is_wrong_with_a_table_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [*structs(2), {"bytes": None, "path": "c.flac"}, None, {"bytes": b"", "path": "e.flac"}]
    write(tmp_path / "1.parquet", {"audio": good})
    write(tmp_path / "2.parquet", {"audio": ["text", "more"]})
    (tmp_path / "3.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    (tmp_path / "4.parquet").write_bytes((tmp_path / "1.parquet").read_bytes()[:-200])
    damaged = bytearray(write(tmp_path / "5.parquet", {"audio": structs(2)}, compression="gzip").read_bytes())
    damaged[100:3000] = bytes(2900)
    (tmp_path / "5.parquet").write_bytes(damaged)
    manifest, summary = indexed(tmp_path, ".")
    assert [u.id for u in manifest] == ["u0", "u1"]
    reasons = {name.replace(f"{tmp_path}/", ""): reason for name, reason in summary.left_out.items()}
    assert reasons["1.parquet: c.flac"].startswith("no audio in this row, only its path")
    assert reasons["1.parquet: e.flac"] == "empty file"
    assert "no column of bytes" in reasons["2.parquet"]
    assert all("not a table of Parquet" in reasons[f"{n}.parquet"] for n in (3, 4))
    assert any("damaged" in reason for name, reason in reasons.items() if name.startswith("5.parquet"))
    for address, message in (
        (f"{tmp_path}/1.parquet#9+0.flac.row", "no row 9 in the table, which has 5"),
        (f"{tmp_path}/1.parquet#0+0.flac.row:b", "no column 'b' of audio"),
        (f"{tmp_path}/2.parquet#0+0.flac.row", "no column ''"),
        (f"{tmp_path}/3.parquet#0+0.m4a.row", "not a table of Parquet"),
    ):
        for ask in (decode, probe):
            with pytest.raises(AudioError, match=message):
                ask(address)
    monkeypatch.setattr(rows, "MOST_OF_GROUP", 100)
    with pytest.raises(AudioError, match="row_group_size"):
        decode(f"{write(tmp_path / '6.parquet', {'audio': structs(2)})}#0+0.flac.row")


def test_a_table_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    for seed in (1, 2):
        write(tmp_path / "x.parquet", {"audio": structs(1, first=seed)})
        assert np.array_equal(decode(f"{tmp_path}/x.parquet#0+0.flac.row").wave, expected(seed))


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.parquet", {"audio": structs(1)})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SpkdError, match=r"needs pyarrow to be read: pip install 'spkd\[parquet\]'"):
        shards.index([path], tmp_path / "m.csv")
    with pytest.raises(AudioError, match="needs pyarrow"):
        decode(f"{path}#0+0.flac.row")


def test_audiofolders(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        soundfile.write(tmp_path / split / "a" / "1.wav", tone(300, 16_000), 16_000)
        table = [{"file_name": "a/1.wav", "speaker_id": split, "text": "x"}]
        if split == "train":
            (tmp_path / split / "metadata.csv").write_text("file_name,speaker_id,text\na/1.wav,train,x\n")
        else:
            (tmp_path / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    both = Manifest.load(tmp_path)
    assert sorted((u.speaker, Path(u.path).is_file()) for u in both) == [("test", True), ("train", True)]
    one = Manifest.load(tmp_path / "train")
    assert [(u.id, u.speaker) for u in one] == [("1", "train")]
    (tmp_path / "train" / "metadata.csv").write_text("x|y|z\n")
    (tmp_path / "test" / "metadata.jsonl").unlink()
    with pytest.raises(SpkdError, match=r"without wav.scp"):
        Manifest.load(tmp_path)
