"""Speaker models in ONNX, run by onnxruntime."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from spkd.corpus.audio import SAMPLE_RATE
from spkd.errors import SpkdError, UsageError, first_line
from spkd.files.reading import parse_json
from spkd.networks import padding
from spkd.outputs.features import FBANKS, HOP, MELS, PREEMPHASIS, WINDOW, in_float32, slaney_filters, without_padding
from spkd.outputs.target import EMBEDDING, Target
from spkd.outputs.teacher_card import TeacherCard
from spkd.progress import log
from spkd.students.description import DESCRIPTION, Training, training_of
from spkd.teachers.base import Teacher
from spkd.teachers.onnx_file import digest_of, files_of, operation_of
from spkd.teachers.onnx_probe import Feed, Node, Output, Probe, probed, seconds_for
from spkd.teachers.onnx_session import Session
from spkd.teachers.settings import ModelConfig
from spkd.teachers.sherpa import NEMO, sherpa_front_end
from spkd.teachers.toolkit import FrontEnd, kaldi_front_end

FRAMES = "frames"
WAVEFORM = "waveform"
CARD = "spkd_card"  # metadata of a file that spkd exported
PROBABILITIES = ("Softmax", "LogSoftmax")
PAD = 16  # frames: NeMo pads its batches to a multiple
PROBES = (16_000, 16_480, 17_760, 24_000, 31_999)  # lengths (samples) for which the shapes of outputs are examined
LONGEST = 300 * SAMPLE_RATE  # longest view: the memory that a graph needs cannot be read from it
LEVELS = (1.0, 0.1, 1e-5)  # levels of probes of noise: -20, -40 and -120 dB of full scale
ALIKE = 1e-4  # largest difference of outputs, as a share of the largest number, that rounding explains
REPEATED = 1e-6  # largest such difference of two runs on the same view
BOUNDARIES = 4  # most places within a stride at which it is measured on what frames depend
BANDS = (8, 256)  # smallest and largest number of bands
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
INTEGERS = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}
MASKS = FLOATS | INTEGERS | {"tensor(bool)": np.bool_}
TAKEN = (
    "spkd loads graphs of a waveform (B, samples) or (B, 1, samples), or of fbank (B, T, mels) or (B, mels, T), with a "
    "further axis of 1 or without, each with lengths (B,) or a mask (B, T) or without"
)


class ONNX(Teacher):
    """Speaker model in ONNX.

    Targets: embedding, and frames where the graph has such an output.

    The input is the waveform (B, samples) or (B, 1, samples), or fbank (B, T, mels) or (B, mels, T), also with an axis
    of 1 before or after both, of any length or of one, in half, single or double precision; further inputs are lengths
    (B,) or masks (B, T). The features are those that sherpa-onnx computes, where the file has its metadata; else those
    of the toolkit that the metadata `framework` or onnx.input names.
    """

    family = "onnx"
    on_card = ("input", "outputs")

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> ONNX:
        """Load a model: `weights` is the file, `onnx.input` the kind of features, `onnx.outputs` the names of embedding
        and frames in the graph, where they are ambiguous."""
        if config.weights is None:
            raise UsageError(f"onnx: name the model's file ({config.SECTION}.weights=FILE.onnx)")
        asked = Asked(config.settings.input, config.settings.outputs, f"{config.SECTION}.onnx")
        return cls(config.weights, asked, device)

    def __init__(self, weights: str, asked: Asked, device: torch.device) -> None:
        self._path, self.device = Path(weights), device
        files = files_of(self._path)
        self._digest = digest_of(files)
        self._details: dict[str, str] = {}
        # The graph is first examined in a separate process.
        size = sum(file.stat().st_size for file in files)
        self._seconds = seconds_for(size)
        with probed(self._path, size) as probe:
            _check_rate(weights, probe.metadata)
            self.training = _training(self._path, probe.metadata)
            self.training_lost = self.training is None and CARD in probe.metadata
            self._input, self._names, runs = _understood(weights, probe, asked)
            if EMBEDDING not in asked.outputs:
                _check_no_probabilities(self._path, self._names[EMBEDDING], asked)
            _check_repeats(weights, probe, self._input, self._names)
            self._input = _with_masks(weights, probe, self._input, self._names[EMBEDDING])
            _check_embedding(weights, probe, self._input, self._names[EMBEDDING])
            self._batches = self._input.takes_batches and self._runs_batches(probe)
            self.targets = _targets(self._path.name, probe, self._input, self._names, runs)
        if self._input.samples is not None:
            self.min_samples = self._input.samples
            self.max_samples = self._input.samples + self._input.spare
        else:
            self.min_samples = max(self._input.least, *(target.window for target in self.targets.values()))
            self.max_samples = LONGEST
        self._session = Session(self._path, device)

    def __getstate__(self) -> dict[str, Any]:
        """State without the session, which cannot be pickled and is made again from the file."""
        return {name: value for name, value in self.__dict__.items() if name != "_session"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._session = Session(self._path, self.device)

    def card(self) -> TeacherCard:
        return TeacherCard(
            family=self.family,
            weights_sha256=self._digest,
            licence="see the model's own page",
            source=self._path.name,
            preprocessing=self._input.words,
            details={"outputs": self._names, **self._details},
            library=_library(),
        )

    def forward(self, waves: Tensor, names: list[str], lengths: Tensor | None = None) -> dict[str, Tensor]:
        wanted = [name for name in self._names if name in names or not names]
        batches = waves.split(len(waves) if self._batches else 1)
        # Two seconds of audio may take as long as the probe, which runs the graph on two seconds of noise.
        seconds = self._seconds * (1 + batches[0].numel() / (2 * SAMPLE_RATE))
        try:
            results = [
                self._session.run([self._names[name] for name in wanted], self._input.feed(batch), seconds)
                for batch in batches
            ]
        except Exception as error:  # onnxruntime's own kinds
            raise SpkdError(
                f"{self._path}: fails on {waves.shape[1] / SAMPLE_RATE:g} s ({first_line(error)})"
            ) from error
        joined = (np.concatenate(values).astype(np.float32, copy=False) for values in zip(*results, strict=True))
        outputs = {name: torch.from_numpy(values) for name, values in zip(wanted, joined, strict=True)}
        if EMBEDDING in outputs:
            outputs[EMBEDDING] = outputs[EMBEDDING].flatten(1)
        return outputs

    def _runs_batches(self, probe: Probe) -> bool:
        """Whether the graph takes batches, in which no view changes what it gives for another. Some graphs were traced
        with a single view; ranges of dynamic quantisation, and norms over the whole tensor, are of the whole batch."""
        samples = self._input.samples or PROBES[0]
        outputs = probe.run(self._input.probe(samples, 2), [self._names[EMBEDDING]])
        if isinstance(outputs, str) or outputs[self._names[EMBEDDING]].shape[0] != 2:
            return False
        difference = probe.difference(
            self._input.probe(samples, len(LEVELS), levels=LEVELS), list(self._names.values())
        )
        if difference <= ALIKE:
            return True
        log(
            f"note: {self._path.name}: what it gives for a view depends on the other views of its batch, so it takes "
            "one view at a time"
        )
        self._details["batch"] = "one view, since the views of a batch change one another's outputs"
        return False


@dataclass(frozen=True)
class Asked:
    """What the settings say of a graph.

    Attributes:
        kind: kind of features, or "auto".
        outputs: names of embedding and frames in the graph, where they are given.
        section: section of these settings in those of the command, for messages.
    """

    kind: str
    outputs: dict[str, str]
    section: str


@dataclass(frozen=True)
class GraphInput:
    """Inputs of a graph for a waveform.

    Attributes:
        main: input of the waveform or the features.
        others: inputs of lengths and masks.
        front_end: computation of the features; None: the waveform itself.
        bands_first: whether the axis of the bands comes before that of time.
        multiple: number to a multiple of which the frames are padded.
        samples: least length of the waveform, where the graph takes only one length (samples).
        channel: place of a further axis of 1 in features; None: there is none.
        valid: value of a mask at steps that are valid.
    """

    main: Node
    others: tuple[Node, ...]
    front_end: FrontEnd | None
    bands_first: bool = False
    multiple: int = 1
    samples: int | None = None
    channel: int | None = None
    valid: int = 1

    @property
    def spare(self) -> int:
        """Number of further samples that change nothing, where the graph takes only one length."""
        return 0 if self.front_end is None else (self.front_end.frames.hop or 1) - 1

    @property
    def takes_batches(self) -> bool:
        return not isinstance(self.main.shape[0], int)

    @property
    def least(self) -> int:
        """Length of the shortest waveform (samples)."""
        return WINDOW if self.front_end is None else max(WINDOW, self.front_end.frames.window)

    @property
    def words(self) -> str:
        return "waveform as it is" if self.front_end is None else self.front_end.words

    def feed(self, waves: Tensor) -> dict[str, np.ndarray]:
        """Values of all inputs by name, for waveforms (B, samples)."""
        values = waves if self.front_end is None else self.front_end.compute(waves, None)
        count = values.shape[1]
        if self.front_end is not None:
            values = pad(values, (0, 0, 0, -count % self.multiple))
        steps = values.shape[1]
        if self.bands_first:
            values = values.transpose(1, 2)
        if self.channel is not None:
            values = values.unsqueeze(self.channel)
        if self.front_end is None:
            values = values.reshape(self._shape(len(waves), steps))
        feed = {self.main.name: values.cpu().contiguous().numpy().astype(FLOATS[self.main.type], copy=False)}
        for node in self.others:
            shape, value = self._other(node, len(waves), count, steps)
            feed[node.name] = np.full(shape, value, MASKS[node.type])
        return feed

    @property
    def frames(self) -> Target:
        """Rate of the steps that the graph takes."""
        return Target(WAVEFORM, 1, 1, 1) if self.front_end is None else self.front_end.frames

    def probe(
        self,
        samples: int,
        batch: int = 1,
        seeds: tuple[int, int] | None = None,
        mask: tuple[int, int] | None = None,
        levels: tuple[float, ...] | None = None,
    ) -> dict[str, Feed]:
        """Descriptions of all inputs by name, for a probe that fills them with noise.

        Args:
            levels: factors of the noise in each view; None: 1.
            seeds: seeds of the noise in both halves of the view.
            mask: values of the masks in both halves of the view; None: all steps are valid.
        """
        count = samples if self.front_end is None else self.front_end.frames.num_frames(samples)
        steps = count + -count % self.multiple
        shape = self._shape(batch, steps)
        time = 2 if self.bands_first or (self.channel is None and shape[1] == 1) else 1
        time += self.channel == 1
        feeds = {self.main.name: Feed(self.main.type, shape, None, time, seeds, levels)}
        for node in self.others:
            halves = mask if len(node.shape) == 2 else None
            feeds[node.name] = Feed(node.type, *self._other(node, batch, count, steps), halves=halves)
        return feeds

    def _shape(self, batch: int, steps: int) -> list[int]:
        """Shape of the main input."""
        if self.front_end is not None:
            mels = self.front_end.frames.dim
            shape = [batch, mels, steps] if self.bands_first else [batch, steps, mels]
            return shape if self.channel is None else [*shape[: self.channel], 1, *shape[self.channel :]]
        if len(self.main.shape) == 2:
            return [batch, steps]
        return [batch, steps, 1] if self.main.shape[2] == 1 else [batch, 1, steps]

    def _other(self, node: Node, batch: int, count: int, steps: int) -> tuple[list[int], int]:
        """Shape and value of a further input: lengths, or a mask that marks all steps as valid."""
        return ([batch], count) if len(node.shape) == 1 else ([batch, steps], self.valid)


def _understood(source: str, probe: Probe, asked: Asked) -> tuple[GraphInput, dict[str, str], list[dict[str, Output]]]:
    """Input of a graph, names of embedding and frames, and shapes of its outputs at each of PROBES."""
    named = asked.outputs
    for target, name in named.items():
        if target not in (EMBEDDING, FRAMES) or name not in probe.outputs:
            raise UsageError(f"{asked.section}.outputs: {target}: {name}; {source} has {', '.join(probe.outputs)}")
    wanted = sorted(set(named.values())) if EMBEDDING in named else probe.outputs
    problems = []
    # Where the dimensions are ambiguous, the right order of the axes is the one for which the graph runs and gives
    # outputs of one width.
    for given in _inputs(source, probe, asked):
        lengths = PROBES if given.samples is None else (given.samples,)
        runs: list[dict[str, Output]] = []
        for samples in lengths:
            outputs = probe.run(given.probe(samples), wanted)
            if isinstance(outputs, str):
                problems.append(f"{source}: fails on {samples / SAMPLE_RATE:g} s of noise ({outputs})")
                break
            runs.append(outputs)
        else:
            try:
                return given, _outputs(source, runs, asked, probe.metadata), runs
            except UsageError as error:
                problems.append(str(error))
    raise UsageError(problems[0])


def _training(path: Path, described: dict[str, str]) -> Training | None:
    """Training of an exported student, from the folder of the student; None where the file is none, or elsewhere."""
    if CARD not in described or not (path.parent / DESCRIPTION).is_file():
        return None
    card = parse_json(described[CARD].encode(), str(path))
    return training_of(path.parent, card.get("weights_sha256")) if isinstance(card, dict) else None


def _check_rate(source: str, described: dict[str, str]) -> None:
    if (rate := described.get("sample_rate", str(SAMPLE_RATE))) != str(SAMPLE_RATE):
        raise UsageError(f"{source}: trained on audio of {rate[:40]} Hz; this project has {SAMPLE_RATE} Hz")


def _inputs(source: str, probe: Probe, asked: Asked) -> list[GraphInput]:
    """Possible inputs of a graph for a waveform, the likeliest first."""
    shapes = ", ".join(f"{node.name} {node.shape} {node.type}" for node in probe.inputs)[:400]
    mains = [node for node in probe.inputs if node.type in FLOATS and len(node.shape) in (2, 3, 4)]
    if not mains:
        raise UsageError(f"{source}: inputs {shapes}; {TAKEN}")
    main = next((node for node in mains if len(node.shape) > 2), mains[0])
    if isinstance(main.shape[0], int) and main.shape[0] != 1:
        raise UsageError(
            f"{source}: takes exactly {main.shape[0]} views at a time; export it for 1 or any number of them"
        )
    others = tuple(node for node in probe.inputs if node is not main)
    for node in others:
        is_length = len(node.shape) == 1 and node.type in INTEGERS
        is_mask = len(node.shape) == 2 and node.type in MASKS
        if not is_length and not is_mask:
            raise UsageError(f"{source}: inputs {shapes}; what is {node.name}? {TAKEN}")
    if len(main.shape) == 2 or (len(main.shape) == 3 and 1 in main.shape[1:]) or asked.kind == WAVEFORM:
        if len(main.shape) == 4:
            raise UsageError(f"{asked.section}.input={asked.kind}: {source} takes features {main.shape}")
        if asked.kind not in ("auto", WAVEFORM):
            raise UsageError(f"{asked.section}.input={asked.kind}: {source} takes a waveform")
        fixed = next((size for size in main.shape[1:] if isinstance(size, int) and size != 1), None)
        if fixed is not None and fixed < WINDOW:
            raise UsageError(f"{source}: takes {fixed} numbers at a time, which is no waveform; {TAKEN}")
        return [GraphInput(main, others, None, samples=fixed)]
    return _of_bands(source, probe, main, others, asked)


def _of_bands(source: str, probe: Probe, main: Node, others: tuple[Node, ...], asked: Asked) -> list[GraphInput]:
    """Possible inputs of a graph that takes features."""
    described, kind, sherpa = probe.metadata, asked.kind, None
    if kind == "auto" and "spkd_features" in described:  # exported by spkd
        kind = described["spkd_features"]
    if kind == "auto" and (sherpa := sherpa_front_end(source, described)) is None:
        kind = described.get("framework", kind)
    if sherpa is None and kind not in (*FBANKS, NEMO):
        raise UsageError(
            f"{source}: takes fbank {main.shape}, but not whose: set {asked.section}.input (in Python: "
            f"spkd.load(FILE, input=...)) to {', '.join(FBANKS)} or {NEMO}"
        )
    of_nemo = NEMO in (kind, described.get("framework") if sherpa is not None else None)
    (steps, last), channel = _axes(source, main)
    # The bands are the fixed dimension; where none is fixed, both orders of the axes are tried.
    orders = [isinstance(steps, int)] if isinstance(steps, int) != isinstance(last, int) else [of_nemo, not of_nemo]
    length = None  # frames, where the graph takes only one length
    if isinstance(steps, int) and isinstance(last, int):
        mels = _bands_among(source, described, steps, last)
        orders, length = [mels == steps], last if mels == steps else steps
    else:
        fixed = next((size for size in (steps, last) if isinstance(size, int)), None)
        mels = fixed or (_bands(source, described) if sherpa is None else sherpa.frames.dim)
    if not BANDS[0] <= mels <= BANDS[1]:
        raise UsageError(f"{source}: takes exactly {mels} frames, or that many bands; spkd loads graphs of any length")
    if sherpa is not None:
        if sherpa.frames.dim != mels:
            raise UsageError(
                f"{source}: takes {mels} bands; sherpa-onnx gives {sherpa.frames.dim} to a model of such metadata; "
                f"set {asked.section}.input to {', '.join(FBANKS)} or {NEMO}"
            )
        if "not normalised" in sherpa.words and not of_nemo:
            log(
                f"note: {Path(source).name}: its features are not mean-normalised, as sherpa-onnx reads its metadata; "
                f"{asked.section}.input={described['framework']} gives it those of its toolkit"
            )
        front_end, multiple = sherpa, 1
    else:
        front_end = nemo_front_end(mels) if kind == NEMO else _centred(kaldi_front_end(kind, mels))
        multiple = PAD if kind == NEMO and length is None else 1
    samples = None if length is None else front_end.frames.window + (length - 1) * HOP
    return [GraphInput(main, others, front_end, first, multiple, samples, channel) for first in orders]


def _axes(source: str, main: Node) -> tuple[list[int | str | None], int | None]:
    """Sizes of the axes of time and bands, in their order, and the place of a further axis of 1."""
    if len(main.shape) == 3:
        return main.shape[1:], None
    ones = [place for place in (1, 3) if main.shape[place] == 1]
    if len(ones) != 1:
        raise UsageError(f"{source}: takes {main.shape}, of which the second or the last has to be 1; {TAKEN}")
    return [size for place, size in enumerate(main.shape) if place not in (0, ones[0])], ones[0]


def _bands_among(source: str, described: dict[str, str], *sizes: int) -> int:
    """Number of bands of a graph that takes only one length: that of its metadata, else 80.

    Raises:
        UsageError: neither or both of its axes have this size.
    """
    bands = _bands(source, described)
    if sizes.count(bands) != 1:
        raise UsageError(
            f"{source}: takes exactly {sizes[0]} x {sizes[1]} numbers, of which {bands} are not the bands of one axis; "
            "name their number in its metadata (feat_dim)"
        )
    return bands


def _bands(source: str, described: dict[str, str]) -> int:
    """Number of bands in the metadata; 80 where they name none. Raises UsageError where it is not a number."""
    text = described.get("feat_dim", str(MELS))
    if not text.strip().isdecimal() or len(text) > 9:
        raise UsageError(f"{source}: feat_dim={text[:40]!r} in its metadata; expected a number of bands")
    return int(text)


def _centred(front_end: FrontEnd) -> FrontEnd:
    """Front end that subtracts the mean of the features over a view."""

    def compute(waves: Tensor, lengths: Tensor | None) -> Tensor:
        bank = front_end.compute(waves, lengths)
        counts = None if lengths is None else front_end.frames.num_frames(lengths)
        return bank - padding.mean(bank.transpose(1, 2), counts).transpose(1, 2)

    return replace(front_end, compute=compute)


def _outputs(source: str, runs: list[dict[str, Output]], asked: Asked, described: dict[str, str]) -> dict[str, str]:
    """Names in the graph of the embedding and, where there are any, of the frames.

    Args:
        runs: shapes of the outputs for views of several lengths.
    """
    named = asked.outputs
    floats = [name for name, output in runs[0].items() if output.type in ("float16", "float32", "float64")]
    shapes = {name: [run[name].shape for run in runs] for name in floats}
    vectors = [name for name in floats if _is_vector(shapes[name])]
    names_of = dict(named)
    if (EMBEDDING in named and named[EMBEDDING] not in vectors) or not vectors:
        given = "; ".join(f"{name} {' then '.join(map(str, shapes[name][:2]))}" for name in floats)[:300]
        raise UsageError(
            f"{source}: no output there of one vector a view, as wide for every length ({given or 'no numbers'} for "
            f"{PROBES[0] / SAMPLE_RATE:g} and {PROBES[1] / SAMPLE_RATE:g} s)"
        )
    if EMBEDDING not in names_of:
        likely = _likely(vectors, list(runs[0]), shapes, described)
        if len(likely) != 1:
            raise UsageError(
                f"{source}: which of {', '.join(runs[0])} is the embedding? Set "
                f"{asked.section}.outputs={{embedding: NAME}}"
            )
        names_of[EMBEDDING] = likely[0]
    steps = [name for name in floats if len(shapes[name][0]) == 3 and name not in vectors]
    if FRAMES not in names_of and len(steps) == 1:
        names_of[FRAMES] = steps[0]
    return names_of


def _is_vector(shapes: list[list[int]]) -> bool:
    """Whether the outputs for views of several lengths are (1, D), (1, 1, D) or (1, D, 1), with the same D."""
    alike = all(shape == shapes[0] for shape in shapes)
    return alike and (len(shapes[0]) == 2 or (len(shapes[0]) == 3 and 1 in shapes[0][1:]))


def _likely(
    vectors: list[str], names: list[str], shapes: dict[str, list[list[int]]], described: dict[str, str]
) -> list[str]:
    """Names of the outputs that may be the embedding, among those that are vectors."""
    place = {NEMO: 1, "wespeaker": 0, "3d-speaker": 0}.get(described.get("framework", ""))
    size = described.get("output_dim")
    sized = [name for name in vectors if str(int(np.prod(shapes[name][0]))) == size]
    if len(sized) > 1 and place is not None and place < len(names) and names[place] in sized:
        return [names[place]]  # the one that sherpa-onnx takes
    return sized or [name for name in vectors if "emb" in name.lower()] or vectors


def _check_no_probabilities(path: Path, output: str, asked: Asked) -> None:
    """Refuse probabilities of classes as an embedding. Raises UsageError where the output is that of a softmax."""
    if (operation := operation_of(path, output)) in PROBABILITIES:
        raise UsageError(
            f"{path}: its output {output} is that of {operation}: probabilities of classes, no embedding; export the "
            f"layer before the classifier too, or set {asked.section}.outputs={{embedding: {output}}}"
        )


def _check_repeats(source: str, probe: Probe, given: GraphInput, names: dict[str, str]) -> None:
    """Refuse a graph with random operations. Raises UsageError where two runs on the same view differ."""
    for level in (max(LEVELS), min(LEVELS)):
        feeds = given.probe(given.samples or PROBES[0], levels=(level,))
        if not probe.difference(feeds, list(names.values())) <= REPEATED:
            raise UsageError(
                f"{source}: gives something else for the same view in every run (random operations, such as dither or "
                "dropout); export it without them"
            )


def _with_masks(source: str, probe: Probe, given: GraphInput, embedding: str) -> GraphInput:
    """Input with the value that its masks have at valid steps: 1 (transformers), or 0 (`padding_mask` of PyTorch).

    With a mask of ones and then zeros, noise is changed in either half; the half that changes the embedding is valid.
    """
    masks = [node.name for node in given.others if len(node.shape) == 2]
    if not masks:
        return given
    samples = given.samples or PROBES[0]

    def run(seeds: tuple[int, int], mask: tuple[int, int]) -> np.ndarray:
        return np.array(probe.values(given.probe(samples, seeds=seeds, mask=mask), embedding))

    plain = run((0, 0), (1, 0))
    of_ones, of_zeros = (np.abs(run(seeds, (1, 0)) - plain).max() for seeds in ((1, 0), (0, 1)))
    if of_zeros < of_ones / 2 or of_ones == of_zeros == 0:
        return given
    if of_ones < of_zeros / 2:
        return replace(given, valid=0)
    if of_ones > 0 and all(np.array_equal(run((0, 0), mask), plain) for mask in ((1, 1), (0, 0))):
        return given  # the graph does not use it
    raise UsageError(f"{source}: whether {masks[0]} marks steps that are valid or padding cannot be told; {TAKEN}")


def _check_embedding(source: str, probe: Probe, given: GraphInput, embedding: str) -> None:
    """Refuse an embedding that does not depend on the input.

    Raises:
        UsageError: an embedding that is the same for different noise, or not finite.
    """
    if CARD in probe.metadata:  # of a student, whose embedding in 8 bits may be the same for two noises
        return
    samples = given.samples or PROBES[0]
    first, second = (np.array(probe.values(given.probe(samples, seeds=(i, i)), embedding)) for i in (0, 1))
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise UsageError(f"{source}: its output {embedding} is not finite on noise; is it the embedding?")
    if np.allclose(first, second, rtol=1e-6, atol=0):
        raise UsageError(f"{source}: its output {embedding} is the same for different noise; is it the embedding?")


def _targets(
    source: str, probe: Probe, given: GraphInput, names: dict[str, str], runs: list[dict[str, Output]]
) -> dict[str, Target]:
    """Targets of a graph, with widths and rates. Frames without a constant rate are removed from `names`."""
    targets = {EMBEDDING: Target(EMBEDDING, int(np.prod(runs[0][names[EMBEDDING]].shape)))}
    if FRAMES in names:
        shapes = [run[names[FRAMES]].shape for run in runs]
        timed = None
        if given.samples is None and len(shapes[0]) == 3 and len({shape[2] for shape in shapes}) == 1:
            timed = _timing(probe, given, names[FRAMES], shapes[0][2])
        if timed is None or any(timed.num_frames(n) != s[1] for n, s in zip(PROBES, shapes, strict=True)):
            log(f"note: {source}: its frames do not come at a constant rate, so they are no target")
            del names[FRAMES]
        else:
            targets[FRAMES] = timed
    return targets


def _timing(probe: Probe, given: GraphInput, frames: str, dim: int) -> Target | None:
    """Frames of a graph with their hop, window and centre; None where their number is not that of any hop and window.

    A network of kernel k and stride s makes 1 + (steps - k) // s frames. Two lengths at which the number of frames
    grows, one after the other, are s apart, and they determine k.
    """
    taken = given.frames
    assert taken.hop is not None

    @cache
    def count(steps: int) -> int:
        """Number of frames for so many steps of the input; 0 where the graph fails."""
        outputs = probe.run(given.probe(taken.window + (steps - 1) * hop), [frames])
        return 0 if isinstance(outputs, str) else outputs[frames].shape[1]

    def next_growth(after: int, low: int, high: int) -> int:
        """The least number of steps, from low to high, with more frames than `after` steps have."""
        return low + bisect_right(range(low, high), count(after), key=count)

    # The number of frames in one second gives the range of the stride.
    hop = taken.hop
    low, high = (taken.num_frames(samples) for samples in (SAMPLE_RATE, 2 * SAMPLE_RATE))
    grown = count(high) - count(low)
    if grown < 2:
        return None
    least, most = (high - low) // (grown + 1), -(-(high - low) // (grown - 1))
    first = next_growth(low, low + 1, low + most)
    second = next_growth(first, first + max(least, 1), first + most)
    stride = second - first
    kernel = first - stride * (count(first) - 1)
    window, middle = taken.window + (kernel - 1) * hop, (kernel - 1) / 2
    if (stride * hop) % HOP or count(second) != count(first) + 1:
        return None
    # The count does not tell whether what is padded lies before or after the input, as in causal networks.
    earliest, latest = _reach(probe, given, frames, dim, stride)
    bounded = math.isfinite(earliest) and math.isfinite(latest)
    measured = (earliest + latest) / 2 if bounded else min(max(middle, earliest), latest)
    # What lies at the ends of a deep network's input changes its frames too little to be measured.
    error = max((latest - earliest) / 16 if bounded else 0, stride / BOUNDARIES if stride > BOUNDARIES else 0)
    centre = taken.middle + hop * (middle if abs(measured - middle) <= error else measured)
    if window < 0:
        return None
    return Target(FRAMES, dim, stride * hop, window, centre=None if centre == window / 2 else round(centre))


def _reach(probe: Probe, given: GraphInput, frames: str, dim: int, stride: int) -> tuple[float, float]:
    """First and last step of the input on which the first frame depends; infinite where frames depend on all steps.

    Frame k depends on steps k * stride + first to k * stride + last. Noise that changes from step b on changes the
    frames from ceil((b - last) / stride) on, noise that changes before b those up to ceil((b - first) / stride) - 1.
    Over boundaries b at all places within a stride, ceil(x / stride) is (mean of x + (stride - 1) / 2) / stride on
    average.

    Args:
        probe: graph in a separate process.
        given: input of the graph.
        frames: name of the frames in the graph.
        dim: width of the frames.
        stride: steps from one frame to the next.
    """
    taken, places = given.frames, min(stride, BOUNDARIES)
    assert taken.hop is not None
    least = taken.num_frames(SAMPLE_RATE) // 2
    boundaries, firsts, lasts = [], np.empty(places), np.empty(places)
    for place in range(places):
        samples = taken.window + (2 * (least + place * stride // places) - 1) * taken.hop
        noise = [given.probe(samples, seeds=seeds) for seeds in ((0, 0), (0, 1), (1, 0))]
        plain, later, earlier = (np.array(probe.values(feeds, frames)).reshape(-1, dim) for feeds in noise)
        of_later, of_earlier = (np.abs(other - plain).max(1) > 1e-6 * np.abs(plain).max() for other in (later, earlier))
        lasts[place] = np.argmax(of_later) if of_later.any() and not of_later[0] else -np.inf
        firsts[place] = np.flatnonzero(of_earlier)[-1] + 1 if of_earlier.any() and not of_earlier[-1] else np.inf
        main = noise[0][given.main.name]
        boundaries.append(main.shape[main.axis] // 2)
    start = float(np.mean(boundaries)) + (stride - 1) / 2
    return start - stride * float(firsts.mean()), start - stride * float(lasts.mean())


def _library() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def nemo_front_end(mels: int) -> FrontEnd:
    """Front end with NeMo's features."""
    words = f"{mels}-mel fbank of NeMo, normalised per band and view"

    def compute(waves: Tensor, lengths: Tensor | None) -> Tensor:
        return nemo_fbank(waves, mels, lengths)

    return FrontEnd(Target("fbank.nemo", mels, HOP, 0), compute, words)


@in_float32
def nemo_fbank(waves: Tensor, mels: int, lengths: Tensor | None = None) -> Tensor:
    """NeMo's AudioToMelSpectrogramPreprocessor (its defaults for speakers, no dither): pre-emphasis 0.97, centred
    windows of 25 ms (Hann) every 10 ms, 512 points, power, Slaney's filters, log(x + 2^-24), every band to zero mean
    and unit deviation of the sample.

    Args:
        waves: (B, samples).
        lengths: (B,) number of samples of each view, where shorter views are padded; None: all are valid.
    Returns:
        (B, 1 + samples // 160, mels).
    """
    waves = without_padding(torch.cat([waves[:, :1], waves[:, 1:] - PREEMPHASIS * waves[:, :-1]], 1), lengths)
    window = torch.hann_window(WINDOW, periodic=False, device=waves.device)
    spectrum = torch.stft(waves, 512, HOP, WINDOW, window, True, "constant", return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    bands = (slaney_filters(mels, 512, device=waves.device) @ power + 2.0**-24).log()
    variance, mean = padding.var_mean(bands, None if lengths is None else 1 + lengths // HOP, correction=1)
    return ((bands - mean) / (variance.sqrt() + 1e-5)).transpose(1, 2)
