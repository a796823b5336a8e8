"""Chat templates: what they may do, what they must not, and what the messages must look like."""

import random
import re
import time

import pytest

from llmcoopt import Tokenizer, chat, errors

USER = [{"role": "user", "content": "Hi"}]
CHATML = (
    "{%- for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TOOLS = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}|{{ tool | tojson(indent=2) }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% if loop.last %}.{% else %},{% endif %}{% endfor %}{{ loop is defined }}"
)
CONVERSATION = [
    {"role": "system", "content": "Be <b>brief</b> & 'kind'."},
    {"role": "user", "content": " Hello \u00e9\u4f60 "},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And?"},
]
TOOL = {"type": "function", "function": {"name": "f", "description": "a < b & 'c' \u00e9", "parameters": {"z": 1, "a": [True, None]}}}


def test_the_text_of_common_templates():
    assert chat.render(CHATML, USER, add_generation_prompt=True) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render(LLAMA2, CONVERSATION[1:3], bos_token="<s>", eos_token="</s>") == "<s>[INST] Hello \u00e9\u4f60 [/INST] Yes. </s>"
    found = chat.render(TOOLS, [*USER, {"role": "skip", "content": "x"}, *USER], tools=[TOOL])
    assert found.startswith(
        '{"type": "function", "function": {"name": "f", "description": "a < b & \'c\' \u00e9", "parameters": {"z": 1, "a": [true'
    )
    assert found.endswith("}\nHi,Hi.False")
    assert re.fullmatch(r"\d{4}-\d\d", chat.render("{{ strftime_now('%Y-%m') }}", USER))
    assert chat.render("{{ messages[0].role ~ ': ' ~ 1 ~ none ~ nothing }}", USER) == "user: 1None"
    assert chat.render("{% if true %}\n  x\n  {% endif %}\n", USER) == "  x\n"  # trim_blocks and lstrip_blocks


@pytest.mark.parity
@pytest.mark.parametrize("template", [CHATML, LLAMA2, TOOLS])
def test_the_text_equals_transformers(template):
    module = pytest.importorskip("transformers.utils.chat_template_utils")
    compiled = module._compile_jinja_template(template)
    for tools in (None, [TOOL]):
        for prompt in (False, True):
            values = {"bos_token": "<s>", "eos_token": "</s>"}
            expected = compiled.render(messages=CONVERSATION, tools=tools, add_generation_prompt=prompt, **values)
            assert chat.render(template, CONVERSATION, tools=tools, add_generation_prompt=prompt, **values) == expected


def test_loop_variables_survive_the_round_counter():
    seen = "{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}{{ loop.previtem.content if loop.previtem }} "
    template = "{% for m in messages %}" + seen + "{% endfor %}"
    two = [*USER, {"role": "user", "content": "b"}]
    assert chat.render(template, two) == "1/2TrueFalse 2/2FalseTrueHi "
    assert chat.render("{% for x in nothing %}{{ x }}{% else %}none{% endfor %}", USER) == "none"
    assert chat.render("{% for k, v in messages[0] | items if k == 'role' %}{{ v }}{% endfor %}", USER) == "user"
    nested = "{% for i in range(3) %}{% if i == 2 %}{% break %}{% endif %}{% for j in range(2) %}{{ i }}{{ j }} {% endfor %}{% endfor %}"
    assert chat.render(nested, USER) == "00 01 10 11 "


