"""Manifests exactly as other tools write them, over audio whose every second has another level: what is heard tells
which stretch of which channel was read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from spkd.corpus.audio import decode
from spkd.corpus.manifest import Manifest, Utterance, build
from spkd.errors import SpkdError, UsageError
from spkd.registry import MANIFEST_READERS

Heard = tuple[str, str | None, list[float]]  # id, speaker, level of every second


def speak(path: Path, levels: Sequence[float | tuple[float, ...]], rate: int = 8000) -> None:
    """Audio whose seconds have these levels; of several channels where a level is a tuple."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.repeat(np.array(levels), rate, axis=0), rate)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """call.wav: ten seconds of 0.1, 0.2, .. at 8 kHz. st.wav: two channels of four seconds. a.wav, b.wav: one each."""
    speak(tmp_path / "call.wav", [0.05 * second for second in range(1, 11)])
    speak(tmp_path / "st.wav", [(0.05 * second, -0.05 * second) for second in range(1, 5)])
    for name, level in (("a", 0.3), ("b", 0.4)):
        speak(tmp_path / f"{name}.wav", [level])
    return tmp_path


def heard(u: Utterance) -> list[float]:
    wave = decode(u.path, u.start, u.duration, u.channel).wave
    return [round(float(np.median(second)), 2) for second in np.split(wave, range(16_000, len(wave), 16_000))]


def read(file: Path, text: str | bytes = b"", columns: Sequence[str] = ()) -> list[Heard]:
    """What is heard of every utterance of a manifest."""
    if text:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [(u.id, u.speaker, heard(u)) for u in Manifest.load(file, columns)]


def notes(file: Path) -> str:
    return "\n".join(Manifest.load(file).notes)


# Times, in tables and JSON lines (M1, M2).


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", "utt,path,speaker,start,end\na,call.wav,A,0,2\nb,call.wav,B,2,3\n"),
        ("m.csv", "utt,path,speaker,start_time,end_time\na,call.wav,A,0.0,2.0\nb,call.wav,B,2.0,3.0\n"),
        ("m.tsv", "utt\tfile_path\tspk\tonset\tduration\na\tcall.wav\tA\t0\t2\nb\tcall.wav\tB\t2\t1\n"),
        ("m.csv", "utt,path,speaker,start,end,duration\na,call.wav,A,0,2,2.0\nb,call.wav,B,2,3,1.0\n"),
        ("m.csv", "ID,dur,path,start,stop,spk\na,10.0,call.wav,0.0,2.0,A\nb,10.0,call.wav,2.0,3.0,B\n"),  # 3D-Speaker
        ("m.csv", "ID,duration,wav,start,stop,spk_id\na,10.0,call.wav,0,16000,A\nb,10.0,call.wav,16000,24000,B\n"),
        ("m.jsonl", '{"id":"a","audio_filepath":"call.wav","speaker":"A","start":0,"end":2}\n'
                    '{"id":"b","audio_filepath":"call.wav","speaker":"B","start":2,"end":3.0}\n'),
        ("m.json", '{"id":"a","audio_filepath":"call.wav","label":"A","offset":0,"duration":2}\n'
                   '{"id":"b","audio_filepath":"call.wav","label":"B","offset":2,"duration":1}\n'),
        ("m.jsonl", '{"ID":"a","wav":"call.wav","Speaker":"A","Start":0,"End":2}\n'
                    '{"ID":"b","wav":"call.wav","Speaker":"B","Start":2,"End":3.0}\n'),
        ("raw.list", '{"key": "a", "wav": "call.wav", "spk": "A", "vad": [["0.000", "2.000"]]}\n'
                     '{"key": "b", "wav": "call.wav", "spk": "B", "vad": [["2.000", "3.000"]]}\n'),
    ],
    ids=[
        *("end", "end_time", "onset", "duration", "3d-speaker", "speechbrain"),
        *("json-end", "nemo", "capitals", "wespeaker"),
    ],
)  # fmt: skip
def test_every_way_to_bound_an_utterance(folder: Path, name: str, text: str) -> None:
    assert read(folder / name, text) == [("a", "A", [0.05, 0.1]), ("b", "B", [0.15])]


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ("utt,path,start_ms,end_ms", "a,call.wav,0,2000"),
        ("utt,path,start,stop", "a,call.wav,0,2"),  # of SpeechBrain samples, of 3D-Speaker seconds
        ("utt,path,t_start,t_end", "a,call.wav,0,2"),
        ("utt,path,start_sample,end_sample", "a,call.wav,0,16000"),
        ("utt,path,from,to", "a,call.wav,0,2"),
        ("utt,path,onset,offset", "a,call.wav,1,2"),  # offset is the end here
        ("utt,path,start,num_samples", "a,call.wav,0,16000"),
        ("utt,path,start,length", "a,call.wav,0,2"),
        ("utt,path,xmin,xmax", "a,call.wav,0,2"),  # Praat's TextGrid
        ("utt,path,tmin,tmax", "a,call.wav,0,2"),
        ("utt,path,t0,t1", "a,call.wav,0,2"),
        ("utt,path,t1,t2", "a,call.wav,0,2"),
        ("utt,path,st,et", "a,call.wav,0,2"),
        ("utt,path,seg_st,seg_et", "a,call.wav,0,2"),
        ("utt,path,in,out", "a,call.wav,0,2"),
        ("utt,path,startoffset,endoffset", "a,call.wav,0,2"),
        ("utt,path,first_sample,last_sample", "a,call.wav,0,16000"),
        ("utt,path,lower,upper", "a,call.wav,0,2"),
        ("utt,path,time_lower,time_upper", "a,call.wav,0,2"),
        ("utt,path,min_sec,max_sec", "a,call.wav,0,2"),
        ("utt,path,cut_from,cut_to", "a,call.wav,0,2"),
        ("utt,path,stime,etime", "a,call.wav,0,2"),  # NIST's scoring tools
        ("utt,path,sframe,eframe", "a,call.wav,0,200"),
        ("utt,path,start,finish_time", "a,call.wav,0,2"),
        ("utt,path,beginning,ending", "a,call.wav,0,2"),
        ("utt,path,cue_in,cue_out", "a,call.wav,0,2"),
        ("utt,path,seek", "a,call.wav,2"),
        ("utt,path,skip_seconds", "a,call.wav,2"),
        ("utt,path,trim_l,trim_r", "a,call.wav,1,1"),
        ("utt,path,since,until", "a,call.wav,0,2"),
        ("utt,path,strt", "a,call.wav,0"),
        ("utt,path,start,lengths", "a,call.wav,0,2"),
        ("utt,path,start,span", "a,call.wav,0,2"),
        ("utt,path,start,nsec", "a,call.wav,0,2"),
    ],
)
def test_times_that_are_not_understood_are_refused(folder: Path, columns: str, row: str) -> None:
    with pytest.raises(SpkdError, match=r"m\.csv:1: '\w+' seems to bound utterances"):
        read(folder / "m.csv", f"{columns}\n{row}\n")
    keys, values = columns.split(","), row.split(",")
    line = json.dumps({k: float(v) if v[0].isdigit() else v for k, v in zip(keys, values, strict=True)})
    with pytest.raises(SpkdError, match=r"m\.jsonl:1: '\w+' seems to bound utterances"):
        read(folder / "m.jsonl", line)


def test_words_that_only_look_like_times_are_columns(folder: Path) -> None:
    names = ["gender", "backend", "friend", "text_length", "mins", "test", "int", "first", "last", "segment", "text_1",
             "sentiment", "skipper", "system", "strtok", "cue", "wins"]  # fmt: skip
    text = f"utt,path,{','.join(names)}\na,a.wav{',x' * len(names)}\n"
    assert read(folder / "m.csv", text) == [("a", None, [0.3])]
    unused = ", ".join(repr(name) for name in names[:8])
    assert f"columns not used: {unused}, ..." in notes(folder / "m.csv")
    words = {"audio_filepath": "a.wav", "words": [{"word": "oh", "start": 0.1}], "f0": [90.0, 120.0, 80.0]}
    assert read(folder / "m.jsonl", json.dumps(words)) == [("a", None, [0.3])]


def test_stretches_in_a_list_are_refused_or_read(folder: Path) -> None:
    with pytest.raises(SpkdError, match=r"m\.jsonl:1: 'segments' lists stretches"):
        read(folder / "m.jsonl", '{"audio_filepath": "call.wav", "segments": [[0, 1], [2, 3]]}')
    for name, value in {
        "speech": [[0.5, 2]],
        "time": [0.5, 2],
        "segments": [{"start": 0.5, "end": 2, "speaker": "A"}],
        "annotation": [{"begin": 0.5, "stop": 2}],
        "crop": {"start": 0.5, "end": 2},
        "range": "0.5-2.0",
        "part": [0.5, 2],
    }.items():
        with pytest.raises(SpkdError, match=rf"m\.jsonl:1: '{name}' lists stretches"):
            read(folder / "m.jsonl", json.dumps({"audio_filepath": "call.wav", name: value}))
    with pytest.raises(SpkdError, match=r"m\.csv:2: 'segment' lists stretches"):
        read(folder / "m.csv", "path,segment\ncall.wav,0.5-2.0\n")
    text = '{"key": "x/1.wav", "spk": "s", "wav": "call.wav", "vad": [["0", "2.0"], ["4.0", "5.0"]]}\n'
    assert read(folder / "raw.list", text) == [("x/1.wav@0.0", "s", [0.05, 0.1]), ("x/1.wav@4.0", "s", [0.25])]
    assert "key@start`: 1" in notes(folder / "raw.list")


@pytest.mark.parametrize(
    ("columns", "row", "error"),
    [
        ("utt,path,start,end", "a,call.wav,3,2", r"m\.csv:2: the end \(2 s\) is not after the start"),
        ("utt,path,start,end", "a,call.wav,3,two", r"m\.csv:2: end is not a number"),
        ("ID,dur,path,start,stop,spk", "a,10,call.wav,3,2,s", r"m\.csv:2: stop is not after start"),
        ("ID,duration,wav,start,stop,spk_id", "a,10,$data_root/call.wav,3,9,s", "placeholder of SpeechBrain"),
        ("ID,duration,wav,start,stop,spk_id", "a,10,$data_folder/call.wav,3,9,s", "placeholder of SpeechBrain"),
        ("utt,path,path", "a,a.wav,b.wav", "two columns are called 'path'"),
    ],
)
def test_times_and_paths_that_cannot_be(folder: Path, columns: str, row: str, error: str) -> None:
    with pytest.raises(SpkdError, match=error):
        read(folder / "m.csv", f"{columns}\n{row}\n")


@pytest.mark.parametrize(
    ("name", "text", "further"),
    [
        ("m.csv", "ID,duration,wav,start,stop,spk_id,end\na,10.0,call.wav,0,16000,A,3\n", "'end'"),
        ("m.csv", "ID,duration,wav,start,stop,spk_id,offset\na,10.0,call.wav,0,16000,A,3\n", "'offset'"),
        ("m.csv", "ID,dur,path,start,stop,spk,end\na,10.0,call.wav,0,2,A,3\n", "'end'"),
        ("raw.list", '{"key": "a", "wav": "call.wav", "spk": "A", "vad": [["0", "2"]], "start": 3}', "'start'"),
        ("cv.tsv", "client_id\tpath\tspeaker\nc1\ta.wav\tann\n", "'speaker'"),
    ],
)  # fmt: skip
def test_two_columns_for_one_field_are_refused(folder: Path, name: str, text: str, further: str) -> None:
    with pytest.raises(SpkdError, match=f"{further} in addition to"):
        read(folder / name, text)


def test_a_duration_of_the_whole_file_beside_start_and_end_is_counted(folder: Path) -> None:
    text = "utt,path,start,end,duration\na,call.wav,1,2,10\nb,call.wav,2,3,1\n"
    assert read(folder / "m.csv", text) == [("a", None, [0.1]), ("b", None, [0.15])]
    assert "durations that are not end - start, which counts: 1 (first:" in notes(folder / "m.csv")


# lhotse (M3): what lhotse 1.33 wrote.

RECORDING = {
    "id": "call",
    "sources": [{"type": "file", "channels": [0], "source": "call.wav"}],
    "sampling_rate": 8000,
    "num_samples": 80000,
    "duration": 10.0,
    "channel_ids": [0],
}
A = {"id": "call-a", "recording_id": "call", "start": 0.0, "duration": 2.0, "channel": 0, "text": "hello",
     "language": "en", "speaker": "A", "gender": "f", "custom": {"age": 30}}  # fmt: skip
B = {"id": "call-b", "recording_id": "call", "start": 2.0, "duration": 8.0, "channel": 0, "speaker": "B"}
CUT = {"id": "call", "start": 0.0, "duration": 10.0, "channel": 0, "supervisions": [A, B], "recording": RECORDING,
       "type": "MonoCut"}  # fmt: skip


def lines(*objects: object) -> str:
    return "".join(f"{json.dumps(one)}\n" for one in objects)


def test_a_conversation_is_an_utterance_for_each_supervision(folder: Path) -> None:
    expected = [("call-a", "A", [0.05, 0.1]), ("call-b", "B", [round(0.05 * s, 2) for s in range(3, 11)])]
    assert read(folder / "cuts.jsonl", lines(CUT), ["age"]) == expected
    assert Manifest.load(folder / "cuts.jsonl", ["age"])[0].attribute("age") == "30"
    assert "one of several supervisions of a cut: 2" in notes(folder / "cuts.jsonl")
    assert "columns not used: 'text', 'language', 'gender', 'custom'" in notes(folder / "cuts.jsonl")
    # cut_into_windows(4): supervisions begin before their cut, or end after it.
    windows = [
        CUT | {"id": "call-0", "start": 0.0, "duration": 4.0},
        CUT | {"id": "call-1", "start": 4.0, "duration": 4.0, "supervisions": [B | {"start": -2.0}]},
        CUT | {"id": "call-2", "start": 8.0, "duration": 2.0, "supervisions": [B | {"start": -6.0}]},
    ]
    assert read(folder / "windows.jsonl.gz", gzip.compress(lines(*windows).encode())) == [
        ("call-a", "A", [0.05, 0.1]),
        ("call-b", "B", [0.15, 0.2]),
        ("call-1", "B", [0.25, 0.3, 0.35, 0.4]),
        ("call-2", "B", [0.45, 0.5]),
    ]


def test_a_supervision_in_two_windows_has_two_names(folder: Path) -> None:
    windows = [CUT | {"id": f"call-{i}", "start": float(i), "duration": 3.0} for i in range(2)]
    assert [name for name, _, _ in read(folder / "cuts.jsonl", lines(*windows))] == [
        *("call-0-call-a", "call-0-call-b", "call-1-call-a", "call-1-call-b")
    ]


def test_supervisions_of_channels(folder: Path) -> None:
    recording = RECORDING | {"sources": [{"type": "file", "channels": [0, 1], "source": "st.wav"}]}
    recording |= {"channel_ids": [0, 1], "duration": 4.0}
    supervisions = [
        {"id": "st-a", "recording_id": "st", "start": 1.0, "duration": 2.0, "channel": 0, "speaker": "A"},
        {"id": "st-b", "recording_id": "st", "start": 2.0, "duration": 1.0, "channel": 1, "speaker": "B"},
        {"id": "st-c", "recording_id": "st", "start": 2.0, "duration": 1.0, "channel": [0, 1], "speaker": "C"},
    ]
    cut = CUT | {"channel": [0, 1], "duration": 4.0, "supervisions": supervisions, "recording": recording}
    assert read(folder / "cuts.jsonl", lines(cut | {"type": "MultiCut"})) == [
        *(("st-a", "A", [0.1, 0.15]), ("st-b", "B", [-0.15]), ("st-c", "C", [0.0]))
    ]


def test_a_supervision_of_another_channel_than_its_cut_is_refused(folder: Path) -> None:
    with pytest.raises(SpkdError, match=r"cuts\.jsonl:1: a supervision of channel 1 in a cut of channel 0"):
        read(folder / "cuts.jsonl", lines(CUT | {"supervisions": [A | {"channel": 1}]}))


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ({"id": "x", "tracks": [{"cut": CUT}], "type": "MixedCut"}, "cuts.save_audios"),
        ({"id": "x", "duration": 2.0, "sampling_rate": 8000, "feat_value": -23.0, "type": "PaddingCut"}, "save_audios"),
        (CUT | {"recording": RECORDING | {"transforms": [{"name": "Speed", "kwargs": {}}]}}, "save_audios"),
        (RECORDING, "lhotse cut simple"),
        (A, "lhotse cut simple"),
        (CUT | {"supervisions": [A | {"start": 11.0}]}, "lies outside of its cut"),
    ],
    ids=["mixed", "padding", "transforms", "recordings", "supervisions", "outside"],
)  # fmt: skip
def test_what_lhotse_would_compute_is_refused_with_its_remedy(folder: Path, line: dict, remedy: str) -> None:
    with pytest.raises(SpkdError, match=remedy):
        read(folder / "cuts.jsonl", lines(line))


# Tables of other tools (M4, M5).


def test_common_voice(folder: Path) -> None:
    for clip in ("cv_1", "cv_2", "cv_3", "cv_4"):
        speak(folder / "clips" / f"{clip}.wav", [0.1 * int(clip[-1])])
    text = (
        "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tage\tgender\n"
        'c1\tcv_1.wav\t1\tone\t\t2\t\t\nc1\tcv_2.wav\t2\t"two, he said\t\t2\ttwenties\tfemale_feminine\n'
        'c2\tcv_3.wav\t3\t"three"\t\t2\t\t\nc2\tcv_4.wav\t4\t"four, she said\t\t2\t\t\n'
    )
    assert read(folder / "validated.tsv", text) == [
        *(("cv_1", "c1", [0.1]), ("cv_2", "c1", [0.2]), ("cv_3", "c2", [0.3]), ("cv_4", "c2", [0.4]))
    ]
    assert [u.attribute("age") for u in Manifest.load(folder / "validated.tsv", ["age"])] == ["", "twenties", "", ""]


def test_quotation_marks_swallow_no_rows(folder: Path) -> None:
    """csv of Python's would take three lines for one row."""
    bars = 'utt|path|text\na|a.wav|"oh\nb|b.wav|no"\n'
    assert [name for name, _, _ in read(folder / "m.csv", bars)] == ["a", "b"]
    with pytest.raises(SpkdError, match=r"m\.csv:\d: not a table"):
        read(folder / "m.csv", 'utt,path,text\na,a.wav,"oh\nb,b.wav,"no"\n')
    assert read(folder / "m.csv", 'utt,path,text\na,a.wav,"oh\nno"\n') == [("a", None, [0.3])]
    assert "rows that go over several lines, as quotation marks enclose line ends: 1" in notes(folder / "m.csv")


