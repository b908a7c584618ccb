"""The cost of a search."""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass

from tts_search.search.protocol import Usage

__all__ = ["SearchStats"]

_PEAKS = ("peak_unique_kv_tokens", "peak_logical_kv_tokens", "peak_kv_bytes")  # of each model
_SUMS = ("recomputed_tokens", "waves", "cached_tokens")  # over both


@dataclass(frozen=True, slots=True)
class SearchStats:
    """What the search of one problem cost. Counts of tokens are 0 where a driver does not count.

    Attributes
    ----------
    wall_s : float
        Seconds from the problem's start to its result. Problems in flight share the time, so these do not add up.
    rounds : int
        Rounds of the search.
    branches : int
        Nodes of its tree, the root apart.
    policy_tokens, policy_prefill_tokens : int
        Tokens sampled; tokens of the prompt forwarded.
    policy_logical_tokens : int
        Tokens that the policy would have forwarded if it read the prompt and the branch so far anew for each step.
    verifier_tokens : int
        Tokens that the verifier read, its prompt included. Branches of equal text are read once.
    flops_policy, flops_verifier : float
        Floating-point operations of all forwards.
    peak_unique_kv_tokens, peak_logical_kv_tokens : int
        Most slots of the policy's KV cache in use at once, and what it would have been without sharing.
    verifier_peak_unique_kv_tokens, verifier_peak_logical_kv_tokens : int
        The same of the verifier's cache.
    peak_kv_bytes, verifier_peak_kv_bytes : int
        Bytes of those slots of the policy's and of the verifier's cache. With a block cache: the most bytes in use at
        once, for full blocks and for tokens that are not quantised.
    recomputed_tokens : int
        Tokens that either model forwarded again because memory had run out.
    waves : int
        Times that a step of either model gave its KV cache up because memory was full, and waited.
    cached_tokens : int
        Tokens that neither model forwarded because its cache still held them, from this problem or another.
    speculated_tokens : int
        Tokens sampled ahead for steps that the search did not ask for; not among `policy_tokens`.
    """

    wall_s: float = 0.0
    rounds: int = 0
    branches: int = 0
    policy_tokens: int = 0
    policy_prefill_tokens: int = 0
    policy_logical_tokens: int = 0
    verifier_tokens: int = 0
    flops_policy: float = 0.0
    flops_verifier: float = 0.0
    peak_unique_kv_tokens: int = 0
    peak_logical_kv_tokens: int = 0
    verifier_peak_unique_kv_tokens: int = 0
    verifier_peak_logical_kv_tokens: int = 0
    peak_kv_bytes: int = 0
    verifier_peak_kv_bytes: int = 0
    recomputed_tokens: int = 0
    waves: int = 0
    cached_tokens: int = 0
    speculated_tokens: int = 0

    @classmethod
    def of(
        cls, policy: Usage, verifier: Usage, *, wall_s: float, rounds: int, branches: int, path_tokens: int = 0
    ) -> SearchStats:
        """Put together what both drivers counted; `path_tokens` is the sum of the lengths of all branches."""
        return cls(
            wall_s=wall_s,
            rounds=rounds,
            branches=branches,
            policy_tokens=policy.tokens,
            policy_prefill_tokens=policy.prefill_tokens,
            policy_logical_tokens=path_tokens + branches * (policy.prefill_tokens + policy.cached_tokens),
            verifier_tokens=verifier.tokens + verifier.prefill_tokens,
            flops_policy=policy.flops,
            flops_verifier=verifier.flops,
            speculated_tokens=policy.speculated_tokens,
            **{name: getattr(policy, name) for name in _PEAKS},
            **{f"verifier_{name}": getattr(verifier, name) for name in _PEAKS},
            **{name: getattr(policy, name) + getattr(verifier, name) for name in _SUMS},
        )

    def __add__(self, other: SearchStats) -> SearchStats:
        """Return what two searches of a problem cost, one after the other: sums, but the larger of the peaks."""
        return SearchStats(
            **{
                name: max(mine, yours) if "peak" in name else mine + yours
                for name, mine, yours in zip(asdict(self), astuple(self), astuple(other), strict=True)
            }
        )
