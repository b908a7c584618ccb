"""Checkpoints in the layouts of published verifiers, with small random models, and the authors' computation on them.

A layout is the config, the tensors' names, the tokenizer's kind with its special tokens, and the chat template. The
tokenizers split text like those of the families (their regular expressions, their marks of white space, bytes that are
no tokens), with a few merges. The ids that matter are the published ones if they fit in a small vocabulary ("+" is 10
and "-" 12 in Llama 3 and Qwen).

The authors' computation is done in a simple way: the whole text in one forward of transformers in float64, all logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedTokenizerFast
from tts_search.verifiers import FORMATS

TAG = "\u043a\u0438"  # "ки"
Published = Callable[[str, Sequence[str]], list[float]]

QWEN_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_REGEX = QWEN_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
MERGES = (
    "Ċ Ċ", "ĊĊ ĊĊ", "ĊĊĊĊ Ċ", "Ġ ĊĊĊĊ", "Ġ ĊĊĊĊĊ", ". ĊĊ", ". Ċ", "Ð º", "Ð ¸", "Ðº Ð¸", "Ġ ÐºÐ¸", "Ġ +", "Ġ -",
    "t h", "th e", "Ġ the", "Ġ a", "S t", "e p", "St ep", "Y es", "e s", "Y es", "N o", "Ġ Yes", "Ġ No", "y es",
    "n o", "o n", "Ġ =", "1 2", "Ġ (", ") .",
)  # fmt: skip

LLAMA3_CHAT = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n' + system_message + '<|eot_id|>' }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
QWEN_CHAT = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
R1_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% else %}"
    "{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)


def byte_level(
    regex: str, special: Sequence[str], *, bos: str | None, eos: str, adds_bos: bool = False, chat: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE as Llama 3 and Qwen 2 have it: bytes first ("+" is 10), special tokens last."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
    pairs = [tuple(merge.split(" ")) for merge in dict.fromkeys(MERGES) if merge != "Y es"]
    pairs.insert(pairs.index(("Ġ", "Yes")), ("Y", "es"))
    tokens = dict.fromkeys([*alphabet, *("".join(pair) for pair in pairs)])
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, special, bos, eos, adds_bos, chat)


def sentence_piece(*, bos: str = "<s>", eos: str = "</s>", size: int = 0) -> PreTrainedTokenizerFast:
    """BPE as Llama 1 and 2 and Mistral have it: "▁" for spaces and at the beginning, bytes for what is no token."""
    pieces = [TAG[0], TAG[1], "▁" + TAG[0], "th", "the", "▁the", "▁a", "▁+", "▁-", "▁=", "St", "ep", "Step", "▁Step"]
    letters = [chr(code) for code in range(33, 127)] + ["▁", TAG]
    tokens = [bos, eos, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += dict.fromkeys([*letters, *TAG, *pieces, "▁" + TAG])
    tokens += [f"unused{i}" for i in range(size - len(tokens))]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("▁", "+"), ("▁", "-"), ("▁", "="), ("S", "t"),
              ("e", "p"), ("St", "ep"), ("▁", "Step"), (TAG[0], TAG[1]), ("▁", TAG)]  # fmt: skip
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)}, merges=merges, byte_fallback=True, unk_token="<unk>"
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(tokenizer, [bos, eos], bos, eos, True, None)


def _fast(
    tokenizer: Tokenizer, special: Sequence[str], bos: str | None, eos: str, adds_bos: bool, chat: str | None
) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if adds_bos and bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    if chat:
        fast.chat_template = chat
    return fast


def qwen_tokenizer(bos: str | None = None) -> PreTrainedTokenizerFast:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<extra_0>")
    return byte_level(QWEN_REGEX, special, bos=bos, eos="<|im_end|>", chat=QWEN_CHAT)


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    special = (
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>",
        "<|end_header_id|>", "<|eot_id|>",
    )  # fmt: skip
    return byte_level(LLAMA3_REGEX, special, bos="<|begin_of_text|>", eos="<|eot_id|>", adds_bos=True, chat=LLAMA3_CHAT)


def r1_tokenizer() -> PreTrainedTokenizerFast:
    special = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
    bos, eos = special[:2]
    return byte_level(QWEN_REGEX, special, bos=bos, eos=eos, adds_bos=True, chat=R1_CHAT)


def config_of(kind: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Any:
    """Two layers of 32, 4 query and 2 KV heads; weights large enough for attention to matter."""
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048,
        "initializer_range": 0.2, "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    return AutoConfig.for_model(kind, **{**settings, **options})


def save(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    *,
    seed: int = 0,
    head: dict[str, tuple[int, ...]] | None = None,
    prefix: str = "",
    drop_lm_head: bool = False,
    config_json: dict[str, Any] | None = None,
    shard_size: str = "50GB",
    **options: Any,
) -> None:
    """Write a causal language model, with more tensors ``head`` and other entries of its config if asked for."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(kind, tokenizer, **options), dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    if head or prefix or drop_lm_head:
        path = folder / "model.safetensors"
        state = {prefix + name: tensor for name, tensor in load_file(path).items()}
        if drop_lm_head:
            del state[prefix + "lm_head.weight"]
        for name, shape in (head or {}).items():
            state[name] = torch.randn(shape) * (0.5 if len(shape) > 1 else 0.1)
        save_file(state, path, metadata={"format": "pt"})
    if config_json:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config_json}))