@pytest.mark.parametrize("name", ["Na", "Nan", "None", "Null", "NA", "n/a", "nan"])
def test_speakers_with_names_that_look_like_nothing(tmp_path: Path, name: str) -> None:
    speaker = name.replace("/", "")
    speak(tmp_path / "audio" / speaker / "1.wav", [0.1])
    made, _, _ = build(tmp_path / "audio", "folder")
    for suffix in ("csv", "jsonl"):
        made.save(tmp_path / f"m.{suffix}")
        assert Manifest.load(tmp_path / f"m.{suffix}").utterances == made.utterances
    (tmp_path / "k.csv").write_text(f"utt,path,speaker\n{name},audio/{speaker}/1.wav,{name}\nb,b.wav,\n")
    assert [(u.id, u.speaker) for u in Manifest.load(tmp_path / "k.csv")] == [(name, name), ("b", None)]
    assert f"utterances of a speaker named {name!r}: 1" in notes(tmp_path / "k.csv")


def test_speechbrains_json(folder: Path) -> None:
    tree = {
        "u1": {"wav": str(folder / "call.wav"), "length": 10.0, "spk_id": "A"},
        "u2": {"wav": str(folder / "call.wav"), "length": 10.0, "start": 8000, "stop": 24000, "spk_id": "B"},
    }
    for indent in (2, None):
        (whole, part) = read(folder / "train.json", json.dumps(tree, indent=indent))
        assert whole[:2] == ("u1", "A")
        assert len(whole[2]) == 10
        assert part == ("u2", "B", [0.1, 0.15])
    with pytest.raises(SpkdError, match="placeholder of SpeechBrain"):
        read(folder / "train.json", json.dumps({"u1": {"wav": "{data_root}/a.wav", "spk_id": "A"}}, indent=2))


