"""ONNX files of OFQ models: onnxruntime gives their logits, from integer weights and products of integers."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from ofq_models import build, codes_of
from torch import Tensor, nn

from hf_ext.ofq_quantizer import OFQConfig, calibrate, export_onnx, quantize, to_int8

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's exporter, of torch

COUNT = 32
SMALL_VIT = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 96}


def calibrated(model: nn.Module, **config: object) -> nn.Module:
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
    return calibrate(quantize(model, OFQConfig(**config)), [x])


def of_transformers() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL_VIT, image_size=32, patch_size=8, num_labels=10, output_hidden_states=True)
    return transformers.ViTForImageClassification(config).bfloat16().eval()


MAKE = {
    "vit": lambda: calibrated(build("vit", depth=1)),
    "swin_qkr": lambda: calibrated(build("swin", depths=(2,), num_heads=(2,)), qk_reparam=True),
    "transformers_bf16": lambda: calibrated(of_transformers(), w_bits=4, a_bits=4),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    """Filled by `exported`: an export takes seconds."""
    return {"folder": tmp_path_factory.mktemp("onnx")}


def exported(files: dict, kind: str) -> tuple[nn.Module, Path]:
    if kind not in files:
        model, path = MAKE[kind](), files["folder"] / "missing" / f"{kind}.onnx"
        model.train()
        before = copy.deepcopy(model.state_dict())
        export_onnx(model, path)
        assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        files[kind] = model.eval(), path
    return files[kind]


def run(path: Path | bytes, x: Tensor) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(path if isinstance(path, bytes) else str(path))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"pixel_values": x.numpy()})), strict=True))


@pytest.mark.parametrize("kind", MAKE)
def test_onnxruntime_gives_the_logits_of_the_model(files, kind):
    """Measured: 0.0. One image in 16 may have an activation on a threshold, where roundings of sums decide."""
    model, path = exported(files, kind)
    x = torch.randn(COUNT, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = copy.deepcopy(model).to(torch.float32)(x)
    expected = {"logits": expected} if isinstance(expected, Tensor) else expected
    found = run(path, x)
    assert found["logits"].std(0).min() > 0.01 * found["logits"].std()
    off = (found["logits"] - expected["logits"]).abs().amax(1) > 1e-4 * expected["logits"].abs().max()
    assert off.sum() <= COUNT // 16
    for few in (1, 3):
        assert torch.equal(run(path, x[:few])["logits"][~off[:few]], found["logits"][:few][~off[:few]])


def test_outputs_of_transformers_keep_their_names(files):
    model, path = exported(files, "transformers_bf16")
    x = torch.randn(2, 3, 32, 32)
    found = run(path, x)
    assert list(found) == ["logits", "hidden_states_0", "hidden_states_1"]
    with torch.no_grad():
        expected = copy.deepcopy(model).to(torch.float32)(x).hidden_states
    torch.testing.assert_close(found["hidden_states_0"], expected[0], rtol=1e-4, atol=1e-4)


def test_weights_are_stored_as_integers_only(files):
    model, path = exported(files, "vit")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    weights = {name: layer.weight for name, layer in model.named_modules() if hasattr(layer, "weight_bits")}
    integers = [torch.from_numpy(value.copy()) for value in stored.values() if value.dtype == "int8"]
    assert sorted(value.numel() for value in integers) == sorted(weight.numel() for weight in weights.values())
    for name in ("blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"):
        odd = (2 * codes_of(weights[name])[0] + 1).to(torch.int8)
        assert any(value.shape == odd.shape and torch.equal(value, odd) for value in integers), name
    floats = {value.size for value in stored.values() if value.dtype != "int8"}
    assert not floats & {weight.numel() for weight in weights.values()}


def test_products_multiply_integers(files):
    """The order in which a runtime sums them then does not matter."""
    _, path = exported(files, "vit")
    graph = onnx.load(path)
    factors = [name for node in graph.graph.node if node.op_type in ("MatMul", "Gemm") for name in node.input[:2]]
    assert len(factors) == 2 * (4 + 2 + 2)  # layers, attention, ends
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(factors))
    values = run(onnx.shape_inference.infer_shapes(graph).SerializeToString(), torch.randn(2, 3, 32, 32))
    assert all(value.abs().max() > 0 and torch.equal(value, value.round()) for value in values.values())


def test_file_tells_nothing_of_the_machine_it_was_made_on(files):
    _, path = exported(files, "vit")
    onnx.checker.check_model(str(path), full_check=True)
    assert not [text for text in (b"site-packages", b".py", str(Path.cwd()).encode()) if text in path.read_bytes()]


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_missing_exporter_names_the_extra(monkeypatch, tmp_path, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}: pip install 'hf-ext\[onnx\]'"):
        export_onnx(MAKE["vit"](), tmp_path / "model.onnx")


def with_nan() -> nn.Module:
    model = MAKE["vit"]()
    model.blocks[0].mlp.fc1.weight.data[5, 0] = float("nan")
    return model


REFUSED = {
    "not_calibrated": (lambda: quantize(build("vit"), OFQConfig()), "calibrate"),
    "not_quantised": (lambda: build("vit"), "not quantised"),
    "made_by_to_int8": (lambda: to_int8(MAKE["vit"]()), "to_int8"),
    "nan": (with_nan, r"blocks\.0\.mlp\.fc1: row 5"),
}


@pytest.mark.parametrize("make, match", REFUSED.values(), ids=REFUSED)
def test_refusals_leave_no_file(tmp_path, make, match):
    with pytest.raises(ValueError, match=match):
        export_onnx(make(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
