"""Where lanes that part at a branch meet again: its immediate post-dominator, as ptxas does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Jump(NamedTuple):
    """An instruction that does not just go on to the next."""

    at: int
    target: int | None  # None: it ends there
    is_conditional: bool


def meeting_points(jumps: Sequence[Jump], length: int) -> dict[int, int]:
    """Returns where the lanes of each branch meet, by where it stands; ``length`` is the end."""
    starts = sorted(
        {0, length}
        | {jump.target for jump in jumps if jump.target is not None}
        | {jump.at + 1 for jump in jumps}
    )
    block_of = {start: i for i, start in enumerate(starts)}
    exit_block = len(starts) - 1
    by_end = {jump.at: jump for jump in jumps}
    leads_to: list[list[int]] = []
    for i in range(exit_block):
        jump = by_end.get(starts[i + 1] - 1)
        targets = [i + 1] if jump is None or jump.is_conditional else []
        if jump is not None:
            targets.append(exit_block if jump.target is None else block_of[jump.target])
        leads_to.append(targets)
    behind = _post_dominators(leads_to, exit_block)
    return {
        jump.at: starts[behind[i]] if i in behind else length
        for i in range(exit_block)
        if (jump := by_end.get(starts[i + 1] - 1)) and jump.target is not None
    }


def _post_dominators(leads_to: Sequence[Sequence[int]], exit_block: int) -> dict[int, int]:
    """The immediate one of each block (Cooper, Harvey and Kennedy's algorithm, backwards)."""
    order = _postorder(leads_to, exit_block)
    number = {block: i for i, block in enumerate(order)}
    found = {exit_block: exit_block}

    def meet(x: int, y: int) -> int:
        while x != y:
            while number[x] < number[y]:
                x = found[x]
            while number[y] < number[x]:
                y = found[y]
        return x

    changed = True
    while changed:
        changed = False
        for block in reversed(order[:-1]):
            known = [target for target in leads_to[block] if target in found]
            new = known[0]
            for target in known[1:]:
                new = meet(new, target)
            changed |= found.get(block) != new
            found[block] = new
    return found


def _postorder(leads_to: Sequence[Sequence[int]], exit_block: int) -> list[int]:
    """Blocks from which the exit is reached, in postorder of the graph turned round."""
    comes_from: list[list[int]] = [[] for _ in range(exit_block + 1)]
    for block, targets in enumerate(leads_to):
        for target in targets:
            comes_from[target].append(block)
    order, seen = [], {exit_block}
    stack = [(exit_block, iter(comes_from[exit_block]))]
    while stack:
        block, rest = stack[-1]
        for previous in rest:
            if previous not in seen:
                seen.add(previous)
                stack.append((previous, iter(comes_from[previous])))
                break
        else:
            order.append(block)
            stack.pop()
    return order
