"""Whole models: quantised, loaded, compared; interrupted and gone on with; and what is refused."""

import filecmp
import json
import shutil
from pathlib import Path

import checkpoints
import gptq_oracle as oracle
import numpy as np
import pytest
from small import SHAPE

import llmcoopt as lc
from llmcoopt import reference, reference_quant
from llmcoopt._core import OpContext
from llmcoopt.config import parse_config
from llmcoopt.errors import ArgumentError, MissingFileError, NumericError, OutOfMemoryError, StorageError
from llmcoopt.loaders import lint, load, load_folder, read_safetensors
from llmcoopt.quantizer import run as run_module
from llmcoopt.quantizer.layer import Layer

QUIET = {"progress": False, "threads": 2}


def quantised(folder):
    """(config, weights of the specification, decoded in float64 from the file's tensors by the specification)."""
    raw = json.loads((folder / "config.json").read_text())
    said = raw["quantization_config"]
    arrays = checkpoints.read_safetensors(folder / "model.safetensors")
    weights = {name: x for name, x in arrays.items() if name.rsplit(".", 1)[1] in ("weight", "bias")}
    for name in arrays:
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            parts = [arrays[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
            weights[f"{module}.weight"] = reference_quant.gptq(*parts, said["bits"], said["checkpoint_format"] == "gptq")
    return parse_config(raw), weights


def exact_logits(model, prompt):
    """Of a prompt over float32 keys and values."""
    with lc.KVCache(model, "float32", max_tokens=len(prompt)) as cache:
        return model.forward(prompt, cache.sequence())


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"bits": 2, "group": 64, "sym": False, "format": "gptq_v2"},
        {"bits": 3, "group": 32, "order": "columns", "sym": False, "format": "gptq"},
        {"bits": 4, "group": 48, "order": "static", "mse": 2.4},
        {"bits": 8, "group": -1, "order": "groups"},
        {"bits": 4, "group": 32, "order": "groups", "sym": False},
        {"bits": 4, "group": 128, "method": "rtn"},
    ],
    ids=str,
)
def test_what_is_written_is_loaded(source, tmp_path, ids, how):
    out = tmp_path / "out"
    report = lc.quantize(source, out, None if how.get("method") == "rtn" else ids, **how, **QUIET)
    assert lint(out) == [] and not (out / ".quantize").exists()
    assert report.matrices == 21 and report.bytes == sum(t.nbytes for t in read_safetensors(out / "model.safetensors")[0].values())
    config, weights = quantised(out)
    prompt = checkpoints.prompt(40, vocab=64)
    with lc.Model.from_pretrained(out, dtype="float32") as model:
        assert {row["format"] for row in model.stored} == {"gptq", "F32"}
        assert {row["order"] for row in model.stored} <= ({None, "act-order"} if how.get("order") == "columns" else {None, "in order"})
        found = exact_logits(model, prompt)
    assert checkpoints.error(found, reference.forward(config, weights, prompt)) < 2e-5
    with lc.Model.from_pretrained(out) as model:  # decoded to 16 bit
        assert checkpoints.error(exact_logits(model, prompt), reference.forward(config, weights, prompt)) < 0.05
    original = checkpoints.read(source)[1]
    assert np.array_equal(weights["model.embed_tokens.weight"], original["model.embed_tokens.weight"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_types_of_weights(tmp_path, ids, dtype):
    """What is not quantised stays as it is; the rest decodes to what the config's type asks for."""
    checkpoints.make(tmp_path / "source", dtype=dtype, **SHAPE)
    lc.quantize(tmp_path / "source", tmp_path / "out", ids, group=32, **QUIET)
    assert lint(tmp_path / "out") == []
    config, weights = quantised(tmp_path / "out")
    assert weights["model.embed_tokens.weight"].dtype == dtype
    prompt = checkpoints.prompt(40, vocab=64)
    with lc.Model.from_pretrained(tmp_path / "out") as model:
        assert model.dtype == {"float32": "bfloat16"}.get(dtype, dtype)
        assert checkpoints.error(exact_logits(model, prompt), reference.forward(config, weights, prompt)) < 0.05


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_every_matrix_is_gptq_of_what_it_reads(family, tmp_path, ids):
    """The inputs of a matrix come from the model as it is quantised up to there: the quantised model itself shows them."""
    more = {"mistral": {"sliding_window": 24}, "llama": {"attention_bias": True, "mlp_bias": True}}.get(family, {})
    original = checkpoints.make(tmp_path / "source", family, dtype="bfloat16", **SHAPE, **more)
    lc.quantize(
        tmp_path / "source",
        tmp_path / "out",
        ids,
        group=32,
        sym=False,
        format="gptq",
        length=128,
        samples=5,
        sink=0.25,
        isa="avx2",
        **QUIET,
    )
    arrays = checkpoints.read_safetensors(tmp_path / "out" / "model.safetensors")
    sums, begun = {}, set()

    def look(point, layer, rows):
        rows = rows.astype(np.float64)
        if (point, layer) not in begun:  # the first chunk of a window: its first token counts as a quarter of 128
            rows[0] *= 32**0.5
            begun.add((point, layer))
        sums[point, layer] = sums.get((point, layer), 0) + rows.T @ rows

    with lc.Model.from_pretrained(tmp_path / "out", isa="avx2", weights="dequantized") as model:
        assert model.dtype == "bfloat16"
        for at in range(0, 1000, 128)[:7]:
            window = ids[at : at + 128]
            begun.clear()
            if at in chosen(ids):
                with lc.KVCache(model, "float32", max_tokens=128) as cache:
                    model.forward(window, cache.sequence(), tap=lc.Tap(["attention_input", "attended", "mlp_input", "down_input"], look))
    inputs = {"self_attn.q_proj": "attention_input", "self_attn.k_proj": "attention_input", "self_attn.v_proj": "attention_input"}
    inputs |= {"self_attn.o_proj": "attended", "mlp.gate_proj": "mlp_input", "mlp.up_proj": "mlp_input", "mlp.down_proj": "down_input"}
    for layer in range(3):
        for name, point in inputs.items():
            module = f"model.layers.{layer}.{name}"
            weight = reference.float64(original[f"{module}.weight"])
            parts = {part: arrays[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
            codes = reference_quant.unpack_stream(parts["qweight"].T, 4, weight.shape[1]).astype(np.int64)
            zeros = reference_quant.gptq_zeros(parts["qzeros"], 4, len(weight), True).astype(np.int64)
            found = codes, parts["scales"].astype(np.float64), zeros, parts["g_idx"]
            drift, scale_off, zero_off, _, same = oracle.verify(found, weight, sums[point, layer], 4, 32, False, least_zero=1)
            assert same and drift < 0.02 and scale_off < 0.01 and zero_off <= 1, module


def chosen(ids):
    """Where the windows of 128 begin that seed 0 takes: 5 of 7."""
    return {128 * i for i in np.random.default_rng(0).choice(len(ids) // 128, 5, replace=False)}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_layer_is_the_models(isa, family, tmp_path):
    """Layer computes what the model's forward pass does, with the attention's keys and values in float32."""
    checkpoints.make(tmp_path, family, dtype="bfloat16", **SHAPE)
    prompt, seen = np.array(checkpoints.prompt(70, vocab=64), np.int32), {}
    with lc.Model.from_pretrained(tmp_path, isa=isa) as model, lc.KVCache(model, "float32", max_tokens=128) as cache:
        points = ["attention_input", "attended", "mlp_input", "down_input"]
        model.forward(prompt, cache.sequence(), tap=lc.Tap(points, lambda point, layer, rows: seen.__setitem__((point, layer), rows)))
    loaded, context = load_folder(tmp_path), OpContext(isa, 2)
    table = loaded.tensors["model.embed_tokens.weight"]
    x = np.empty((len(prompt), 64), np.float32)
    context.embed(x, prompt, table.numpy(), "bfloat16")
    for index in range(3):
        layer = Layer(context, loaded.config, index, loaded.tensors)
        found = {"attention_input": layer.attention_input(x), "attended": layer.attended(x)}
        layer.add_attention(x, found["attended"])
        found |= {"mlp_input": layer.mlp_input(x), "down_input": layer.down_input(x)}
        layer.add_mlp(x)
        for point, rows in found.items():
            assert checkpoints.error(rows, seen[point, index]) < 2e-3, point  # inputs rounded to bfloat16 may fall to the other side


def test_folders_as_transformers_knows_them(source, tmp_path, ids):
    tokenizers = {
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "generation_config.json": b'{"eos_token_id": 2}',
        "chat_template.jinja": b"x",
    }
    for name, content in tokenizers.items():
        (source / name).write_bytes(content)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("y")
    (source / "README.md").write_text("of the original")
    out = tmp_path / "new" / "out"
    lc.quantize(source, out, ids, order="columns", group=32, sym=False, **QUIET)
    assert all((out / name).read_bytes() == content for name, content in tokenizers.items())
    assert (out / "additional_chat_templates" / "rag.jinja").read_text() == "y" and not (out / "README.md").exists()
    raw, said = json.loads((out / "config.json").read_text()), json.loads((out / "quantize_config.json").read_text())
    assert raw["quantization_config"] == said and raw["hidden_size"] == 64
    keys = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": False,
        "desc_act": True,
        "checkpoint_format": "gptq_v2",
        "lm_head": False,
    }
    assert {key: said[key] for key in keys} == keys


def test_shards(source, tmp_path, ids, monkeypatch):
    lc.quantize(source, tmp_path / "one", ids, **QUIET)
    monkeypatch.setattr("llmcoopt.loaders.write.write_weights.__defaults__", (20_000,))
    lc.quantize(source, tmp_path / "many", ids, **QUIET)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3 and lint(tmp_path / "many") == []
    one, many = load(tmp_path / "one").tensors, load(tmp_path / "many").tensors
    assert one.keys() == many.keys() and all(np.array_equal(one[name].data, many[name].data) for name in one)


def test_a_temporary_file_for_activations(source, tmp_path, ids, monkeypatch):
    lc.quantize(source, tmp_path / "memory", ids, **QUIET)
    monkeypatch.setattr(run_module, "IN_MEMORY", 0)
    lc.quantize(source, tmp_path / "file", ids, **QUIET)
    assert same_files(tmp_path / "memory", tmp_path / "file")


def test_the_seed_chooses_windows(source, tmp_path, ids):
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        lc.quantize(source, tmp_path / name, ids, samples=2, length=100, seed=seed, **QUIET)
    assert same_files(tmp_path / "a", tmp_path / "b") and not same_files(tmp_path / "a", tmp_path / "c")


def same_files(a, b):
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    return filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


# ---------------------------------------------------------------- interruptions


def interrupt_at(monkeypatch, layer, error=KeyboardInterrupt):
    """The run ends with `error` when it comes to this layer."""
    go_on = run_module._Run.quantize_layer

    def stop(self, at, held):
        if at.index == layer:
            raise error
        go_on(self, at, held)

    monkeypatch.setattr(run_module._Run, "quantize_layer", stop)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_going_on_gives_the_same_bits(source, tmp_path, ids, monkeypatch, layer):
    how = {"group": 32, "order": "columns", "sym": False, **QUIET}
    lc.quantize(source, tmp_path / "whole", ids, **how)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, layer)
        lc.quantize(source, tmp_path / "parts", ids, **how)
    left = sorted(path.name for path in (tmp_path / "parts" / ".quantize").iterdir())
    assert left == [f"layer-{i:05}.safetensors" for i in range(layer)] + ["run.json"]
    assert not (tmp_path / "parts" / "config.json").exists()  # half a model does not load
    report = lc.quantize(source, tmp_path / "parts", ids, **(how | {"threads": 1}))
    assert len(report.losses) == 7 * (3 - layer)
    assert same_files(tmp_path / "whole", tmp_path / "parts")


def test_going_on_with_other_options_is_refused(source, tmp_path, ids, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 1)
        lc.quantize(source, out, ids, **QUIET)
    with pytest.raises(ArgumentError, match=f"^{out}: holds an interrupted run with bits 4, this one has 3; .* resume=False"):
        lc.quantize(source, out, ids, bits=3, **QUIET)
    with pytest.raises(ArgumentError, match="holds an interrupted run with text "):
        lc.quantize(source, out, ids[1:], **QUIET)
    checkpoints.make(tmp_path / "other", dtype="bfloat16", seed=1, **SHAPE)
    with pytest.raises(ArgumentError, match="holds an interrupted run with model "):
        lc.quantize(tmp_path / "other", out, ids, **QUIET)
    lc.quantize(source, out, ids, bits=3, resume=False, **QUIET)
    assert load(out).quantized["model.layers.0.mlp.up_proj"].bits == 3


def test_interrupted_after_the_last_layer(source, tmp_path, ids, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("llmcoopt.quantizer.folder.write_weights", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        lc.quantize(source, tmp_path / "out", ids, **QUIET)
    lc.quantize(source, tmp_path / "out", ids, **QUIET)
    assert lint(tmp_path / "out") == []


FULL = """
import resource, sys
import llmcoopt as lc
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))  # as on a full disk: a write ends with an error
try:
    lc.quantize(sys.argv[1], sys.argv[2], list(range(64)) * 16, threads=1, progress=False)
except lc.errors.StorageError as error:
    print(error)
"""


def test_a_full_disk(source, tmp_path, run_script):
    out = tmp_path / "out"
    said = run_script(FULL, source, out)
    assert said.startswith(f"{out}/.quantize/layer-00000.safetensors: cannot be written (") and "File too large" in said
    assert [path.name for path in (out / ".quantize").iterdir()] == ["run.json"]  # nothing half written stays
    lc.quantize(source, out, list(range(64)) * 16, **QUIET)
    assert lint(out) == []


def test_out_of_memory(source, tmp_path, ids, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, MemoryError)
        message = (
            "^out of memory: the sums and the factor of 96 inputs take 108 KiB, activations of 1,000 tokens 500 KiB; pass fewer samples"
        )
        with pytest.raises(OutOfMemoryError, match=message):
            lc.quantize(source, tmp_path / "out", ids, **QUIET)
    lc.quantize(source, tmp_path / "out", ids, **QUIET)


# ---------------------------------------------------------------- refused


def test_folders_that_are_taken(source, tmp_path, ids):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArgumentError, match="file: there is a file of this name"):
        lc.quantize(source, tmp_path / "file", ids, **QUIET)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(ArgumentError, match="full: the folder is not empty and not of an interrupted run"):
        lc.quantize(source, tmp_path / "full", ids, **QUIET)
    (tmp_path / "empty").mkdir()
    lc.quantize(source, tmp_path / "empty", ids, **QUIET)
    with pytest.raises(ArgumentError, match="empty: the folder is not empty"):
        lc.quantize(source, tmp_path / "empty", ids, **QUIET)
    with pytest.raises(StorageError, match="cannot be made"):
        lc.quantize(source, tmp_path / "file" / "out", ids, **QUIET)


def test_a_quantised_model(source, tmp_path, ids):
    lc.quantize(source, tmp_path / "once", ids, **QUIET)
    message = "once: it is quantised already \\('model.layers.0.mlp.down_proj': gptq, 4 bits\\); expected the 16-bit model"
    with pytest.raises(ArgumentError, match=message):
        lc.quantize(tmp_path / "once", tmp_path / "twice", ids, **QUIET)
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(tmp_path, ids, value):
    def edit(weights):
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    checkpoints.make(tmp_path / "source", dtype="bfloat16", edit=edit, **SHAPE)
    message = r"tensor 'model.layers.1.mlp.up_proj.weight' has 1 values that are NaN or infinite, the first at \[3, 5\]"
    with pytest.raises(NumericError, match=message):
        lc.quantize(tmp_path / "source", tmp_path / "out", ids, **QUIET)


def test_activations_that_are_no_numbers(tmp_path, ids):
    def edit(weights):
        weights["model.layers.1.post_attention_layernorm.weight"][7] = np.nan

    checkpoints.make(tmp_path / "source", dtype="bfloat16", edit=edit, **SHAPE)
    with pytest.raises(NumericError, match=r"^model.layers.1.mlp.gate_proj: its input 7 is NaN or infinite"):
        lc.quantize(tmp_path / "source", tmp_path / "out", ids, **QUIET)


@pytest.mark.parametrize("calib", [None, []])
def test_without_text(source, tmp_path, calib):
    with pytest.raises(
        ArgumentError, match=r"^calib: none given. GPTQ needs text like what the model will read: about 128 windows .* method='rtn'"
    ):
        lc.quantize(source, tmp_path / "out", calib, **QUIET)
    assert not (tmp_path / "out").exists()


def test_too_little_text(source, tmp_path, ids):
    with pytest.raises(ArgumentError, match=r"^calib: found 200 tokens, expected at least 256"):
        lc.quantize(source, tmp_path / "out", ids[:200], **QUIET)
    with pytest.raises(MissingFileError, match=r"nowhere\.txt: cannot be read"):
        lc.quantize(source, tmp_path / "out", Path(tmp_path / "nowhere.txt"), **QUIET)
    with pytest.raises(ArgumentError, match="is outside the vocabulary of 64"):
        lc.quantize(source, tmp_path / "out", [*ids, 64], **QUIET)
    checkpoints.make(tmp_path / "wide", dtype="bfloat16", **(SHAPE | {"intermediate_size": 1200, "num_hidden_layers": 1}))
    with pytest.warns(UserWarning, match="calib: 1000 tokens for matrices of 1200 inputs"):
        lc.quantize(tmp_path / "wide", tmp_path / "out", ids, **QUIET)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 5}, "bits: found 5, expected one of 2, 3, 4, 8"),
        ({"bits": True}, "bits: found True"),
        ({"group": 0}, "group: found 0, expected a number of inputs from 1, or -1"),
        ({"method": "awq"}, "method: found 'awq', expected one of gptq, rtn"),
        ({"format": "marlin"}, "format: found 'marlin', expected one of gptq, gptq_v2"),
        ({"order": "rows"}, "order: found 'rows', expected one of none, columns, static, groups"),
        ({"order": "columns", "method": "rtn"}, "order: found 'columns' with method 'rtn'"),
        ({"damp": -1}, "damp: found -1.0, expected a number from 0 to 1"),
        ({"mse": float("nan")}, "mse: found nan"),
        ({"sink": 2}, "sink: found 2.0, expected a share from 0 to 1"),
        ({"samples": 0}, "samples: found 0, expected a number of windows from 1"),
        ({"length": 300}, "length: found 300, expected 32 to 256, the model's context"),
    ],
)
def test_wrong_options(source, tmp_path, ids, wrong, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        lc.quantize(source, tmp_path / "out", ids, **wrong, **QUIET)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- GGUF


def test_a_gguf_file_becomes_a_folder(data, tmp_path):
    path = data / "models" / "hf-tiny-logits" / "tiny_llama_f16.gguf"
    with pytest.warns(UserWarning, match="the result will have no tokenizer"):
        lc.quantize(path, tmp_path / "out", method="rtn", bits=8, group=-1, **QUIET)
    prompt = [1, 5, 3, 9, 2]
    with lc.Model.from_pretrained(tmp_path / "out", dtype="float32") as model, lc.Model.from_pretrained(path, dtype="float32") as first:
        assert model.config == first.config
        assert checkpoints.error(exact_logits(model, prompt), exact_logits(first, prompt)) < 0.05


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "rope",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 20.0, "truncate": False},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope and rope["rope_type"],
)
def test_configs_written_for_gguf_files(family, rope):
    """to_hf() is read as the config that it was made from."""
    raw = checkpoints.SMALL | {"model_type": family, "head_dim": 4, "rope_scaling": rope, "bos_token_id": 1, "eos_token_id": [2, 3]}
    raw |= {"mistral": {"sliding_window": 16}, "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}}.get(
        family, {}
    )
    config = parse_config(raw)
    assert parse_config(json.loads(json.dumps(config.to_hf()))) == config


