"""Limits of control groups, on files as containers have them."""

import os

import pytest

import llmcoopt
from llmcoopt import _limits

HERE = len(os.sched_getaffinity(0))
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def system(folder, cgroup, **files):
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = folder / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


V1 = "4:memory:/job\n1:cpu,cpuacct:/job\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "cpus", "memory"),
    [
        ("0::/\n", {"cpu.max": "100000 100000\n", "memory.max": "1048576\n"}, 1, 1 << 20),
        ("0::/\n", {"cpu.max": "50000 100000\n", "memory.max": "max\n"}, 1, MEMORY),
        ("0::/\n", {"cpu.max": "max 100000\n"}, HERE, MEMORY),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "max 100000\n", "memory.max": "4096\n"}, 1, 4096),
        (V1, {"cpu,cpuacct/job/cpu.cfs_quota_us": "90000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 1, MEMORY),
        (V1, {"cpu/cpu.cfs_quota_us": "90000", "cpu/cpu.cfs_period_us": "100000", "memory/job/memory.limit_in_bytes": "99"}, 1, 99),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, HERE, MEMORY),
        ("0::/\n", {"cpu.max": "1000000000 100000\n", "memory.max": f"{1 << 62}\n"}, HERE, MEMORY),
        ("0::/\n", {"cpu.max": "rubbish", "memory.max": ""}, HERE, MEMORY),
        ("rubbish", {"cpu.max": "100000 100000"}, 1, MEMORY),
    ],
)
def test_limits(tmp_path, cgroup, files, cpus, memory):
    root = system(tmp_path, cgroup, **files)
    assert _limits.cpus(root) == cpus
    assert _limits.memory_bytes(root) == memory


def test_no_control_groups(tmp_path):
    assert _limits.cpus(tmp_path) == HERE and _limits.memory_bytes(tmp_path) == MEMORY


def test_a_model_takes_as_many_threads(monkeypatch):
    monkeypatch.setattr(_limits, "cpus", lambda: 1)
    with llmcoopt.Model.from_pretrained("tiny") as model:
        assert model.threads == 1
    with llmcoopt.Model.from_pretrained("tiny", threads=2) as model:
        assert model.threads == 2
