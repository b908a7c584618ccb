"""Quantised keys and values: the size of a pool, the outputs, and the same results in a pool of any size."""

from __future__ import annotations

from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_llama_decoder import model_of
from tiny import save_checkpoint, tiny_model
from torch import Tensor
from tts_search import HFPolicy, HFVerifier, SearchConfig, search
from tts_search.models.decoder import DecoderShape, KVPool
from tts_search.models.loading import load_decoder
from tts_search.models.sizing import pool_for
from typer.testing import CliRunner

import tts_kernels as tk

MODELS = files("tts_search.lab") / "models"
TOKENS = list(range(10, 60))


def logits_of(path: str, kind: Any, kv_dtype: str | torch.dtype) -> Tensor:
    """Of a text read in three parts, the second by a child."""
    decoder = load_decoder(path, decoder=kind, dtype="float32", self_test=False)
    pool = KVPool(decoder.shape, 64, 4, kv_dtype)
    root = pool.forest.add_root()
    parts = [decoder.logits(pool.pack([root], [TOKENS[:21]]), pool.kv)]
    child, other = pool.forest.fork([root, root])
    parts.append(decoder.logits(pool.pack([child, other], [TOKENS[21:40], [5, 6]]), pool.kv)[:-2])
    parts.append(decoder.logits(pool.pack([child], [TOKENS[40:]]), pool.kv))
    return torch.cat(parts)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize(("kv_dtype", "allowed"), [("int8", 0.05), ("int4", 0.6)])
def test_logits_are_near_and_both_decoders_agree(tmp_path: Any, name: str, kv_dtype: str, allowed: float) -> None:
    path = save_checkpoint(tmp_path, model_of(name))
    exact = logits_of(path, "lean", torch.float32)
    lean, theirs = (logits_of(path, kind, kv_dtype) for kind in ("lean", "transformers"))
    assert 0 < (lean - exact).norm() / exact.norm() < allowed
    assert (theirs - lean).norm() / exact.norm() < allowed / 4  # a rounding that went the other way


@pytest.mark.parametrize(("kv_dtype", "head_bytes"), [(None, 64), ("int8", 18), ("int4", 12)])
def test_a_pool_of_so_many_bytes_holds_so_many_more_tokens(tmp_path: Any, kv_dtype: Any, head_bytes: int) -> None:
    path = save_checkpoint(tmp_path, tiny_model())  # 3 layers, 2 KV heads of 16 elements, in float32
    token = 2 * 3 * 2 * head_bytes
    policy = HFPolicy(path, kv_memory=10 * 16 * token + 1, kv_dtype=kv_dtype)
    assert policy._pool.pool_tokens == 160
    pool = policy._pool.pool
    assert pool.kv.nbytes == 160 * pool.token_bytes == 160 * token
    assert HFVerifier(path, format="yes_no", kv_memory=16 * token, kv_dtype=kv_dtype)._pool.pool_tokens == 16


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_a_search_is_the_same_in_any_room(kv_dtype: Any) -> None:
    """Forks, truncation, the prefix cache and branches that are read again: to the bit."""
    config = SearchConfig("beam_search", n=4, expand=2, max_steps=4, max_step_tokens=12, lookahead=1)
    problems = ["12+34-5", "7*8+9", "12+34-5"]

    def run(memory: str, **options: Any) -> list[Any]:
        models = [
            kind(str(MODELS / name), dtype="float32", kv_memory=memory, self_test=False, decoder="lean", **options)
            for kind, name in ((HFPolicy, "policy-0.1m"), (HFVerifier, "prm-weak"))
        ]
        results = search(problems, *models, config, progress=False)
        return [(one.tree.to_json(), one.completions, one.stats.recomputed_tokens) for one in results]

    wide = run("8MiB", kv_dtype=kv_dtype)
    tight = run("56KiB", kv_dtype=kv_dtype)
    assert [one[:2] for one in tight] == [one[:2] for one in wide]
    assert sum(one[2] for one in tight) > sum(one[2] for one in wide)
    assert wide != run("8MiB")


def test_stats_say_bytes() -> None:
    policy = HFPolicy(str(MODELS / "policy-0.1m"), kv_memory="1MiB", kv_dtype="int8", self_test=False)
    stats = search(["1+2"], policy, None, SearchConfig("best_of_n", n=2, max_tokens=5), progress=False)[0].stats
    assert stats.peak_kv_bytes == stats.peak_unique_kv_tokens * policy._pool.pool.token_bytes > 0


def test_what_is_not_possible_is_refused_by_name(tmp_path: Any) -> None:
    path = save_checkpoint(tmp_path, tiny_model())
    with pytest.raises(ValueError, match=r"^kv_dtype: expected None or one of 'fp8', .*, got 'int3'"):
        HFPolicy(path, kv_dtype="int3")  # type: ignore[arg-type]
    shape = DecoderShape(1, 2, 1, 7, 100, 10, 10)
    cpu = SimpleNamespace(shape=shape, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^kv_dtype: expected no fp8 on cpu, as its kernels do not read it"):
        HFPolicy(path, kv_dtype="fp8")
    with tk.use_backend("reference"):
        assert pool_for(cpu, "1MiB", kv_dtype="fp8").token_bytes == 2 * 7  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^kv_dtype: expected no int4 for heads of an odd size, 7"):
        pool_for(cpu, "1MiB", kv_dtype="int4")  # type: ignore[arg-type]


def test_the_command_line_takes_it() -> None:
    from tts_search.cli.commands import app

    command = ["solve", "1+2", "--policy", str(MODELS / "policy-0.1m"), "--method", "best_of_n", "--n", "2"]
    done = CliRunner().invoke(app, [*command, "--vote", "majority", "--kv-dtype", "int4", "--kv-memory", "1MiB"])
    assert done.exit_code == 0, done.output
    assert " MiB" in done.output