@pytest.mark.parametrize(
    "template, text",
    [
        ("{{ ''.__class__.__mro__ }}", "sandbox"),
        ("{{ messages.append({}) }}", "sandbox"),
        ("{{ 'x' * 10 ** 9 }}", "too large"),
        ("{{ 10 ** 10 ** 10 }}", "too large"),
        ("{{ [0] * 1000000000 }}", "too large"),
        ("{{ '%0400000000d' % 1 }}", "% is too large"),
        ("{{ '%.400000000d' % 1 }}", "% is too large"),
        ("{{ '%(a)400000000s' % {'a': 1} }}", "% is too large"),
        ("{{ '%*d' % (400000000, 1) }}", "% is too large"),
        ("{{ '%*d' % (-400000000, 1) }}", "% is too large"),
        ("{{ '%99999999999999999999999d' % 1 }}", "% is too large"),
        ("{{ '%0400000000d'.encode() % 1 }}", "% is too large"),
        ("{{ '%0400000000d' | format(1) }}", "% is too large"),
        ("{{ '%(a)400000000d' | format(a=1) }}", "% is too large"),
        ("{% set a = 'x' * 40000000 %}{{ '%s%s' % (a, a) }}", "% is too large"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}", "loop rounds and calls"),
        ("{% for x in [40] recursive %}{{ loop([x - 1, x - 1]) if x }}{% endfor %}", "loop rounds and calls"),
        ("{% for x in [1] recursive %}{% if loop.depth < 5 %}{{ loop(range(90000)) }}{% endif %}{% endfor %}", "loop rounds and calls"),
        ("{% set _llmcoopt_counted = range %}", "not for templates"),
        ("{% for i in range(10 ** 6) %}{% endfor %}", "[Rr]ange"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "loop rounds"),
        ("{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "~ is too large"),
        (
            "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "sum of two texts or lists is too large",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "without end"),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "characters of text"),
        ("{{ messages[5].content }}", "line 1: UndefinedError"),
        ("a\n{{ 1 + 'x' }}", "line 2: TypeError"),
        ("a\n{% if %}", "line 2"),
        ("{% for m in messages %}", "line 1.*Unexpected end"),
        ("{{ nothing() }}", "UndefinedError: 'nothing' is undefined"),
        ("{% include 'x' %}", "line 1"),
        ("{{ raise_exception('no system role') }}", "refuses the messages: no system role"),
        ("{{ (" * 500, "line 1|too deeply"),
    ],
)
def test_bad_templates_fail_soon_and_say_why(template, text):
    started = time.perf_counter()
    with pytest.raises(chat.TemplateError, match=text) as caught:
        chat.render(template, USER)
    assert isinstance(caught.value, errors.FormatError)
    assert time.perf_counter() - started < 20


def test_the_bounds_leave_usual_work_alone():
    assert chat.render("{{ '%s: %5.1f|%-4d|%%|%x' % ('a', 2.25, 7, 255) }}{{ 7 % 3 }}{{ -7 % 3 }}", USER) == "a:   2.2|7   |%|ff12"
    assert chat.render("{{ '%(a)s%(b)03d' % {'a': 'x', 'b': 5} }}{{ '%*d' % (4, 1) }}", USER) == "x005   1"
    assert chat.render("{{ '%s-%d' | format('a', 2) }}{{ '%(k)s' | format(k=3) }}", USER) == "a-23"
    assert chat.render("{% macro f(context, n) %}{{ context }}{{ n }}{% endmacro %}{{ f(context=3, n=4) }}", USER) == "34"
    assert chat.render("{% macro f() %}<{{ caller(1) }}>{% endmacro %}{% call(x) f() %}{{ x }}{% endcall %}", USER) == "<1>"
    tree = "{% for x in [3] recursive %}{{ x }}{{ loop.depth }}{{ loop([x - 1, x - 2]) if x > 1 }}{% endfor %}"
    assert chat.render(tree, USER) == "3122130312"
    macro = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% else %}x{% endif %}{% endmacro %}{{ f(10) | length }}"
    for _ in range(2):  # each rendering counts anew
        assert chat.render(macro, USER) == "1024"


@pytest.mark.parametrize(
    "messages, text",
    [
        ("Hi", r"messages is 'Hi' \(str\)"),
        ({"role": "user"}, r"\(dict\); expected a list"),
        ([], "messages is empty"),
        (None, "NoneType"),
        (["Hi"], r"messages\[0\] is 'Hi'"),
        ([*USER, {"content": "x"}], r"messages\[1\]\['role'\] is None"),
        ([{"role": 3, "content": "x"}], r"\['role'\] is 3"),
        ([{"role": "user", "text": "x"}], r"messages\[0\] \(user\) has no 'content'; it has 'role', 'text'"),
        ([{"role": "user", "content": 7}], r"\['content'\] is int"),
        ([{"role": "user", "content": b"7"}], r"\['content'\] is bytes"),
    ],
)
def test_messages_are_checked(messages, text):
    with pytest.raises(errors.ArgumentError, match=text):
        chat.render(CHATML, messages)


def test_choice_of_the_template():
    two = {"default": "one", "rag": "two"}
    assert chat.choose(two, None, False, "x") == "one"
    assert chat.choose(two, "rag", False, "x") == "two"
    assert chat.choose(two, "{{ 1 }}", False, "x") == "{{ 1 }}"
    with pytest.raises(errors.ArgumentError, match=r"neither a template nor the name of one \(x has: 'default', 'rag'"):
        chat.choose(two, "other", False, "x")
    with pytest.raises(errors.ArgumentError, match=r"folder/tokenizer\.json: no chat template\. Pass one: chat_template="):
        chat.choose({}, None, False, "folder/tokenizer.json")
    with pytest.raises(errors.ArgumentError, match="none is 'default'"):
        chat.choose({"rag": "two"}, None, False, "x")


def tokenizer_with(template):
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "H", "i", "Hi", "<|im_start|>", "<|im_end|>"]
    return Tokenizer.from_gguf_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces + [f"<0x{b:02X}>" for b in range(256)],
            "tokenizer.ggml.scores": [0.0] * 3 + [-1.0, -2.0, -3.0, -4.0, 0.0, 0.0] + [0.0] * 256,
            "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 3, 3] + [6] * 256,
            "tokenizer.ggml.add_space_prefix": False,
            **({"tokenizer.chat_template": template} if template else {}),
        }
    )