# ---------------------------------------------------------------- other readers


@pytest.mark.parity
def test_transformers_computes_the_same(source, tmp_path, ids):
    """transformers with the weights as the specification decodes them, in float32."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    out = tmp_path / "out"
    lc.quantize(source, out, ids, order="columns", group=32, sym=False, **QUIET)
    _, weights = quantised(out)
    plain = tmp_path / "plain"
    shutil.copytree(source, plain)
    checkpoints.write_safetensors(
        plain / "model.safetensors", {name: reference.float64(x).astype(np.float32) for name, x in weights.items()}
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    prompt = checkpoints.prompt(40, vocab=64)
    with torch.no_grad():
        right = theirs(torch.tensor([prompt])).logits[0].numpy()
    with lc.Model.from_pretrained(out, dtype="float32") as model:
        assert checkpoints.error(exact_logits(model, prompt), right) < 1e-4


@pytest.mark.parity
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"order": "columns", "sym": False},
        {"bits": 8},
        {"bits": 3, "sym": False},
        {"sym": False, "format": "gptq_v2"},
        {"order": "groups"},
    ],
    ids=str,
)
def test_gptqmodel_loads_it(tmp_path, how):
    """GPTQModel's reader in plain PyTorch, where it is installed: it has the weights that the specification decodes."""
    gptqmodel, torch = pytest.importorskip("gptqmodel"), pytest.importorskip("torch")
    out, prompt = tmp_path / "out", checkpoints.prompt(40, vocab=512)
    lc.quantize("tiny", out, checkpoints.prompt(1000, vocab=512), group=64, length=250, **how, **QUIET)
    theirs = gptqmodel.GPTQModel.load(str(out), backend=gptqmodel.BACKEND.TORCH, device="cpu", dtype=torch.float16).model
    config, weights = quantised(out)
    modules = {name: module for name, module in theirs.named_modules() if hasattr(module, "dequantize_weight")}
    assert len(modules) == 28
    for name, module in modules.items():
        found, right = module.dequantize_weight().float().numpy().T, weights[f"{name}.weight"]
        assert np.abs(found - right).max() <= 2**-10 * np.abs(right).max(), name  # a product in float16
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt])).logits[0].float().numpy()
    assert checkpoints.error(logits, reference.forward(config, weights, prompt)) < 0.02
