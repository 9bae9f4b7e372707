"""Prefills whose decode engine loads while they run: their open offers grow with each step.

An offer is opened when its request is first scheduled. Each step then appends the blocks that it computes; the workers make them
readable once the step has computed them. The blocks of a sliding window come with the last step, because the engine frees
earlier ones as it advances. A prefill that is preempted loses its blocks, so its offer ends; blocks that were loaded before stay
loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvferry.vllm.guard import ENDING, logger
from kvferry.vllm.messages import GroupBlocks, Growth, Held, Opening

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

# The block id that means "no block".
NULL_BLOCK = 0


@dataclass
class Growing:
    """A prefill with a transfer id."""

    request: "Request"
    transfer: str
    offer_id: str
    # The name of its offer (JSON), once that is open.
    offer: str = field(default="", repr=False)
    # Preemptions of the request before the offer was opened.
    preemptions: int = 0
    # Tokens that its last look-up found in the prefix cache.
    local: int = 0
    # By group, the number of positions that are listed.
    listed: dict[int, int] = field(default_factory=dict)
    # Whether everything is listed.
    complete: bool = False


@dataclass
class Todo:
    """Messages for the workers."""

    openings: list[Opening] = field(default_factory=list)
    cached: list[Growth] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    revokes: list[str] = field(default_factory=list)

    def any(self) -> bool:
        """Whether there is a message."""
        return bool(self.openings or self.growths or self.held or self.dropped or self.revokes)


class Transfers:
    """The prefills of one engine that have a transfer id. `name` makes the name of an offer (JSON), or `None` if the prefill must
    not be offered; `unchanged`: whether its offer still holds."""

    def __init__(
        self,
        block_tokens: dict[int, int],
        windows: set[int],
        name: Callable[[Growing], str | None],
        unchanged: Callable[[Growing], bool],
    ) -> None:
        self._block_tokens, self._windows = block_tokens, windows
        self._name, self._unchanged = name, unchanged
        self._manager: KVCacheManager | None = None
        self._growing: dict[str, Growing] = {}
        # Whether another connector has loaded blocks within a step.
        self._synchronous = False
        self.todo = Todo()

    def bind(self, manager: "KVCacheManager") -> None:
        """Receives the engine's cache manager, which knows the blocks of each request."""
        self._manager = manager

    def add(self, request: "Request", transfer: str, offer_id: str) -> None:
        """A prefill has arrived."""
        if any(g.offer_id == offer_id for g in self._growing.values()):
            # Parallel sampling: the decode engine loads one of them.
            return
        self._growing[request.request_id] = Growing(request, transfer, offer_id, preemptions=request.num_preemptions)

    def looked_up(self, request_id: str, local: int) -> None:
        """The look-up of a request has found this many tokens in the prefix cache."""
        if growing := self._growing.get(request_id):
            growing.local = local

    def finished(self, request: "Request") -> Growing | None:
        """A request has ended. Returns its state if its offer was opened, and has not been dropped; then `keep` or `end` must
        follow."""
        growing = self._growing.pop(request.request_id, None)
        if growing is None:
            return None
        if not growing.offer:
            # A decode engine may wait for it.
            self.todo.revokes.append(growing.offer_id)
            return None
        return growing

    def keep(self, growing: Growing) -> None:
        """The blocks of a finished prefill are held until its offer ends."""
        self.todo.held.append(Held(growing.request.request_id, growing.offer_id))

    def end(self, growing: Growing) -> None:
        """Revokes the offer of a prefill that did not finish. Its blocks are held until nothing reads them."""
        self.todo.revokes.append(growing.offer_id)
        self.keep(growing)

    def step(self, output: "SchedulerOutput") -> None:
        """The engine has scheduled a step."""
        self._synchronous |= getattr(output, "has_sync_kv_loads", True)
        for request_id, growing in list(self._growing.items()):
            try:
                goes_on = self._step(growing, output.num_scheduled_tokens.get(request_id), output)
            except ENDING:
                raise
            except BaseException:
                logger.exception("kvferry: request %s is not offered", request_id)
                goes_on = False
            if not goes_on:
                self.todo.dropped.append(growing.offer_id)
                del self._growing[request_id]

    def _step(self, growing: Growing, scheduled: int | None, output: "SchedulerOutput") -> bool:
        """Whether the prefill is still offered, or may be later."""
        request = growing.request
        if growing.offer and (request.num_preemptions != growing.preemptions or not self._unchanged(growing)):
            return False
        if scheduled is None or growing.complete:
            return True
        if not growing.offer:
            # Blocks that another connector loads within a step are in the prefix cache before they are filled, and the load may
            # fail.
            if (self._synchronous and request.num_computed_tokens) or not self._open(growing, output):
                return False
        done = min(request.num_computed_tokens + scheduled, request.num_prompt_tokens)
        self.todo.growths.append(self._growth(growing, done))
        return True

    def _open(self, growing: Growing, output: "SchedulerOutput") -> bool:
        name = self._name(growing) if self._manager is not None else None
        if name is None:
            return False
        request = growing.request
        growing.offer, growing.preemptions = name, request.num_preemptions
        self.todo.openings.append(Opening(request.request_id, growing.offer_id, name))
        local = min(growing.local, request.num_computed_tokens)
        if local and (ready := self._computed(request.request_id, local, output)):
            self.todo.cached.append(self._growth(growing, ready))
        return True

    def _computed(self, request_id: str, tokens: int, output: "SchedulerOutput") -> int:
        """How many of the first `tokens` tokens, which are cached, are computed before this step: another request of this step may
        share blocks that it is only about to compute."""
        assert self._manager is not None
        new, cached = output.scheduled_new_reqs, output.scheduled_cached_reqs
        starts = {r.req_id: r.num_computed_tokens for r in new}
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        written: dict[int, set[int]] = {g: set() for g in self._block_tokens}
        for other, start in starts.items():
            end = start + output.num_scheduled_tokens.get(other, 0)
            if other == request_id:
                continue
            ids = self._manager.get_block_ids(other)
            for group, size in self._block_tokens.items():
                written[group].update(ids[group][start // size : -(-end // size)])
        mine = self._manager.get_block_ids(request_id)
        for group, size in self._block_tokens.items():
            if group in self._windows:
                continue
            for position, block in enumerate(mine[group][: tokens // size]):
                if block in written[group]:
                    tokens = min(tokens, position * size)
                    break
        return tokens

    def _growth(self, growing: Growing, tokens: int) -> Growth:
        """The blocks of the first `tokens` tokens that are not listed yet."""
        assert self._manager is not None
        growing.complete = tokens == growing.request.num_prompt_tokens
        ids = self._manager.get_block_ids(growing.request.request_id)
        groups = []
        for group, size in self._block_tokens.items():
            if group in self._windows and not growing.complete:
                continue
            first, past = growing.listed.get(group, 0), -(-tokens // size)
            mine = ids[group][first:past]
            if len(mine) != past - first:
                raise RuntimeError(f"group {group} has {len(mine)} blocks for {past - first} positions")
            if mine:
                groups.append(GroupBlocks(group, first, [None if b == NULL_BLOCK else b for b in mine]))
                growing.listed[group] = past
        return Growth(growing.offer_id, groups, tokens, growing.complete)

    def take(self) -> dict[str, Any]:
        """The messages since the last call, as fields of `Meta`."""
        todo, self.todo = self.todo, Todo()
        return vars(todo)