def test_apply_chat_template_gives_ids_without_additions():
    tokenizer = tokenizer_with("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    assert tokenizer.apply_chat_template(USER) == [1, 7, 6, 8]
    assert tokenizer.apply_chat_template(USER, tokenize=False) == "<s><|im_start|>Hi<|im_end|>"
    assert tokenizer.apply_chat_template([USER, USER]) == [[1, 7, 6, 8]] * 2
    assert tokenizer.apply_chat_template(USER, return_dict=True) == {"input_ids": [1, 7, 6, 8], "attention_mask": [1] * 4}
    assert tokenizer.eos_token_ids == [2, 8]
    with pytest.raises(errors.ArgumentError, match=r"no chat template\. Pass one"):
        tokenizer_with(None).apply_chat_template(USER)


def test_continue_final_message():
    tokenizer = tokenizer_with(CHATML)
    last = [*USER, {"role": "assistant", "content": "Hi "}]
    assert tokenizer.apply_chat_template(last, tokenize=False, continue_final_message=True).endswith("<|im_start|>assistant\nHi ")
    stripping = "{% for m in messages %}[{{ m.content.strip() }}]{% endfor %}"
    assert tokenizer.apply_chat_template(last, tokenize=False, chat_template=stripping, continue_final_message=True) == "[Hi][Hi"
    with pytest.raises(errors.ArgumentError, match="exclude each other"):
        tokenizer.apply_chat_template(last, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(errors.ArgumentError, match="leaves out the last message's content"):
        tokenizer.apply_chat_template(last, chat_template="{{ 1 }}", continue_final_message=True)


def test_context_reaches_the_template():
    tokenizer = tokenizer_with("{{ eos_token }}{{ enable_thinking }}{{ tools | length if tools }}")
    assert tokenizer.apply_chat_template(USER, tokenize=False, enable_thinking=False, tools=[TOOL]) == "</s>False1"


def test_the_end_of_the_last_message_is_its_own():
    """Not a place where a template's own text, or another message, has the same letters."""
    tokenizer = tokenizer_with("{% for m in messages %}[{{ m.content }}<|end|>{% endfor %}the end")

    def continued(content, **options):
        messages = [*USER, {"role": "assistant", "content": content}]
        return tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True, **options)

    for content in ("e", "end", "end ", "Hi", " \n", "", "|end|>"):
        assert continued(content) == "[Hi<|end|>[" + content
    parts = "{% for m in messages %}{% for p in m.content %}{{ p.text if p is mapping else p }};{% endfor %}{% endfor %}"
    assert continued([{"type": "text", "text": "a"}, {"type": "text", "text": ";"}, {"type": "image"}], chat_template=parts) == "H;i;a;;"
    assert continued("Hi ", chat_template="{{ messages[-1].content | trim | upper }}.") == "HI"
    assert continued("Hi", chat_template="{{ messages[-1].content }},{{ messages[-1].content }}.") == "Hi,Hi"
    for content in (None, [], [{"type": "image"}], ["text"]):
        with pytest.raises(errors.ArgumentError, match="the last message has no text to go on with"):
            continued(content, chat_template=parts)


def test_lists_of_conversations_have_one_level():
    tokenizer = tokenizer_with("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert tokenizer.apply_chat_template((USER, USER * 2), tokenize=False) == ["Hi", "HiHi"]
    with pytest.raises(errors.ArgumentError, match=r"messages\[0\] is \[.* \(list\); expected"):
        tokenizer.apply_chat_template([[USER]])
    with pytest.raises(errors.ArgumentError, match="messages is empty"):
        tokenizer.apply_chat_template([USER, []])


NESTED = {
    "as text": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.content | length }}{% endfor %}",
    "json": "{% for m in messages %}{{ m | tojson }}{{ m.content | tojson(indent=2) }}{% endfor %}",
    "filters": "{% for m in messages %}{{ m.content | map(attribute='text') | join(',') }}{{ (m.content | list)[::-1] }}|{% endfor %}",
    "parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p is mapping %}"
    "{{ p.text if p.type == 'text' else p.type }}{% else %}{{ p }}{% endif %};{% endfor %}{% endif %}{% endfor %}",
    "recursive": "{% for m in messages %}{% for p in m.content recursive %}{% if p is iterable and p is not string and p is not mapping %}"
    "[{{ loop(p) }}]{% else %}{{ loop.depth }}.{{ loop.index }}/{{ loop.length }}:{{ p }}{{ ',' if not loop.last }}"
    "{% endif %}{% endfor %}{% endfor %}",
}