@pytest.mark.parametrize(
    ("times", "levels"),
    [
        ({"start": 1.0, "end": 3.0}, [0.1, 0.15]),
        ({"start": 1.0, "end": 3.0, "length": 10.0}, [0.1, 0.15]),
        ({"offset": 1, "duration": 2}, [0.1, 0.15]),
        ({"begin": 1, "end": 3}, [0.1, 0.15]),
        ({"duration": 2.0}, [0.05, 0.1]),
        ({"start": 8000, "stop": 24000, "duration": 10.0}, [0.1, 0.15]),  # SpeechBrain's own
        ({"start": 8000.0, "stop": 24000.0}, [0.1, 0.15]),
    ],
)
def test_a_json_object_of_utterances_is_read_as_it_says(folder: Path, times: dict, levels: list[float]) -> None:
    tree = {"u0": {"wav": "a.wav"}, "u1": {"wav": "call.wav", "spk_id": "A"} | times}
    assert read(folder / "m.json", json.dumps(tree)) == [("u0", None, [0.3]), ("u1", "A", levels)]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({"start": 0.5, "stop": 2.0}, "0.5 to 2 looks like seconds"),
        ({"start": 0, "stop": 2}, "0 to 2 looks like seconds"),
        ({"start": 1}, "'start' without its end"),
        ({"start": 1, "length": 2}, "'length' seems to bound"),
        ({"stop": 24000}, "'stop' seems to bound"),
        ({"start": 8000, "stop": 24000, "end": 3.0}, "'end' in addition to start and stop"),
        ({"start": 8000, "stop": 24000, "offset": 3.0}, "'offset' in addition to start and stop"),
        ({"start_ms": 1000, "end_ms": 3000}, "'start_ms' seems to bound"),
        ({"xmin": 1.0, "xmax": 3.0}, "'xmin' seems to bound"),
    ],
)
def test_a_json_object_with_unclear_times_is_refused(folder: Path, times: dict, message: str) -> None:
    with pytest.raises(SpkdError, match=message):
        read(folder / "m.json", json.dumps({"u1": {"wav": "call.wav"} | times}))
    if "stop" in times and "start" in times and len(times) == 2:
        text = f"ID,duration,wav,start,stop,spk_id\na,10.0,call.wav,{times['start']},{times['stop']},A\n"
        with pytest.raises(SpkdError, match=message):
            read(folder / "m.csv", text)


