from __future__ import annotations

import pytest
import torch
from rules import DTYPES, assert_names, assert_rule, assert_same_by_threads
from torch.library import opcheck

import tts_kernels as tk
from tts_kernels import reference

HEADS = {
    "label_pair": lambda h: tk.ScoreHead.label_pair(torch.randn(h) / h**0.5, torch.randn(h) / h**0.5),
    "scalar": lambda h: tk.ScoreHead.scalar(torch.randn(h) / h**0.5, bias=0.25),
    "identity": lambda h: tk.ScoreHead.scalar(torch.randn(h), bias=torch.tensor([1.5]), activation="identity"),
    "two_class": lambda h: tk.ScoreHead.two_class(torch.randn(2, h) / h**0.5, torch.randn(2), good=0),
    "mlp": lambda h: tk.ScoreHead.mlp(
        torch.randn(h + 3, h) / h**0.5, torch.randn(h + 3), torch.randn(2, h + 3) / h**0.5, None
    ),
    "normed": lambda h: tk.ScoreHead.scalar(torch.randn(h) / h**0.5).with_norm(torch.rand(h) + 0.5, 1e-5),
}


def double(head: tk.ScoreHead) -> tuple[object, ...]:
    return tuple(p.double() if isinstance(p, torch.Tensor) else p for p in head.unpack())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("steps", "width"), [(0, 8), (1, 1), (3, 17), (33, 64), (70, 1537)])
def test_equals_the_definition(name: str, dtype: torch.dtype, steps: int, width: int) -> None:
    torch.manual_seed(steps * 31 + width)
    hidden = torch.randn(50, width).to(dtype)
    head = HEADS[name](width)
    positions = torch.randint(0, 50, (steps,), dtype=torch.int32 if width % 2 else torch.int64)
    out = tk.step_scores(hidden, positions, head)
    exact = reference.step_scores(hidden.double(), positions, *double(head))
    plain = reference.step_scores(hidden, positions, *head.unpack())
    assert out.dtype == torch.float32
    assert_rule(out, exact, plain)


def test_strided_rows_and_mixed_dtypes() -> None:
    hidden = torch.randn(20, 48).half()[::2, :31]
    head = tk.ScoreHead.scalar(torch.randn(31).bfloat16()).with_norm(torch.rand(31).half(), 1e-6)
    positions = torch.arange(20)[::3][:3]
    exact = reference.step_scores(hidden.double(), positions, *double(head))
    torch.testing.assert_close(tk.step_scores(hidden, positions, head).double(), exact, rtol=1e-5, atol=1e-6)


