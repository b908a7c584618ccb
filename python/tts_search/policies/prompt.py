"""The text that a policy reads before the first step."""

from __future__ import annotations

from typing import Any

__all__ = ["prompt_of"]


def prompt_of(problem: str, system_prompt: str | None, tokenizer: Any) -> str:
    """Return a problem as the tokenizer's chat template has it, up to where the answer begins.

    Without a template it is the system prompt and the problem, each followed by a blank line.
    """
    if tokenizer.chat_template is None:
        bos = tokenizer.bos_token or ""
        return bos + "".join(f"{part}\n\n" for part in (system_prompt, problem) if part)
    messages = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    messages.append({"role": "user", "content": problem})
    prompt: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return prompt