# NeMo (M8, M11) and lists (M9).


def test_nemo_without_ids(folder: Path) -> None:
    for speaker, level in (("id1", 0.1), ("id2", 0.2)):
        speak(folder / speaker / "x" / "00001.wav", [level, level])
    rows = [
        {"audio_filepath": f"{s}/x/00001.wav", "offset": 0, "duration": 2.0, "label": s, "text": "-"}
        for s in ("id1", "id2")
    ]
    assert read(folder / "train.json", lines(*rows)) == [
        *(("id1/x/00001.wav", "id1", [0.1, 0.1]), ("id2/x/00001.wav", "id2", [0.2, 0.2]))
    ]
    segments = [{"audio_filepath": "call.wav", "offset": o, "duration": 1.0, "label": "A"} for o in (0, 1.5, 3)]
    assert [name for name, _, _ in read(folder / "seg.json", lines(*segments))] == [
        *("call.wav@0.0", "call.wav@1.5", "call.wav@3.0")
    ]
    infer = {"offset": 0, "duration": None, "label": "infer", "text": "-", "num_speakers": None, "rttm_filepath": None}
    rows = [{"audio_filepath": str(folder / f"{s}.wav")} | infer for s in "ab"]
    assert read(folder / "infer.json", lines(*rows)) == [("a", None, [0.3]), ("b", None, [0.4])]
    assert "placeholder 'infer', unknown: 2" in notes(folder / "infer.json")


