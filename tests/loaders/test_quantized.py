"""Quantised folders of every variant load to exactly the numbers that were written, and run."""

import json
import warnings
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import quant_writers
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_writers import SHAPE, as_float32, groups_of, make

import llmcoopt
from llmcoopt import _core
from llmcoopt import reference_quant as spec
from llmcoopt.config import parse_config
from llmcoopt.loaders import load
from llmcoopt.loaders.packing import pack, why_not
from llmcoopt.loaders.quant_config import QuantConfig, Scheme
from llmcoopt.loaders.quant_modules import module_weight
from llmcoopt.loaders.safetensors import make_tensor
from llmcoopt.loaders.shapes import matrix_shapes, norm_shapes

VARIANTS = {
    "gptq 4": ("gptq", {}),
    "gptq 2": ("gptq", {"bits": 2}),
    "gptq 3": ("gptq", {"bits": 3}),
    "gptq 8": ("gptq", {"bits": 8}),
    "gptq short last group": ("gptq", {"group": 64}),
    "gptq group larger than a matrix": ("gptq", {"group": 128}),
    "gptq one group": ("gptq", {"group": -1}),
    "gptq odd group": ("gptq", {"group": 24}),
    "gptq asymmetric": ("gptq", {"sym": False}),
    "gptq 3 asymmetric": ("gptq", {"bits": 3, "sym": False}),
    "gptq 2 asymmetric": ("gptq", {"bits": 2, "sym": False}),
    "gptq 8 asymmetric": ("gptq", {"bits": 8, "sym": False}),
    "gptq_v2": ("gptq", {"version": "v2"}),
    "gptq_v2 asymmetric": ("gptq", {"version": "v2", "sym": False}),
    "gptq_v2 3 asymmetric": ("gptq", {"version": "v2", "sym": False, "bits": 3}),
    "gptq act-order": ("gptq", {"order": 1}),
    "gptq act-order asymmetric, 8, short group": ("gptq", {"order": 2, "sym": False, "bits": 8, "group": 40}),
    "gptq bfloat16 scales": ("gptq", {"scale_dtype": "bfloat16"}),
    "gptq float32 scales": ("gptq", {"scale_dtype": "float32", "sym": False}),
    "gptq without g_idx": ("gptq", {"with_g_idx": False}),
    "awq": ("awq", {}),
    "awq symmetric, one group": ("awq", {"sym": True, "group": -1}),
    "compressed 4": ("compressed-tensors", {}),
    "compressed 8": ("compressed-tensors", {"bits": 8}),
    "compressed 3": ("compressed-tensors", {"bits": 3}),
    "compressed 3 asymmetric": ("compressed-tensors", {"bits": 3, "sym": False}),
    "compressed 3 dense": ("compressed-tensors", {"bits": 3, "dense": True}),
    "compressed 3 dense asymmetric": ("compressed-tensors", {"bits": 3, "dense": True, "sym": False}),
    "compressed short last group": ("compressed-tensors", {"group": 64, "sym": False}),
    "compressed 4 asymmetric": ("compressed-tensors", {"sym": False}),
    "compressed 8 asymmetric, channels": ("compressed-tensors", {"bits": 8, "sym": False, "group": -1}),
    "compressed zeros in bytes": ("compressed-tensors", {"sym": False, "byte_zeros": True}),
    "compressed act-order": ("compressed-tensors", {"order": 1}),
}


def arguments(how):
    return {**how, "order": np.random.default_rng(how["order"])} if "order" in how else how


def rounded(x, dtype):
    return checkpoints.cast(x, dtype) if x.dtype == np.float32 and x.ndim == 2 else x


def same(checkpoint, meant, dtype):
    """Every tensor to the bit; quantised ones rounded once from float32."""
    assert checkpoint.tensors.keys() == meant.keys()
    for name, tensor in checkpoint.tensors.items():
        expected = rounded(meant[name], dtype)
        assert tensor.shape == expected.shape and tensor.numpy().tobytes() == expected.tobytes(), name


