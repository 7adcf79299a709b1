"""How much memory a piece of work takes: bytes of tensors, exact to the byte, and what the process grows by."""

import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce itself on stderr at each use
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def tensor_bytes(work: Callable[[], object]) -> tuple[int, int]:
    """(held, peak) bytes of tensors above those there were before ``work``.

    held: what is still there when ``work`` ends, its result included, so of a forward pass what the backward pass
    needs. Every allocation counts, temporary ones too: torch's own counters on a GPU, its profiler's on a CPU.
    """
    collecting = gc.isenabled()
    gc.disable()  # what is freed while ``work`` runs shall be its own
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
    """The most bytes that the process has at any time during ``work`` above those before.

    The system's count of resident memory; on a GPU what torch has reserved there. None where neither can be read:
    a system without /proc, or one that does not let the high-water mark be set back.
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
        _CLEAR.write_text("5")  # sets the high-water mark back to what is resident now
    except OSError:
        return None
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """A line of the process's status, in bytes."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def megabytes(count: float | None) -> str:
    """Bytes as 10^6 bytes, for a table."""
    return "–" if count is None else f"{count / 1e6:,.1f}"
