"""The tokenizer in a GGUF file's metadata (keys tokenizer.ggml.*): SentencePiece BPE ("llama") and byte-level BPE ("gpt2")."""

import math
import reprlib
import warnings

from tokenizers import AddedToken as RustAdded
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from ..errors import FormatError, UnsupportedError
from .facts import TokenizerFacts, surround
from .normalizer import Normalizer
from .pretokenizers import ADD_BOS, EXPRESSIONS, IGNORE_MERGES
from .rust import RustEncoder, guarded
from .segmenters import BpeSegmenter
from .sentencepiece import ALWAYS, NEVER, AddedToken, SentencePieceEncoder
from .spm_file import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

_MODEL = "tokenizer.ggml.model"
_NAMES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "seperator": "sep_token",
    "mask": "mask_token",
}
# Pieces that end a turn or a text in the chat formats of Llama-family models; a file names only one as its end-of-text token.
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "</s>")
_LLAMA_DEFAULTS = {"bos": 1, "eos": 2, "unknown": 0}


def from_metadata(metadata: dict, where: str):
    """(encoder, facts) of a file's metadata. Raises FormatError and UnsupportedError, each naming the key."""
    keys = _Metadata(metadata, where)
    kind = keys.text("model")
    if kind is None:
        raise FormatError(f"{where}: no key {_MODEL}: the file holds no tokenizer")
    if kind not in ("llama", "gpt2"):
        raise UnsupportedError(f"{where}: {_MODEL} is {kind!r:.100}; expected 'llama' or 'gpt2'")
    tokens = keys.array("tokens", "text")
    if not tokens:
        raise FormatError(f"{where}: tokenizer.ggml.tokens is missing or empty")
    types = keys.array("token_type", "int", len(tokens)) or [NORMAL] * len(tokens)
    ids = _special_ids(keys, kind, len(tokens), where)
    encoder = (_llama if kind == "llama" else _gpt2)(keys, tokens, types, where)
    return encoder, _facts(keys, kind, tokens, types, ids, where)


def _is_number(value):
    try:
        return type(value) in (int, float) and not math.isnan(value)
    except OverflowError:  # an int beyond float
        return False


_ITEMS = {
    "text": lambda value: isinstance(value, str),
    "int": lambda value: type(value) is int,
    "a number": _is_number,
}


class _Metadata:
    """Typed look-ups under tokenizer.ggml. Each raises FormatError naming file and key where the value has another type."""

    def __init__(self, metadata, where):
        self.metadata, self.where = metadata, where

    def get(self, name):
        """The value; NumPy's scalars and arrays as Python's numbers and lists."""
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        return value.tolist() if hasattr(value, "tolist") else value

    def fail(self, name, expected):
        raise FormatError(f"{self.where}: tokenizer.ggml.{name} is {reprlib.repr(self.get(name))}; expected {expected}")

    def text(self, name):
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            self.fail(name, "text")
        return value

    def flag(self, name):
        """True, False, or None where it is missing. 0 and 1 count."""
        value = self.get(name)
        if value is not None and (type(value) not in (bool, int) or value not in (0, 1)):
            self.fail(name, "true or false")
        return None if value is None else bool(value)

    def token_id(self, name):
        value = self.get(name)
        if value is not None and type(value) is not int:
            self.fail(name, "a token id")
        return value

    def array(self, name, item, size=None):
        """The list of an array whose values are all "text", "int" or "a number"; empty where it is missing."""
        found = self.get(name)
        if found is None:
            return []
        if not isinstance(found, list | tuple):
            self.fail(name, "an array")
        if size is not None and len(found) != size:
            self.fail_array(name, f" has {len(found)} entries; expected {size}, one for each token")
        fits = _ITEMS[item]
        bad = next((i for i, value in enumerate(found) if not fits(value)), None)
        if bad is not None:
            self.fail_array(name, f"[{bad}] is {reprlib.repr(found[bad])}; expected {item}")
        return list(found)

    def fail_array(self, name, problem):
        raise FormatError(f"{self.where}: tokenizer.ggml.{name}{problem}")