@pytest.mark.parametrize("key", ["speaker", "label"])
@pytest.mark.parametrize("name", ["infer", "UNK", "-"])
def test_placeholders_of_nemo_are_no_speakers(folder: Path, key: str, name: str) -> None:
    rows = [{"audio_filepath": "a.wav", key: name}, {"audio_filepath": "b.wav", key: "B"}]
    assert [speaker for _, speaker, _ in read(folder / "m.json", lines(*rows))] == [None, "B"]
    assert f"placeholder {name!r}, unknown: 1" in notes(folder / "m.json")


@pytest.mark.parametrize("name", ["UNK", "<unk>", "-", "-1", "<none>", "[UNKNOWN]", "<NA>"])
@pytest.mark.parametrize("reader", ["table", "kaldi", "wespeaker"])
def test_placeholders_are_no_speakers_in_any_format(folder: Path, reader: str, name: str) -> None:
    """ESPnet and Kaldi have `<unk>` and `-` too; one rule holds for all."""
    path, speakers = folder / "m.csv", {"a": name, "b": "unknown"}
    if reader == "kaldi":
        path = folder / "data"
        path.mkdir()
        (path / "wav.scp").write_text("".join(f"{s} {folder / s}.wav\n" for s in "ab"))
        (path / "utt2spk").write_text("".join(f"{s} {speaker}\n" for s, speaker in speakers.items()))
    elif reader == "table":
        path.write_text("utt,path,speaker\n" + "".join(f"{s},{s}.wav,{speakers[s]}\n" for s in "ab"))
    else:
        path = folder / "raw.list"
        path.write_text(lines(*({"key": s, "spk": speakers[s], "wav": str(folder / f"{s}.wav")} for s in "ab")))
    manifest = Manifest.load(path)
    assert [u.speaker for u in manifest] == [None, "unknown"]
    text = "\n".join(manifest.notes)
    assert f"utterances whose speaker is the placeholder {name!r}, unknown: 1" in text
    assert "utterances of a speaker named 'unknown': 1" in text


