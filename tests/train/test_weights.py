"""Weights that a recipe would train are counted without loading a model, and what can not be counted says why."""

import io
import json

from mtl_lora.train import weights


def test_recipes_are_counted_and_one_without_a_base_model_says_so(tiny_base, train, monkeypatch, capsys, tmp_path):
    recipes = [
        {"base_model": tiny_base, "lora_r": 3},
        {"base_model": str(tmp_path / "nowhere")},
        {"base_model": tiny_base, "lora_target_modules": ["elbow_proj"]},
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(recipes)))
    weights.main()
    counted, unknown, untargeted = json.loads(capsys.readouterr().out)
    folder = train("run", lora_r=3, max_steps=1)
    said = capsys.readouterr().err
    assert f"training {counted[0]:,} of {counted[1]:,} weights" in said and folder.is_dir()
    assert "nowhere" in unknown and "can not be loaded" in unknown
    assert "elbow_proj" in untargeted
