"""Chat templates: messages to the text a model was trained on. Jinja2 in a sandbox, with the helpers that Hugging Face templates expect.

A template is a program from a file, so it is held in bounds: immutable sandbox, limits on loop rounds and calls, on the text it makes, and on
the strings, lists and powers that its operators make. It cannot see the file system or attributes that begin with an underscore. Methods and
filters that pad a string (center, ljust, str.format) are not limited, but for the filter format, which is the operator %."""

import json
import re
import reprlib
import unicodedata
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache

import jinja2
from jinja2 import nodes
from jinja2.exceptions import FilterArgumentError
from jinja2.ext import Extension
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer
from markupsafe import soft_str

from .errors import ArgumentError, Error, FormatError

MAX_ROUNDS = 1_000_000  # rounds of all loops and calls of all functions and macros together
MAX_TEXT = 1 << 26  # characters a template may make
_OWN = "_llmcoopt_"
_COUNTED, _JOINED = f"{_OWN}counted", f"{_OWN}joined"  # loops and ~ go through functions of these names


class TemplateError(FormatError):
    """A chat template is wrong, refused the messages, or ran out of bounds."""


def render(template: str, messages: Sequence[Mapping], *, add_generation_prompt: bool = False, tools=None, **context) -> str:
    """The text of `template` for `messages`. `context` is passed on: bos_token, eos_token, documents, and whatever the template knows."""
    check_messages(messages)
    compiled = _compile(template)
    parts, size = [], 0
    values = {**context, "messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt, _COUNTED: _Rounds()}
    try:
        for part in compiled.generate(values):
            size += len(part)
            if size > MAX_TEXT:
                raise TemplateError(f"chat template: more than {MAX_TEXT} characters of text")
            parts.append(part)
    except Error:
        raise
    except RecursionError:
        raise TemplateError("chat template: it calls itself without end") from None
    except SecurityError as error:
        raise TemplateError(f"chat template: refused by the sandbox: {error}") from error
    except Exception as error:
        raise TemplateError(f"chat template{_place(error)}: {type(error).__name__}: {error}") from error
    return "".join(parts)


def render_continued(template: str, messages: Sequence[Mapping], **context) -> str:
    """The text up to the end of the last message's content, so that a model goes on writing that message. Blanks at the content's end stay
    unless the template strips them. The end is found by a mark that the content gets, a number that no text holds by chance."""
    mark = str(uuid.uuid4().int)
    text = render(template, _marked(messages, mark + " "), **context)
    at = text.rfind(mark)
    if at < 0:
        raise ArgumentError(
            f"continue_final_message: the template leaves out the last message's content {reprlib.repr(messages[-1]['content'])}"
        )
    kept = text[:at] if text.startswith(" ", at + len(mark)) else text[:at].rstrip()
    return kept.replace(mark + " ", "").replace(mark, "")  # of templates that write the content twice


def _marked(messages, mark):
    """The messages with `mark` after the last one's content: text, or the last part of a list that has text."""
    check_messages(messages)
    *before, last = messages
    content = last.get("content")
    if isinstance(content, str):
        return [*before, {**last, "content": content + mark}]
    parts = list(content or ())
    for i in reversed(range(len(parts))):
        if isinstance(parts[i], Mapping) and isinstance(parts[i].get("text"), str):
            parts[i] = {**parts[i], "text": parts[i]["text"] + mark}
            return [*before, {**last, "content": parts}]
    raise ArgumentError(f"continue_final_message: the last message has no text to go on with: {reprlib.repr(content)}")


def choose(templates: Mapping[str, str], wanted: str | None, has_tools: bool, source: str) -> str:
    """The template to use: `wanted` is the name of one or a template itself; without it "tool_use" where tools are given, else "default"."""
    if wanted is not None:
        if not isinstance(wanted, str):
            raise ArgumentError(f"chat_template is {type(wanted).__name__}; expected a name or a template as text")
        if wanted in templates:
            return templates[wanted]
        if "{" in wanted:
            return wanted
        names = ", ".join(map(repr, templates)) or "none"
        raise ArgumentError(f"chat_template is {wanted!r}, which is neither a template nor the name of one ({source} has: {names})")
    if has_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    if not templates:
        raise ArgumentError(
            f"{source}: no chat template. Pass one: chat_template='{{% for m in messages %}}...{{% endfor %}}', "
            "or put chat_template.jinja beside the tokenizer"
        )
    raise ArgumentError(f"{source}: the chat templates are {', '.join(map(repr, templates))}, none is 'default'; pass chat_template=NAME")


def check_messages(messages) -> None:
    """Raises ArgumentError unless messages is a sequence of {"role": text, "content": text, list of parts, or None}."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ArgumentError(
            f"messages is {reprlib.repr(messages)} ({type(messages).__name__}); expected a list of {{'role': ..., 'content': ...}}"
        )
    if not messages:
        raise ArgumentError("messages is empty; expected at least one {'role': ..., 'content': ...}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ArgumentError(
                f"messages[{i}] is {reprlib.repr(message)} ({type(message).__name__}); expected {{'role': ..., 'content': ...}}"
            )
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise ArgumentError(f"messages[{i}]['role'] is {role!r}; expected text such as 'user'")
        content = message.get("content")
        if "content" not in message and "tool_calls" not in message:
            raise ArgumentError(f"messages[{i}] ({role}) has no 'content'; it has {', '.join(map(repr, message))}")
        if content is not None and (isinstance(content, bytes) or not isinstance(content, str | Sequence)):
            raise ArgumentError(f"messages[{i}]['content'] is {type(content).__name__}; expected text or a list of parts")


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what the assistant wrote, for training; here the text inside is plain text."""

    tags = frozenset(["generation"])

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Rounds:
    """Counts the loop rounds and the calls of one rendering. Called with what a loop runs over, it gives the same, counted."""

    def __init__(self):
        self.rounds = 0

    def take(self):
        self.rounds += 1
        if self.rounds > MAX_ROUNDS:
            raise TemplateError(f"chat template: more than {MAX_ROUNDS} loop rounds and calls")

    def __call__(self, items):
        for item in items:
            self.take()
            yield item


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def call(__self, __context, __obj, *args, **kwargs):  # named as in Jinja2: a template's keyword may be `context`
        """Every call in a template comes here, macros and the inner rounds of recursive loops included."""
        rounds = __context.resolve_or_missing(_COUNTED)
        if isinstance(rounds, _Rounds) and __obj is not rounds:  # while compiling there is nothing to count
            rounds.take()
            if isinstance(__obj, LoopContext) and args:
                args = (rounds(args[0]), *args[1:])
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context, operator, left, right):
        if operator == "%" and isinstance(left, str | bytes):
            _check_format(left, right)
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__") and len(left) + len(right) > MAX_TEXT:
            raise SecurityError("a sum of two texts or lists is too large")
        if operator == "**" and not (abs(left) <= 1 << 16 and abs(right) <= 64):
            raise SecurityError(f"{left} ** {right} is too large")
        for repeated, times in ((left, right), (right, left)) if operator == "*" else ():
            if hasattr(repeated, "__len__") and isinstance(times, int) and len(repeated) * times > MAX_TEXT:
                raise SecurityError(f"a text or list repeated {times} times is too large")
        return super().call_binop(context, operator, left, right)