def test_names_that_may_stand_for_an_unknown_speaker_are_noted(folder: Path) -> None:
    odd = ["unlabeled", "Unlabelled", "noise", "no_speaker", "SPEAKER_UNKNOWN", "anon", "n.a.", "undefined", "?"]
    names = [*odd, "<spk1>", "Ana", "No", "speaker1", "-2", "张三"]
    rows = "".join(f"{n},a.wav,{name},0.1\n" for n, name in enumerate(names))
    (folder / "m.csv").write_text(f"utt,path,speaker,duration\n{rows}")
    manifest = Manifest.load(folder / "m.csv")
    assert [u.speaker for u in manifest] == names
    assert list(manifest.notes) == [f"utterances of a speaker named {name!r}: 1" for name in odd]


def test_a_speaker_for_each_utterance_is_noted(folder: Path) -> None:
    """Kaldi's way to write that speakers are unknown: utt2spk gives each utterance its own id."""
    (folder / "data").mkdir()
    (folder / "data" / "wav.scp").write_text("".join(f"{s} {folder / s}.wav\n" for s in "ab"))
    (folder / "data" / "utt2spk").write_text("a a\nb b\n")
    assert "each of 2 utterances is of a speaker of its own id" in notes(folder / "data")
    (folder / "data" / "utt2spk").write_text("a a\nb a\n")
    assert "of its own id" not in notes(folder / "data")


