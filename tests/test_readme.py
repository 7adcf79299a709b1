"""The Python of the README and of docs/python.md runs as printed, on the embedded base model."""

import importlib.util
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


@pytest.mark.slow(15)
def test_the_python_of_the_page_for_peft_users_runs_as_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    loop, sft, merged = re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "python.md").read_text(), re.S)
    blocks = [loop, sft, merged] if importlib.util.find_spec("trl") else [loop, merged]
    exec(compile("\n".join(blocks), "python.md", "exec"), {})  # noqa: S102 - the project's own text
    assert (tmp_path / "mood_model" / "model.safetensors").is_file() and capsys.readouterr().out
