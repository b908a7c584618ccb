"""`ScoreHead`: the last few arithmetic steps of a process reward model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import checks

_Bias = float | Tensor | None


@dataclass(frozen=True, eq=False)
class ScoreHead:
    """Computes a step's score from a hidden state. The class methods make one.

    Every published discriminative PRM is ``act(w . mlp(norm(h)) + b)``: an optional RMSNorm, an optional Linear + ReLU,
    one dot product, and a sigmoid or no activation. A softmax over two logits is the sigmoid of their difference. So
    two rows become one, ``w = good - bad``, in float32.

    Attributes
    ----------
    weight
        [K] float32; K = H, or H1 with a hidden layer.
    bias
        [1] float32, or None.
    w1, b1
        Hidden layer [H1, H] and [H1] in their original dtype, or None.
    norm_weight, eps
        RMSNorm [H] over the gathered rows, or None.
    sigmoid
        Whether the last step is a sigmoid.
    """

    weight: Tensor
    bias: Tensor | None = None
    w1: Tensor | None = None
    b1: Tensor | None = None
    norm_weight: Tensor | None = None
    eps: float = 0.0
    sigmoid: bool = True

    @classmethod
    def label_pair(cls, good: Tensor, bad: Tensor) -> ScoreHead:
        """Two rows [H] of the LM head: the score is softmax over the two labels, the good one's part.

        Math-Shepherd (arXiv 2312.08935), RLHFlow, VersaPRM, Math-PSA.

        Raises
        ------
        TypeError, ValueError
            For tensors that are not float vectors of one length on one device.
        """
        checks.tensor("good", good, shape=["H"])
        checks.tensor("bad", bad, shape=[good.shape[0]], device=good.device)
        return cls(good.float() - bad.float())

    @classmethod
    def scalar(cls, weight: Tensor, bias: _Bias = None, activation: str = "sigmoid") -> ScoreHead:
        """One row [H] and a bias: a value head. ``activation`` is "sigmoid" (Skywork) or "identity" (PQM).

        Raises
        ------
        TypeError, ValueError
            For a weight that is not a float vector, a bias of more than one element, another activation.
        """
        checks.tensor("weight", weight, shape=["H"])
        checks.choice("activation", activation, ("sigmoid", "identity"))
        return cls(weight.float().contiguous(), _bias(bias, weight), sigmoid=activation == "sigmoid")

    @classmethod
    def two_class(cls, weight: Tensor, bias: Tensor | None = None, good: int = 1) -> ScoreHead:
        """Token classification [2, H] and [2] (TRL's PRMTrainer): softmax, the part of class ``good``.

        Raises
        ------
        TypeError, ValueError
            For other shapes or dtypes, or a class other than 0 and 1.
        """
        checks.tensor("weight", weight, shape=[2, "H"])
        return cls(_difference(weight, good), _bias_difference("bias", bias, weight, good))

    @classmethod
    def mlp(cls, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, good: int = 1) -> ScoreHead:
        """Linear [H1, H] + ReLU, then two classes [2, H1]: Qwen2.5-Math-PRM (arXiv 2501.07301), ReasonFlux-PRM.

        Raises
        ------
        TypeError, ValueError
            For other shapes or dtypes, or a class other than 0 and 1.
        """
        checks.tensor("w1", w1, shape=["H1", "H"])
        if b1 is not None:
            checks.tensor("b1", b1, shape=[w1.shape[0]], device=w1.device)
        checks.tensor("w2", w2, shape=[2, w1.shape[0]], device=w1.device)
        b1 = None if b1 is None else b1.contiguous()
        return cls(_difference(w2, good), _bias_difference("b2", b2, w2, good), w1.contiguous(), b1)

    def with_norm(self, weight: Tensor, eps: float) -> ScoreHead:
        """The same head behind an RMSNorm ``x * weight / sqrt(mean(x**2) + eps)`` of the gathered rows.

        Raises
        ------
        TypeError, ValueError
            For a weight that is not a float vector [H], or a negative or non-finite eps.
        """
        checks.tensor("weight", weight, shape=[self.width], device=self.weight.device)
        checks.number("eps", eps, low=0.0)
        return replace(self, norm_weight=weight.contiguous(), eps=float(eps))

    @property
    def width(self) -> int:
        """H, the hidden size that this head reads."""
        return int(self.weight.shape[0] if self.w1 is None else self.w1.shape[1])

    def to(self, device: torch.device | str) -> ScoreHead:
        """The same head with its tensors on ``device``."""
        moved = {
            name: value.to(device)
            for name in ("weight", "bias", "w1", "b1", "norm_weight")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def unpack(self) -> tuple[Any, ...]:
        """Tensors and numbers in the order that operators take them."""
        return (self.weight, self.bias, self.w1, self.b1, self.norm_weight, self.eps, self.sigmoid)


def unpacked(head: ScoreHead) -> tuple[Any, ...]:
    """``head.unpack()``; TypeError for anything but a head."""
    if not isinstance(head, ScoreHead):
        raise TypeError(f"head: expected a ScoreHead, got {checks.describe(head)}")
    return head.unpack()


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
) -> None:
    """An unpacked head against ``hidden`` [T, H]. TypeError, ValueError."""
    width, device = int(hidden.shape[1]), hidden.device
    inner = width
    if w1 is not None:
        checks.tensor("head.w1", w1, shape=["H1", width], device=device)
        inner = int(w1.shape[0])
        if b1 is not None:
            checks.tensor("head.b1", b1, shape=[inner], device=device)
    checks.tensor("head.weight", weight, (torch.float32,), [inner], device)
    if bias is not None:
        checks.tensor("head.bias", bias, (torch.float32,), [1], device)
    if norm_weight is not None:
        checks.tensor("head.norm_weight", norm_weight, shape=[width], device=device)
    for name, part in (("weight", weight), ("w1", w1), ("b1", b1), ("norm_weight", norm_weight)):
        if part is not None and not part.is_contiguous():
            raise ValueError(f"head.{name}: expected a contiguous tensor, got strides {part.stride()}")
    checks.number("head.eps", eps, low=0.0)


def _difference(rows: Tensor, good: int) -> Tensor:
    if good not in (0, 1) or isinstance(good, bool):
        raise ValueError(f"good: expected class 0 or 1, got {good!r}")
    return rows[good].float() - rows[1 - good].float()


def _bias(bias: _Bias, like: Tensor) -> Tensor | None:
    if bias is None:
        return None
    if isinstance(bias, Tensor):
        checks.tensor("bias", bias, device=like.device)
        if bias.numel() != 1:
            raise ValueError(f"bias: expected one element, got {checks.describe(bias)}")
        return bias.float().reshape(1)
    checks.number("bias", bias)
    return torch.full((1,), float(bias), device=like.device)


def _bias_difference(name: str, bias: Tensor | None, like: Tensor, good: int) -> Tensor | None:
    if bias is None:
        return None
    checks.tensor(name, bias, shape=[2], device=like.device)
    return (bias[good].float() - bias[1 - good].float()).reshape(1)
