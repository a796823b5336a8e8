"""The command line: what it prints, its JSON and its exit codes."""

import json
import os
import signal
import subprocess
import sys

import pytest

from llmcoopt import __version__
from llmcoopt.cli import main


def run(capsys, *argv):
    code = main(list(argv))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and __version__ in capsys.readouterr().out


def test_info(capsys):
    code, out, _ = run(capsys, "info", "tiny")
    assert code == 0 and "kv heads" in out
    code, out, _ = run(capsys, "info", "tiny", "--json")
    facts = json.loads(out)
    assert facts["heads"] == facts["kv_heads"] == 8 and facts["head_dim"] == 32 and facts["vocab_size"] == 2048


def test_generate(capsys):
    arguments = ["generate", "tiny", "--prompt", "Once upon a time", "--max-new-tokens", "8", "--temperature", "0"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out.startswith("Once upon a time")
    code, text, _ = run(capsys, *arguments, "--json")
    result = json.loads(text)
    assert out == "Once upon a time" + result["text"] + "\n"
    assert len(result["ids"]) == len(result["logprobs"]) == 8 and result["finish_reason"] == "length"


def test_prompt_from_standard_input(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.read", lambda: "Lily and Tom", raising=False)
    code, out, _ = run(capsys, "generate", "tiny", "--prompt", "-", "--max-new-tokens", "2")
    assert code == 0 and out.startswith("Lily and Tom")


def test_demo(capsys):
    code, out, _ = run(capsys, "demo", "--max-new-tokens", "40")
    assert code == 0 and "Once upon a time" in out and "tokens/s" in out and "cache" in out and "memory" in out
    code, out, _ = run(capsys, "demo", "--max-new-tokens", "5", "--json")
    facts = json.loads(out)
    assert facts["new_tokens"] == 5 and facts["decode_tokens_per_second"] > 0 and facts["cache_bytes"] > 0


def test_errors_are_one_line_and_code_1(capsys, tmp_path):
    for argv in (
        ["info", str(tmp_path / "nothing")],
        ["generate", "tiny", "--prompt", "x", "--temperature", "-1"],
        ["chat", "tiny", "--prompt", "x"],
    ):
        code, out, err = run(capsys, *argv)
        assert code == 1 and out == "" and err.startswith("llmcoopt: ") and err.count("\n") == 1, argv


def test_wrong_usage_is_code_2(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["generate"])
    assert exit.value.code == 2
    capsys.readouterr()


def test_chat_as_json_needs_a_question(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["chat", "no/such/model", "--json"])
    assert exit.value.code == 2
    out = capsys.readouterr()
    assert out.out == "" and "--json needs --prompt" in out.err


def test_interrupt_is_code_130():
    """On the portable code, which is slow enough to be interrupted in the middle; temperature and seed keep the text from ending early."""
    code = "import sys; from llmcoopt.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ["--max-new-tokens", "900", "--temperature", "3", "--seed", "1"]
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", code, "generate", "tiny", "--prompt", "Once", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "LLMCOOPT_ISA": "ref"},
    )
    child.stdout.read(12)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"interrupted" in err and b"Traceback" not in err
