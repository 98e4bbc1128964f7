"""The machine's limit: what `bench/limit.c` finds, and that its failure costs only the figures that need it."""

from __future__ import annotations

import re
import shutil
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from engine import steps_line, steps_row
from rounds import Bench

FLOAT32 = """print('{"float32": 100.0, "float32 by": "AVX-512 FMA"}', flush=True)"""
BF16 = """print('{"bf16": 400.0, "bf16 by": "AMX BF16"}', flush=True)"""
NO_BF16 = """print('{"bf16": null, "bf16 by": "none"}')"""
DIE = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
TIMES = {"ours float32": [0.1, 0.1], "ours bf16": [0.05, 0.05]}  # seconds, of two rounds
GFLOP = 4 * 128**2 * 9 * (3 * 64 + 64) / 1e9  # block1_conv2 at 128 px: the convolution before it, and one channel
FLOAT32_SHARE, BF16_SHARE = GFLOP / 0.1 / 100, GFLOP / 0.05 / 400


@pytest.fixture
def bench() -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(Namespace(threads=1), stack)


def matmul_rate(dtype: torch.dtype) -> float:
    """Return the 1e9 multiplications and additions a second of a product of matrices, by the thread's own clock."""
    threads, side, moments = torch.get_num_threads(), 512, []
    left, right = torch.randn(2, side, side).to(dtype)
    torch.set_num_threads(1)
    for _ in range(10):
        left @ right
        moments.append(time.thread_time())
    torch.set_num_threads(threads)
    seconds = statistics.median(after - before for before, after in pairwise(moments))
    return 2 * side**3 / seconds / 1e9


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_limit_is_above_what_a_product_of_matrices_reaches(bench: Bench) -> None:
    for _ in range(3):
        bench.note_limit(seconds=0.05)
    float32 = max(limit["float32"] for limit in bench.limits)
    assert float32 > matmul_rate(torch.float32)
    if bench.limits[0]["bf16 by"] == "none":
        assert bench.limits[0]["bf16"] is None
        return
    bf16 = max(limit["bf16"] for limit in bench.limits)
    assert bf16 > matmul_rate(torch.bfloat16)
    if bench.limits[0]["bf16 by"] == "AMX BF16":
        assert bf16 > 4 * float32  # AVX-512 BF16 makes at most twice as many as AVX-512 FMA


@pytest.mark.parametrize(
    ("script", "shares", "sentences"),
    [
        ([FLOAT32, BF16], [FLOAT32_SHARE, BF16_SHARE], []),
        ([FLOAT32, DIE, BF16], [FLOAT32_SHARE, None], ["bf16 is not measured: .*SIGSEGV"]),
        ([FLOAT32, NO_BF16], [FLOAT32_SHARE, None], ["bf16 is not measured: this processor has no instructions"]),
        ([DIE], [None, None], ["float32 is not measured: .*SIGSEGV", "bf16 is not measured: .*SIGSEGV"]),
    ],
)
def test_a_limit_program_that_dies_costs_only_its_column(
    bench: Bench,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    script: list[str],
    shares: list[float | None],
    sentences: list[str],
) -> None:
    bench.limit_program = tmp_path / "limit"
    bench.limit_program.write_text("\n".join((f"#!{sys.executable}", *script)))
    bench.limit_program.chmod(0o755)
    for _ in range(2):
        bench.note_limit()
    rows = [steps_row(128, "block1_conv2", name, TIMES, bench.limits) for name in TIMES]
    assert [row.get("share of limit") for row in rows] == pytest.approx(shares)
    assert [row["milliseconds"] for row in rows] == pytest.approx([100, 50])
    assert [steps_line(row).endswith("nan") for row in rows] == [share is None for share in shares]
    said = capsys.readouterr().out.splitlines()  # once, not every round
    assert len(said) == len(sentences)
    assert all(re.search(sentence, line) for sentence, line in zip(sentences, said, strict=True))


def test_a_round_in_which_it_dies_is_left_out_of_the_median(bench: Bench) -> None:
    died = {"float32": 100.0, "float32 by": "AVX-512 FMA"}
    bench.limits = [died, *({**died, "bf16": rate, "bf16 by": "AMX BF16"} for rate in (300.0, 500.0))]
    assert steps_row(128, "block1_conv2", "ours bf16", TIMES, bench.limits)["share of limit"] == pytest.approx(
        BF16_SHARE
    )


@pytest.mark.parametrize("compiler", [None, shutil.which("false")])
def test_without_a_compiler_that_works_nothing_is_measured(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compiler: str | None
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: compiler)
    for _ in range(2):
        bench.note_limit()
    assert bench.limits == [{}, {}]
    assert len(capsys.readouterr().out.strip().splitlines()) == 1
    assert "share of limit" not in steps_row(128, "block1_conv2", "ours float32", TIMES, bench.limits)


def test_a_program_that_does_not_start_is_no_limit(bench: Bench, tmp_path: Path) -> None:
    bench.limit_program = tmp_path / "limit"
    bench.limit_program.write_text("")
    bench.note_limit()
    assert bench.limits == [{}]
