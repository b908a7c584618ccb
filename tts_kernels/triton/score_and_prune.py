"""score_and_prune: scores of new steps, aggregates of candidates, the k best of each group, in one launch.

One program for each candidate scores its steps and folds them into its aggregate. The last program of a group that
finishes prunes the group. So there are as many programs as candidates to read rows, and no launch waits for another.
Every group has one program more, so that an empty group is pruned as well. Finished programs are counted from 0: 4 G
bytes are cleared before the launch. A head with a hidden layer takes one launch more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aggregate_steps import aggregate
from .prune import options as prune_options
from .prune import outputs, prune_group
from .step_scores import head_arguments, step_score


@triton.jit
def group_of(indptr, groups, c):
    """The group of candidate c: the last group that begins at or before it."""
    low = tl.full((), 0, tl.int64)
    high = groups.to(tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        left = tl.load(indptr + middle) <= c
        low = tl.where(left, middle, low)
        high = tl.where(left, high, middle)
    return low


@triton.jit(do_not_specialize=["steps", "candidates", "groups", "kept"])
def round_kernel(
    hidden, stride, positions, steps, weight, bias, norm_weight, eps, width, partials, blocks, step_out,
    step_indptr, prior, prior_counts, candidate_out, candidates,
    group_indptr, groups, wanted, kept, indices, counts, ranks, arrivals,
    SIGMOID: tl.constexpr, HOW: tl.constexpr, KEEP_ORDER: tl.constexpr, BLOCK: tl.constexpr, PRUNE_BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64)
    group = c - candidates
    if c < candidates:
        group = group_of(group_indptr, groups, c)
        begin = tl.load(step_indptr + c).to(tl.int64)
        end = tl.load(step_indptr + c + 1).to(tl.int64)
        for s in range(begin, end):
            score = step_score(
                hidden, stride, positions, s, steps, weight, bias, norm_weight, eps, width, partials, blocks,
                SIGMOID, BLOCK,
            )  # fmt: skip
            tl.store(step_out + s, score)
        tl.debug_barrier()  # scores may come from any thread, and all threads read them
        lane = tl.zeros([1], tl.int64)
        earlier = tl.zeros([1], tl.float32)
        count = lane
        if prior is not None:
            earlier = tl.load(prior + c + lane).to(tl.float32)
            count = tl.load(prior_counts + c + lane).to(tl.int64)
        tl.store(candidate_out + c + lane, aggregate(step_out, begin + lane, end + lane, earlier, count, HOW))
    tl.debug_barrier()
    others = tl.load(group_indptr + group + 1).to(tl.int32) - tl.load(group_indptr + group).to(tl.int32)
    arrived = tl.atomic_add(arrivals + group, 1, sem="acq_rel")
    tl.debug_barrier()
    if arrived == others:
        prune_group(group, candidate_out, group_indptr, wanted, kept, indices, counts, ranks, KEEP_ORDER, PRUNE_BLOCK)


def score_and_prune(
    hidden: Tensor,
    positions: Tensor,
    step_indptr: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    sigmoid: bool,
    group_indptr: Tensor,
    width: int,
    k: Tensor | None,
    how: str,
    prior: Tensor | None,
    prior_counts: Tensor | None,
    keep_order: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[G, K] int64, [G] int32, [C] float32, [S] float32."""
    groups, candidates = group_indptr.shape[0] - 1, step_indptr.shape[0] - 1
    step_scores = hidden.new_empty(positions.shape[0], dtype=torch.float32)
    candidate_scores = hidden.new_empty(candidates, dtype=torch.float32)
    indices, counts, ranks = outputs(hidden, groups, width, keep_order)
    if groups:
        head, options = head_arguments(hidden, positions, weight, bias, w1, b1, norm_weight, eps)
        dense = (None if t is None else t.contiguous() for t in (prior, prior_counts))
        arrivals = torch.zeros(groups, dtype=torch.int32, device=hidden.device)
        round_kernel[(candidates + groups,)](
            *head, step_scores, step_indptr.contiguous(), *dense, candidate_scores, candidates,
            group_indptr.contiguous(), groups, None if k is None else k.contiguous(), width, indices, counts, ranks,
            arrivals, SIGMOID=sigmoid, HOW=how, KEEP_ORDER=keep_order,
            PRUNE_BLOCK=prune_options(hidden)["BLOCK"], **options,
        )  # fmt: skip
    return indices, counts, candidate_scores, step_scores
