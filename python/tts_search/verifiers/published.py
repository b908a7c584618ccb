"""The formats of published verifiers, one entry for each; docs/verifiers.md says how each was checked.

If the authors' code and popular wrappers of it differ, the entry follows the authors, with one score for each step.
ThinkPRM's and R-PRM's instructions are published without a licence. So they are replaced here by our own words, around
the markers that the models know. To use the authors' text, pass it as
``format=replace(FORMATS["r_prm"], prompt=...)``.
"""

from __future__ import annotations

from typing import Final

from tts_search.verifiers.formats import Judge, VerifierFormat, register_format

STEP_TAG: Final = " \u043a\u0438"  # " ки", the step tag of Math-Shepherd
_REASON: Final = "Please reason step by step, and put your final answer within \\boxed{}."

register_format(
    VerifierFormat(
        name="math_shepherd",
        source="https://huggingface.co/peiyi9979/math-shepherd-mistral-7b-prm",
        head="label_pair",
        labels=("+", "-"),
        prompt="{problem} {steps}",
        boundary=STEP_TAG,
        separator="\n",
        ids=("math-shepherd",),
    )
)

# A conversation: the user writes the problem and the first step, then one step in each turn. The assistant answers each
# with + or -.
register_format(
    VerifierFormat(
        name="rlhflow",
        source="https://github.com/RLHFlow/RLHF-Reward-Modeling/blob/main/math-rm/prm_evaluate.py",
        head="label_pair",
        labels=("+", "-"),
        chat=(("user", "{problem} {steps}"),),
        reply="+",
        ids=("prm-mistral-data", "prm-deepseek-data"),
    )
)

# The authors' code scores every line; here a step is a line, as in compute-optimal-tts.
register_format(
    VerifierFormat(
        name="skywork",
        source="https://github.com/SkyworkAI/skywork-o1-prm-inference/blob/main/model_utils/io_utils.py",
        head="scalar",
        weight="v_head.summary.weight",
        bias="v_head.summary.bias",
        prompt="{problem}\n{steps}",
        boundary="\n",
        replace=(("\n", " "),),
        encoding="steps",
        bos=True,
        ids=("skywork-o1-open-prm",),
        architectures=("Qwen2ForPrmModel", "Qwen2ForCausalLM"),
        tensors=("v_head.summary.weight",),
    )
)

register_format(
    VerifierFormat(
        name="qwen_math_prm",
        source="https://huggingface.co/Qwen/Qwen2.5-Math-PRM-7B",
        head="mlp",
        inner_weight="score.0.weight",
        inner_bias="score.0.bias",
        weight="score.2.weight",
        bias="score.2.bias",
        chat=(("system", _REASON), ("user", "{problem}"), ("assistant", "{steps}")),
        boundary="<extra_0>",
        ids=("qwen2.5-math-prm", "qwen2.5-math-7b-prm800k"),
        architectures=("Qwen2ForProcessRewardModel",),
        tensors=("score.0.weight", "score.2.weight"),
    )
)

register_format(
    VerifierFormat(
        name="reasonflux_7b",
        source="https://huggingface.co/Gen-Verse/ReasonFlux-PRM-7B",
        head="mlp",
        weight="score.2.weight",
        bias="score.2.bias",
        chat=(("user", "{problem}"), ("assistant", "{steps}")),
        boundary="<extra_0>",
        ids=("reasonflux-prm-7b",),
    )
)

# A score of the whole trajectory, read at its last token.
register_format(
    VerifierFormat(
        name="reasonflux_1.5b",
        source="https://github.com/Gen-Verse/ReasonFlux/blob/main/ReasonFlux_PRM/utils/rm_utils.py",
        head="scalar",
        head_file="reward_head.pt",
        weight="weight",
        bias="bias",
        prompt="{problem}{steps}",
        separator="\n\n",
        ids=("reasonflux-prm-1.5b",),
    )
)