@pytest.fixture(autouse=True)
def no_warnings():
    """What is as its config says loads in silence."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_loads_exactly(tmp_path, variant):
    layout, how = VARIANTS[variant]
    _, meant = make(tmp_path, layout, **arguments(how))
    checkpoint = load(tmp_path)
    same(checkpoint, meant, "bfloat16")
    weight = checkpoint.quantized["model.layers.1.mlp.down_proj"]
    group = how.get("group", 32)
    assert (weight.out_features, weight.in_features, weight.format) == (64, 96, layout)
    assert weight.bits == how.get("bits", 4) and weight.group_size == (96 if group == -1 else min(group, 96))
    assert (weight.g_idx is not None) == ("order" in how)
    assert (weight.zeros is None) == how.get("sym", layout != "awq")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["gptq", "awq", "compressed-tensors"])
def test_dtypes(tmp_path, layout, dtype):
    """dtype= decodes to that type; "auto" follows torch_dtype, 16 bit at most."""
    _, meant = make(tmp_path, layout, sym=False, dtype="float32")
    same(load(tmp_path, dtype), meant, dtype)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "torch_dtype": dtype}))
    decoded = load(tmp_path).tensors["model.layers.0.mlp.up_proj.weight"]
    expected = "float16" if dtype == "float16" else "bfloat16"
    assert decoded.numpy().tobytes() == rounded(meant[decoded.name], expected).tobytes()


@pytest.mark.parametrize("variant", ["gptq act-order asymmetric, 8, short group", "gptq 3 asymmetric", "awq", "compressed act-order"])
def test_canonical_form(tmp_path, variant):
    """Codes, scales, zeros and g_idx of the canonical form give the weights by the specification's formula, without decoding."""
    layout, how = VARIANTS[variant]
    _, meant = make(tmp_path, layout, **arguments(how))
    for name, weight in load(tmp_path).quantized.items():
        g_idx = weight.g_idx if weight.g_idx is not None else groups_of(weight.in_features, weight.group_size)
        zeros = weight.zero_points(0, weight.out_features).T
        found = spec.dequantize(weight.rows(0, weight.out_features), as_float32(weight.scales), zeros, g_idx)
        np.testing.assert_array_equal(found, meant[f"{name}.weight"])
        np.testing.assert_array_equal(weight.rows(7, 30), weight.rows(0, weight.out_features)[7:30])
        assert not weight.codes.words.flags.owndata and not weight.codes.words.flags.writeable


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_run(tmp_path, variant):
    """The quantised folder, decoded, and a folder of its dequantised weights are the same model, to the bit."""
    layout, how = VARIANTS[variant]
    _, meant = make(tmp_path / "quantised", layout, dtype="float16", **arguments(how))
    checkpoints.make(tmp_path / "plain", **SHAPE, dtype="float16")
    checkpoints.write_safetensors(tmp_path / "plain/model.safetensors", {name: rounded(x, "float16") for name, x in meant.items()})
    ids = checkpoints.prompt(20, SHAPE["vocab_size"])
    with (
        llmcoopt.Model.from_pretrained(tmp_path / "quantised", threads=1, weights="dequantized") as a,
        llmcoopt.Model.from_pretrained(tmp_path / "plain", threads=1) as b,
    ):
        assert a.dtype == b.dtype == "float16"
        np.testing.assert_array_equal(a.forward(ids), b.forward(ids))
        assert len(a.generate([ids], max_new_tokens=4)) == 1


@pytest.mark.parity
def test_against_transformers(tmp_path):
    """transformers with the dequantised weights. The bound is that of float32 sums in another order; observed: 1e-6."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", "5.0")
    _, meant = make(tmp_path, "gptq", sym=False, order=np.random.default_rng(5), version="v2", dtype="float32")
    content = json.loads((tmp_path / "config.json").read_text())
    del content["quantization_config"]
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**content)).eval()
    peer.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in meant.items()}, strict=True)
    ids = checkpoints.prompt(30, SHAPE["vocab_size"])
    with torch.no_grad():
        expected = peer(torch.tensor([ids])).logits[0].numpy()
    with llmcoopt.Model.from_pretrained(tmp_path, dtype="float32", threads=1) as model, llmcoopt.KVCache(model, dtype="float32") as cache:
        assert checkpoints.error(model.forward(ids, cache.sequence()), expected) < 2e-5


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["gptq", "awq", "compressed-tensors"]),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([8, 32, 48, 56, 72]),
    st.sampled_from([32, 64, 96, 192, 200, 704]),
    st.sampled_from([-1, 16, 24, 32, 64, 128]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["v1", "v2"]),
    st.integers(0, 5),
)
def test_every_shape(layout, bits, outputs, inputs, group, sym, shuffled, version, seed):
    """Modules of any shape: inputs that are no multiple of the group, outputs that fill no whole word."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((outputs, inputs)).astype(np.float32)
    how, said = {"group": group, "sym": sym}, {}
    if layout == "gptq":
        how |= {"bits": bits, "order": rng if shuffled else None, "version": version}
        said = {"zeros": version}
    elif layout == "awq" and inputs % (inputs if group == -1 else group):
        return  # it has no short groups
    elif layout == "compressed-tensors":
        how |= {"bits": bits, "order": rng if shuffled else None, "dense": version == "v2"}
    parts, meant = quant_writers.WRITERS[layout](weight, **how)
    kinds = {x: name for name, x in checkpoints.KINDS.items()}
    tensors = {k: make_tensor(k, kinds[x.dtype.type], x.shape, x.reshape(-1).view(np.uint8).copy(), "f") for k, x in parts.items()}
    scheme = Scheme(how.get("bits", 4), group, sym if layout != "awq" else None, None)
    notes = []
    found = module_weight("m", tensors, (outputs, inputs), {}, QuantConfig("c", layout, scheme, **said), notes)
    np.testing.assert_array_equal(found.dequantize("F32").numpy(), meant)
    chance = bits == 2 and layout == "gptq"  # the last zeros of a word may look like damage, which is a warning
    assert all(chance and note.kind == "borrow" for note in notes) and why_not(found) is None
    kept, x = pack(found), rng.standard_normal((3, inputs)).astype(np.float32)
    rows, exact = np.empty((outputs, inputs), np.float32), x.astype(np.float64) @ meant.astype(np.float64).T
    _core.unpack_rows(kept.data, 0, rows)
    np.testing.assert_array_equal(rows, meant)
    bound = 4e-5 * np.abs(x).max() * np.abs(meant).sum(axis=1) + 1e-5  # a step of 16-bit activations is 3e-5 of their largest
    for isa in llmcoopt.isas():
        out = np.empty((3, outputs), np.float32)
        _core.OpContext(isa).linear_quantized(x, [(out, kept.data, "quantized", None)])
        assert (np.abs(out - exact) <= bound).all(), isa


