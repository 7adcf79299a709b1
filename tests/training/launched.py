"""An evaluation and several trainings one after another in one launch, for starting processes costs more than these.

    torchrun --nproc_per_node 2 tests/training/launched.py JOB.json

``evaluate`` in the file holds arguments of ``mtl-lora evaluate``, or none; ``runs`` lists settings of ``TrainConfig``,
and ``system`` where it is not language; each run's folder also gets ``facts.json``, what its adapter layers were in a
forward. Of a run that is ``broken`` the last process raises an error after some layer calls. An evaluation leaves the
launch's process group, which cannot be joined twice: ``port`` is where the trainings meet after one.
"""

import gc
import json
import os
import sys
from pathlib import Path

from torch.nn.modules.module import register_module_forward_hook
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mtl_lora import base_model, cli, systems
from mtl_lora.adapter.layer import AdapterLayer
from mtl_lora.training.distributed import destroy_process_group, prepare_process
from mtl_lora.training.run import train

JOB = json.loads(Path(sys.argv[1]).read_text())
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
calls, broken, facts = 0, False, {}


def watch(module, inputs, output) -> None:
    """Runs after every module's forward."""
    global calls
    if not isinstance(module, AdapterLayer):
        return
    calls += 1
    weights = [module.weight, *module.adapter_parameters().values()]
    facts["dtypes"] = [str(weight.dtype) for weight in weights]
    facts["partitioned"] = all(hasattr(weight, "ds_id") and not weight.ds_persist for weight in weights)
    if broken and calls == 60 and RANK == WORLD - 1:
        raise RuntimeError("this process breaks")


if JOB["evaluate"]:
    cli.main(["evaluate", *JOB["evaluate"]])
    os.environ |= {"MASTER_PORT": JOB["port"], "TORCHELASTIC_USE_AGENT_STORE": "False"}
register_module_forward_hook(watch)
gc.freeze()  # every training collects garbage, and that of the imports takes longer than a tiny training
for settings in JOB["runs"]:
    base_model._positions.cache_clear()  # or a run under ZeRO-3 would not look for itself
    calls, broken = 0, settings.pop("broken", False)
    system = settings.pop("system", "language")
    config = systems.part(system, "config").TrainConfig(**settings)
    prepare_process(config)
    train(config)
    unset_hf_deepspeed_config()  # transformers keeps a run's, and would make the next one's model by it
    if RANK == 0:
        (Path(settings["output_dir"]) / "facts.json").write_text(json.dumps(facts))
destroy_process_group()
