"""Measures the memory of a piece of work: tensor bytes, exact to the byte, and the growth of the process."""

import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would print a line on stderr at each use
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def tensor_bytes(work: Callable[[], object]) -> tuple[int, int]:
    """Return (held, peak): bytes of tensors above those that existed before ``work``.

    held: what exists when ``work`` ends, including its result; for a forward pass what the backward pass needs. Every
    allocation counts, also temporary ones: from torch's own counters on a GPU, from its profiler on a CPU.
    """
    collecting = gc.isenabled()
    gc.disable()  # so that only memory of ``work`` itself is freed while it runs
    try:
        return _on_gpu(work) if torch.cuda.is_available() else _on_cpu(work)
    finally:
        if collecting:
            gc.enable()


def _on_gpu(work: Callable[[], object]) -> tuple[int, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = work()
    torch.cuda.synchronize()
    held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    del result
    return held - before, peak - before


def _on_cpu(work: Callable[[], object]) -> tuple[int, int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return held, peak


def process_growth(work: Callable[[], object]) -> int | None:
    """Return the peak bytes of the process during ``work`` above those before.

    Counts resident memory; on a GPU what torch has reserved. None where neither can be read: on a system without /proc,
    or one on which the high-water mark cannot be reset.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved() - before
    try:
        _CLEAR.write_text("5")  # resets the high-water mark to what is resident now
    except OSError:
        return None
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Return a value of the process's status, in bytes."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def megabytes(count: float | None) -> str:
    """Format bytes in units of 10^6 bytes, for a table."""
    return "–" if count is None else f"{count / 1e6:,.1f}"
