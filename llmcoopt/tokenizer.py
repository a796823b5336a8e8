"""Text <-> token ids. `Tokenizer.from_pretrained` reads a Hugging Face folder, a SentencePiece model or a GGUF file; the names are Hugging Face's."""

import operator
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from . import chat
from .errors import ArgumentError
from .loaders.gguf import read_metadata
from .loaders.hub import resolve
from .text import folder, gguf_vocab
from .text.detokenizer import ByteStream, WindowStream, byte_level_bytes
from .text.facts import TokenizerFacts
from .text.rust import RustEncoder
from .text.sentencepiece import SentencePieceEncoder


class Tokenizer:
    """Encodes text to ids and decodes ids to text.

    tokenizer = Tokenizer.from_pretrained("tiny")
    ids = tokenizer.encode("Once upon a time")
    text = tokenizer.decode(ids, skip_special_tokens=True)

    Attributes: bos_token, eos_token, pad_token, unk_token (text or None) and the same with _id; eos_token_ids: every id that ends a generation;
    chat_template: the default template or None; chat_templates: all of them by name; source: where it was read from."""

    def __init__(self, encoder: RustEncoder | SentencePieceEncoder, facts: TokenizerFacts):
        self._encoder = encoder
        self._facts = facts
        self.source = facts.source
        self.padding_side = facts.padding_side
        self.chat_templates: dict[str, str] = facts.chat_templates
        self.all_special_ids: frozenset[int] = encoder.special_ids

    @classmethod
    def from_pretrained(cls, name_or_path, revision: str | None = None) -> "Tokenizer":
        """Reads the tokenizer of a model: a folder with tokenizer.json or tokenizer.model, one such file, a .gguf file, "tiny", or a hub id.

        Raises MissingFileError, FormatError and UnsupportedError, each naming the file and what is wrong in it."""
        path = resolve(name_or_path, revision)
        if path.is_dir():
            return cls(*folder.load_folder(path))
        if path.suffix in (".json", ".model"):
            return cls(*folder.load_file(path))
        return cls.from_gguf_metadata(read_metadata(path), str(path))

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping, source: str = "GGUF metadata") -> "Tokenizer":
        """The tokenizer that a GGUF file's metadata (key -> value) holds."""
        return cls(*gguf_vocab.from_metadata(metadata, source))

    # --- encoding ---

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]:
        """The ids of `text`; nothing is stripped.

        add_special_tokens: adds what the model wants around a text (often a beginning token). A text that begins with the beginning token
        itself gets one, not two, with a warning. parse_special: special tokens in the text become their ids; False takes them as plain
        text, for text that is not to be trusted."""
        if not isinstance(text, str):
            raise ArgumentError(f"text is {reprlib.repr(text)} ({type(text).__name__}); expected str")
        raw = _utf8(text)
        lost = self._encoder.lost_bytes
        if lost and (count := len(raw) - len(raw.translate(None, lost))):
            warnings.warn(f"{self.source}: {count} bytes of the text have no token in the vocabulary and are lost", stacklevel=2)
        ids = self._encoder.encode(text, parse_special)
        return self._surround(ids) if add_special_tokens else ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True, *, parse_special: bool = True) -> list[list[int]]:
        """The ids of each text."""
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise ArgumentError(f"texts is {reprlib.repr(texts)} ({type(texts).__name__}); expected a list of str")
        return [self.encode(text, add_special_tokens, parse_special=parse_special) for text in texts]

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        *,
        padding: bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> dict:
        """{'input_ids', 'attention_mask'} of a text, or lists of them for a list of texts.

        padding: to the longest of the list, on `padding_side`, with the pad token (the end token where there is none). truncation: cuts to
        max_length ids at the end. return_tensors: None for lists, "np" for int64 arrays [texts, ids]."""
        if return_tensors not in (None, "np"):
            raise ArgumentError(f"return_tensors is {return_tensors!r}; expected None or 'np'")
        if truncation and (not isinstance(max_length, int) or max_length < 1):
            raise ArgumentError(f"max_length is {max_length!r}; truncation needs a number from 1 on")
        single = isinstance(text, str)
        rows = self.encode_batch([text] if single else text, add_special_tokens)
        if truncation:
            rows = [row[:max_length] for row in rows]
        masks = [[1] * len(row) for row in rows]
        if padding and not single:
            rows, masks = self._pad(rows, masks)
        if return_tensors == "np":
            if len({len(row) for row in rows}) > 1:
                raise ArgumentError(f"the {len(rows)} texts have different numbers of ids; pass padding=True to make an array of them")
            return {"input_ids": np.array(rows, np.int64), "attention_mask": np.array(masks, np.int64)}
        return {"input_ids": rows[0], "attention_mask": masks[0]} if single else {"input_ids": rows, "attention_mask": masks}

    def _pad(self, rows, masks):
        pad = self.pad_token_id if self.pad_token_id is not None else self.eos_token_id
        if pad is None:
            raise ArgumentError(f"{self.source}: neither a pad token nor an end token to pad with")
        width = max(map(len, rows), default=0)
        fill = [width - len(row) for row in rows]
        if self.padding_side == "left":
            return [[pad] * n + r for n, r in zip(fill, rows, strict=True)], [[0] * n + m for n, m in zip(fill, masks, strict=True)]
        return [r + [pad] * n for n, r in zip(fill, rows, strict=True)], [m + [0] * n for n, m in zip(fill, masks, strict=True)]

    def _surround(self, ids):
        before, after = self._facts.before, self._facts.after
        if before and ids and before[-1] == ids[0] == self.bos_token_id:
            warnings.warn(f"the text begins with {self.bos_token!r} already; it is not added a second time", stacklevel=3)
            before = before[:-1]
        return [*before, *ids, *after]

    # --- decoding ---

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ids (a list, an array [n], or one id). Bytes that are no UTF-8 become U+FFFD.

        In runs of byte tokens the whole characters are kept and only the broken bytes are replaced, as SentencePiece does. Punctuation is
        not moved (no clean_up_tokenization_spaces)."""
        checked = self._checked(ids)
        if skip_special_tokens:
            checked = [i for i in checked if i not in self.all_special_ids]
        detokenizer = self._encoder.detokenizer
        return self._encoder.decode(checked) if detokenizer is None else detokenizer.decode(checked)

    def batch_decode(self, rows: Iterable[Iterable[int]], skip_special_tokens: bool = False) -> list[str]:
        """The text of each row of ids."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def stream_decoder(self) -> ByteStream | WindowStream:
        """put(id) -> text, finish() -> text: decodes one id at a time. TextStream adds special tokens and stop strings."""
        detokenizer = self._encoder.detokenizer
        return WindowStream(self._encoder.decode) if detokenizer is None else detokenizer.stream()

    def id_to_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for inside a text: a byte token gives its byte, a special token its name."""
        token_id = self.check_id(token_id)
        detokenizer = self._encoder.detokenizer
        if detokenizer is not None:
            return detokenizer.piece(token_id)
        return byte_level_bytes(self._encoder.token(token_id) or "")

    def check_id(self, token_id: int) -> int:
        """The id as an int. Raises ArgumentError unless it is a whole number below the vocabulary's size."""
        try:
            value = operator.index(token_id)
        except TypeError:
            value = None
        if value is None or isinstance(token_id, bool):
            raise ArgumentError(f"id {token_id!r} is {type(token_id).__name__}; expected int")
        if not 0 <= value < self._encoder.size:
            raise ArgumentError(f"id {value} is outside the vocabulary of {self._encoder.size} tokens ({self.source})")
        return value

    def _checked(self, ids):
        if isinstance(ids, str | bytes) or ids is None:
            raise ArgumentError(f"ids is {reprlib.repr(ids)} ({type(ids).__name__}); expected a list of int")
        if hasattr(ids, "tolist"):
            ids = ids.tolist()
        if not isinstance(ids, Iterable):
            ids = [ids]
        return list(map(self.check_id, ids))

    # --- vocabulary ---

    @property
    def vocab_size(self) -> int:
        """Tokens of the model's vocabulary, without those added later; len(tokenizer), the largest id + 1, counts these too."""
        return self._encoder.base_size

    def __len__(self) -> int:
        return self._encoder.size

    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | list[str]:
        """The tokens as the vocabulary writes them ("Ġthe", "▁the", "<0x0A>")."""
        tokens = [self._encoder.token(i) or "" for i in self._checked(ids)]
        return tokens if isinstance(ids, Iterable) else tokens[0]

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int | None] | None:
        """The id of each token; the unknown token's for one that is not there, None where there is no unknown token."""
        wanted = [tokens] if isinstance(tokens, str) else list(tokens)
        bad = next((token for token in wanted if not isinstance(token, str)), None)
        if bad is not None:
            raise ArgumentError(f"token {bad!r} is {type(bad).__name__}; expected str")
        found = [self._encoder.id(token) for token in wanted]
        found = [self.unk_token_id if i is None else i for i in found]
        return found[0] if isinstance(tokens, str) else found

    def get_vocab(self) -> dict[str, int]:
        """token -> id of all tokens."""
        tokens = ((self._encoder.token(i), i) for i in range(len(self) - 1, -1, -1))
        return {token: i for token, i in tokens if token is not None}

    bos_token = property(lambda self: self._facts.special.get("bos_token"))
    eos_token = property(lambda self: self._facts.special.get("eos_token"))
    pad_token = property(lambda self: self._facts.special.get("pad_token"))
    unk_token = property(lambda self: self._facts.special.get("unk_token"))
    bos_token_id = property(lambda self: self._special_id("bos_token"))
    eos_token_id = property(lambda self: self._special_id("eos_token"))
    pad_token_id = property(lambda self: self._special_id("pad_token"))
    unk_token_id = property(lambda self: self._special_id("unk_token"))

    @property
    def eos_token_ids(self) -> list[int]:
        """Every id that ends a generation: the end token's, and those of generation_config.json, config.json or the GGUF metadata."""
        return list(self._facts.end_ids)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Name ("bos_token", ...) -> token."""
        return dict(self._facts.special)

    def _special_id(self, name):
        token = self._facts.special.get(name)
        return None if token is None else self._encoder.id(token)

    # --- chat ---

    @property
    def chat_template(self) -> str | None:
        """The template that apply_chat_template uses by default; None where the checkpoint has none."""
        return self.chat_templates.get("default")

    def apply_chat_template(
        self,
        messages: Sequence,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        chat_template: str | None = None,
        tools: Sequence | None = None,
        continue_final_message: bool = False,
        return_dict: bool = False,
        **context,
    ):
        """The ids (tokenize=False: the text) of a conversation, a list of {"role", "content"}; of a list of conversations, a list.

        The template writes all special tokens, so none are added. chat_template: a template, or the name of one of `chat_templates`.
        add_generation_prompt: ends with the beginning of an answer. continue_final_message: ends inside the last message. return_dict:
        {'input_ids', 'attention_mask'}. Other keywords are passed to the template.

        Raises ArgumentError for messages of a wrong form and where there is no template; TemplateError (a FormatError) where the template
        fails or refuses the messages."""
        many = (
            isinstance(messages, Sequence)
            and len(messages) > 0
            and isinstance(messages[0], Sequence)
            and not isinstance(messages[0], str | bytes)
        )
        options = (add_generation_prompt, chat_template, tools, continue_final_message, context)
        texts = [self._conversation(one, *options) for one in (messages if many else [messages])]
        if not tokenize:
            return texts if many else texts[0]
        rows = [self.encode(text, add_special_tokens=False) for text in texts]
        masks = [[1] * len(row) for row in rows]
        if not many:
            rows, masks = rows[0], masks[0]
        return {"input_ids": rows, "attention_mask": masks} if return_dict else rows

    def _conversation(self, messages, add_generation_prompt, chat_template, tools, continue_final_message, context) -> str:
        if add_generation_prompt and continue_final_message:
            raise ArgumentError("add_generation_prompt and continue_final_message exclude each other")
        template = chat.choose(self.chat_templates, chat_template, bool(tools), self.source)
        values = {**self._facts.special, **context, "tools": list(tools) if tools else None}
        if continue_final_message:
            return chat.render_continued(template, messages, **values)
        return chat.render(template, messages, add_generation_prompt=add_generation_prompt, **values)

    def __repr__(self) -> str:
        names = ", ".join(f"{name.removesuffix('_token')}={token!r}" for name, token in self._facts.special.items())
        template = ", chat template" if self.chat_templates else ""
        return f"Tokenizer({self._encoder.kind}, {len(self)} tokens, {names}{template}, from {self.source!r})"


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        at = error.start
        raise ArgumentError(
            f"text[{at}] is {text[at]!r}, half of a surrogate pair, which is no character; decode the bytes with errors='replace'"
        ) from None