def test_wespeakers_raw_list(folder: Path) -> None:
    for speaker_key in ("spk", "speaker"):
        rows = [{"key": f"{s}/x/00001.wav", speaker_key: s, "wav": str(folder / f"{s}.wav")} for s in "ab"]
        expected = [("a/x/00001.wav", "a", [0.3]), ("b/x/00001.wav", "b", [0.4])]
        assert read(folder / "raw.list", lines(*rows)) == expected
        assert read(folder / "one.jsonl", lines(rows[0])) == expected[:1]
    with pytest.raises(SpkdError, match=r"shards_000000000\.tar: no such file"):
        read(folder / "shard.list", "shards/shards_000000000.tar\nshards/shards_000000001.tar\n")
    with pytest.raises(SpkdError, match="feat"):
        read(folder / "feat.list", '{"key": "a", "feat": "feats.ark:12", "spk": "s"}\n')


def test_clovaais_training_list(folder: Path) -> None:
    for s in ("id1", "id2"):
        speak(folder / s / "x" / "00001.wav", [0.1 * int(s[-1])])
    text = "id1 id1/x/00001.wav\nid2 id2/x/00001.wav\n"
    assert read(folder / "train_list.txt", text) == [
        *(("id1/x/00001.wav", "id1", [0.1]), ("id2/x/00001.wav", "id2", [0.2]))
    ]
    # A path with a space is a path where there is such a file.
    speak(folder / "ann lee.wav", [0.2])
    assert read(folder / "paths.txt", "ann lee.wav\na.wav\n") == [("ann lee.wav", None, [0.2]), ("a.wav", None, [0.3])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("utt0 id1/x/1.wav\nutt1 id1/x/2.wav\n", [("utt0", None), ("utt1", None)]),  # wav.scp
        ("id1-x-1\tid1/x/1.wav\nid1-x-2\tid1/x/2.wav\n", [("id1-x-1", None), ("id1-x-2", None)]),
        ("id1-enroll enroll/id1-enroll.wav\n", [("id1-enroll", None)]),  # CN-Celeb's enroll.lst
        (
            "12013 audio/unaiw.wav\n12014 audio/abcde.wav\n",
            [("12013", None), ("12014", None)],
        ),  # SITW's enroll-core.lst
        ("ann ann/1.wav\nbob bob/1.wav\n", [("ann/1.wav", "ann"), ("bob/1.wav", "bob")]),
        ("ann 1.wav\nann 2.wav\nbob 3.wav\n", [("1.wav", "ann"), ("2.wav", "ann"), ("3.wav", "bob")]),
    ],
)
def test_lists_of_an_id_or_a_speaker_and_a_path(folder: Path, text: str, expected: list) -> None:
    (folder / "list.lst").write_text(text)
    manifest = Manifest.load(folder / "list.lst")
    assert [(u.id, u.speaker) for u in manifest] == expected
    taken = "lines taken as `id path` of unknown speakers, as each name is there once and is no folder of its path: "
    assert list(manifest.notes) == [f"{taken}{len(manifest)}"] * (expected[0][1] is None)