def _special_ids(keys, kind, size, where):
    ids = {}
    for name in (*_NAMES, "eot", "eom"):
        key = f"tokenizer.ggml.{name}_token_id"
        value = keys.token_id(f"{name}_token_id")
        if value is None and kind == "llama" and _LLAMA_DEFAULTS.get(name, size) < size:
            value = _LLAMA_DEFAULTS[name]
        if value is None:
            continue
        if not 0 <= value < size:
            warnings.warn(f"{where}: {key} is {value}, but there are {size} tokens; ignored", stacklevel=4)
            continue
        ids[name] = value
    return ids


def _facts(keys, kind, tokens, types, ids, where):
    add_bos = keys.flag("add_bos_token")
    if add_bos is None:
        add_bos = kind == "llama" or keys.text("pre") in ADD_BOS
    before, after = surround([], [], ids.get("bos"), ids.get("eos"), add_bos, bool(keys.flag("add_eos_token")))
    control = {token: i for i, token in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED)}
    ends = [ids[name] for name in ("eos", "eot", "eom") if name in ids] + [control[end] for end in _ENDS if end in control]
    return TokenizerFacts(
        where,
        special={name: tokens[ids[short]] for short, name in _NAMES.items() if short in ids},
        before=before,
        after=after,
        end_ids=list(dict.fromkeys(ends)),
        chat_templates=_templates(keys.metadata, where),
    )


def _templates(metadata, where):
    found = {}
    for key, value in metadata.items():
        if key != "tokenizer.chat_template" and not key.startswith("tokenizer.chat_template."):
            continue
        if not isinstance(value, str):
            raise FormatError(f"{where}: {key} is {type(value).__name__}; expected text")
        found[key.removeprefix("tokenizer.chat_template").lstrip(".") or "default"] = value
    return found


def _llama(keys, tokens, types, where):
    scores = [float(score) for score in keys.array("scores", "a number", len(tokens))]
    if not scores:
        raise FormatError(f"{where}: tokenizer.ggml.scores is missing; a 'llama' vocabulary needs the scores of its tokens")
    prefix = keys.flag("add_space_prefix")
    unknown = types.index(UNKNOWN) if UNKNOWN in types else 0
    segmenter = BpeSegmenter(tokens, scores, types, unknown, BYTE in types)
    normalizer = Normalizer(remove_extra_spaces=bool(keys.flag("remove_extra_whitespaces")))
    kinds = (CONTROL, UNKNOWN, USER_DEFINED)
    added = [AddedToken(token, i, types[i] != USER_DEFINED) for i, token in enumerate(tokens) if types[i] in kinds and token]
    dummy = ALWAYS if prefix is None or prefix else NEVER
    return SentencePieceEncoder(tokens, types, segmenter, normalizer, dummy=dummy, added=added, unk_surface=" \u2047 ")


def _gpt2(keys, tokens, types, where):
    merges = [_merge(m, i, where) for i, m in enumerate(keys.array("merges", "text"))]
    if not merges:
        raise FormatError(f"{where}: tokenizer.ggml.merges is missing; a 'gpt2' vocabulary needs them")
    pre = keys.text("pre")
    if pre not in EXPRESSIONS:
        said = "is missing" if pre is None else f"{pre!r} is not known"
        warnings.warn(
            f"{where}: tokenizer.ggml.pre {said}; splitting text as 'default', which may give other ids than in training", stacklevel=4
        )
        pre = "default"
    vocabulary = {token: i for i, token in reversed(list(enumerate(tokens)))}
    inner = guarded(
        lambda: Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in IGNORE_MERGES)),
        f"{where}: tokenizer.ggml.merges",
    )
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in EXPRESSIONS[pre]]
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    for special in (True, False):
        wanted = (CONTROL, UNKNOWN) if special else (USER_DEFINED,)
        found = [RustAdded(t, special=special, normalized=False) for i, t in enumerate(tokens) if types[i] in wanted and t]
        (inner.add_special_tokens if special else inner.add_tokens)(found)
    return RustEncoder(inner, tokens)


def _merge(text, index, where):
    """The two halves of a merge. A half may begin with a blank, so the separator is looked for after the first character."""
    at = text.find(" ", 1)
    if at < 0 or at + 1 == len(text):
        raise FormatError(f"{where}: tokenizer.ggml.merges[{index}] is {text!r}; expected two pieces with a blank between")
    return text[:at], text[at + 1 :]