# "%(name)-08.3d": width and precision, either a number or a star, which takes it from the values
_CONVERSION = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|[0-9]*)(?:\.(\*|[0-9]*))?")


def _check_format(form, values):
    """Refuses `form % values` where widths, precisions and values may make too large a text."""
    form = form.decode("latin-1") if isinstance(form, bytes) else form
    if isinstance(values, Mapping):
        values = list(values.values())
    elif not isinstance(values, tuple):
        values = [values]
    star = max((abs(value) for value in values if isinstance(value, int)), default=0)
    longest = max((len(value) if isinstance(value, str | bytes) else len(str(value)) for value in values), default=0)
    size = len(form)
    for conversion in _CONVERSION.finditer(form):
        numbers = [star if number == "*" else int(number[:12]) for number in conversion.groups() if number]
        size += longest + sum(numbers)
        if size > MAX_TEXT:
            raise SecurityError("a text made with % is too large")


def _format(value, *args, **kwargs):
    """Jinja2's filter, held in the bounds of %."""
    if args and kwargs:
        raise FilterArgumentError("can't handle positional and keyword arguments at the same time")
    form = soft_str(value)
    _check_format(form, kwargs or args)
    return form % (kwargs or args)


def _joined(*parts):
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) > MAX_TEXT:
        raise SecurityError("a text made with ~ is too large")
    return "".join(texts)


def _raise_exception(message):
    raise TemplateError(f"the chat template refuses the messages: {message}")


def _strftime_now(form):
    return datetime.now().strftime(form)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON as Hugging Face templates expect it: no HTML escapes, keys in order, text as it is."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Bounded(NodeTransformer):
    """Sends what loops run over, and the operands of ~, through the functions that count."""

    def visit_For(self, node):
        self.generic_visit(node)
        node.iter = self._call(_COUNTED, [node.iter], node)
        return node

    def visit_Concat(self, node):
        self.generic_visit(node)
        return self._call(_JOINED, node.nodes, node)

    def _call(self, name, arguments, node):
        return nodes.Call(nodes.Name(name, "load"), arguments, [], None, None).set_lineno(node.lineno)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    environment.filters["format"] = _format
    environment.globals[_JOINED] = _joined
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    if _OWN in unicodedata.normalize("NFKC", template):  # as Python reads names
        raise TemplateError(f"chat template: names with {_OWN} are not for templates")
    environment = _environment()
    try:
        tree = _Bounded().visit(environment.parse(template))
        return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))
    except jinja2.TemplateSyntaxError as error:
        lines = template.splitlines()
        shown = f": {reprlib.repr(lines[error.lineno - 1].strip())}" if 0 < error.lineno <= len(lines) else ""
        raise TemplateError(f"chat template, line {error.lineno}{shown}: {error.message}") from None
    except RecursionError:
        raise TemplateError("chat template: nested too deeply") from None


def _place(error) -> str:
    """', line N' of the template where a run-time error arose."""
    line, trace = None, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f", line {line}" if line else ""