class Plain:
    """A checkpoint as transformers reads it, in float64."""

    def __init__(self, folder: Path, tokens: Sequence[str] = (), auto: Any = AutoModelForCausalLM) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        if tokens:
            self.tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
        mapping = {r"^pretrained_model\.": ""}
        self.model = auto.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", key_mapping=mapping
        ).eval()
        self.tensors: dict[str, Tensor] = {}
        for file in folder.glob("*.safetensors"):
            self.tensors |= {name: tensor.double() for name, tensor in load_file(file).items()}

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        return self.model(torch.tensor([list(ids)]), use_cache=False).logits[0]

    @torch.inference_mode()
    def hidden(self, ids: Sequence[int]) -> Tensor:
        return self.model.model(torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0]

    def ids(self, text: str, special: bool = True) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def chat(self, turns: Sequence[tuple[str, str]], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in turns], tokenize=False, **options
        )

    def pair_at(self, ids: Sequence[int], good: int, bad: int, tag: int) -> list[float]:
        """Softmax over two labels, the good one's part, wherever a tag is read."""
        scores = self.logits(ids)[:, [good, bad]].softmax(dim=-1)[:, 0]
        return scores[torch.tensor(ids) == tag].tolist()


@dataclass(frozen=True)
class Layout:
    """A published checkpoint: its name, the format that reads it, how to write it, and what its authors compute."""

    checkpoint: str
    format: str
    write: Callable[[Path], None]
    published: Callable[[Path], Published]


def math_shepherd(folder: Path) -> Published:
    plain = Plain(folder)
    good, bad = plain.ids("+ -")[1:]
    tag = plain.ids(TAG)[-1]

    def score(problem: str, steps: Sequence[str]) -> list[float]:
        text = f"{problem} " + "".join(f"{step.strip()} {TAG}\n" for step in steps)
        return plain.pair_at(plain.ids(text), good, bad, tag)

    return score


