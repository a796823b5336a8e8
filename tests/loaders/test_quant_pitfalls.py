"""Known traps of quantised checkpoints, each as a small input with the right behaviour; and contradictions, which are errors that name the tensor
and both values."""

import json
import re
import warnings

import checkpoints
import numpy as np
import pytest
import quant_writers
from quant_writers import SHAPE, as_float32, gptq, gptq_config, int32, make, pack_stream, v1_words
from test_hf_folder import edit_json, rewrite
from test_quantized import same

import llmcoopt
from llmcoopt.errors import ArgumentError, FormatError, MissingFileError, UnsupportedError
from llmcoopt.loaders import load
from llmcoopt.loaders.quant_config import QuantConfig, Scheme
from llmcoopt.loaders.quant_modules import module_weight
from llmcoopt.loaders.safetensors import make_tensor

UP = "model.layers.0.mlp.up_proj"


def silently(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(path, **options)


def module(parts, shape, zeros="v1", method="gptq", notes=None, **scheme):
    """A module of arrays, loaded as a folder's would be."""
    kinds = {kind: name for name, kind in checkpoints.KINDS.items()}
    tensors = {p: make_tensor(p, kinds[x.dtype.type], x.shape, np.frombuffer(x.tobytes(), np.uint8).copy(), "f") for p, x in parts.items()}
    return module_weight("m", tensors, shape, {}, QuantConfig("c", method, Scheme(**scheme), zeros), [] if notes is None else notes)


def zeros_of(fields_or_words, bits, version, outputs=8, **scheme):
    """Effective zeros of one group, from words."""
    words = np.asarray(fields_or_words, np.uint32).reshape(1, -1)
    parts = {"qweight": np.zeros((32 * bits // 32, outputs), np.int32), "qzeros": int32(words), "scales": np.ones((1, outputs), np.float16)}
    weight = module(parts, (outputs, 32), version, bits=bits, **scheme)
    return weight.zero_points(0, outputs)[:, 0].tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("written, said", [("v2", "gptq"), ("v1", "gptq_v2"), ("v2", None)])
def test_g1_wrong_zero_format(tmp_path, bits, written, said):
    """Zeros of version 2 in a file that says version 1, and the reverse: told by the zeros themselves, one warning for all."""
    config = {**gptq_config(bits=bits), "checkpoint_format": said}
    _, meant = make(tmp_path, bits=bits, version=written, config=config)
    with pytest.warns(UserWarning, match=r"qzeros': zeros are stored as in 'gptq.*and 13 more tensors\)") as caught:
        checkpoint = load(tmp_path)
    assert len(caught) == 1
    same(checkpoint, meant, "bfloat16")
    same(silently(tmp_path, quantization_config={"checkpoint_format": {"v1": "gptq", "v2": "gptq_v2"}[written]}), meant, "bfloat16")


def test_g1_the_override_is_obeyed(tmp_path):
    """A caller who insists gets what was asked for: here zeros that are off by one."""
    tensors, _ = make(tmp_path, version="v2")
    found = silently(tmp_path, quantization_config={"checkpoint_format": "gptq"}, dtype="float32").tensors[f"{UP}.weight"].numpy()
    scales = as_float32(tensors[f"{UP}.scales"])
    right = load(tmp_path, "float32", quantization_config={"checkpoint_format": "gptq_v2"}).tensors[f"{UP}.weight"].numpy()
    np.testing.assert_allclose(right - found, np.repeat(scales, 32, axis=0).T, rtol=0, atol=1e-6)


def test_g2_a_zero_of_0_borrows_from_its_neighbour():
    zeros = [8, 0, 5, 8, 8, 8, 8, 8]
    assert zeros_of(0x88888508, 4, "v2", sym=False) == zeros
    assert zeros_of(0x777773F7, 4, "v1", sym=False) == zeros
    assert v1_words(np.array([zeros]), 4)[0, 0] == 0x777773F7


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_g4_zeros_of_all_groups_0(bits):
    """All-positive groups: 0 - 1 wraps, and comes back as 0, never as 2^bits."""
    zeros = np.zeros((1, 32), np.int64)
    for version, words in (("v1", v1_words(zeros, bits)), ("v2", pack_stream(zeros, bits))):
        assert zeros_of(words, bits, version, outputs=32, sym=False) == [0] * 32


def test_g2_zeros_overwritten_by_a_zero_of_0_are_reported():
    parts, notes = gptq(np.ones((8, 32), np.float32)[:, :32], sym=False)[0], []
    parts["qzeros"] = int32(np.array([[0xFFFFFFF7]], np.uint32))
    module(parts, (8, 32), "v1", notes=notes, bits=4, sym=False)
    assert [note.kind for note in notes] == ["borrow"] and "output 1 and those after it" in notes[0].found
    notes.clear()
    parts["qzeros"] = int32(np.array([[0xF7777777]], np.uint32))  # a 0 in the last place has overwritten nothing
    module(parts, (8, 32), "v1", notes=notes, bits=4, sym=False)
    parts["qzeros"] = int32(np.array([[0xFFFFFFF7]], np.uint32))  # 15 is an ordinary zero in version 2
    module(parts, (8, 32), "v2", notes=notes, bits=4, sym=False)
    assert not notes


def test_g6_swapped_constants_of_3_bits():
    """The damaged words are told from good ones, and mean what they must mean: symmetric."""
    parts, notes = gptq(np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32), bits=3)[0], []
    assert parts["qzeros"].view(np.uint32).tolist() == [[0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]]
    good = module(parts, (32, 32), "v1", notes=notes, bits=3, sym=True).dequantize("F32").numpy()
    assert not notes
    parts["qzeros"] = int32(np.array([[0x00000000, 0xB6DB6DB7, 0x49249249]], np.uint32))
    repaired = module(parts, (32, 32), "v1", notes=notes, bits=3, sym=True).dequantize("F32").numpy()
    np.testing.assert_array_equal(repaired, good)
    assert [note.kind for note in notes] == ["zero-format"]


def test_g7_g9_straddling_values():
    codes = np.tile(np.arange(128) % 8, (32, 1))
    parts = {
        "qweight": int32(pack_stream(codes, 3).T),
        "scales": np.ones((1, 32), np.float16),
        "qzeros": int32(v1_words(np.full((1, 32), 4), 3)),
    }
    weight = module(parts, (32, 128), bits=3, group_size=-1, sym=True)
    np.testing.assert_array_equal(weight.rows(0, 32), codes)
    np.testing.assert_array_equal(weight.dequantize("F32").numpy(), codes - 4)


def test_g10_g11_one_group(tmp_path):
    """group_size -1 is the whole row: the same bits as with the number in its place."""
    make(tmp_path, group=-1)
    a = silently(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config=gptq_config(group=96))
    b = silently(tmp_path)
    assert a.tensors.keys() == b.tensors.keys()
    assert all(tensor.data.tobytes() == b.tensors[name].data.tobytes() for name, tensor in a.tensors.items())
    assert a.quantized[UP].group_size == 64 and a.quantized[UP].groups == 1


@pytest.mark.parametrize("said", [True, False, None])
def test_g13_the_order_is_in_g_idx(tmp_path, said):
    """Whatever desc_act says: an unsorted g_idx is used, a sorted one is none."""
    for order in (None, np.random.default_rng(1)):
        folder = tmp_path / ("shuffled" if order else "sorted")
        _, meant = make(folder, order=order, config={**gptq_config(), "desc_act": said})
        checkpoint = silently(folder)
        same(checkpoint, meant, "bfloat16")
        assert (checkpoint.quantized[UP].g_idx is None) == (order is None)


def test_g13_all_zero_g_idx(tmp_path):
    """A slip of some writers: groups in order when desc_act is false, an error when it is true."""

    def edit(tensors):
        tensors |= {name: np.zeros_like(x) for name, x in tensors.items() if name.endswith("g_idx")}

    _, meant = make(tmp_path, edit=edit)
    with pytest.warns(UserWarning, match="g_idx': all 0 with 2 groups: loaded with groups in order"):
        same(load(tmp_path), meant, "bfloat16")
    edit_json(tmp_path / "config.json", quantization_config={**gptq_config(), "desc_act": True})
    with pytest.raises(FormatError, match="g_idx': all 0 with 2 groups; expected the group of every input, as desc_act is true"):
        load(tmp_path)


def test_g13_compressed_tensors_without_order(tmp_path):
    """Its writers fill weight_g_idx with -1 when there is no order."""

    def edit(tensors):
        tensors |= {name: np.full_like(x, -1) for name, x in tensors.items() if name.endswith("g_idx")}

    sorted_numbers = type("InOrder", (), {"permutation": staticmethod(lambda g_idx: g_idx)})()
    _, meant = make(tmp_path, "compressed-tensors", order=sorted_numbers, edit=edit)
    same(silently(tmp_path), meant, "bfloat16")


def test_g13_act_order_without_g_idx(tmp_path):
    make(tmp_path, with_g_idx=False, config={**gptq_config(), "desc_act": True})
    with pytest.warns(UserWarning, match="missing, though .* says desc_act: loaded with groups in order"):
        load(tmp_path)


@pytest.mark.parametrize("bad", [-1, 2, 2**30])
def test_g_idx_out_of_range(tmp_path, bad):
    def edit(tensors):
        tensors[f"{UP}.g_idx"] = tensors[f"{UP}.g_idx"].copy()
        tensors[f"{UP}.g_idx"][5] = bad

    make(tmp_path, edit=edit)
    with pytest.raises(FormatError, match=rf"model\.safetensors: tensor '{UP}\.g_idx': input 5 is in group {bad}; expected 0 to 1"):
        load(tmp_path)


def test_g15_a_bias_that_is_not_there_is_none(tmp_path):
    """qwen2's class has biases; a quantised module without one in the file has none, and says so."""
    name = "model.layers.0.self_attn.q_proj.bias"
    make(tmp_path, family="qwen2", edit=lambda tensors: tensors.pop(name))
    with pytest.warns(UserWarning, match=f"'{name}': missing: no bias is used"):
        checkpoint = load(tmp_path)
    assert name not in checkpoint.tensors
    with pytest.warns(UserWarning), llmcoopt.Model.from_pretrained(tmp_path, threads=1) as model:
        assert np.isfinite(model.forward([1, 2, 3])).all()


def test_g16_bfloat16_scales(tmp_path):
    _, meant = make(tmp_path, scale_dtype="bfloat16", dtype="bfloat16")
    same(silently(tmp_path), meant, "bfloat16")


def test_g17_shards(tmp_path):
    _, meant = make(tmp_path, shards=2, name="gptq_model-4bit-32g.safetensors")
    same(silently(tmp_path), meant, "bfloat16")
    (tmp_path / "gptq_model-4bit-32g-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"00002-of-00002\.safetensors: no such file"):
        load(tmp_path)


def test_g20_a_short_last_group():
    weight = np.random.default_rng(2).standard_normal((32, 704)).astype(np.float32)
    parts, meant = gptq(weight, group=128)
    assert parts["scales"].shape == (6, 32)
    found = module(parts, (32, 704), bits=4, group_size=128, sym=True)
    assert found.groups == 6
    np.testing.assert_array_equal(found.dequantize("F32").numpy(), meant)


def test_g21_overrides_by_module(tmp_path):
    """One layer 8 bit, one left alone, without the config knowing: an error that names both values; with `dynamic`, no word."""
    per_module = {UP: {"bits": 8}, "model.layers.1.mlp.up_proj": None}
    _, meant = make(tmp_path, per_module=per_module)
    with pytest.raises(FormatError, match=rf"'{UP}\.qweight': bits is 8 by its shape; expected 4, as .*config\.json.* says"):
        load(tmp_path)
    rules = {r"model\.layers\.0\.mlp\.up_proj": {"bits": 8}, r"-:model\.layers\.1\.mlp\.up_proj": {}}
    same(silently(tmp_path, quantization_config={"dynamic": rules}), meant, "bfloat16")
    with pytest.warns(UserWarning, match=r"the module is quantised; expected a plain weight, as .* says \(dynamic\)"):
        load(tmp_path, quantization_config={"dynamic": {**rules, r"-:.*gate_proj": {}}})


def test_g22_zeros_of_symmetric_files(tmp_path):
    """They are looked at, and then symmetric is what the canonical form says; one wrong zero is an error."""
    make(tmp_path)
    assert all(weight.zeros is None for weight in silently(tmp_path).quantized.values())
    tensors = checkpoints.read_safetensors(tmp_path / "model.safetensors")
    words = tensors[f"{UP}.qzeros"].view(np.uint32).copy()
    words[1, 3] ^= 0x00000300
    rewrite(tmp_path, lambda arrays: {**arrays, f"{UP}.qzeros": int32(words)})
    with pytest.raises(FormatError, match=rf"'{UP}\.qzeros': group 1, output 26 has the stored zero 4; expected 7 \(gptq\) or 8"):
        load(tmp_path)
    assert load(tmp_path, quantization_config={"sym": False}).quantized[UP].zeros[1, 26] == 5
    rewrite(tmp_path, lambda arrays: {name: x for name, x in arrays.items() if not name.endswith("qzeros")})
    assert silently(tmp_path).quantized[UP].zeros is None
    with pytest.raises(FormatError, match=r"qzeros': missing beside"):
        load(tmp_path, quantization_config={"sym": False})


# ---------------------------------------------------------------- files without a config, and what is guessed


@pytest.mark.parametrize("name", ["llama-13b-4bit-32g.safetensors", "llama13b-4bit-gr32.safetensors", "model.safetensors"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_no_config(tmp_path, name, version):
    """The files of 2023: bits and groups from the shapes, with a warning that says what was guessed."""
    _, meant = make(tmp_path, config=None, name=name, with_g_idx=False, version=version)
    with pytest.warns(UserWarning, match=r"read as gptq with 4 bits and groups of 32, by names and shapes.*quantization_config="):
        same(load(tmp_path), meant, "bfloat16")
    form = {"v1": "gptq", "v2": "gptq_v2"}[version]
    same(silently(tmp_path, quantization_config={"bits": 4, "group_size": 32, "checkpoint_format": form}), meant, "bfloat16")


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors"])
def test_no_config_of_other_layouts(tmp_path, layout):
    _, meant = make(tmp_path, layout, config=None, sym=False)
    with pytest.warns(UserWarning, match=f"read as {layout} with 4 bits and groups of 32"):
        same(load(tmp_path), meant, "bfloat16")


@pytest.mark.parametrize(
    "name, found", [("x-3bit-32g", "4 bits by its shape; expected 3"), ("x-4bit-128g", "2 groups .*says groups of 128")]
)
def test_a_name_that_contradicts_the_shapes(tmp_path, name, found):
    make(tmp_path, config=None, name=f"{name}.safetensors", with_g_idx=False)
    with pytest.raises(FormatError, match=rf"model\.layers\.\d\.\S+': {found}"):
        load(tmp_path)


def test_short_groups_without_a_config(tmp_path):
    make(tmp_path, config=None, group=64, with_g_idx=False)
    with pytest.warns(UserWarning, match="2 groups for 96 inputs: groups of 48 assumed|read as gptq"):
        load(tmp_path)


# ---------------------------------------------------------------- contradictions and damage


def changed(part, edit):
    def run(tensors):
        tensors[f"{UP}.{part}"] = np.ascontiguousarray(edit(tensors[f"{UP}.{part}"]))

    return run


DAMAGE = {
    "bits of another width": ({"bits": 8, "config": gptq_config(bits=4)}, None, r"qweight': bits is 8 by its shape; expected 4"),
    "rows": ({}, changed("qweight", lambda x: x[:5]), r"qweight': shape \[5, 96\]; expected 4 rows for 2 bits"),
    "columns": ({}, changed("qweight", lambda x: x[:, :90]), r"qweight': shape \[8, 90\]; expected \[8, 96\]"),
    "scales": ({}, changed("scales", lambda x: x[:, :90]), r"scales': shape \[2, 90\]; expected \[2, 96\]"),
    "groups": ({}, changed("scales", lambda x: x[:1]), r"scales': 1 groups; expected 2 for 64 inputs in groups of 32"),
    "zeros": ({}, changed("qzeros", lambda x: x[:1]), r"qzeros': shape \[1, 12\]; expected \[2, 12\]"),
    "g_idx": ({}, changed("g_idx", lambda x: x[:63]), r"g_idx': shape \[63\]; expected \[64\]"),
    "rank": ({}, changed("scales", lambda x: x[:, :, None]), r"scales': shape \[2, 96, 1\]; expected 2 dimensions"),
    "empty": ({}, changed("scales", lambda x: x[:0]), r"scales': shape \[0, 96\]; expected 2 dimensions that are not 0"),
    "type of scales": ({}, changed("scales", lambda x: x.astype(np.int16)), r"scales': dtype I16; expected F16 or BF16 or F32"),
    "type of words": ({}, changed("qweight", lambda x: x.astype(np.float32)), r"qweight': dtype F32; expected I32"),
    "no scales": ({}, lambda t: t.pop(f"{UP}.scales"), r"scales': missing beside qweight, qzeros, g_idx"),
    "nan": ({}, changed("scales", lambda x: x * np.float16(np.nan)), r"up_proj': \d+ of its weights are NaN"),
    "plain weight too": ({}, lambda t: t.update({f"{UP}.weight": np.zeros((96, 64), np.float32)}), r"up_proj\.weight': 'model.* is there too"),
    "unknown module": ({}, lambda t: t.update({"model.layers.9.x.qweight": np.zeros((8, 8), np.int32)}), r"9\.x\.qweight': it belongs to no"),
    "group size of the config": ({"config": gptq_config(group=64)}, None, r"scales': 2 groups; expected 1 for 64 inputs in groups of 64"),
    "not gptq": ({"config": quant_writers.compressed_config()}, None, r"it belongs to GPTQ or AWQ; expected compressed-tensors"),
    "not awq": ({"config": quant_writers.awq_config()}, None, r"qweight': shape \[8, 64\]; expected \[64, 8\] for 4 bits in AWQ's"),
    "awq zeros": ({"layout": "awq"}, changed("qzeros", lambda x: x[:, :3]), r"qzeros': shape \[2, 3\]; expected \[2, 12\]"),
    "awq groups": ({"layout": "awq"}, changed("scales", lambda x: np.tile(x[:1], (3, 1))), r"scales': 3 groups; expected 2"),
    "compressed columns": ({"layout": "compressed-tensors"}, changed("weight_packed", lambda x: x[:, :5]), r"weight_packed': shape \[96, 5\]"),
    "compressed rows": ({"layout": "compressed-tensors"}, changed("weight_packed", lambda x: x[:5]), r"shape \[5, 8\]; expected \[96, 8\]"),
    "compressed shape": ({"layout": "compressed-tensors"}, changed("weight_shape", lambda x: x[::-1]), r"weight_shape': \[64, 96\]; expected"),
    "compressed zeros": (
        {"layout": "compressed-tensors", "sym": False},
        lambda t: t.pop(f"{UP}.weight_zero_point"),
        r"weight_zero_point': missing; expected it, as .* says symmetric: false",
    ),
    "compressed order": (
        {"layout": "compressed-tensors", "order": np.random.default_rng(0)},
        changed("weight_g_idx", lambda x: x + 1),
        r"weight_g_idx': input \d+ is in group 2; expected 0 to 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_contradictions_name_the_tensor_and_both_values(tmp_path, case):
    how, edit, message = DAMAGE[case]
    make(tmp_path, edit=edit, **how)
    with pytest.raises(FormatError, match=message) as caught:
        load(tmp_path)
    assert "model.safetensors: tensor 'model.layers." in str(caught.value)


# ---------------------------------------------------------------- layouts that are refused by name

REFUSED = {
    "marlin": ({"quant_method": "marlin"}, "Marlin"),
    "marlin of old": ({**gptq_config(), "is_marlin_format": True}, "Marlin"),
    "gptq as marlin": ({**gptq_config(), "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    "bitblas": ({**gptq_config(), "checkpoint_format": "bitblas"}, "'bitblas'"),
    "bit planes": ({**gptq_config(), "bits": 3, "checkpoint_format": "gptq_p"}, "bit planes"),
    "five bits": ({**gptq_config(), "bits": 5}, "bits is 5"),
    "other words": ({**gptq_config(), "pack_dtype": "int16"}, "pack_dtype is 'int16'"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "fp8": ({"quant_method": "fp8"}, "'fp8'"),
    "awq gemv": ({**quant_writers.awq_config(), "version": "gemv"}, "'gemv'"),
    "compressed floats": ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "'float-quantized'"),
    "compressed dense": ({"quant_method": "compressed-tensors", "format": "dense"}, "'dense'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layouts_refused_by_config(tmp_path, case):
    config, name = REFUSED[case]
    make(tmp_path, config=config)
    with pytest.raises(UnsupportedError, match=rf"{re.escape(name)}.*GPTQ \(2, 3, 4 and 8 bits\), AWQ \(gemm\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    "tensor, name",
    [("B", "Marlin"), ("weight.absmax", "bitsandbytes"), ("codebooks", "AQLM"), ("weight_scale_inv", "FP8"), ("zeros", "GPTQ-for-LLaMa")],
)
def test_layouts_refused_by_tensor(tmp_path, tensor, name):
    checkpoints.make(tmp_path, **SHAPE)
    rewrite(
        tmp_path, lambda arrays: {**arrays, f"{UP}.{tensor}": np.zeros((4, 4), np.int32)} if tensor != "zeros" else without_weight(arrays)
    )
    with pytest.raises(UnsupportedError, match=rf"'{re.escape(f'{UP}.{tensor}')}': it belongs to .*{name}"):
        load(tmp_path)


def without_weight(arrays):
    return {name: x for name, x in arrays.items() if name != f"{UP}.weight"} | {f"{UP}.zeros": np.zeros((4, 4), np.float32)}


@pytest.mark.parametrize("word", [np.int8, np.int16, np.int64])
def test_other_words_are_refused(tmp_path, word):
    make(tmp_path, edit=changed("qweight", lambda x: x.astype(word)))
    with pytest.raises(UnsupportedError, match=rf"qweight': packed into {np.dtype(word).name.upper()[:1]}\d+ words \(pack_dtype\)"):
        load(tmp_path)


# ---------------------------------------------------------------- configs


def test_configs_that_contradict_each_other(tmp_path):
    _, meant = make(tmp_path)
    for key, value in (("bits", 8), ("group_size", 64), ("sym", False), ("checkpoint_format", "gptq_v2"), ("quant_method", "awq")):
        (tmp_path / "quantize_config.json").write_text(json.dumps({**gptq_config(), key: value}))
        with pytest.raises(
            FormatError, match=rf"config\.json.*{key} is .*but .*quantize_config\.json says .*expected the same value in both"
        ):
            load(tmp_path)
    (tmp_path / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 32, "desc_act": True})
    )  # adds, and desc_act is not compared
    same(silently(tmp_path), meant, "bfloat16")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": "4"}, "bits is '4'; expected a whole number"),
        ({"bits": True}, "bits is True; expected a whole number"),
        ({"group_size": 0}, "group_size is 0; expected a positive number"),
        ({"sym": 1}, "sym is 1; expected true or false"),
        ({"dynamic": []}, r"dynamic is \[\]; expected an object"),
        ({"dynamic": {"(": {}}}, r"dynamic is '\('; expected a regular expression"),
        ({"dynamic": {"x": 3}}, "dynamic is .*; expected overrides for 'x'"),
        ({"checkpoint_format": 2}, "checkpoint_format is 2; expected a name"),
        ({"quant_method": 2}, "quant_method is 2; expected a name"),
    ],
)
def test_nonsense_in_the_config(tmp_path, change, message):
    make(tmp_path, config={**gptq_config(), **change})
    with pytest.raises(FormatError, match=rf"config\.json: quantization_config: {message}"):
        load(tmp_path)


def test_unknown_overrides_are_refused(tmp_path):
    make(tmp_path)
    with pytest.raises(ArgumentError, match="unknown key 'bit'; known: quant_method, bits"):
        load(tmp_path, quantization_config={"bit": 4})


def test_gguf_files_take_no_override(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ArgumentError, match=r"x\.gguf: a GGUF file says itself"):
        load(tmp_path / "x.gguf", quantization_config={"bits": 4})


def test_a_config_without_quantised_tensors(tmp_path):
    weights = checkpoints.make(tmp_path, **SHAPE)
    edit_json(tmp_path / "config.json", quantization_config=gptq_config())
    with pytest.warns(UserWarning, match="describes a quantised checkpoint, but no tensor is quantised"):
        assert load(tmp_path).tensors.keys() == weights.keys()


def test_old_spellings(tmp_path):
    """Keys of old files: w_bit, q_group_size, zero_point, version; of new ones: method and format beside the usual names."""
    _, meant = make(tmp_path, "awq", config={"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"})
    same(silently(tmp_path), meant, "bfloat16")
    config = {**gptq_config(), "method": "gptq", "format": "gptq", "pack_dtype": "int32", "meta": {"quantizer": ["gptqmodel:5.0"]}}
    _, meant = make(tmp_path, config=config)
    same(silently(tmp_path), meant, "bfloat16")


def test_tied_and_quantised_head(tmp_path):
    """A quantised head of a model that says it is tied is used, with a warning; on demand the embedding is."""
    make(tmp_path, per_module={"lm_head": {}})
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    with pytest.warns(UserWarning, match=r"'lm_head\.weight': it differs from"):
        assert "lm_head.weight" in load(tmp_path).tensors
    assert "lm_head.weight" not in silently(tmp_path, tie_word_embeddings=True).tensors