def test_published_gptq_slices(data):
    """Slices of real checkpoints, with the bfloat16 weights that their publisher's tool gives."""
    for name, bits in (("falcon3_1b_int4.bin", 4), ("falcon3_1b_int8.bin", 8)):
        raw = (data / "quant-ref/gptq" / name).read_bytes()
        head = np.frombuffer(raw[:44], "<u4").tolist()
        assert head[0] == bits
        _, group, inputs, outputs, kind, has_g_idx, *sizes = head
        blobs, at = [], 44
        for size in sizes:
            blobs.append(np.frombuffer(raw[at : at + size], np.uint8).copy())
            at += size
        groups = inputs // group
        shapes = [(inputs * bits // 32, outputs), (groups, outputs), (groups, outputs * bits // 32), (inputs,)]
        kinds = ["I32", ("F32", "BF16", "F16")[kind], "I32", "I32"]
        parts = ["qweight", "scales", "qzeros", *(["g_idx"] if has_g_idx else [])]
        tensors = {p: make_tensor(p, k, s, b, name) for p, k, s, b in zip(parts, kinds, shapes, blobs, strict=False)}
        config, notes = QuantConfig(name, "gptq", Scheme(bits, group, True, False), "v1"), []
        weight = module_weight("m", tensors, (outputs, inputs), {}, config, notes)
        assert weight.zeros is None and weight.g_idx is None and not notes
        expected = blobs[4].view(np.uint16).reshape(inputs, outputs).T
        np.testing.assert_array_equal(weight.dequantize("BF16").numpy(), expected)


def test_published_gptq_file(data):
    """A stub whose modules have no real name: read as a module of the shape that its expected header says."""
    from llmcoopt.loaders.quant_modules import split_modules
    from llmcoopt.loaders.safetensors import read_safetensors

    tensors, metadata = read_safetensors(data / "quant-ref/safetensors/gptq.safetensors")
    expected = json.loads((data / "quant-ref/safetensors/gptq.expected.json").read_text())
    assert [[t.name, t.dtype, list(t.shape)] for t in tensors.values()] == [
        [t["name"], t["dtype"], t["shape"]] for t in expected["tensors"]
    ]
    assert metadata["gptq_bits"] == "4"
    plain, modules = split_modules(tensors)
    assert list(plain) == ["model.norm.weight"]
    parts = modules["model.layers.0"]
    weight = module_weight("m", parts, (32, 64), {}, QuantConfig("c", "gptq", Scheme(4, 32, False), "v1"), [])
    numbers = {part: tensor.data.view(np.int32).reshape(tensor.shape) for part, tensor in parts.items() if part != "scales"}
    found = spec.gptq(numbers["qweight"], numbers["qzeros"], parts["scales"].numpy(), numbers["g_idx"], 4, True)
    np.testing.assert_array_equal(weight.dequantize("F32").numpy(), found)


@pytest.mark.parametrize("config", ["quantize_config.json", "quant_config.json", "config.json"])
@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_places_of_the_config(tmp_path, layout, config):
    _, meant = make(tmp_path, layout, config, sym=False)
    same(load(tmp_path), meant, "bfloat16")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", [None, "gptq_model-4bit-32g.safetensors", "anything.safetensors"])
def test_file_names(tmp_path, name, shards):
    _, meant = make(tmp_path, shards=shards, name=name)
    same(load(tmp_path), meant, "bfloat16")


def test_the_base_name_tells_files_apart(tmp_path):
    config = quant_writers.gptq_config(model_file_base_name="gptq_model-4bit-32g")
    _, meant = make(tmp_path, config=config, name="gptq_model-4bit-32g.safetensors")
    checkpoints.write_safetensors(tmp_path / "gptq_model-3bit-32g.safetensors", {"x": np.zeros(3, np.float32)})
    same(load(tmp_path), meant, "bfloat16")


def test_quantised_head_and_bare_names(tmp_path):
    """lm_head.qweight, and names without "model." as a model without its head is saved."""
    _, meant = make(
        tmp_path, per_module={"lm_head": {"bits": 8}}, config=quant_writers.gptq_config(lm_head=True, dynamic={"lm_head": {"bits": 8}})
    )
    checkpoint = load(tmp_path)
    same(checkpoint, meant, "bfloat16")
    assert checkpoint.quantized["lm_head"].bits == 8


def test_dynamic(tmp_path):
    """Other bits and groups for some modules, others left plain; the first matching pattern wins, matched from the start of the name."""
    rules = {
        r"-:.*\.0\.mlp\.down_proj": {},
        r"+:.*\.mlp\.down_proj": {"bits": 8, "group_size": -1},
        r".*\.mlp\.(up|down)_proj": {"bits": 2},
        r"mlp\.gate_proj": {"bits": 3},  # matches no full name from its start
    }
    per_module = {"model.layers.0.mlp.down_proj": None, "model.layers.1.mlp.down_proj": {"bits": 8, "group": -1}}
    per_module |= {f"model.layers.{i}.mlp.up_proj": {"bits": 2} for i in range(2)}
    _, meant = make(tmp_path, per_module=per_module, config=quant_writers.gptq_config(dynamic=rules))
    checkpoint = load(tmp_path)
    same(checkpoint, meant, "bfloat16")
    bits = {name.split(".", 2)[2]: weight.bits for name, weight in checkpoint.quantized.items()}
    assert bits["1.mlp.down_proj"] == 8 and bits["0.mlp.up_proj"] == 2 and bits["0.mlp.gate_proj"] == 4 and "0.mlp.down_proj" not in bits


def test_biases(tmp_path):
    """qwen2 with the biases that its class has; all-zero ones of 2023 are dropped where the config denies them."""
    _, meant = make(tmp_path / "qwen2", family="qwen2")
    same(load(tmp_path / "qwen2"), meant, "bfloat16")

    def zeros(tensors):
        tensors |= {name.replace("qweight", "bias"): np.zeros(x.shape[1], np.float16) for name, x in tensors.items() if "qweight" in name}

    _, meant = make(tmp_path / "llama", edit=zeros)
    same(load(tmp_path / "llama"), meant, "bfloat16")


def test_facts(tmp_path, capsys):
    make(tmp_path, bits=8, sym=False, order=np.random.default_rng(0))
    with llmcoopt.Model.from_pretrained(tmp_path, threads=1) as model:
        rows = {row["modules"]: row for row in model.facts()["stored"]}
        assert model.stored_lines()[-1]
    row = rows["model.layers.*.mlp.up_proj"]
    assert row["count"] == 2 and (row["format"], row["bits"], row["group_size"]) == ("gptq", 8, 32)
    assert (row["order"], row["zeros"]) == ("act-order", "asymmetric")
    # 64 inputs and 96 outputs in 8 bits, 2 groups of zeros and float16 scales, g_idx
    assert row["bytes"] == 2 * (64 * 96 + 2 * 96 + 2 * 2 * 96 + 4 * 64)
    # in memory: a header, the order, and for each 32 outputs 2 blocks of codes, float16 scales, bytes of zeros and 32 bytes to a whole line
    assert (row["kept"], row["memory"]) == ("8 bits", 2 * (64 + 4 * 64 + 3 * 2 * 32 * (32 + 2 + 1 + 1)))
    plain = {"format": "BF16", "bits": 16, "group_size": None, "order": None, "zeros": None, "kept": None}
    assert rows["lm_head"] == {"modules": "lm_head", "count": 1, "bytes": 2 * 64 * 64, "memory": 2 * 64 * 64, **plain}


@pytest.mark.parametrize("family", checkpoints.ARCHITECTURES)
def test_shapes_of_the_config(tmp_path, family):
    """shapes.py lists exactly what a model of the family has."""
    checkpoints.make(tmp_path, family)
    config = parse_config(json.loads(Path(tmp_path / "config.json").read_text()))
    weights = checkpoints.read_safetensors(tmp_path / "model.safetensors")
    expected = {name: x.shape for name, x in weights.items() if not name.endswith("bias")}
    assert {f"{name}.weight": shape for name, shape in matrix_shapes(config).items()} | norm_shapes(config) == expected