def rlhflow(folder: Path) -> Published:
    """A conversation with a placeholder for each answer; the token before it is scored, and "+" is in its place."""
    plain = Plain(folder)
    plus, minus = plain.ids("+")[-1], plain.ids("-")[-1]
    holder = plain.tokenizer.convert_tokens_to_ids("<|reserved_special_token_0|>")

    def score(problem: str, steps: Sequence[str]) -> list[float]:
        turns = []
        for number, step in enumerate(steps):
            turns.append(("user", f"{problem} {step.strip()}" if number == 0 else step.strip()))
            turns.append(("assistant", "<|reserved_special_token_0|>"))
        ids = torch.tensor(plain.ids(plain.chat(turns), special=False))
        places = torch.where(ids == holder)[0]
        ids[places] = plus
        return plain.logits(ids.tolist())[:, [plus, minus]].softmax(dim=-1)[places - 1, 0].tolist()

    return score


def skywork(folder: Path) -> Published:
    plain = Plain(folder)
    newline = plain.ids("\n")[-1]
    weight, bias = plain.tensors["v_head.summary.weight"], plain.tensors["v_head.summary.bias"]

    def score(problem: str, steps: Sequence[str]) -> list[float]:
        ids = plain.ids(plain.tokenizer.bos_token + problem + "\n")
        flags = []
        for step in steps:
            ids = [*ids, *plain.ids(step.replace("\n", " ").strip()), newline]
            flags.append(len(ids) - 1)
        return torch.sigmoid(plain.hidden(ids) @ weight[0] + bias)[flags].tolist()

    return score


def qwen_prm(system: str | None) -> Callable[[Path], Published]:
    def published(folder: Path) -> Published:
        plain = Plain(folder)
        t = plain.tensors
        tag = plain.tokenizer.convert_tokens_to_ids("<extra_0>")

        def score(problem: str, steps: Sequence[str]) -> list[float]:
            turns = [] if system is None else [("system", system)]
            turns += [("user", problem), ("assistant", "".join(f"{step.strip()}<extra_0>" for step in steps))]
            ids = plain.ids(plain.chat(turns), special=False)
            inner = torch.relu(plain.hidden(ids) @ t["score.0.weight"].T + t["score.0.bias"])
            logits = inner @ t["score.2.weight"].T + t["score.2.bias"]
            return logits.softmax(dim=-1)[torch.tensor(ids) == tag, 1].tolist()

        return score

    return published


def reasonflux_small(folder: Path) -> Published:
    plain = Plain(folder)
    head = {name: value.double() for name, value in torch.load(folder / "reward_head.pt", weights_only=True).items()}

    def score(problem: str, steps: Sequence[str]) -> list[float]:
        texts = [problem + "\n\n".join(step.strip() for step in steps[: n + 1]) for n in range(len(steps))]
        last = torch.stack([plain.hidden(plain.ids(text))[-1] for text in texts])
        return torch.sigmoid(last @ head["weight"][0] + head["bias"]).tolist()

    return score


def label_text(before: str, tag: str, after: str, good: str, bad: str, newlines: int) -> Callable[[Path], Published]:
    """VersaPRM, Math-PSA, ER-PRM: one text, the last token of " + tag" scored."""

    def published(folder: Path) -> Published:
        plain = Plain(folder)
        labels = [plain.ids(label, special=False)[-1] for label in (good, bad)]
        mark = plain.ids(tag, special=False)
        assert len(mark) == 1

        def score(problem: str, steps: Sequence[str]) -> list[float]:
            text = problem + before + "".join(step.strip() + tag + after for step in steps)
            assert not newlines or "\n" * newlines not in "".join(map(str.strip, steps))
            return plain.pair_at(plain.ids(text), *labels, mark[0])  # type: ignore[call-arg]

        return score

    return published


def pqm(folder: Path) -> Published:
    plain = Plain(folder, tokens=["[PRM]"])
    weight, bias = plain.tensors["v_head.summary.weight"], plain.tensors["v_head.summary.bias"]
    tag = plain.ids("[PRM]", special=False)[-1]

    def score(problem: str, steps: Sequence[str]) -> list[float]:
        query = (
            "Below is an instruction that describes a task.\nWrite a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{problem}\n\n### Response: Let's think step by step"
        )
        numbered = [f"Step {number}: {step.strip()}" for number, step in enumerate(steps, 1)]
        ids = plain.ids(query + "\n" + " [PRM]\n".join(numbered) + " [PRM]", special=False)
        return (plain.hidden(ids) @ weight[0] + bias)[torch.tensor(ids) == tag].tolist()

    return score


