"""Training logs: what a kill or a disk left in one neither stops a resume nor stays."""

import json

from mtl_lora import train_log


def test_what_is_no_line_of_a_step_is_dropped_at_a_resume(tmp_path):
    log = tmp_path / "train_log.jsonl"
    for step in (1, 2, 3):
        train_log.append(log, step, {"loss": 1.0})
    log.write_bytes(b'\xff\n{"step": "2"}\n[]\n' + log.read_bytes() + b'{"step": 1, "lo')
    train_log.drop_after(log, 2)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]