def any_content(rng, depth=0):
    kind = rng.randrange(9 if depth < 4 else 6)
    if kind < 3:
        return {"type": "text", "text": rng.choice(["hi", "", " <x> & 'q' ", "\u65e5\n"])}
    if kind < 6:
        return [{"type": "image"}, {"type": "image_url", "image_url": {"url": "x?a&b"}}, rng.choice(["s", 1, 2.5, None, True])][kind - 3]
    parts = [any_content(rng, depth + 1) for _ in range(rng.randrange(4))]
    return tuple(parts) if kind == 6 else parts


@pytest.mark.parity
@pytest.mark.parametrize("name", NESTED)
def test_content_of_nested_lists_equals_transformers(name):
    """Also where the last message goes on; of templates that write it twice, transformers leaves its mark in the text."""
    module = pytest.importorskip("transformers.utils.chat_template_utils")
    rng, template, mark = random.Random(4), NESTED[name], "CONTINUE_FINAL_MESSAGE_TAG"
    for n in range(400):
        contents = [rng.choice([" a ", [any_content(rng) for _ in range(rng.randrange(4))]]) for _ in range(rng.randrange(1, 4))]
        messages = [{"role": rng.choice(["user", "assistant"]), "content": content} for content in contents]
        if n % 2 and any(isinstance(part, dict) and "text" in part for part in contents[-1]):
            options = {"chat_template": template, "add_generation_prompt": False, "continue_final_message": True}
            if any(isinstance(part, str) or not hasattr(part, "__contains__") for part in contents[-1]):
                continue  # which transformers looks into as if they were parts
            expected = module.render_jinja_template([messages], **options)[0][0]
            expected = expected.replace(f"{mark} ", "").replace(mark, "")
            if name != "as text":  # its length counts the mark
                assert chat.render_continued(template, messages) == expected
        expected = module._compile_jinja_template(template).render(messages=messages, add_generation_prompt=False)
        assert chat.render(template, messages) == expected
