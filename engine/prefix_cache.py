"""The prefix cache: a radix tree of full blocks over their chained hashes.

A chained hash names its whole path, so the tree is a flat map from hash to node with parent links
and child counts. One node is one full block and owns one slot. The tree stays prefix-closed: a
node is never there without its parent, so eviction takes leaves first.

A node is *busy* while its slot has a holder or a child is busy; all others can be evicted, each
after its children. Busy state climbs the tree only when it flips, so pinning a path is amortised
O(1) per block and `num_evictable` is a counter.

RadixAttention with leaf-first LRU: Zheng et al., "SGLang", NeurIPS 2024; block hashes: vLLM.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple, Protocol

from baton.common.ids import BlockHash, Slot
from baton.engine.block_pool import BlockPool


class PrefixListener(Protocol):
    """Told of every change of the tree, in order. Must not block nor call the cache back."""

    def on_stored(self, block: BlockHash, parent: BlockHash | None) -> None:
        """A node is there now; a first block has no parent."""
        ...

    def on_evicted(self, block: BlockHash) -> None:
        """A node is gone, its children before it."""
        ...


class CachedBlock(NamedTuple):
    """One node as an outsider sees it."""

    hash: BlockHash
    parent: BlockHash | None
    slot: Slot


@dataclass(slots=True, eq=False)
class _Node:
    hash: BlockHash
    slot: Slot
    parent: "_Node | None"
    last_use: int
    num_children: int = 0
    # Reasons to stay: 1 if the slot has a holder, and 1 per busy child.
    num_busy: int = 0
    # At most one heap entry per node keeps the heap no larger than the tree.
    is_queued: bool = False

    @property
    def is_evictable_leaf(self) -> bool:
        return self.num_children == 0 and self.num_busy == 0


class PrefixCache:
    """Slots of computed blocks by identity. Recency is a logical counter, never time."""

    def __init__(self, pool: BlockPool, listener: PrefixListener | None = None) -> None:
        self._pool = pool
        self._listener = listener
        self._nodes: dict[BlockHash, _Node] = {}
        self._by_slot: dict[Slot, _Node] = {}
        self._num_busy_nodes = 0
        self._clock = 0
        # Lazy: an entry (last use, ticket, node) may be out of date and is checked when popped.
        self._heap: list[tuple[int, int, _Node]] = []
        self._ticket = 0
        # Slots that were dropped while somebody held them: they do not come back by a publication.
        self._barred: set[Slot] = set()
        pool.attach(self)

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def num_evictable(self) -> int:
        """Nodes that eviction can take, now and without anybody letting go of a slot."""
        return len(self._nodes) - self._num_busy_nodes

    def holds(self, slot: Slot) -> bool:
        return slot in self._by_slot

    def slots(self) -> Collection[Slot]:
        """The slots of all nodes, in no order, as a view."""
        return self._by_slot.keys()

    def blocks(self) -> Iterator[CachedBlock]:
        """All nodes, each parent before its children."""
        for node in self._nodes.values():
            parent = None if node.parent is None else node.parent.hash
            yield CachedBlock(node.hash, parent, node.slot)

    def peek(self, hashes: Sequence[BlockHash]) -> tuple[int, int]:
        """(length of the longest leading run, how many of it are evictable); changes nothing."""
        num_evictable = 0
        for index, block in enumerate(hashes):
            node = self._nodes.get(block)
            if node is None:
                return index, num_evictable
            num_evictable += node.num_busy == 0
        return len(hashes), num_evictable

    def match(self, hashes: Sequence[BlockHash]) -> list[Slot]:
        """Slots of the longest leading run of `hashes`, whose recency this refreshes.

        Nothing is pinned: the caller pins before anything may be evicted.
        """
        self._clock += 1
        slots = []
        for block in hashes:
            node = self._nodes.get(block)
            if node is None:
                break
            node.last_use = self._clock
            slots.append(node.slot)
        return slots

    def insert(self, hashes: Sequence[BlockHash], slots: Sequence[Slot], start: int) -> None:
        """Add nodes for the blocks `[start, len(hashes))` of a path whose table is `slots`.

        A hash that is already there keeps its first slot; the duplicate stays the caller's own. An
        ancestor may be gone: a twin in another slot published it and was evicted since. Then the
        path is repaired with the caller's slots, so that no node lacks its parent. What follows a
        dropped block of the table was computed from wrong bytes, and is left out.
        """
        assert 0 <= start <= len(hashes) <= len(slots), "each block of the path has a slot"
        if self._barred:
            hashes = hashes[: self._num_trusted(slots[: len(hashes)])]
            start = min(start, len(hashes))
        while start > 0 and hashes[start - 1] not in self._nodes:
            start -= 1
        self._clock += 1
        parent = self._nodes[hashes[start - 1]] if start > 0 else None
        for block, slot in zip(hashes[start:], slots[start : len(hashes)], strict=True):
            node = self._nodes.get(block)
            if node is None:
                node = self._add(block, slot, parent)
            node.last_use = self._clock
            parent = node

    def evict(self, count: int) -> list[Slot]:
        """Drop `count <= num_evictable` nodes and free their slots: leaves, least recent first."""
        assert 0 <= count <= self.num_evictable, f"{count} wanted, {self.num_evictable} evictable"
        slots: list[Slot] = []
        while len(slots) < count:
            last_use, _, node = heappop(self._heap)
            node.is_queued = False
            if not node.is_evictable_leaf:
                continue
            if node.last_use != last_use:
                self._queue(node)
                continue
            self._remove(node)
            slots.append(node.slot)
        self._pool.reclaim(slots)
        return slots

    def drop(self, slots: Sequence[Slot]) -> int:
        """Forget the blocks in `slots`, whose bytes are wrong, with all that follows them in the
        tree; the number of nodes that went. Costs O(tree).

        A held slot just stops being cached: it is freed when its last holder lets go, and until
        then no publication of a table with it puts that block or a later one back.
        """
        named = set(slots)
        doomed: list[_Node] = []
        for node in self._nodes.values():
            # Parents come before their children here, so one pass finds whole subtrees.
            if node.slot in named or (node.parent is not None and node.parent.slot in named):
                named.add(node.slot)
                doomed.append(node)
        for node in reversed(doomed):
            if node.num_busy > 0:
                assert node.num_busy == 1, "its children are gone, its slot's holder is left"
                self._release(node)
            self._remove(node)
        gone = set(doomed)
        self._heap = [entry for entry in self._heap if entry[2] not in gone]
        heapify(self._heap)
        self._barred.update(slot for slot in named if self._pool.refcount(slot) > 0)
        self._pool.reclaim(node.slot for node in doomed if node.slot not in self._barred)
        return len(doomed)

    def slot_idle(self, slot: Slot) -> bool:
        """The pool's word that the last holder of `slot` let go; whether the cache keeps it."""
        node = self._by_slot.get(slot)
        if node is None:
            self._barred.discard(slot)
            return False
        # A block counts as used until its last holder let go, not just when it was matched.
        self._clock += 1
        node.last_use = self._clock
        self._release(node)
        return True

    def slot_busy(self, slot: Slot) -> None:
        """The pool's word that a kept slot has a holder again."""
        self._retain(self._by_slot[slot])

    def _num_trusted(self, table: Sequence[Slot]) -> int:
        """Leading slots of the table before the first that was dropped."""
        return next((n for n, slot in enumerate(table) if slot in self._barred), len(table))

    def _add(self, block: BlockHash, slot: Slot, parent: _Node | None) -> _Node:
        assert slot not in self._by_slot, f"slot {slot} already holds another cached block"
        assert self._pool.refcount(slot) > 0, f"slot {slot} is published by nobody who holds it"
        node = _Node(block, slot, parent, self._clock)
        self._nodes[block] = node
        self._by_slot[slot] = node
        if parent is not None:
            parent.num_children += 1
        self._retain(node)
        if self._listener is not None:
            self._listener.on_stored(block, None if parent is None else parent.hash)
        return node

    def _remove(self, node: _Node) -> None:
        del self._nodes[node.hash]
        del self._by_slot[node.slot]
        parent = node.parent
        if parent is not None:
            parent.num_children -= 1
            self._queue(parent)
        if self._listener is not None:
            self._listener.on_evicted(node.hash)

    def _retain(self, node: _Node | None) -> None:
        while node is not None:
            node.num_busy += 1
            if node.num_busy > 1:
                return
            self._num_busy_nodes += 1
            node = node.parent

    def _release(self, node: _Node | None) -> None:
        while node is not None:
            assert node.num_busy > 0, f"slot {node.slot} was released more often than retained"
            node.num_busy -= 1
            if node.num_busy > 0:
                return
            self._num_busy_nodes -= 1
            self._queue(node)
            node = node.parent

    def _queue(self, node: _Node) -> None:
        if node.is_queued or not node.is_evictable_leaf:
            return
        node.is_queued = True
        self._ticket += 1
        heappush(self._heap, (node.last_use, self._ticket, node))
