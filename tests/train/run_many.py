"""Several training runs in one launch: ``run_many.py SETTINGS.json`` trains with each of a list of settings."""

import json
import sys
from pathlib import Path

from mtl_lora.train.run import run
from mtl_lora.train.settings import TrainConfig

if __name__ == "__main__":
    for settings in json.loads(Path(sys.argv[1]).read_text()):
        run(TrainConfig(**settings))
