"""Two processes of a launch train as one process that takes their batches one after the other."""

import pytest
import torch
from dense_cases import make_folder, make_swin
from launches import TORCHRUN, curve, launch, weights

from mtl_lora.dense import evaluate
from mtl_lora.dense.config import EvalConfig, TrainConfig
from mtl_lora.dense.train import run

MODES = ("matrix", "addition")
NAMES = ("things", "front", "far", "normal")


@pytest.mark.slow(20)
def test_two_processes_train_as_one_that_accumulates(subtests, made_once, tmp_path, one_thread, no_old_objects):
    """Batch norm and the balance of saliency are of a batch of one process, and the mean of a loss is of the step.

    Only two of twelve images have normals, so that a process, or both, have none of them in most steps.
    """
    data = make_folder(tmp_path / "data", 13, 16)
    for index in range(1, 11):
        (data / "normal" / f"{index}.npy").unlink()
    common = {
        "base_model": str(made_once("tiny_swin", make_swin)),
        "data_path": str(data),
        "missing_labels": True,
        "augmentation": "pascal",
        "image_size": 16,
        "dtype": "fp64",
        "lora_r": 4,
        "lora_dropout": 0.0,
        "batch_size": 2,
        "max_steps": 4,
        "save_step": 2,
        "logging_steps": 1,
        "learning_rate": 3e-3,
        "warmup_ratio": 0.0,
    }
    runs = []
    for mode in MODES:
        settings = common | {"shared_mode": mode, "output_dir": str(tmp_path / "one" / mode)}
        run(TrainConfig(**settings, gradient_accumulation_steps=2))
        runs.append(settings | {"system": "dense", "output_dir": str(tmp_path / mode)})
    done = launch(TORCHRUN, runs, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "batch norm" in done.stderr
    for mode in MODES:
        with subtests.test(mode):
            one, two = tmp_path / "one" / mode, tmp_path / mode
            for key in ("loss", "grad_norm", *(f"loss/{task}" for task in NAMES)):
                assert curve(one, key), key
                assert curve(two, key) == pytest.approx(curve(one, key), rel=1e-6), key
            assert len(curve(one, "loss/normal")) < len(curve(one, "loss")) == 4
            expected, found = weights(one), weights(two)
            counted = {key for key in expected if ".norm.running_" in key or ".num_batches_" in key}
            assert expected.keys() == found.keys() and len(counted) == 3 * len(NAMES)
            for key in expected.keys() - counted:
                torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-8, msg=key)
            # Averages of the first process's batches alone, of which there are half as many.
            batches = "decoders.0.norm.num_batches_tracked"
            assert (found[batches], expected[batches]) == (4, 8)
    flags = {"data_dir": str(data), "output_dir": str(tmp_path / "results"), "dtype": "fp64"}
    results = evaluate.run(EvalConfig(checkpoint=str(tmp_path / "matrix"), **flags))
    assert [results["maps"].tasks[name].n for name in NAMES] == [1] * 4
