"""The fused kernels against the plain layers in float64: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from mtl_lora import AdapterConfig, route
from mtl_lora.adapter import layer as layers

pytest.importorskip("triton", reason="the fused kernels need Triton")

from mtl_lora import fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TASKS = ["a", "b", "c", "d", "e"]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch):
    """Layers take the kernels on a CPU too, where these are interpreted."""
    monkeypatch.setattr(layers, "_fused_kernels", lambda rows: fused)


def adapted(method: str, k: int, d: int, dtype: torch.dtype, **settings) -> layers.AdapterLayer:
    """A layer with random weights everywhere."""
    torch.manual_seed(0)
    tasks = {"tasks": TASKS} if method == "mtl_lora" else {}
    config = AdapterConfig(method=method, target_modules=["any"], alpha=6, dropout=0.0, **tasks, **settings)
    layer = layers.layer_class(method)(torch.nn.Linear(k, d).to(dtype).requires_grad_(False), config)
    with torch.no_grad():
        for parameter in layer.adapter_parameters().values():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return layer.to(DEVICE)


def outputs(layer: layers.AdapterLayer, x: torch.Tensor, ids, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """The layer's output and all gradients by name."""
    x = x.detach().requires_grad_()
    with route.use(ids):
        y = layer(x)
    y.backward(gradient)
    found = {"output": y.detach(), "input": x.grad}
    for name, parameter in layer.adapter_parameters().items():
        found[name], parameter.grad = parameter.grad, None
    return found


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.norm().clamp(min=1e-6)
        error = ((found[name].double().cpu() - tensor.double().cpu()).norm() / scale).item()
        assert error < tolerance, f"{name}: {error:.2e}"


CASES = [  # method, settings, (B, L, k, d)
    ("lora", {"rank": 8}, (3, 5, 40, 50)),
    ("lora", {"rank": 3}, (2, 37, 65, 33)),
    ("lora", {"rank": 32}, (1, 1, 130, 70)),
    ("mtl_lora", {"rank": 4, "num_B": 3}, (3, 5, 40, 50)),
    ("mtl_lora", {"rank": 8, "num_B": 3}, (4, 19, 300, 130)),
    ("mtl_lora", {"rank": 8, "num_B": 1}, (2, 37, 64, 33)),
    ("mtl_lora", {"rank": 20, "num_B": 5}, (2, 16, 48, 40)),
    ("mtl_lora", {"rank": 8, "num_B": 2, "lambda_shape": "diagonal"}, (3, 18, 40, 50)),
    ("mtl_lora", {"rank": 4, "num_B": 3, "temperature": 0.1}, (17, 1, 40, 50)),
]


# The interpreter takes bf16 numbers for whole ones.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16], ids=str)
@pytest.mark.parametrize(("method", "settings", "shape"), CASES, ids=str)
def test_layer_is_the_plain_layer(method, settings, shape, dtype, monkeypatch):
    B, L, k, d = shape
    layer = adapted(method, k, d, dtype, **settings)
    ids = torch.arange(B) % 3 + 1  # the first and the last task have no rows
    x, gradient = (torch.randn(B, L, size, device=DEVICE).to(dtype) for size in (k, d))
    called = []
    monkeypatch.setattr(fused, "low_rank", lambda *a, run=fused.low_rank: called.append(1) or run(*a))
    found = outputs(layer, x, ids, gradient)
    assert called == [1]
    layer.parameter_dtype = torch.float64
    layer.fusable = False
    expected = outputs(layer.double(), x.double(), ids, gradient.double())
    assert_close(found, expected, TOLERANCE[dtype])
    if method == "mtl_lora":
        for task in (0, 4):
            assert not found["lora_lambda"][task].any() and not found["lora_w"][task].any()


def test_flattened_and_sliced_inputs_give_the_same():
    layer, ids = adapted("mtl_lora", 24, 40, torch.float32, rank=4), torch.tensor([3, 1])
    wide = torch.randn(2, 6, 48, device=DEVICE)
    gradient = torch.randn(2, 6, 40, device=DEVICE)
    expected = outputs(layer, wide[..., ::2].contiguous(), ids, gradient)
    assert_close(outputs(layer, wide[..., ::2], ids, gradient), expected, 1e-6)
    assert_close(outputs(layer, wide[..., ::2].contiguous(), ids, gradient.mT.contiguous().mT), expected, 1e-6)


def test_every_token_may_have_its_own_task():
    layer = adapted("mtl_lora", 24, 40, torch.float32, rank=4)
    x, gradient = torch.randn(2, 6, 24, device=DEVICE), torch.randn(2, 6, 40, device=DEVICE)
    ids = torch.tensor([[0, 1, 2, 3, 4, 0], [3, 3, 1, 0, 2, 4]])
    found = outputs(layer, x, ids, gradient)
    layer.fusable = False
    assert_close(found, outputs(layer, x, ids, gradient), 1e-5)


