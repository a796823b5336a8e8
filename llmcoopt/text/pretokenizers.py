"""How GGUF's tokenizer.ggml.pre names split text before byte-level BPE: each name stands for regular expressions, applied one after another."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"


def _modern(digits: str, letters: str = r"\p{L}") -> list[str]:
    """Contractions, words with one leading mark, numbers, marks, blanks. `letters` is what words are made of, to stand inside brackets."""
    return [rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}| ?[^\s{letters}\p{{N}}]+[\r\n]*|{_TAIL}"]


def _cased(digits: str, contractions: str) -> list[str]:
    """Words split where lower case meets upper case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    mark = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{mark}{upper}*{lower}+{contractions}|{mark}{upper}+{lower}*{contractions}"
    return [rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"]


_LLAMA3 = _modern(r"\p{N}{1,3}")
_QWEN2 = _modern(r"\p{N}")
_DIGITS_GPT2 = [r"\p{N}", _GPT2]
_DEFAULT = [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]


def _all(names: list[str], expressions: list[str]) -> dict[str, list[str]]:
    return {name: expressions for name in names}


EXPRESSIONS: dict[str, list[str]] = {
    "default": _DEFAULT,
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        _CJK,
        rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}",
    ],
    "qwen35": _modern(r"\p{N}", r"\p{L}\p{M}"),
    "tekken": _cased(r"\p{N}", ""),
    "gpt-4o": _cased(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),
    "llama4": _cased(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),
}
EXPRESSIONS |= _all(["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "mellum", "gigachat"], [_GPT2])
EXPRESSIONS |= _all(["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"], _DIGITS_GPT2)
EXPRESSIONS |= _all(["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"], _LLAMA3)
EXPRESSIONS |= _all(["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], _LLAMA3)
EXPRESSIONS |= _all(["qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "kormo"], _QWEN2)

# A word that is a piece as it stands is taken whole, whatever the merges say.
IGNORE_MERGES = frozenset(["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"])
# Names whose vocabulary wants a beginning-of-text token where tokenizer.ggml.add_bos_token is missing.
ADD_BOS = IGNORE_MERGES