def trl(folder: Path) -> Published:
    plain = Plain(folder, auto=AutoModelForTokenClassification)

    def score(problem: str, steps: Sequence[str]) -> list[float]:
        bos = plain.tokenizer.bos_token_id  # Qwen's tokenizers have none
        ids = [*([] if bos is None else [bos]), *plain.ids(problem, special=False)]
        places = []
        for step in steps:
            ids += plain.ids(step.strip(), special=False) + plain.ids("\n", special=False)
            places.append(len(ids) - 1)
        return plain.logits(ids).softmax(dim=-1)[places, 1].tolist()

    return score


def llemma(folder: Path) -> Published:
    plain = Plain(folder)
    begin, pair = plain.ids("\n\n# Solution", special=False)[1:], plain.ids("\n\n", special=False)[1:]

    def score(problem: str, steps: Sequence[str]) -> list[float]:
        text = f"# Question\n\n{problem}\n\n# Solution\n\n" + "".join(f"{step.strip()}\n\n" for step in steps)
        ids = plain.ids(text)
        begun, places = False, []
        for i in range(len(ids)):
            begun = begun or ids[i : i + len(begin)] == begin
            if begun and ids[i : i + 2] == pair:
                places.append(i)
        # the first pair stands before "# Solution", the second behind it
        return torch.sigmoid(plain.logits(ids).mean(dim=-1))[places[2:]].tolist()

    return score


def llemma_logit(folder: Path) -> Published:
    plain = Plain(folder)
    tag = plain.ids(TAG)[-1]

    def score(problem: str, steps: Sequence[str]) -> list[float]:
        ids = plain.ids(f"{problem} " + "".join(f"{step.strip()} {TAG}\n" for step in steps))
        return torch.sigmoid(plain.logits(ids)[torch.tensor(ids) == tag, 8094]).tolist()

    return score


