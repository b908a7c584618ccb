"""Choosing an implementation, and reporting which ones are available."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import cast

import pytest
import torch

import tts_kernels as tk
from tts_kernels import checks
from tts_kernels.ops.linear import linear_op


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_setter_and_context_manager() -> None:
    with tk.use_backend("reference"):
        assert tk.backend_info().in_use == "reference"
        with tk.use_backend("cpp"):
            assert tk.backend_info().in_use == "cpp"
        assert tk.backend_info().in_use == "reference"
    assert tk.backend_info().in_use == "auto"
    tk.use_backend("reference")
    assert tk.backend_info().in_use == "reference"
    tk.use_backend("auto")


def test_reference_backend_checks_its_input_too() -> None:
    scores = torch.rand(4)
    with tk.use_backend("reference"):
        assert tk.aggregate_steps(scores, torch.tensor([0, 4]), "max") == scores.max()
        with pytest.raises(ValueError, match=r"^indptr"):
            tk.aggregate_steps(scores, torch.tensor([0, 5]), "max")


def test_a_capture_of_a_graph_is_not_ended_by_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = cast("torch.Tensor", SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with tk.debug_checks(True):
        for capturing in (False, True):
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
            assert checks.readable(on_gpu) is not capturing
            assert checks.readable(torch.zeros(1))


@pytest.mark.parametrize("deterministic", [False, True])
def test_products_of_floats_are_the_librarys_unless_they_must_be_deterministic(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(linear_op, "_devices", ("cpu", "meta", "cuda"))
    monkeypatch.setattr(linear_op, "_device", lambda _: "cuda")
    monkeypatch.setattr(linear_op, "_cpp", lambda _: ran.append("cpp"))
    monkeypatch.setattr(linear_op, "check", lambda *_: None)
    monkeypatch.setattr(linear_op, "composed", lambda *_: ran.append("torch"))
    x, weight = torch.ones(2, 64), torch.ones(3, 64)
    with tk.deterministic(deterministic):
        tk.linear(x, tk.PackedLinear(weight, 64, 3))
        tk.linear(x, tk.pack_linear(weight, quantize="int8"))
    assert ran == ["cpp" if deterministic else "torch", "cpp"]


def test_unknown_and_missing_backends_say_so() -> None:
    with pytest.raises(ValueError, match=r"^name: expected one of auto, cpp, triton, reference, got 'fast'"):
        tk.use_backend("fast")
    for name, missing in tk.backend_info().available.items():
        if missing:
            with pytest.raises(RuntimeError, match=name):
                tk.use_backend(name)
    assert tk.backend_info().available["cpp"] == ""


def test_missing_cuda_kernels_say_why() -> None:
    why = tk.backend_info().cuda
    if torch.version.cuda is None:
        assert why == "this torch has no CUDA"
    else:
        assert why == "" or "was not built" in why


def test_what_runs_on_a_gpu_is_said() -> None:
    info = tk.backend_info()
    assert set(info.on_gpu) >= {"sample", "tree_attention", "linear", "decoder_layers_"}
    assert info.on_gpu["decoder_layers_"] == info.on_gpu["linear"] == "torch"
    by_kernel = info.on_gpu["tree_attention"]
    assert (by_kernel == "cpp") == (info.cuda == "")
    assert torch.cuda.is_available() or "is_available() is False" in info.gpu
    with tk.use_backend("reference"):
        assert set(tk.backend_info().on_gpu.values()) == {"reference"}


def test_instruction_set_can_be_forced_and_a_wrong_one_is_named() -> None:
    for isa in tk.backend_info().cpu_isas:
        done = run("import tts_kernels as tk; print(tk.backend_info().cpu_isa)", TTS_KERNELS_CPU_ISA=isa)
        assert done.stdout.strip() == isa
    done = run("import tts_kernels", TTS_KERNELS_CPU_ISA="sse9")  # before a kernel's thread hides the reason
    assert done.returncode != 0
    assert "TTS_KERNELS_CPU_ISA: expected one of generic" in done.stderr
    assert "sse9" in done.stderr


def test_module_prints_what_is_there() -> None:
    done = subprocess.run([sys.executable, "-m", "tts_kernels"], capture_output=True, text=True, check=True)
    for word in ("torch", "instruction sets", "in use", "cpp", "triton", "reference", "GPU", "by torch"):
        assert word in done.stdout


def test_import_is_quick_and_alone() -> None:
    """Neither transformers nor anything of the search is imported by the kernels."""
    code = (
        "import torch, sys, time; t = time.perf_counter(); import tts_kernels; print(time.perf_counter() - t);"
        "print([m for m in sys.modules if m.split('.')[0] in ('transformers', 'tts_search', 'rich', 'triton')])"
    )
    seconds, modules = run(code).stdout.splitlines()
    assert modules == "[]"
    assert float(seconds) > 0
