"""Random 200-frame windows of fp16 x 512: the cache's reader against a plain memory map and every other reader.

All readers take the same windows of the same bytes, interleaved in one run; every result is compared bit by bit with
the source. Ratios are medians over the rounds of (reader / memory map in the same round). Readers whose package is not
installed are skipped by name.

    python benchmarks/cache_read.py

Prints a table and, as its last line, one JSON object; keeps it in benchmarks/results/cache_read.json.
"""

from __future__ import annotations

import gc
import io
import os
import shutil
import statistics
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import record
import torch
from synthetic import make_card, whole_views
from torch.utils.data import DataLoader, Dataset

from spkd.cache import Cache, Crop, Plan, UnitWriter, claim_units, finalize, initialise
from spkd.cache.codec import make_codec
from spkd.corpus.manifest import Manifest, Utterance
from spkd.outputs.target import Target

HERE = Path(__file__).parent
DIM, WINDOW, BATCH = 512, 200, 32
HOP = 160
TARGET = Target("frames", DIM, HOP, 0)
Reader = Callable[[np.ndarray, np.ndarray, np.ndarray], None]  # (views, first frame in the view, out (B, 200, 512))


def build(work: Path, utterances: int) -> tuple[Path, np.ndarray, np.ndarray]:
    """A cache and one flat .npy with the same frames. Returns the cache, lengths and starts (in frames)."""
    random = np.random.RandomState(0)
    frames = random.randint(WINDOW, 3 * WINDOW, utterances)
    starts = np.concatenate([[0], np.cumsum(frames)])[:-1]
    root, flat = work / "cache", work / "flat.npy"
    if (root / "COMPLETE.json").is_file() and flat.is_file():
        return root, frames, starts
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    samples = ((frames - 1) * HOP).astype(np.int32)
    manifest = Manifest(tuple(Utterance(f"u{i}", "", None, s / 16_000) for i, s in enumerate(samples)))
    plan = Plan.make(manifest, whole_views(samples), 1024, 1280.0)
    card = make_card([TARGET], manifest, plan)
    initialise(root, card, [plan])
    fitted = {TARGET.name: make_codec(TARGET.codec, DIM)}
    out = np.lib.format.open_memmap(flat, "w+", np.float16, (int(frames.sum()), DIM))
    for unit in claim_units(root, plan.units):
        writer = UnitWriter(root, card, plan, unit, fitted)
        for view in plan.unit(unit):
            values = random.standard_normal((frames[view], DIM)).astype(np.float16)
            writer.put("frames", [view], values[None])
            out[starts[view] : starts[view] + frames[view]] = values
        writer.commit()
    finalize(root, card, plan)
    out.flush()
    return root, frames, starts


def memmap_reader(flat: Path, starts: np.ndarray) -> Reader:
    source = np.load(flat, mmap_mode="r").view(np.ndarray)

    def read(views: np.ndarray, first: np.ndarray, out: np.ndarray) -> None:
        for i, at in enumerate((starts[views] + first).tolist()):
            out[i] = source[at : at + WINDOW]

    return read


def cache_reader(root: Path) -> Reader:
    cache = Cache.open(root)

    def read(views: np.ndarray, first: np.ndarray, out: np.ndarray) -> None:
        crop = Crop(first * HOP, (WINDOW - 1) * HOP)
        cache.batch(views, ["frames"], crop, {"frames": torch.from_numpy(out)})

    return read


def per_window(fetch: Callable[[int], np.ndarray], place: np.ndarray) -> Reader:
    def read(views: np.ndarray, first: np.ndarray, out: np.ndarray) -> None:
        for i, at in enumerate((place[views] + first).tolist()):
            out[i] = fetch(at)

    return read