@pytest.mark.parametrize("text", ["1 id1/x/1.wav\n3 id1/x/2.wav\n2 id2/x/1.wav\n", "0 a.wav\n1 b.wav\n"])
def test_parts_of_a_corpus_before_the_paths_are_refused(folder: Path, text: str) -> None:
    """VoxCeleb1's iden_split.txt, and labels."""
    with pytest.raises(SpkdError, match=r"the words before the paths are [0-3, ]+: parts of a corpus"):
        read(folder / "iden_split.txt", text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.wav id1\nb.wav id2\n", "list.txt:1: 'a.wav id1' has words after its path"),
        ("a.wav 0\nb.wav 1\n", "list.txt:1: 'a.wav 0' has words after its path"),
        ("a.wav,id1\n", "has words after its path"),
        ("a.wav\nb.wav id2\n", "list.txt:2: 'b.wav id2' has words after its path"),
        ("id1 a.wav\nb.wav id2\n", "list.txt:2: 'b.wav id2' is not `speaker path`"),
        ("1 a.wav b.wav\n", "has two paths, as a trial"),
        ("speaker path\nid1 a.wav\n", "list.txt:1: 'speaker path' looks like a header"),
        ("path\na.wav\n", "list.txt:1: 'path' looks like a header"),
    ],
)
def test_lists_that_are_no_lists_of_paths(folder: Path, text: str, message: str) -> None:
    with pytest.raises(SpkdError, match=message):
        read(folder / "list.txt", text)


def kaldi(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def test_kaldi_and_espnet_folders(folder: Path) -> None:
    data = kaldi(folder, wav_scp=f"r1 {folder}/call.wav\nr2 {folder}/st.wav\nr3 a.wav\n")
    (data / "spk2utt").write_text("A u1 u2\nB u3 u9\n")
    (data / "segments").write_text("u1 r1 0.00 2.00\nu2 r1 3.00 4.00\nu3 r2 1.00 2.00 1\n")
    (data / "utt2num_samples").write_text("u1 16000\n")
    assert read(data) == [("u1", "A", [0.05, 0.1]), ("u2", "A", [0.2]), ("u3", "B", [-0.1])]
    assert "utterances with a speaker but without audio: 1 (first: 'u9')" in notes(data)
    assert "recordings of wav.scp without a segment: 1 (first: 'r3')" in notes(data)
    (data / "utt2spk").write_text("u1 A\nu2 A\n")
    assert [speaker for _, speaker, _ in read(data)] == ["A", "A", None]
    assert "utterances without a speaker: 1 (first: 'u3')" in notes(data)


# What no reader takes.


def test_json_that_is_not_a_line_an_object(folder: Path) -> None:
    with pytest.raises(SpkdError, match="one object a line"):
        read(folder / "m.json", '[{"audio_filepath": "a.wav"}]')
    with pytest.raises(SpkdError, match="one object a line"):
        read(folder / "m.jsonl", '[\n{"audio_filepath": "a.wav"}\n]')


def test_an_unknown_format_lists_what_is_known(folder: Path) -> None:
    (folder / "m.xml").write_text("<recordings/>\n")
    with pytest.raises(UsageError, match="unknown manifest format") as caught:
        Manifest.load(folder / "m.xml")
    assert [name for name, reader in MANIFEST_READERS.items() if reader.describes not in str(caught.value)] == []


def test_hard_links_are_files_and_symbolic_links_are_listed(tmp_path: Path) -> None:
    speak(tmp_path / "v" / "id1" / "1.wav", [0.1])
    (tmp_path / "v" / "id2").mkdir()
    (tmp_path / "v" / "id2" / "1.wav").hardlink_to(tmp_path / "v" / "id1" / "1.wav")
    (tmp_path / "v" / "id3").symlink_to(tmp_path / "v" / "id1")
    (tmp_path / "v" / "id2" / "2.wav").symlink_to(tmp_path / "v" / "id1" / "1.wav")
    made, _, left_out = build(tmp_path / "v", "folder")
    assert [u.id for u in made] == ["id1/1.wav", "id2/1.wav"]
    assert left_out == dict.fromkeys(("id2/2.wav", "id3"), "a link to what is listed under another name")


@pytest.mark.parametrize(
    ("name", "lines", "reason"),
    [
        (
            "cuts.jsonl",
            [
                '{"id": "c", "start": 0, "duration": 1, "channel": 0, "type": "MonoCut", "recording": {"sources": '
                '[{"type": "file", "channels": [0], "source": "a.wav"}], "sampling_rate": 8000, "duration": 1}}'
            ],
            "cuts.jsonl:2: the cut 'c' is there twice",
        ),
        ("t.csv", ["ID,duration,wav,start,stop,spk_id", "c,1.0,a.wav,0,8000,s"], "t.csv:3: duplicate utterance id 'c'"),
    ],
)
def test_a_row_that_is_there_twice_ends_the_reading(tmp_path: Path, name: str, lines: list[str], reason: str) -> None:
    """What follows is not read: a short gzipped file could repeat a row without end."""
    (tmp_path / name).write_text("\n".join([*lines, lines[-1], "not read"]) + "\n")
    with pytest.raises(SpkdError, match=reason):
        Manifest.load(tmp_path / name)
