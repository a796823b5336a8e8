"""llmcoopt quantize: options, what is printed, and exit status."""

import json
import os
import signal
import subprocess
import sys
import time

import checkpoints
import pytest
from small import SHAPE

from llmcoopt.cli import main
from llmcoopt.loaders import lint, load

TINY_TEXT = "Once upon a time there was a girl who had a dog. The dog liked to run in the park. " * 40


def test_quantises(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TINY_TEXT)
    how = [
        "--calib",
        str(tmp_path / "text.txt"),
        "--calib",
        "And then they all went home.",
        "--length",
        "64",
        "--group",
        "64",
        "--threads",
        "2",
    ]
    assert main(["quantize", "tiny", str(tmp_path / "out"), *how, "--desc-act", "--asym", "--bits", "3", "--format", "gptq_v2"]) == 0
    said = capsys.readouterr()
    assert f"{tmp_path / 'out'}: 28 matrices of 3 bits in groups of 64; 7.5 MiB became " in said.out
    assert "layer 4 of 4" in said.err  # the bar
    weight = load(tmp_path / "out").quantized["model.layers.0.mlp.down_proj"]
    assert (weight.bits, weight.group_size) == (3, 64) and weight.zeros is not None and weight.g_idx is not None
    assert lint(tmp_path / "out") == []
    assert main(["generate", str(tmp_path / "out"), "--prompt", "Once upon", "--max-new-tokens", "3"]) == 0


def test_json_and_one_group(tmp_path, capsys):
    assert main(["quantize", "tiny", str(tmp_path / "out"), "--method", "rtn", "--group", "-1", "--bits", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["matrices"] == 28 and report["group"] == -1 and report["tokens"] == 0 and report["bytes"] < report["source_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "calib: none given. GPTQ needs text like what the model will read"),
        (["--calib", "no_such_file.txt"], "tokens ('no_such_file.txt'), expected at least 256"),
        (["--method", "rtn", "--bits", "7"], "bits: found 7, expected one of 2, 3, 4, 8"),
        (["--desc-act", "--order", "static"], "--desc-act means --order columns, but --order is 'static'"),
    ],
)
def test_refuses(tmp_path, capsys, arguments, message):
    assert main(["quantize", "tiny", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_interrupted_by_ctrl_c(tmp_path):
    """The layers that are finished stay, the exit status is 130, and the same command goes on."""
    checkpoints.make(tmp_path / "source", dtype="bfloat16", **(SHAPE | {"num_hidden_layers": 40, "intermediate_size": 1024}))
    (tmp_path / "source" / "tokenizer.json").write_text(tokenizer_of_letters())
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "llmcoopt",
        "quantize",
        str(tmp_path / "source"),
        str(out),
        "--calib",
        "abcdefgh" * 2000,
        "--threads",
        "1",
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while len(list(out.glob(".quantize/layer-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "finished layers are kept" in said and "Traceback" not in said
    names = sorted(path.name for path in (out / ".quantize").iterdir())
    assert 2 <= len(names) - 1 < 40 and all(name.startswith(("layer-", "run.json")) for name in names)
    assert subprocess.run(command, env=env, capture_output=True).returncode == 0
    assert lint(out) == []


def tokenizer_of_letters():
    vocabulary = {chr(97 + i): i for i in range(26)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": None, "byte_fallback": False}
    parts = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None, "truncation": None, "padding": None}
    return json.dumps({"version": "1.0", "added_tokens": [], **parts, "model": model})