def other_readers(work: Path, root: Path, flat: Path, starts: np.ndarray) -> dict[str, Callable[[], Reader]]:
    """Everything else that can read these bytes, each behind its own import."""
    cache = Cache.open(root)
    every = np.arange(len(cache))
    in_array = cache.plan.units_of(every) * cache.plan.shard_rows(TARGET) + cache.plan.places(TARGET, every)[0]

    def zarr_python() -> Reader:
        import zarr

        array = zarr.open_group(root, mode="r")["frames"]
        return per_window(lambda at: array[at : at + WINDOW], in_array)

    def zarrs() -> Reader:
        import zarr
        import zarrs  # noqa: F401  (registers its pipeline)

        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            array = zarr.open_group(root, mode="r")["frames"]
        return per_window(lambda at: array[at : at + WINDOW], in_array)

    def tensorstore() -> Reader:
        import tensorstore as ts

        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(root / "frames")}}
        array = ts.open(spec, read=True).result()

        def read(views: np.ndarray, skip: np.ndarray, out: np.ndarray) -> None:
            futures = [array[at : at + WINDOW].read() for at in (in_array[views] + skip).tolist()]
            for i, future in enumerate(futures):
                out[i] = future.result()

        return read

    def h5py_contiguous() -> Reader:
        import h5py

        path = work / "flat.h5"
        if not path.is_file():
            with h5py.File(path, "w") as file:
                file["frames"] = np.load(flat, mmap_mode="r")
        data = h5py.File(path, "r")["frames"]
        return per_window(lambda at: data[at : at + WINDOW], starts)

    def safetensors() -> Reader:
        from safetensors import safe_open
        from safetensors.numpy import save_file

        path = work / "flat.safetensors"
        if not path.is_file():
            save_file({"frames": np.load(flat)}, path)
        data = safe_open(path, "np").__enter__().get_slice("frames")
        return per_window(lambda at: data[at : at + WINDOW], starts)

    def webdataset() -> Reader:
        import webdataset as wds

        path = work / "flat.tar"
        lengths = np.diff(np.append(starts, len(np.load(flat, mmap_mode="r"))))
        if not path.is_file():
            source = np.load(flat, mmap_mode="r")
            with tarfile.open(path, "w") as tar:
                for i, (at, n) in enumerate(zip(starts, lengths, strict=True)):
                    body = io.BytesIO()
                    np.save(body, source[at : at + n])
                    info = tarfile.TarInfo(f"{i:08d}.npy")
                    info.size = body.tell()
                    body.seek(0)
                    tar.addfile(info, body)
        # A tar is read in its own order: one utterance parsed per window, its window taken from the sequence.
        stream = iter(wds.WebDataset(str(path), shardshuffle=False, empty_check=False).decode().repeat())

        def read(views: np.ndarray, skip: np.ndarray, out: np.ndarray) -> None:
            for i in range(len(views)):
                out[i] = next(stream)["npy"][:WINDOW]

        return read

    def litdata() -> Reader:
        import litdata as ld
        from litdata.streaming.writer import BinaryWriter

        folder = work / "lit"
        if not (folder / "index.json").is_file():
            source = np.load(flat, mmap_mode="r")
            lengths = np.diff(np.append(starts, len(source)))
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            writer = BinaryWriter(str(folder), chunk_bytes="64MB")
            for i, (at, n) in enumerate(zip(starts, lengths, strict=True)):
                writer[i] = np.asarray(source[at : at + n])
            writer.done()
            writer.merge()
        data = ld.StreamingDataset(str(folder))

        def read(views: np.ndarray, skip: np.ndarray, out: np.ndarray) -> None:
            for i, (view, at) in enumerate(zip(views.tolist(), skip.tolist(), strict=True)):
                out[i] = data[view][at : at + WINDOW]

        return read

    return {
        "safetensors": safetensors,
        "h5py contiguous": h5py_contiguous,
        "tensorstore batched": tensorstore,
        "zarrs": zarrs,
        "webdataset stream": webdataset,
        "litdata getitem": litdata,
        "zarr-python": zarr_python,
    }


def windows(frames: np.ndarray, count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of random (view, first frame)."""
    random = np.random.RandomState(seed)
    views = random.randint(len(frames), size=(count, BATCH))
    return [(v, (random.random_sample(BATCH) * (frames[v] - WINDOW + 1)).astype(np.int64)) for v in views]


def rate(reader: Reader, batches: list[tuple[np.ndarray, np.ndarray]], out: np.ndarray) -> float:
    start = time.perf_counter()
    for views, first in batches:
        reader(views, first, out)
    return len(batches) * BATCH / (time.perf_counter() - start)


class Batches(Dataset):
    """What a trainer's loader does: item i is a whole batch. `kind` is opened in the worker."""

    def __init__(self, kind: str, root: Path, flat: Path, starts: np.ndarray, frames: np.ndarray, count: int) -> None:
        self._kind, self._root, self._flat, self._starts = kind, root, flat, starts
        self._windows = windows(frames, count, 7)
        self._reader: Reader | None = None
        self._cache: Cache | None = None

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, i: int) -> torch.Tensor:
        views, first = self._windows[i]
        if self._kind == "spkd":
            self._cache = self._cache or Cache.open(self._root)
            return self._cache.batch(views, ["frames"], Crop(first * HOP, (WINDOW - 1) * HOP))["frames"]
        self._reader = self._reader or memmap_reader(self._flat, self._starts)
        out = torch.empty(BATCH, WINDOW, DIM, dtype=torch.float16)
        self._reader(views, first, out.numpy())
        return out


def loader_rate(kind: str, *arguments: object) -> float:
    loader = DataLoader(Batches(kind, *arguments), batch_size=None, num_workers=2)  # type: ignore[arg-type]
    start, count = 0.0, -1
    for _ in loader:  # the first batch carries the workers' start
        start, count = start or time.perf_counter(), count + 1
    return count * BATCH / (time.perf_counter() - start)


