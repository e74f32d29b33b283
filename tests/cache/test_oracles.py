"""Other Zarr readers open the same arrays, bit for bit. Each in a process of its own: some do not survive a fork."""

from __future__ import annotations

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


@pytest.mark.parametrize("reader", list(READERS))
@pytest.mark.parametrize("codec", ["float16", "float32", "float16+zstd"])
def test_every_zarr_reader_sees_what_we_wrote(tmp_path: Path, reader: str, codec: str) -> None:
    pytest.importorskip(reader)
    root, targets = tmp_path / "c", [Target("frames", 6, 160, 400, codec), Target("embedding", 5, codec=codec)]
    values = write(root, [4000, 9000, 700, 31_000, 5000], targets, unit_views=2)
    cache = Cache.open(root)
    for target in targets:
        out = tmp_path / f"{target.name}.npy"
        code = f"import sys, numpy as np\n{READERS[reader]}\nnp.save(sys.argv[3], np.asarray(read(*sys.argv[1:3])))"
        subprocess.run([sys.executable, "-c", code, str(root), target.name, str(out)], check=True, timeout=120)
        array = np.load(out)
        first, count = cache.plan.places(target)
        start = cache.plan.unit_of * cache.plan.shard_rows(target) + first
        for at, n, expected in zip(start, count, values[target.name], strict=True):
            assert np.array_equal(array[at : at + n], expected)
        assert np.isnan(array).all(1).sum() == len(array) - count.sum()