def eurus(reference: Path) -> Callable[[Path], Published]:
    """The cumulative log-ratio at the last token of each step and the blank line behind it."""

    def published(folder: Path) -> Published:
        models = [Plain(folder), Plain(reference)]

        def score(problem: str, steps: Sequence[str]) -> list[float]:
            begin = models[0].chat([("user", problem), ("assistant", "")]).removesuffix("<|im_end|>\n")
            texts = [f"Step {number}: {step.strip()}\n\n" for number, step in enumerate(steps, 1)]
            found = []
            for count in range(1, len(steps) + 1):
                ids = models[0].ids(begin + "".join(texts[:count]), special=False)
                first = len(models[0].ids(begin, special=False))
                logps = [
                    plain.logits(ids)[:-1].log_softmax(dim=-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
                    for plain in models
                ]
                found.append(0.001 * (logps[0] - logps[1])[first - 1 :].sum().item())
            return found

        return score

    return published


@dataclass(frozen=True)
class JudgeText:
    """What a generative verifier's authors put together: the text before the analysis, and the one behind it.

    ThinkPRM's and R-PRM's sentences have no licence: ours stand in their places.
    """

    before: Callable[[Plain, str, Sequence[str]], str]
    decision: str
    labels: tuple[str, str]


def judged(text: JudgeText, stops: Sequence[str], max_tokens: int) -> Callable[[Path], Published]:
    """Greedy analyses by plain forwards of the whole text, then both labels' logits at the end of the decision."""

    def published(folder: Path) -> Published:
        plain = Plain(folder)
        labels = [plain.ids(label, special=False)[0] for label in text.labels]

        def score(problem: str, steps: Sequence[str]) -> list[float]:
            found = []
            for count in range(1, len(steps) + 1):
                before = text.before(plain, problem, [step.strip() for step in steps[:count]])
                ids, analysis = plain.ids(before, special=False), ""
                given = len(ids)
                while len(ids) < given + max_tokens and not any(stop in analysis for stop in stops):
                    token = int(plain.logits(ids)[-1].argmax())
                    if token == plain.tokenizer.eos_token_id:
                        break
                    ids.append(token)
                    analysis = plain.tokenizer.decode(ids[given:], skip_special_tokens=True)
                for stop in stops:
                    analysis = analysis.partition(stop)[0]
                ids = plain.ids(before + analysis + text.decision, special=False)
                found.append(plain.logits(ids)[-1, labels].softmax(dim=-1)[0].item())
            return found

        return score

    return published


def _genprm_text(plain: Plain, problem: str, steps: Sequence[str]) -> str:
    system = "You are a math teacher. Your task is to review and critique the paragraphs in solution step by step."
    joined = "\n\n".join(steps)
    text = plain.chat([("system", system), ("user", f"Question: {problem}\n\n{joined}")])
    return text + f"<analyze>\nLet's analyze the Paragraph {len(steps)} step by step: "


def _thinkprm_text(plain: Plain, problem: str, steps: Sequence[str]) -> str:
    solution = "\n".join(f"Step {number}: {step}" for number, step in enumerate(steps, 1))
    text = (
        f"[Math Problem]\n\n{problem}\n\n[Solution]\n\n{solution}\n\n"
        "Check the solution one step after the other; it may stop before the end of the problem."
    )
    return plain.chat([("user", text)], add_generation_prompt=True) + "\nLet's verify step by step:"


def r_prm_text(instruction: str, none: str, request: str) -> Callable[[Plain, str, Sequence[str]], str]:
    """The layout of R-PRM's prompt around its sentences."""

    def text(_plain: Plain, problem: str, steps: Sequence[str]) -> str:
        before = "\n".join(steps[:-1]) or none
        return (
            f"{instruction}\n\nQuestion: {problem}\nPrevious Steps: {before}\nNow Step: {steps[-1]}\n{request}Reply: "
        )

    return text


R_PRM = FORMATS["r_prm"].prompt.partition("\n\nQuestion: ")[0]
JUDGES = {
    "GenPRM-7B": JudgeText(_genprm_text, "</analyze>\n<output>\n**Judgement**: $\\boxed{", ("Yes", "No")),
    "ThinkPRM-1.5B": JudgeText(_thinkprm_text, "\nIs the solution correct? ", ("yes", "no")),
    "R-PRM-7B-DPO": JudgeText(r_prm_text(R_PRM, "(none)", ""), "Is the step correct (Yes/No)?", (" Yes", " No")),
}


def _write_skywork(folder: Path) -> None:
    save(
        folder, qwen_tokenizer(bos="<|endoftext|>"), "qwen2",
        head={"v_head.summary.weight": (1, 32), "v_head.summary.bias": (1,)},
        config_json={"architectures": ["Qwen2ForPrmModel"]},
    )  # fmt: skip


def _write_qwen_prm(folder: Path) -> None:
    head = {"score.0.weight": (32, 32), "score.0.bias": (32,), "score.2.weight": (2, 32), "score.2.bias": (2,)}
    code = {
        "AutoConfig": "configuration_qwen2_rm.Qwen2RMConfig",
        "AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel",
    }
    save(
        folder, qwen_tokenizer(), "qwen2", head=head,
        config_json={"architectures": ["Qwen2ForProcessRewardModel"], "auto_map": code, "num_labels": 2},
    )  # fmt: skip
    (folder / "modeling_qwen2_rm.py").write_text("raise RuntimeError('code of a checkpoint was run')\n")
    (folder / "configuration_qwen2_rm.py").write_text("raise RuntimeError('code of a checkpoint was run')\n")


def _write_reasonflux_small(folder: Path) -> None:
    save(folder, qwen_tokenizer(), "qwen2")
    torch.save({"weight": torch.randn(1, 32) * 0.5, "bias": torch.randn(1) * 0.1}, folder / "reward_head.pt")


def _write_pqm(folder: Path) -> None:
    """Saved from TRL's wrapper, with its name in front; the tokenizer is the base model's, without [PRM]."""
    tokenizer = llama3_tokenizer()
    bigger = llama3_tokenizer()
    bigger.add_special_tokens({"additional_special_tokens": ["[PRM]"]})
    save(
        folder, bigger, "llama", prefix="pretrained_model.",
        head={"v_head.summary.weight": (1, 32), "v_head.summary.bias": (1,)},
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


def _write_trl(folder: Path, kind: str = "llama") -> None:
    tokenizer = llama3_tokenizer() if kind == "llama" else qwen_tokenizer()
    torch.manual_seed(0)
    config = config_of(kind, tokenizer, num_labels=2)
    AutoModelForTokenClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _written(tokenizer: Callable[..., PreTrainedTokenizerFast], kind: str, **options: Any) -> Callable[[Path], None]:
    return lambda folder: save(folder, tokenizer(), kind, **options)


SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
VERSA = label_text(" \n\n", " \n\n\n\n", "", "+", "-", 4)
LAYOUTS = [
    Layout("math-shepherd-mistral-7b-prm", "math_shepherd", _written(sentence_piece, "mistral"), math_shepherd),
    Layout("Llama3.1-8B-PRM-Deepseek-Data", "rlhflow", _written(llama3_tokenizer, "llama"), rlhflow),
    Layout("Llama3.1-8B-PRM-Mistral-Data", "rlhflow", _written(llama3_tokenizer, "llama", shard_size="40KB"), rlhflow),
    Layout("Skywork-o1-Open-PRM-Qwen-2.5-1.5B", "skywork", _write_skywork, skywork),
    Layout("Qwen2.5-Math-PRM-7B", "qwen_math_prm", _write_qwen_prm, qwen_prm(SYSTEM)),
    Layout("Qwen2.5-Math-7B-PRM800K", "qwen_math_prm", _write_qwen_prm, qwen_prm(SYSTEM)),
    Layout("ReasonFlux-PRM-7B", "reasonflux_7b", _write_qwen_prm, qwen_prm(None)),
    Layout("ReasonFlux-PRM-1.5B", "reasonflux_1.5b", _write_reasonflux_small, reasonflux_small),
    Layout("VersaPRM", "versaprm", _written(llama3_tokenizer, "llama"), VERSA),
    Layout("Llama-PRM800K", "versaprm", _written(llama3_tokenizer, "llama"), VERSA),
    Layout("Qwen-PRM800K", "versaprm", _written(qwen_tokenizer, "qwen2"), VERSA),
    Layout(
        "Math-psa", "math_psa", _written(qwen_tokenizer, "qwen2"), label_text(" ", " \n\n\n\n\n", " ", " +", " -", 5)
    ),
    Layout(
        "Llama3.1-Math-PRM",
        "er_prm",
        _written(llama3_tokenizer, "llama"),
        label_text(" ", f" {TAG}", "", " +", " -", 0),
    ),
    Layout("PQM-zeta-4", "pqm", _write_pqm, pqm),
    Layout("Qwen2.5-Math-7B-PRM-TRL", "two_class", _write_trl, trl),
    Layout("Qwen3-0.6B-PRM", "two_class", lambda folder: _write_trl(folder, "qwen3"), trl),
    Layout("llemma-7b-prm-prm800k-level-1to3-hf", "llemma", _written(sentence_piece, "llama"), llemma),
    Layout("llemma-ets", "llemma_logit", lambda folder: save(folder, sentence_piece(size=8200), "llama"), llemma_logit),
]
