"""Other Zarr readers open the same arrays, bit for bit. Each in a process of its own: some do not survive a fork."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spkd.cache import Cache
from spkd.outputs.target import Target

from .test_layout import write

READERS = {
    "zarr": "import zarr\nread = lambda root, name: zarr.open_group(root, mode='r')[name][:]",
    "zarrs": (
        "import zarr, zarrs\nzarr.config.set({'codec_pipeline.path': 'zarrs.ZarrsCodecPipeline'})\n"
        "read = lambda root, name: zarr.open_group(root, mode='r')[name][:]"
    ),
    "tensorstore": (
        "import tensorstore as ts\n"
        "spec = lambda path: {'driver': 'zarr3', 'kvstore': {'driver': 'file', 'path': path}}\n"
        "read = lambda root, name: ts.open(spec(f'{root}/{name}'), read=True).result().read().result()"
    ),
}


CODECS = ("float16", "float32", "float16+zstd")


@pytest.mark.parametrize("reader", list(READERS))
def test_every_zarr_reader_sees_what_we_wrote(tmp_path: Path, reader: str) -> None:
    pytest.importorskip(reader)
    lengths = [4000, 9000, 700, 31_000, 5000]
    targets = {codec: [Target("frames", 6, 160, 400, codec), Target("embedding", 5, codec=codec)] for codec in CODECS}
    values = {codec: write(tmp_path / codec, lengths, targets[codec], unit_views=2) for codec in CODECS}
    arrays = [(codec, target.name) for codec in CODECS for target in targets[codec]]
    code = (
        f"import json, sys, numpy as np\n{READERS[reader]}\n"
        "for root, name in json.loads(sys.argv[1]): np.save(f'{root}.{name}.npy', np.asarray(read(root, name)))"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(arrays)], cwd=tmp_path, check=True, timeout=120)
    for codec in CODECS:
        cache = Cache.open(tmp_path / codec)
        for target in targets[codec]:
            array = np.load(tmp_path / f"{codec}.{target.name}.npy")
            every = np.arange(len(cache))
            first, count = cache.plan.places(target, every)
            start = cache.plan.units_of(every) * cache.plan.shard_rows(target) + first
            for at, n, expected in zip(start, count, values[codec][target.name], strict=True):
                assert np.array_equal(array[at : at + n], expected)
            assert np.isnan(array).all(1).sum() == len(array) - count.sum()
