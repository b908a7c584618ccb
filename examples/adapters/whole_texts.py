"""How frameworks run their models without us: transformers over whole texts, each time from the first token.

`WholeTextPolicy` samples with ``generate()`` in left-padded batches, with its KV cache inside a call and no further;
`WholeTextVerifier` reads each candidate from the problem to its last step in right-padded batches, as the wrappers of
search-and-learn, reward_hub and compute-optimal-tts do. Both count the tokens that they forward, padding left out.
They stand behind the same adapters as our policy and verifier, so that a comparison is of these two alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
from tts_search import HFPolicy, HFVerifier, Step, StepRequest, TextPolicy, TextVerifier
from tts_search.verifiers.reader import Reader


class WholeTextPolicy(TextPolicy):
    """A policy by ``generate()``; see above."""

    chat = True

    def __init__(self, path: str, *, chat: bool = True, dtype: str = "float32", batch_size: int = 64) -> None:
        super().__init__(self._sample)
        self.chat, self.batch_size, self.forwarded, self.sampled = chat, batch_size, 0, 0
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    def _sample(self, requests: list[StepRequest]) -> list[list[Step]]:
        rows = [(self._prompt(each), each.params) for each in requests for _ in range(each.num_samples)]
        steps = iter([step for some in _batches(rows, self.batch_size) for step in self._generate(some)])
        return [[next(steps) for _ in range(each.num_samples)] for each in requests]

    def _prompt(self, request: StepRequest) -> str:
        prompt = request.problem
        if self.chat:
            messages = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return prompt + "".join(request.steps)

    @torch.inference_mode()
    def _generate(self, rows: Sequence[tuple[str, Any]]) -> list[Step]:
        params = rows[0][1]
        inputs = self.tokenizer([text for text, _ in rows], add_special_tokens=False, padding=True, return_tensors="pt")
        sampling: dict[str, Any] = {"do_sample": False}
        if params.temperature:
            sampling = {
                "do_sample": True,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k,
            }
        stop = {} if params.delimiter is None else {"stop_strings": [params.delimiter], "tokenizer": self.tokenizer}
        room = self.model.config.max_position_embeddings - inputs["input_ids"].shape[1]
        limit = max(1, min(params.max_tokens, room))
        pad = self.tokenizer.pad_token_id
        out = self.model.generate(**inputs, **sampling, **stop, max_new_tokens=limit, pad_token_id=pad)
        steps = []
        for row in out[:, inputs["input_ids"].shape[1] :].tolist():
            tokens = [token for token in row if token != pad]
            ended = bool(tokens) and tokens[-1] == self.tokenizer.eos_token_id
            text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            stopped = params.delimiter is not None and params.delimiter in text
            steps.append(
                Step(text, ended or not text, len(tokens), reason="eos" if ended else "stop" if stopped else "length")
            )
            self.sampled += len(tokens)
            self.forwarded += max(0, len(tokens) - 1)
        self.forwarded += int(inputs["attention_mask"].sum())
        return steps


class WholeTextVerifier(TextVerifier):
    """A token-classification PRM over whole texts; see above."""

    def __init__(self, path: str, verifier: HFVerifier, *, dtype: str = "float32", batch_size: int = 16) -> None:
        super().__init__(self._score)
        self.batch_size, self.forwarded = batch_size, 0
        self._reader = Reader(verifier.tokenizer, verifier.format)  # the same tokens as ours reads
        self._good = verifier.format.good
        self.model = AutoModelForTokenClassification.from_pretrained(path, dtype=dtype).eval()

    def _score(self, branches: list[tuple[str, tuple[str, ...]]]) -> list[list[float]]:
        return [scores for some in _batches(branches, self.batch_size) for scores in self._forward(some)]

    @torch.inference_mode()
    def _forward(self, branches: Sequence[tuple[str, tuple[str, ...]]]) -> list[list[float]]:
        texts, marks = zip(*(self._tokens(problem, steps) for problem, steps in branches), strict=True)
        longest = max(map(len, texts))
        ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
        self.forwarded += int(mask.sum())
        scores = self.model(input_ids=ids, attention_mask=mask).logits.float().softmax(-1)[..., self._good]
        return [row[list(places)].tolist() for row, places in zip(scores, marks, strict=True)]

    def _tokens(self, problem: str, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        tokens, tail = self._reader.prompt(problem)
        marks = []
        for number, step in enumerate(steps, 1):
            start, new, tail = self._reader.step(tail, step, number)
            tokens = tokens[:start] + new
            marks.append(len(tokens) - 1)
        return tokens, marks


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def count_forwarded(driver: HFPolicy | HFVerifier) -> list[int]:
    """Return a list of one number that grows with the tokens that a driver's model is given."""
    count = [0]
    decoder: Any = driver.decoder
    name = "logits" if isinstance(driver, HFPolicy) else "hidden"
    call = getattr(decoder, name)

    def counted(batch: Any, *args: Any, **options: Any) -> Any:
        count[0] += batch.tokens.numel()
        return call(batch, *args, **options)

    setattr(decoder, name, counted)
    return count
