"""What a checkpoint says about its tokenizer besides the vocabulary."""

from dataclasses import dataclass, field

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass
class TokenizerFacts:
    """special: name ("bos_token", ...) -> token. before, after: ids around every encoded text. end_ids: every id that ends a generation."""

    source: str
    special: dict[str, str] = field(default_factory=dict)
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    end_ids: list[int] = field(default_factory=list)
    chat_templates: dict[str, str] = field(default_factory=dict)
    padding_side: str = "left"


def surround(before: list[int], after: list[int], bos, eos, add_bos: bool | None, add_eos: bool | None) -> tuple[list[int], list[int]]:
    """before and after with a beginning and an end token added (True), removed (False) or as they are (None)."""
    if add_bos is False:
        before = [i for i in before if i != bos]
    elif add_bos and bos is not None and bos not in before:
        before = [bos, *before]
    if add_eos is False:
        after = [i for i in after if i != eos]
    elif add_eos and eos is not None and eos not in after:
        after = [*after, eos]
    return before, after