register_format(
    VerifierFormat(
        name="versaprm",
        source="https://github.com/UW-Madison-Lee-Lab/VersaPRM/blob/main/evaluation/prm_models/prm_llama.py",
        head="label_pair",
        labels=("+", "-"),
        prompt="{problem} \n\n{steps}",
        boundary=" \n\n\n\n",
        replace=(("\n\n\n\n", "\n\n"),),
        ids=("versaprm", "llama-prm800k", "qwen-prm800k"),
    )
)

register_format(
    VerifierFormat(
        name="math_psa",
        source="https://huggingface.co/openreasoner/Math-psa",
        head="label_pair",
        labels=(" +", " -"),
        prompt="{problem} {steps}",
        boundary=" \n\n\n\n\n",
        separator=" ",
        replace=(("\n\n\n\n\n", "\n\n"),),
        ids=("math-psa",),
    )
)

register_format(
    VerifierFormat(
        name="er_prm",
        source="https://github.com/RyanLiu112/compute-optimal-tts/blob/main/src/reason/inference/rm_call.py",
        head="label_pair",
        labels=(" +", " -"),
        prompt="{problem} {steps}",
        boundary=STEP_TAG,
        ids=("llama3.1-math-prm", "er-prm"),
    )
)

# Q-values are for ranking, not probabilities: the value head's output is not changed.
register_format(
    VerifierFormat(
        name="pqm",
        source="https://github.com/WindyLee0822/Process_Q_Model/blob/main/bon_eval_hf.py",
        head="scalar",
        weight="v_head.summary.weight",
        bias="v_head.summary.bias",
        activation="identity",
        prompt=(
            "Below is an instruction that describes a task.\nWrite a response that appropriately completes the request."
            "\n\n### Instruction:\n{problem}\n\n### Response: Let's think step by step\n{steps}"
        ),
        numbered="Step {number}: ",
        boundary=" [PRM]",
        separator="\n",
        bos=False,
        tokens=("[PRM]",),
        ids=("pqm",),
        architectures=("LlamaForCausalLM",),
        tensors=("v_head.summary.weight",),
    )
)

register_format(
    VerifierFormat(
        name="two_class",
        source="https://huggingface.co/docs/trl/prm_trainer",
        head="two_class",
        prompt="{problem}{steps}",
        boundary="\n",
        encoding="steps",
        bos=True,
        architectures=("ForTokenClassification",),
        tensors=("score.weight",),
    )
)

# The last layer was trained to give the same logit for every token; the authors take the mean. The scored token is the
# first of the two newlines that end a step.
register_format(
    VerifierFormat(
        name="llemma",
        source="https://huggingface.co/ScalableMath/llemma-7b-prm-prm800k-level-1to3-hf",
        head="vocab_mean",
        prompt="# Question\n\n{problem}\n\n# Solution\n\n{steps}",
        boundary="\n",
        separator="\n",
        replace=(("\n\n", "\n"),),
        ids=("llemma-7b-prm", "llemma-7b-oprm"),
    )
)

register_format(
    VerifierFormat(
        name="llemma_logit",
        source="https://github.com/SqueezeAILab/ETS",
        head="label",
        labels=(8094,),
        prompt="{problem} {steps}",
        boundary=STEP_TAG,
        separator="\n",
    )
)

register_format(
    VerifierFormat(
        name="eurus_prm",
        source="https://github.com/PRIME-RL/ImplicitPRM/blob/main/eval/processbench.py",
        head="log_ratio",
        beta=0.001,
        reference="Qwen/Qwen2.5-Math-7B-Instruct",
        chat=(("user", "{problem}"), ("assistant", "{steps}")),
        numbered="Step {number}: ",
        boundary="\n\n",
        ids=("eurusprm",),
    )
)

