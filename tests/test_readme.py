"""The README's Python runs as printed, on the embedded base model."""

import re

import pytest
import torch
from shared import PROJECT


@pytest.mark.slow(10)
def test_the_python_of_the_readme_runs_as_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.S)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)  # noqa: S102 - the project's own text
    assert "trainable params: 1," in capsys.readouterr().out
    layer = names["model"].get_submodule("model.layers.0.self_attn.q_proj")
    assert type(layer) is torch.nn.Linear
    assert names["A"].shape == (8, 576) and names["B"].shape == (576, 8)
    assert (tmp_path / "my_adapter" / "mtl_lora.safetensors").is_file()