@pytest.mark.parametrize("p", [0.05, 0.4])
def test_dropout_is_bernoulli_and_the_same_forward_and_backward(p):
    """With A and B the identity the path is dropout itself, so the mask can be read off the output."""
    k = 32
    layer = adapted("lora", k, k, torch.float32, rank=k).train()
    layer.dropout, layer.scale = p, 1.0
    with torch.no_grad():
        layer.base_layer.weight.zero_(), layer.base_layer.bias.zero_()
        layer.lora_A.copy_(torch.eye(k)), layer.lora_B.copy_(torch.eye(k))
    x = torch.randn(150, k, device=DEVICE).abs() + 1
    torch.manual_seed(1)
    gradient = torch.randn(150, k, device=DEVICE)
    found = outputs(layer, x, [0], gradient)
    mask = found["output"] / x
    kept = mask != 0
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)), rtol=1e-5, atol=0)
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs((~kept).float().mean().item() - p) < 4 * deviation
    torch.testing.assert_close(found["input"], gradient * mask, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["lora_A"], (gradient.T @ (x * mask)), rtol=1e-4, atol=1e-4)
    again = outputs(layer, x, [0], gradient)["output"]
    assert (again != found["output"]).any(), "another step draws another mask"
    torch.manual_seed(1)
    torch.randn(150, k, device=DEVICE)
    layer.eval()
    torch.testing.assert_close(outputs(layer, x, [0], gradient)["output"], x)


def test_a_seed_fixes_the_masks_and_every_sum():
    layer = adapted("mtl_lora", 40, 24, torch.float32, rank=4).train()
    layer.dropout = 0.2
    x, gradient = torch.randn(4, 33, 40, device=DEVICE), torch.randn(4, 33, 24, device=DEVICE)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(outputs(layer, x, [1, 1, 1, 2], gradient))
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][name]), name


def test_inputs_without_gradient_and_no_gradients_at_all():
    layer = adapted("mtl_lora", 24, 40, torch.float32, rank=4)
    x = torch.randn(2, 6, 24, device=DEVICE)
    with route.use([0, 2]):
        y = layer(x)
        y.sum().backward()
        assert layer.lora_A.grad.any()
        with torch.no_grad():
            assert torch.equal(layer(x), y)
        with torch.inference_mode():
            assert torch.equal(layer(x), y)


def test_what_the_kernels_do_not_take_goes_the_plain_way():
    rows = torch.randn(16, 8)
    output = torch.randn(16, 4)
    assert fused.applies(rows, output, 8, 24, 2)
    assert not fused.applies(rows.double(), output.double(), 8, 24, 2)
    assert not fused.applies(rows, output.bfloat16(), 8, 24, 2)  # autocast
    assert not fused.applies(rows, torch.randn(16, 8)[:, :4], 8, 24, 2)
    assert not fused.applies(rows, output, 64, 64, 2)
    assert not fused.applies(rows, output, 8, 256, 2)
    assert not fused.applies(rows.expand(1000, 16, 8).reshape(-1, 8), torch.randn(16000, 4), 8, 24, 16000)


def test_a_subclass_that_changes_the_path_is_not_fused(monkeypatch):
    from mtl_lora.adapter.lora import LoraLayer

    class Doubled(LoraLayer):
        def mix(self, z, x):
            return 2 * z

    assert LoraLayer.fusable and not Doubled.fusable


def test_mixing_is_written_as_in_the_paper():
    """low_rank itself against equations 5 to 7, row by row."""
    torch.manual_seed(0)
    (G, L, k, d, r, n, T), scale, tau = (3, 4, 20, 24, 4, 3, 5), 0.7, 0.3
    x, base = torch.randn(G * L, k, device=DEVICE), torch.randn(G * L, d, device=DEVICE)
    A, B = torch.randn(r, k, device=DEVICE), torch.randn(d, n * r, device=DEVICE)
    transforms, logits = torch.randn(T, r, r, device=DEVICE), torch.randn(T, n, device=DEVICE)
    ids = torch.tensor([4, 0, 4], device=DEVICE)
    found = fused.low_rank(x, base.clone(), A, B, scale, 0.0, fused.Mixing(transforms, logits, tau, ids))
    for row in range(G * L):
        task, expected = ids[row // L], base[row].clone()
        weights = F.softmax(logits[task] / tau, dim=0)
        for i in range(n):
            expected += scale * weights[i] * (B[:, i * r : (i + 1) * r] @ (transforms[task] @ (A @ x[row])))
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