register_format(
    VerifierFormat(
        name="genprm",
        source="https://github.com/RyanLiu112/GenPRM/blob/main/src/prm_evaluation/genprm_inference.py",
        head="label_pair",
        labels=("Yes", "No"),
        chat=(
            (
                "system",
                "You are a math teacher. Your task is to review and critique the paragraphs in solution step by step.",
            ),
            ("user", "Question: {problem}\n\n{steps}"),
        ),
        generation_prompt=False,
        separator="\n\n",
        score_at="closing",
        judge=Judge(
            question="<analyze>\nLet's analyze the Paragraph {number} step by step: ",
            stop=("</analyze>",),
            decision="</analyze>\n<output>\n**Judgement**: $\\boxed{",
            temperature=0.6,
            top_p=0.95,
            top_k=20,
            max_tokens=2048,
        ),
        ids=("genprm",),
    )
)

register_format(
    VerifierFormat(
        name="thinkprm",
        source="https://github.com/mukhal/ThinkPRM/blob/main/utils/helper.py",
        head="label_pair",
        labels=("yes", "no"),
        chat=(
            (
                "user",
                "[Math Problem]\n\n{problem}\n\n[Solution]\n\n{steps}\n\n"
                "Check the solution one step after the other; it may stop before the end of the problem.",
            ),
        ),
        numbered="Step {number}: ",
        separator="\n",
        score_at="closing",
        judge=Judge(
            question="\nLet's verify step by step:",
            stop=("Is the solution correct?", "</think>", "Step {next}:"),
            decision="\nIs the solution correct? ",
            temperature=0.7,
            max_tokens=8172,
        ),
        ids=("thinkprm",),
    )
)

register_format(
    VerifierFormat(
        name="r_prm",
        source="https://github.com/NJUNLP/R-PRM/blob/main/src/prompts/GenPRM/GenPRM-evaluate-new3.json",
        head="label_pair",
        labels=(" Yes", " No"),
        prompt=(
            "A solution to the Question is checked step by step, and it is the turn of the Now Step. Look at what the "
            "Previous Steps established, at where the Now Step takes its data from, at whether the two agree, and at "
            'every calculation. Then conclude with "Verification: Is the step correct (Yes/No)? Yes" or "Verification: '
            'Is the step correct (Yes/No)? No".\n\n'
            "Question: {problem}\n"
            "Previous Steps: {steps}"
        ),
        separator="\n",
        score_at="closing",
        judge=Judge(
            question="\nNow Step: {step}\nReply: ",
            stop=("Is the step correct (Yes/No)?",),
            decision="Is the step correct (Yes/No)?",
            no_steps="(none)",
            samples=10,
            temperature=0.95,
            top_p=0.95,
            max_tokens=3072,
        ),
        ids=("r-prm",),
    )
)

# A chat model that is asked, without any training for it, whether the solution so far is right.
register_format(
    VerifierFormat(
        name="yes_no",
        head="label_pair",
        labels=("Yes", "No"),
        chat=(
            (
                "user",
                "Problem:\n{problem}\n\nSolution so far:\n{steps}\n\nIs every step of this solution so far correct? "
                "Answer with Yes or No.",
            ),
        ),
        separator="\n\n",
        score_at="closing",
    )
)

# Verdicts on a whole completion, by any chat model: at once, or after an analysis that it writes.
_OUTCOME: Final = "Problem:\n{problem}\n\nSolution:\n{steps}\n\nIs the final answer of this solution right? "

register_format(
    VerifierFormat(
        name="outcome",
        head="label_pair",
        labels=("Yes", "No"),
        chat=(("user", _OUTCOME + "Answer with Yes or No."),),
        separator="\n\n",
        score_at="closing",
        outcome=True,
    )
)

register_format(
    VerifierFormat(
        name="outcome_judge",
        head="label_pair",
        labels=(" Yes", " No"),
        chat=(("user", _OUTCOME + "Check it, and end with the line: Verdict: Yes or Verdict: No."),),
        separator="\n\n",
        score_at="closing",
        outcome=True,
        judge=Judge(question="", stop=("Verdict:",), decision="\nVerdict:", max_tokens=1024),
    )
)
