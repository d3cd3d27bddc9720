"""torch's caching allocator once more, from its rules, with plain lists and linear search.

The oracle of the native simulator: slow, small, and without any of its data structures. A segment
is a list of blocks by offset; all that is free is found by looking at every block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MIB = 1 << 20


@dataclass
class Block:
    offset: int
    size: int
    state: str = "free"  # free, live, awaiting, unmapped
    born: int = 0
    requested: int = 0
    event: int = -1
    shared: bool = False


@dataclass
class Segment:
    serial: int
    stream: int
    small: bool
    granule: int  # 0 unless expandable
    blocks: list[Block]


@dataclass
class Options:
    limit: int | None = None
    device_memory: int | None = None
    max_split_size: int | None = None
    max_non_split_rounding_size: int = 20 * MIB
    large_segment_size: int = 20 * MIB
    garbage_collection_threshold: float = 0.0
    expandable_segments: bool = False
    roundup_power2_divisions: list[int] = field(default_factory=list)


class NoMemory(Exception):
    pass


def up(value: int, step: int) -> int:
    return -(-value // step) * step


class Allocator:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.segments: list[Segment] = []
        self.serial = 0
        self.searches = {True: 0, False: 0}
        self.reserved = self.reserved_high = self.takes = self.gives = self.retries = 0
        self.swept = self.oversized = 0  # segments given back by age, and by max_split_size

    # -- sizes

    def rounded(self, size: int) -> int:
        if size < 512:
            return 512
        table = self.options.roundup_power2_divisions
        divisions = 0
        if table:
            # The table's first entry is for all below 2 MiB, the last for 32 GiB and above.
            interval = 0
            while interval < 15 and size >= (2 * MIB) << interval:
                interval += 1
            divisions = table[interval] if len(table) > 1 else table[0]
        if divisions > 1 and size > 512 * divisions:
            floor = 1
            while 2 * floor <= size:
                floor *= 2
            return next(
                s for k in range(divisions + 1) if (s := floor + k * floor // divisions) >= size
            )
        return up(size, 512)

    def segment_size(self, size: int) -> int:
        if size <= MIB:
            return 2 * MIB
        return self.options.large_segment_size if size < 10 * MIB else up(size, 2 * MIB)

    # -- looking

    def free(self, small: bool, stream: int | None = None) -> list[tuple[Segment, Block]]:
        """Free blocks as torch orders them: by stream, size, address."""
        found = [
            (s, b)
            for s in self.segments
            if s.small == small and stream in (None, s.stream)
            for b in s.blocks
            if b.state == "free"
        ]
        return sorted(found, key=lambda f: (f[0].stream, f[1].size, f[0].serial, f[1].offset))

    def whole(self, segment: Segment) -> bool:
        return len(segment.blocks) == 1

    # -- allocating and releasing

    def allocate(self, requested: int, stream: int, event: int) -> Block:
        size = self.rounded(requested)
        small = size <= MIB
        found = self.cached(size, stream, small)
        if found is None:
            if self.collecting:
                self.collect()
            found = self.fresh(size, stream, small)
        if found is None and self.release_oversize(size, stream, small):
            found = self.fresh(size, stream, small)
        if found is None:
            self.empty_cache()
            self.retries += 1
            found = self.fresh(size, stream, small)
        if found is None:
            raise NoMemory
        segment, block = found
        left = block.size - size
        if small or self.options.expandable_segments:
            split = left >= 512
        else:
            oversize = self.options.max_split_size
            split = left > MIB and (oversize is None or size < oversize)
        if split:
            rest = Block(block.offset + size, left, born=self.searches[small])
            segment.blocks.insert(segment.blocks.index(block) + 1, rest)
            block.size = size
        block.state, block.requested, block.event = "live", requested, event
        return block

    @property
    def collecting(self) -> bool:
        return self.options.limit is not None and self.options.garbage_collection_threshold > 0

    def cached(self, size: int, stream: int, small: bool) -> tuple[Segment, Block] | None:
        if self.collecting:
            self.searches[small] += 1
        fits = [f for f in self.free(small, stream) if f[1].size >= size]
        if not fits:
            return None
        chosen = fits[0]
        if self.options.expandable_segments:

            def room(found: tuple[Segment, Block]) -> int:
                blocks = found[0].blocks
                after = blocks[blocks.index(found[1]) + 1 :][:1]
                return found[1].size + sum(b.size for b in after if b.state == "unmapped")

            for following in fits[1:]:
                if room(following) >= room(chosen):
                    break
                chosen = following
        oversize = self.options.max_split_size
        if oversize is not None:
            have = chosen[1].size
            if size < oversize <= have:
                return None
            if size >= oversize and have >= size + self.options.max_non_split_rounding_size:
                return None
        return chosen

    def fresh(self, size: int, stream: int, small: bool) -> tuple[Segment, Block] | None:
        o = self.options
        wanted = self.segment_size(size)
        if o.limit is not None and self.reserved + wanted > o.limit:
            return None
        if o.expandable_segments:
            return self.expand(size, stream, small)
        if o.device_memory is not None and self.reserved + wanted > o.device_memory:
            return None
        segment = self.add_segment(stream, small, 0, wanted)
        self.take(wanted)
        return segment, segment.blocks[0]

    def add_segment(self, stream: int, small: bool, granule: int, size: int) -> Segment:
        segment = Segment(self.serial, stream, small, granule, [Block(0, size)])
        self.serial += 1
        self.segments.append(segment)
        return segment

    def take(self, size: int) -> None:
        self.reserved += size
        self.reserved_high = max(self.reserved_high, self.reserved)
        self.takes += 1

    def give(self, size: int) -> None:
        self.reserved -= size
        self.gives += 1

    def segment_of(self, block: Block) -> Segment:
        return next(s for s in self.segments if any(b is block for b in s.blocks))

    def release(self, block: Block) -> bool:
        """True if it is free now, False if it awaits other streams."""
        if block.shared:
            block.state = "awaiting"
            return False
        self.make_free(block)
        return True

    def make_free(self, block: Block) -> None:
        segment = self.segment_of(block)
        block.state, block.requested, block.event, block.shared = "free", 0, -1, False
        block.born = self.searches[segment.small]
        self.join(segment, block)

    def join(self, segment: Segment, block: Block) -> None:
        """Takes in the neighbours that are in the same state; the block's age is its own."""
        i = next(k for k, b in enumerate(segment.blocks) if b is block)
        if i + 1 < len(segment.blocks) and segment.blocks[i + 1].state == block.state:
            block.size += segment.blocks.pop(i + 1).size
        if i > 0 and segment.blocks[i - 1].state == block.state:
            before = segment.blocks.pop(i - 1)
            block.offset, block.size = before.offset, before.size + block.size

    # -- giving back

    def drop(self, segment: Segment) -> None:
        self.give(segment.blocks[0].size)
        self.segments.remove(segment)

    def collect(self) -> None:
        assert self.options.limit is not None
        threshold = int(self.options.garbage_collection_threshold * self.options.limit)
        if self.reserved <= threshold:
            return
        target, released = self.reserved - threshold, 0
        pool = [s for s, b in self.free(False) if self.whole(s)]
        ages = {s.serial: self.searches[False] - s.blocks[0].born for s in pool}
        total, count, progress = sum(ages.values()), len(pool), True
        while released < target and progress and count > 0:
            average, progress = total / count, False
            for s in list(pool):
                if s.granule == 0 and ages[s.serial] >= average:
                    progress = True
                    released += s.blocks[0].size
                    total -= ages[s.serial]
                    count -= 1
                    pool.remove(s)
                    self.drop(s)
                    self.swept += 1

    def release_oversize(self, size: int, stream: int, small: bool) -> bool:
        oversize = self.options.max_split_size
        if oversize is None or self.options.expandable_segments:
            return False
        wanted = max(size, oversize)
        free = self.free(small, stream)
        for s, b in free:
            if b.size >= wanted:
                assert self.whole(s)
                self.drop(s)
                self.oversized += 1
                return True
        released = 0
        for s, b in reversed(free):
            if released >= wanted or b.size < oversize:
                break
            assert self.whole(s)
            released += b.size
            self.drop(s)
            self.oversized += 1
        return released >= wanted

    def empty_cache(self) -> None:
        for s in list(self.segments):
            for b in [b for b in s.blocks if b.state == "awaiting"]:
                self.make_free(b)
        for s, b in self.free(False) + self.free(True):
            if s.granule:
                self.unmap(s, b)
            elif self.whole(s):
                self.drop(s)

    # -- expandable segments

    def expand(self, size: int, stream: int, small: bool) -> tuple[Segment, Block] | None:
        segment, i = self.place(size, stream, small)
        if segment.blocks[i].state == "unmapped":
            i_mapped = self.map(segment, i, min(size, segment.blocks[i].size))
            if i_mapped is None:
                return None
            i = i_mapped
        while segment.blocks[i].size < size:
            missing = size - segment.blocks[i].size
            i_mapped = self.map(segment, i + 1, min(missing, segment.blocks[i + 1].size))
            if i_mapped is None:
                return None
            i = i_mapped
        return segment, segment.blocks[i]

    def place(self, size: int, stream: int, small: bool) -> tuple[Segment, int]:
        for s in self.segments:  # by serial
            if s.small != small or s.stream != stream or not s.granule:
                continue
            for i, b in enumerate(s.blocks):
                if b.state != "unmapped":
                    continue
                start = i - 1 if i > 0 and s.blocks[i - 1].state == "free" else i
                room = 0
                for c in s.blocks[start:]:
                    if c.state not in ("free", "unmapped") or room >= size:
                        break
                    room += c.size
                if room >= size:
                    return s, start
        o = self.options
        granule = 2 * MIB if small else o.large_segment_size
        memory = next(m for m in (o.device_memory, o.limit, 1 << 60) if m is not None)
        space = up(max(memory + memory // 8, size), granule)
        segment = self.add_segment(stream, small, granule, space)
        segment.blocks[0].state = "unmapped"
        return segment, 0

    def map(self, segment: Segment, i: int, size: int) -> int | None:
        size = up(size, segment.granule)
        memory = self.options.device_memory
        if memory is not None and self.reserved + size > memory:
            return None
        block = segment.blocks[i]
        if block.size > size:
            rest = Block(block.offset + size, block.size - size, "unmapped")
            segment.blocks.insert(i + 1, rest)
            block.size = size
        block.state, block.born = "free", self.searches[segment.small]
        self.join(segment, block)
        self.take(size)
        return next(k for k, b in enumerate(segment.blocks) if b is block)

    def unmap(self, segment: Segment, block: Block) -> None:
        g = segment.granule
        begin, stop = up(block.offset, g), (block.offset + block.size) // g * g
        if begin >= stop:
            return
        i = next(k for k, b in enumerate(segment.blocks) if b is block)
        now = self.searches[segment.small]
        middle = Block(begin, stop - begin, "unmapped")
        parts = [
            Block(block.offset, begin - block.offset, born=now),
            middle,
            Block(stop, block.offset + block.size - stop, born=now),
        ]
        segment.blocks[i : i + 1] = [p for p in parts if p.size > 0]
        self.join(segment, middle)
        self.give(stop - begin)
        if len(segment.blocks) == 1:
            self.segments.remove(segment)


def layout(segments: list[Segment]) -> list[tuple[object, ...]]:
    """Segments by address, an expandable one as its mapped runs, in a form that compares."""
    found: list[tuple[object, ...]] = []
    for s in segments:
        run: list[tuple[int, int, int, str, int]] = []
        for b in [*s.blocks, Block(0, 0, "unmapped")]:
            if b.state != "unmapped":
                run.append((b.offset, b.size, b.requested, b.state, b.event))
            elif run:
                start = run[0][0] if s.granule else 0
                size = sum(r[1] for r in run)
                found.append((s.serial, start, size, s.stream, s.small, s.granule > 0, tuple(run)))
                run = []
    return found


@dataclass
class Result:
    peak_allocated: int = 0
    peak_allocated_event: int | None = None
    reserved_at_peak: int = 0
    peak_reserved: int = 0
    peak_reserved_event: int | None = None
    allocated_at_peak_reserved: int = 0
    alive_at_peak: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    out_of_memory: tuple[int, int, int] | None = None  # event, reserved, allocated
    timeline: list[tuple[int, int, int]] = field(default_factory=list)
    layout: list[tuple[object, ...]] = field(default_factory=list)
    takes: int = 0
    gives: int = 0
    retries: int = 0
    awaiting: int = 0
    swept: int = field(default=0, compare=False)
    oversized: int = field(default=0, compare=False)


def replay(events: list[tuple[int, int, int, int]], options: Options) -> Result:
    """What the rules make of a trace that is well formed."""
    allocator, result = Allocator(options), Result()
    live: dict[int, Block] = {}
    waiting: dict[int, Block] = {}
    origin: dict[int, tuple[int, int, int, int]] = {}
    for index, (block_id, size, stream, tag) in enumerate(events):
        allocator.reserved_high = allocator.reserved
        failed = False
        if size > 0:
            try:
                live[block_id] = allocator.allocate(size, stream, index)
                origin[block_id] = (size, stream, tag, index)
            except NoMemory:
                failed = True
        elif size == -1 and block_id in live:
            block = live.pop(block_id)
            if not allocator.release(block):
                waiting[block_id] = block
        elif size == -2 and block_id in live:
            block = live[block_id]
            block.shared |= stream != allocator.segment_of(block).stream
        elif size == -3 and block_id in waiting:
            block = waiting.pop(block_id)
            if block.state == "awaiting":
                allocator.make_free(block)
        elif size == -4:
            allocator.empty_cache()
        waiting = {i: b for i, b in waiting.items() if b.state == "awaiting"}
        allocated = sum(b.size for b in live.values())
        result.timeline.append((index, allocated, allocator.reserved_high))
        if allocated > result.peak_allocated:
            result.peak_allocated, result.peak_allocated_event = allocated, index
            result.reserved_at_peak = allocator.reserved
            result.alive_at_peak = sorted(
                ((i, b.size, *origin[i]) for i, b in live.items()), key=lambda r: (-r[1], r[5])
            )
        if allocator.reserved_high > result.peak_reserved:
            result.peak_reserved, result.peak_reserved_event = allocator.reserved_high, index
            result.allocated_at_peak_reserved = allocated
        if failed:
            result.out_of_memory = (index, allocator.reserved, allocated)
            break
    result.layout = layout(allocator.segments)
    result.takes, result.gives = allocator.takes, allocator.gives
    result.swept, result.oversized = allocator.swept, allocator.oversized
    result.retries, result.awaiting = allocator.retries, sum(b.size for b in waiting.values())
    return result
