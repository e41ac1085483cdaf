"""What a phone needs, computed: as many bytes as a file that was written has."""

import json

import gguf
import pytest

from mlx_fd.export import gguf_file
from mlx_fd.export.source import open_source
from mlx_fd.models.loading import load
from support import tiny
from support.scripted import script


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_bytes_are_those_of_a_file(tmp_path, kind):
    model = tiny.make_model_dir(tmp_path / "model", hidden=64, layers=2, heads=4, kv_heads=2)
    config = json.loads((model / "config.json").read_text())
    found = script("edge_budget").budget(config, 100)
    source = open_source(str(model))
    gguf_file.write_file(source, load(model).tokenizer, tmp_path / "m.gguf", kind=kind)
    tensors = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    assert found["weights"][kind] == sum(int(tensor.n_bytes) for tensor in tensors)
    assert found["parameters"] == sum(int(tensor.n_elements) for tensor in tensors)


def test_a_cache_is_keys_and_values_of_each_token(capsys, monkeypatch):
    bench = script("edge_budget")
    # 24 layers, 2 heads of 64 for keys and as many for values, two bytes a number.
    assert bench.budget(bench.MODELS["Qwen2.5-0.5B"], 7)["cache"] == 7 * 24 * 2 * 2 * 64 * 2
    monkeypatch.setattr("sys.argv", ["edge_budget.py", "--context", "1024"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(bench.MODELS)
    assert "494 M" in lines[3]
