"""Time and host memory of loading a model directory onto a mesh, and of exporting it from there or from a checkpoint.

    python benchmarks/loading.py --model DIR --out DIR --devices 8 --mesh 1,4,2
    python benchmarks/loading.py --workdir RUN --out DIR          the export of a run's newest checkpoint

Prints a JSON object. Per phase: seconds; the peak of resident memory (VmHWM, pages of mapped files included) and of
anonymous memory (RssAnon, sampled every 10 ms); the bytes of the arrays on this process's devices at the end, which on
CPU devices live in the same memory; and `overhead_bytes`, the host memory that is not device arrays: the larger of
VmHWM less the device arrays, and the peak over time of resident memory less the arrays alive until then. It counts the
interpreter and its libraries, `baseline_bytes`.

The limit is 1.5 times the largest shard file and one layer.
"""

import argparse
import json
import math
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np

from fpo_jax import hf, sharding
from fpo_jax.models import params
from fpo_jax.trainer import export

AXES = ("data", "fsdp", "tensor")


class Memory:
    """Watches the memory of this process while a block runs; `report()` afterwards."""

    def __enter__(self) -> "Memory":
        """Forget the old peak and start sampling."""
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at what is resident now
        self._anonymous = self._overhead = self._arrays = 0
        self._baseline, self._start = _status("VmRSS"), time.perf_counter()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        """Stop sampling."""
        self._seconds = time.perf_counter() - self._start
        self._done.set()
        self._thread.join()

    def report(self) -> dict[str, float]:
        """Return seconds and bytes of the block."""
        peak, arrays = _status("VmHWM"), _array_bytes()
        return {
            "seconds": round(self._seconds, 2),
            "baseline_bytes": self._baseline,
            "peak_resident_bytes": peak,
            "peak_anonymous_bytes": self._anonymous,
            "device_bytes": arrays,
            "overhead_bytes": max(peak - arrays, self._overhead),
        }

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            resident, self._anonymous = _status("VmRSS"), max(self._anonymous, _status("RssAnon"))
            # while an array is handed over from one program to the next, it is missing here: device arrays only grow
            self._arrays = max(self._arrays, _array_bytes())
            self._overhead = max(self._overhead, resident - self._arrays)


def load_and_export(model: Path, out: Path, *, mesh: tuple[int, ...], dtype: str) -> dict:
    """Load a directory onto a mesh of all devices and write it again."""
    config = hf.read_config(model)
    grid = sharding.make_mesh(**dict(zip(AXES, mesh, strict=True)), devices=jax.devices())
    places = params.shardings(config, mesh=grid)
    with Memory() as loading:
        weights = hf.load_params(model, config, dtype=dtype, shardings=places)
    report = {"load": loading.report()}
    with Memory() as exporting:
        hf.export(weights, config, out_dir=out, source_dir=model, dtype=dtype)
    return report | {"export": exporting.report(), "limit_bytes": limit(model, dtype)}


def export_checkpoint(workdir: Path, out: Path) -> dict:
    """Write the newest checkpoint of a run."""
    with Memory() as exporting:
        export.export(workdir, out, step=None, dtype=None)
    return {"export": exporting.report()}


def limit(model: Path, dtype: str) -> int:
    """Return the bytes of 1.5 times the largest shard file and one layer."""
    config = hf.read_config(model)
    layer = (
        sum(entry.size // config.layers for entry in params.entries(config) if entry.stacked) * np.dtype(dtype).itemsize
    )
    return int(1.5 * max(path.stat().st_size for path in model.glob("*.safetensors"))) + layer


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _array_bytes() -> int:
    """Count arrays that lie on several devices; shards and what is on its way to one are arrays of one device."""
    return sum(
        math.prod(array.sharding.shard_shape(array.shape))
        * array.dtype.itemsize
        * len(array.sharding.addressable_devices)
        for array in jax.live_arrays()
        if len(array.sharding.device_set) > 1 and not array.is_deleted()
    )


def main() -> int:
    """Measure what the command line says and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="model directory to load and to write again")
    parser.add_argument("--workdir", type=Path, help="run whose newest checkpoint is written")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--devices", type=int, help="virtual CPU devices")
    parser.add_argument("--mesh", default="1,-1,1", help="data,fsdp,tensor")
    parser.add_argument("--dtype", default="bfloat16", help="of the parameters on the devices and on disk")
    options = parser.parse_args()
    if (options.model is None) == (options.workdir is None):
        parser.error("give --model or --workdir")
    if options.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.devices)
    if options.workdir:
        report = export_checkpoint(options.workdir, options.out)
    else:
        mesh = tuple(int(size) for size in options.mesh.split(","))
        report = load_and_export(options.model, options.out, mesh=mesh, dtype=options.dtype)
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