def test_strided_columns_and_a_normed_hidden_layer() -> None:
    hidden, positions = torch.randn(40, 70).bfloat16().T, torch.tensor([0, 69, 3])
    head = HEADS["mlp"](40).with_norm(torch.rand(40) + 0.5, 1e-6)
    exact = reference.step_scores(hidden.double(), positions, *double(head))
    torch.testing.assert_close(tk.step_scores(hidden, positions, head).double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_layer_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    """bfloat16 states with bfloat16 weights are multiplied as they are: the products are exact."""
    hidden, positions = torch.randn(90, 200).to(dtype), torch.randint(0, 90, (75,))
    rows = ((torch.randn(131, 200) / 14).to(dtype), torch.randn(131).to(dtype), torch.randn(2, 131).to(dtype) / 11)
    head = tk.ScoreHead.mlp(*rows, torch.randn(2).to(dtype), good=0)
    exact = reference.step_scores(hidden.double(), positions, *double(head))
    assert_rule(
        tk.step_scores(hidden, positions, head), exact, reference.step_scores(hidden, positions, *head.unpack())
    )


def test_difference_of_labels_is_not_rounded() -> None:
    """Two nearly equal bfloat16 rows: their difference needs more bits than either has."""
    good = torch.tensor([1.0078125, -3.0], dtype=torch.bfloat16)
    bad = torch.tensor([1.0, -3.015625], dtype=torch.bfloat16)
    score = tk.step_scores(torch.tensor([[100.0, 1.0]]), torch.tensor([0]), tk.ScoreHead.label_pair(good, bad))
    torch.testing.assert_close(score, torch.sigmoid(torch.tensor([100 * 0.0078125 + 0.015625])))


def test_nan_passes_a_hidden_layer() -> None:
    head = tk.ScoreHead.mlp(torch.ones(3, 2), None, torch.ones(2, 3), None)
    out = tk.step_scores(torch.tensor([[torch.nan, 1.0], [1.0, 1.0]]), torch.arange(2), head)
    assert out.isnan().tolist() == [True, False]


def test_non_finite_hidden_states_show() -> None:
    hidden = torch.tensor([[torch.inf, 1.0], [torch.nan, 1.0], [-torch.inf, 1.0]])
    out = tk.step_scores(hidden, torch.arange(3), tk.ScoreHead.scalar(torch.ones(2)))
    assert out[0] == 1
    assert out[1].isnan()
    assert out[2] == 0


def test_threads_do_not_change_the_result() -> None:
    hidden, positions = torch.randn(300, 257), torch.randint(0, 300, (200,))
    for head in (HEADS["label_pair"](257), HEADS["mlp"](257)):
        assert_same_by_threads(tk.step_scores, hidden, positions, head)


def test_opcheck_and_compile() -> None:
    for name in ("label_pair", "mlp", "normed"):
        hidden, head = torch.randn(9, 16), HEADS[name](16)
        args = (hidden, torch.tensor([1, 8]), *head.unpack())
        opcheck(torch.ops.tts_kernels.step_scores.default, args)

        def scores(h: torch.Tensor, p: torch.Tensor, head: tk.ScoreHead = head) -> torch.Tensor:
            return tk.step_scores(h, p, head) * 2

        compiled = torch.compile(scores, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(hidden, args[1]), scores(hidden, args[1]))


def test_bad_input_names_the_argument() -> None:
    hidden, positions, head = torch.randn(5, 4), torch.tensor([0]), tk.ScoreHead.scalar(torch.randn(4))
    assert_names(TypeError, "hidden", tk.step_scores, hidden.double(), positions, head)
    assert_names(TypeError, "hidden", tk.step_scores, [1.0], positions, head)
    assert_names(ValueError, "hidden", tk.step_scores, hidden[0], positions, head)
    assert_names(TypeError, "positions", tk.step_scores, hidden, positions.float(), head)
    assert_names(ValueError, "positions", tk.step_scores, hidden, positions[None], head)
    assert_names(IndexError, "positions", tk.step_scores, hidden, torch.tensor([0, 5]), head)
    assert_names(IndexError, "positions", tk.step_scores, hidden, torch.tensor([-1]), head)
    assert_names(TypeError, "head", tk.step_scores, hidden, positions, torch.randn(4))
    assert_names(ValueError, "head.weight", tk.step_scores, torch.randn(5, 3), positions, head)


def test_bad_heads_name_the_argument() -> None:
    row = torch.randn(4)
    assert_names(ValueError, "bad", tk.ScoreHead.label_pair, row, torch.randn(5))
    assert_names(TypeError, "good", tk.ScoreHead.label_pair, row.long(), row)
    assert_names(ValueError, "activation", tk.ScoreHead.scalar, row, activation="tanh")
    assert_names(ValueError, "bias", tk.ScoreHead.scalar, row, bias=float("nan"))
    assert_names(ValueError, "bias", tk.ScoreHead.scalar, row, bias=torch.zeros(2))
    assert_names(ValueError, "weight", tk.ScoreHead.two_class, row)
    assert_names(ValueError, "good", tk.ScoreHead.two_class, torch.randn(2, 4), good=2)
    assert_names(ValueError, "w2", tk.ScoreHead.mlp, torch.randn(3, 4), None, torch.randn(2, 4), None)
    assert_names(ValueError, "eps", tk.ScoreHead.scalar(row).with_norm, row, -1.0)
    assert_names(ValueError, "eps", tk.ScoreHead.scalar(row).with_norm, row, 1e39)


def test_a_head_made_by_hand_is_checked_as_strictly_as_under_compile() -> None:
    hidden, positions, row = torch.randn(5, 4), torch.tensor([0, 4]), torch.randn(4)
    wide = torch.randn(4, 2)
    for name, head in [
        ("head.bias", tk.ScoreHead(row, bias=torch.ones(1, 1))),
        ("head.b1", tk.ScoreHead(row[:3], w1=torch.randn(3, 4), b1=torch.ones(1, 3))),
        ("head.norm_weight", tk.ScoreHead(row, norm_weight=torch.ones(2, 2))),
        ("head.weight", tk.ScoreHead(wide[:, 0])),
        ("head.w1", tk.ScoreHead(row[:2], w1=wide.T)),
    ]:
        assert_names(ValueError, name, tk.step_scores, hidden, positions, head)
    assert tk.ScoreHead(row) != tk.ScoreHead(row)  # by identity: comparing tensors has no one answer
