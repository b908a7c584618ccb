"""Errors: PTX that the emulator does not know, and faults of a kernel that it found."""

from __future__ import annotations


class UnsupportedPTX(NotImplementedError):  # noqa: N818
    """An instruction, a modifier or a directive that the emulator does not implement, by name and line."""


class KernelFault(RuntimeError):  # noqa: N818
    """A kernel did something that a GPU would not forgive.

    Attributes
    ----------
    kind : str
        ``out-of-bounds``, ``misaligned``, ``divergent-barrier``, ``barrier``, ``absent-lane``, ``cp.async``, ``trap``,
        ``assert``, ``timeout``, ``race`` (ThreadSanitizer) or ``address`` (AddressSanitizer).
    text : str
        What happened, in words.
    block, thread : tuple of int
        Who did it, as (x, y, z); empty where a sanitizer does not say: it may take a block for one thread.
    ptx_line : int
        The line in the PTX, 0 if there is none.
    instruction : str
        That line.
    source : str
        ``file:line`` of the CUDA source, "" without ``-lineinfo``.
    """

    def __init__(
        self,
        kind: str,
        text: str,
        block: tuple[int, ...] = (),
        thread: tuple[int, ...] = (),
        ptx_line: int = 0,
        instruction: str = "",
        source: str = "",
    ) -> None:
        self.kind, self.text, self.block, self.thread = kind, text, block, thread
        self.ptx_line, self.instruction, self.source = ptx_line, instruction, source
        of_thread = f" thread {_triple(thread)}" if thread else ""
        who = f"block {_triple(block)}{of_thread}: " if block else ""
        at = f"\n  at PTX line {ptx_line}: {instruction}" if ptx_line else ""
        of = f"\n  from {source}" if source else ""
        super().__init__(f"{kind}: {who}{text}{at}{of}")


def _triple(xyz: tuple[int, ...]) -> str:
    return "(" + ",".join(map(str, xyz)) + ")"
