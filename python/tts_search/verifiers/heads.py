"""The head of a verifier's format, from the tensors of its checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

import tts_kernels as tk
from tts_search.verifiers.formats import VerifierFormat

if TYPE_CHECKING:
    from tts_search.models.checkpoint import Checkpoint

__all__ = ["lm_head", "load_head"]

# Options of a configuration that change the output of the LM head.
_LOGIT_OPTIONS: Final = ("final_logit_softcapping", "logit_scale", "logits_scaling")
_LM_HEAD: Final = "lm_head.weight"
_TIED: Final = ("model.embed_tokens.weight", "embed_tokens.weight", "transformer.wte.weight")


def load_head(entry: VerifierFormat, checkpoint: Checkpoint, config: Any, tokenizer: Any) -> tk.ScoreHead:
    """The head of a format. From an LM head, only the rows of the labels are loaded.

    Raises
    ------
    ValueError
        If a label is not one token, the logits are not those of a plain LM head, or a tensor is missing or has another
        shape. The message names it.
    """
    if entry.head in ("label_pair", "label", "vocab_mean"):
        return _label_head(entry, checkpoint, config, tokenizer)
    tensors = _Tensors(entry, checkpoint, int(config.get_text_config(decoder=True).hidden_size))
    if entry.head == "scalar":
        weight, bias = tensors.get(entry.weight, 1, "H"), tensors.get(entry.bias, 1)
        return tk.ScoreHead.scalar(weight[0], bias, entry.activation)
    if entry.head == "two_class":
        return tk.ScoreHead.two_class(tensors.get(entry.weight, 2, "H"), tensors.get(entry.bias, 2), entry.good)
    inner = tensors.get(entry.inner_weight, "H1", "H")
    return tk.ScoreHead.mlp(
        inner,
        tensors.get(entry.inner_bias, inner.shape[0]),
        tensors.get(entry.weight, 2, inner.shape[0]),
        tensors.get(entry.bias, 2),
        entry.good,
    )


def lm_head(entry: VerifierFormat, checkpoint: Checkpoint, config: Any, rows: list[int] | None = None) -> Tensor:
    """The LM head's weight [V, H], or some of its rows.

    Raises
    ------
    ValueError
        If logits are not those of a plain LM head, or there is none in the checkpoint.
    """
    if (
        any(getattr(config, name, None) not in (None, 1.0) for name in _LOGIT_OPTIONS)
        or "lm_head.bias" in checkpoint.names
    ):
        raise ValueError(f"{checkpoint.path_or_id}: format {entry.name!r} needs logits that are a plain LM head's")
    tied = [name for name in _TIED if name in checkpoint.names] if config.tie_word_embeddings else []
    name = _LM_HEAD if _LM_HEAD in checkpoint.names else next(iter(tied), None)
    if name is None:
        raise ValueError(f"{checkpoint.path_or_id}: format {entry.name!r} found no {_LM_HEAD} in the checkpoint")
    return checkpoint.tensor(name, rows)


def label_token(tokenizer: Any, label: str | int) -> int:
    """The id of a label that is an id, or the text of one token.

    Raises
    ------
    ValueError
        If it is no id of the vocabulary, or its text is not one token.
    """
    if isinstance(label, int):
        if not 0 <= label < len(tokenizer):
            raise ValueError(f"labels: expected a token id below {len(tokenizer)}, got {label}")
        return label
    ids: list[int] = tokenizer(label, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"labels: expected the text of one token, got {label!r}, which is {len(ids)} tokens: {ids}")
    return ids[0]


def _label_head(entry: VerifierFormat, checkpoint: Checkpoint, config: Any, tokenizer: Any) -> tk.ScoreHead:
    if entry.head == "vocab_mean":
        mean = lm_head(entry, checkpoint, config).double().mean(0).float()
        return tk.ScoreHead.scalar(mean, activation=entry.activation)
    rows = lm_head(entry, checkpoint, config, [label_token(tokenizer, label) for label in entry.labels])
    if entry.head == "label":
        return tk.ScoreHead.scalar(rows[0], activation=entry.activation)
    return tk.ScoreHead.label_pair(rows[0], rows[1])


class _Tensors:
    """Looks a head's tensors up by name and checks their shapes."""

    def __init__(self, entry: VerifierFormat, checkpoint: Checkpoint, hidden_size: int) -> None:
        self.entry, self.checkpoint, self.hidden_size = entry, checkpoint, hidden_size
        self.where = entry.head_file or "the checkpoint"
        self.state = checkpoint.tensors_of(entry.head_file) if entry.head_file else None
        if missing := [name for name in self._names() if name not in self._known()]:
            raise ValueError(
                f"{checkpoint.path_or_id}: format {entry.name!r} found no {' and no '.join(missing)} in {self.where}"
            )

    def get(self, name: str | None, *shape: int | str) -> Any:
        """The tensor of this name; None for the name None. In a shape, H is the hidden size, other names any size."""
        if name is None:
            return None
        tensor = self.checkpoint.tensor(name) if self.state is None else self.state[name]
        wanted = [self.hidden_size if size == "H" else size for size in shape]
        fits = tensor.dim() == len(wanted) and all(
            size == want or isinstance(want, str) for size, want in zip(tensor.shape, wanted, strict=True)
        )
        if not fits or not tensor.is_floating_point():
            raise ValueError(
                f"{self.checkpoint.path_or_id}: format {self.entry.name!r} expected {name} in {self.where} to be "
                f"[{', '.join(map(str, wanted))}] float, got {list(tensor.shape)} {tensor.dtype}"
            )
        return tensor

    def _names(self) -> list[str]:
        entry = self.entry
        inner = [entry.inner_weight, entry.inner_bias] if entry.head == "mlp" else []
        return [name for name in (*inner, entry.weight, entry.bias) if name is not None]

    def _known(self) -> frozenset[str]:
        return self.checkpoint.names if self.state is None else frozenset(self.state)
