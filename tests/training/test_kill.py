"""A training run that is killed while it saves resumes from the checkpoint before, as if it had never stopped."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from shared import PROJECT

from mtl_lora.artifacts import checkpoints

# The process kills itself at a moment that no other process could hit: the second checkpoint is half written.
KILLED = """
import json, os, signal, sys
from mtl_lora.language.config import TrainConfig
from mtl_lora.training.run import train as run
from mtl_lora.training.trainer import MultiTaskTrainer

save = MultiTaskTrainer._save_optimizer_and_scheduler

def killed_at_the_second(self, output_dir):
    if self.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, output_dir)

MultiTaskTrainer._save_optimizer_and_scheduler = killed_at_the_second
run(TrainConfig(**json.loads(sys.argv[1])))
"""


@pytest.mark.slow(10)
def test_a_run_killed_while_saving_ends_with_the_weights_of_one_that_was_not(train, tmp_path):
    flags = {"max_steps": 8, "save_step": 3, "lora_dropout": 0.1}
    undisturbed = load_file(train("undisturbed", **flags) / "mtl_lora.safetensors")
    settings = json.loads((tmp_path / "undisturbed" / "run.json").read_text())["settings"]
    folder = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, json.dumps(settings | {"output_dir": str(folder)})]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (folder / "mtl_lora.safetensors").exists()
    assert (folder / ".saving" / "checkpoint-6" / "mtl_lora.safetensors").exists()
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-3"]

    found = load_file(train("run", **flags, resume_from_checkpoint="True") / "mtl_lora.safetensors")
    assert found.keys() == undisturbed.keys()
    for name, tensor in undisturbed.items():
        assert torch.equal(tensor, found[name]), name
    steps = [line for line in (folder / "train_log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(steps) == 8
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
