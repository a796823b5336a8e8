"""The folder that a quantisation writes: finished layers on the way, and at the end a Hugging Face folder as transformers and GPTQModel read it."""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
from tokenizers import processors

from .._version import __version__
from ..errors import ArgumentError, FormatError, StorageError
from ..loaders import LoadedCheckpoint, read_safetensors
from ..loaders.hf import read_json
from ..loaders.safetensors import Tensor
from ..loaders.write import Entry, write_file, write_json, write_safetensors, write_weights
from ..text.rust import RustEncoder
from ..tokenizer import Tokenizer
from .options import Options

WORK = ".quantize"  # within the folder: what an interrupted run goes on from
# What stands beside the weights: copied as it is.
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
)
COPIED += ("additional_chat_templates",)


def quantization_config(options: Options) -> dict:
    """config.json's quantization_config, with the keys that GPTQModel writes and transformers reads."""
    meta = {"quantizer": [f"llmcoopt:{__version__}"], "method": options.method, "mse": options.mse, "sink": options.sink}
    meta |= {"damp_percent": options.damp, "static_groups": options.order == "static", "act_group_aware": options.order == "groups"}
    return {
        "quant_method": "gptq",
        "bits": options.bits,
        "group_size": options.group,
        "sym": options.sym,
        "desc_act": options.order == "columns",
        "checkpoint_format": options.format,
        "pack_dtype": "int32",
        "lm_head": False,
        "true_sequential": True,
        "damp_percent": options.damp,
        "meta": meta,
    }


class OutputFolder:
    """`about`: everything that decides the result; a run goes on only from one with the same."""

    def __init__(self, path: Path, about: dict, resume: bool):
        self.path, self.work, self.about = path, path / WORK, about
        if path.exists() and not path.is_dir():
            raise ArgumentError(f"{path}: there is a file of this name; expected a folder to be made")
        if (self.work / "run.json").exists():
            if resume:
                self._check_same()
            else:
                shutil.rmtree(self.work)
        elif path.exists() and os.listdir(path):
            raise ArgumentError(f"{path}: the folder is not empty and not of an interrupted run; expected a new one")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{path}: cannot be made: {error.strerror or error}") from error
        write_json(self.work / "run.json", about)

    def _check_same(self):
        before = read_json(self.work / "run.json")
        for key, here in json.loads(json.dumps(self.about)).items():
            if before.get(key) != here:
                raise ArgumentError(
                    f"{self.path}: holds an interrupted run with {key} {before.get(key)!r}, this one has {here!r}; "
                    "go on with the same values, or pass resume=False (--restart) to begin anew"
                )

    def _layer(self, index: int) -> Path:
        return self.work / f"layer-{index:05}.safetensors"

    def finished(self) -> int:
        """How many layers are done, from the first one on."""
        count = 0
        while self._layer(count).exists():
            count += 1
        return count

    def save_layer(self, index: int, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
        write_safetensors(self._layer(index), {name: (dtype, array.shape, array) for name, (dtype, array) in tensors.items()})

    def load_layer(self, index: int) -> dict[str, Tensor]:
        return read_safetensors(self._layer(index))[0]

    def finish(self, checkpoint: LoadedCheckpoint, options: Options, beside: dict[str, bytes]) -> int:
        """Writes the folder out of the finished layers, what is not quantised and the files `beside` the weights; config.json comes last. Returns the
        bytes of its weights."""
        entries = self._entries(checkpoint)
        write_weights(self.path, entries)
        for name, content in beside.items():
            (self.path / name).parent.mkdir(exist_ok=True)
            write_file(self.path / name, lambda file, content=content: file.write(content))
        raw = read_json(checkpoint.path / "config.json") if checkpoint.format == "safetensors" else gguf_hf_config(checkpoint)
        said = quantization_config(options)
        write_json(self.path / "quantize_config.json", said)
        raw |= {"tie_word_embeddings": checkpoint.config.tie_word_embeddings, "quantization_config": said}
        write_json(self.path / "config.json", raw)
        shutil.rmtree(self.work)
        return sum(data.nbytes for _, _, data in entries.values())

    def _entries(self, checkpoint) -> dict[str, Entry]:
        """All tensors of the result in the order of the model. They stay mapped: nothing is read before it is written."""
        made = {}
        for index in range(checkpoint.config.num_hidden_layers):
            made |= self.load_layer(index)
        replaced = {f"{name.removesuffix('.qweight')}.weight" for name in made if name.endswith(".qweight")}
        kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in replaced}

        def place(name):
            parts = name.split(".")
            layer = int(parts[2]) if parts[1] == "layers" else -1 if "embed_tokens" in name else 1 << 30
            return layer, name

        return {name: (t.dtype, t.shape, t.data) for name, t in sorted({**kept, **made}.items(), key=lambda item: place(item[0]))}


def gguf_hf_config(checkpoint: LoadedCheckpoint) -> dict:
    """config.json of a model that came without one."""
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[checkpoint.tensors["model.embed_tokens.weight"].dtype]
    biased = any(name.endswith("self_attn.q_proj.bias") for name in checkpoint.tensors)
    raw = checkpoint.config.to_hf() | {"torch_dtype": dtype}
    return raw | ({"attention_bias": biased} if "attention_bias" in raw else {})


def tokenizer_files(checkpoint: LoadedCheckpoint) -> dict[str, bytes]:
    """What stands beside the weights, by path in the folder: the source's files, or tokenizer.json and others for the vocabulary of a GGUF file.

    Warns where there is no tokenizer that could be written so."""
    source = checkpoint.tokenizer_source
    if source.is_dir():
        found = {path for pattern in COPIED for path in source.glob(pattern)}
        files = {file for path in found for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()}
        return {file.relative_to(source).as_posix(): file.read_bytes() for file in sorted(files)}
    try:
        tokenizer = Tokenizer.from_pretrained(source)
    except FormatError as error:
        warnings.warn(f"{error}; the result will have no tokenizer", stacklevel=4)
        return {}
    if not isinstance(tokenizer._encoder, RustEncoder):
        advice = "put the tokenizer.model of the original model into the result"
        warnings.warn(f"{source}: its SentencePiece vocabulary cannot be written as tokenizer.json; {advice}", stacklevel=4)
        return {}
    return gguf_tokenizer(tokenizer, checkpoint.config.max_positions)


def gguf_tokenizer(tokenizer: Tokenizer, context: int) -> dict[str, bytes]:
    """Files of a Hugging Face folder for the byte-level tokenizer of a GGUF file; context: the model's."""
    encoder, facts = tokenizer._encoder, tokenizer._facts
    inner = json.loads(encoder.inner.to_str())
    if facts.before or facts.after:
        around = {encoder.token(i): i for i in (*facts.before, *facts.after)}
        template = [*(encoder.token(i) for i in facts.before), "$A", *(encoder.token(i) for i in facts.after)]
        rule = processors.TemplateProcessing(single=" ".join(template), special_tokens=list(around.items()))
        inner["post_processor"] = json.loads(rule.__getstate__())
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **facts.special,
    }
    if tokenizer.chat_template is not None:
        said["chat_template"] = tokenizer.chat_template
    files = {"tokenizer.json": inner, "tokenizer_config.json": said, "generation_config.json": {"eos_token_id": list(facts.end_ids)}}
    return {name: json.dumps(content, ensure_ascii=False, indent=2).encode() for name, content in files.items()}