def evict(folder: Path) -> None:
    """Drop the files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def fill_page_cache(folder: Path) -> None:
    """Read every file from end to end. How the cache was filled decides how well its pages are translated, so all
    files are filled alike."""
    evict(folder)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass


def main() -> None:
    options = record.options(__doc__, "cache_read")
    options.add_argument("--utterances", type=int, default=4000, help="about 400 frames each; 4000 make 1.6 GB")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--windows", type=int, default=2000, help="batches that warm the maps; fewer are timed")
    given = record.parse(options, utterances=40, rounds=1, windows=8)
    root, frames, starts = build(given.work, given.utterances)
    flat = given.work / "flat.npy"
    # As a trainer's batch is: torch aligns to 64 bytes. numpy's 16 make copies from aligned rows a third slower (the
    # processor takes addresses that agree in their low 12 bits for the same).
    out = torch.empty(BATCH, WINDOW, DIM, dtype=torch.float16).numpy()
    truth = np.empty_like(out)

    fill_page_cache(given.work)
    readers = {"memory map": memmap_reader(flat, starts), "spkd": cache_reader(root)}
    for name, make in other_readers(given.work, root, flat, starts).items():
        try:
            readers[name] = make()
        except ImportError as error:
            print(f"skipped: {name} ({error.name} is not installed)")
    batches = windows(frames, min(40, given.windows), 1)
    for name, reader in readers.items():
        slow = name not in ("memory map", "spkd", "safetensors", "h5py contiguous")
        for views, first in batches[: 2 if slow else None]:
            reader(views, first, out)
            readers["memory map"](views, first, truth)
            if name != "webdataset stream" and not np.array_equal(out, truth):
                raise SystemExit(f"{name} read something else than the source")

    for name in (
        "memory map",
        "spkd",
        "safetensors",
    ):  # the first touch of a mapped page is a fault: warm means after it
        if name in readers:
            rate(readers[name], windows(frames, given.windows, 2), out)
    warm: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(given.rounds):
        for name, reader in readers.items():
            count = given.windows * 3 // 20 if name in ("memory map", "spkd", "safetensors") else 4
            warm[name].append(rate(reader, windows(frames, count, 100 + turn), out))
    loaders: dict[str, list[float]] = {"memmap": [], "spkd": []}
    for _ in range(min(5, given.rounds)):
        for kind in loaders:
            loaders[kind].append(loader_rate(kind, root, flat, starts, frames, given.windows // 10 + 2))

    # Pages that are mapped cannot be evicted.
    readers.clear()
    del reader
    gc.collect()
    cold: dict[str, list[float]] = {"memory map": [], "spkd": []}
    for turn in range(min(5, given.rounds)):
        for name in cold:
            evict(given.work)
            fresh = memmap_reader(flat, starts) if name == "memory map" else cache_reader(root)
            cold[name].append(rate(fresh, windows(frames, 10, 200 + turn), out))
            del fresh

    def ratio(ours: list[float], theirs: list[float]) -> list[float]:
        return [a / b for a, b in zip(ours, theirs, strict=True)]

    print(f"\n{'reader':22} {'windows/s':>10} {'MB/s':>8} {'ratio to memory map':>20}   (least..most)")
    table = {}
    for name, values in warm.items():
        ratios = ratio(values, warm["memory map"])
        table[name] = round(statistics.median(ratios), 4)
        middle = statistics.median(values)
        megabytes = middle * WINDOW * DIM * 2 / 1e6
        spread = f"({min(ratios):.3f}..{max(ratios):.3f})"
        print(f"{name:22} {middle:10.0f} {megabytes:8.0f} {table[name]:20.3f}   {spread}")
    loader_ratios, cold_ratios = ratio(loaders["spkd"], loaders["memmap"]), ratio(cold["spkd"], cold["memory map"])
    for label, ours, theirs, ratios in (
        ("2 loader workers", loaders["spkd"], loaders["memmap"], loader_ratios),
        ("cold page cache", cold["spkd"], cold["memory map"], cold_ratios),
    ):
        print(
            f"{label}: spkd {statistics.median(ours):.0f} windows/s, memory map {statistics.median(theirs):.0f}; "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        )
    result = {
        "ratio_to_memmap": table["spkd"],
        "loader_ratio_to_memmap": round(statistics.median(loader_ratios), 3),
        "cold_times_memmap": round(statistics.median(cold_ratios), 2),
        "times_zarr_python": round(table["spkd"] / table["zarr-python"], 1) if "zarr-python" in table else None,
        "ratios": table,
        "bytes": int(frames.sum()) * DIM * 2,
    }
    record.keep("cache_read", result, given.tiny)


if __name__ == "__main__":
    main()
