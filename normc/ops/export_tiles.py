"""How an exported file chooses the form of a kernel and the sizes of its tiles.

The text is Python with ``$names`` that `normc.ops.export` fills in. It stays text because it stands
on its own in a file that knows nothing of normc; it means what the Triton backend means
by resident and streaming.
"""

from __future__ import annotations

TILES = '''
ON_CHIP = 16384  # float32 numbers of all tensors together that a program keeps in registers
STREAMED = 2048  # of all tensors together that a loop reads at once
NEIGHBOURS = (32, 16, 8, 4)  # instances next to each other in memory that a program takes
SECTOR = 32  # bytes of memory that are read together at the least
SMALL = 1024  # elements below which a program takes several instances
PROGRAMS = 1024  # that keep a large GPU busy
PARTS = 256  # programs, at most, that carry a sum over the grid


class _Tiles(NamedTuple):
    """How a kernel is launched."""

    resident: bool  # all that a program walks lies in one tile; else it loops, tile after tile
    programs: int
    options: dict  # the extents of tiles, powers of two, and what Triton is told


@lru_cache(maxsize=1024)
def _tiles(dims, sizes, grid, sweeps, tensors, values, width, most=2**31 - 1):
    """The form of a kernel and its tiles, found without trying it: resident if all fits on chip.

    ``dims`` are a tile's dimensions, outermost in memory first, ``grid`` those that are split over
    programs, ``sweeps`` those that each pass over memory walks. ``tensors`` of x's size are read;
    ``values`` have to be in registers at once; a stored number has ``width`` bytes.
    """
    size = dict(zip(dims, sizes))
    weight = max(1, tensors)
    whole = {d: _ceiling(size[d]) for d in dims if d not in grid}
    lanes = [_lanes(dims, size, grid, n) for n in NEIGHBOURS if n * width >= SECTOR]
    fitting = [one for one in lanes if prod({**whole, **one}.values()) * weight <= ON_CHIP]
    busy = [one for one in fitting or lanes if _programs(size, one) >= PROGRAMS]
    lane = (busy or (fitting or lanes)[-1:])[0]
    if fitting:
        lane = _several(size, lane, prod(whole.values()))
        extents = {d.upper(): n for d, n in {**whole, **lane}.items()}
        largest = prod(extents.values())
    else:
        extents, largest = _loops(dims, size, lane, sweeps, max(1, STREAMED // weight))
        largest *= 2 if values > 4 else 1
    blocks = {f"BLOCK_{name}": n for name, n in extents.items()}
    programs = min(_programs(size, lane), most)
    return _Tiles(bool(fitting), programs, {**blocks, **_options(largest)})


def _lanes(dims, size, grid, width):
    """Instances per program: several where neighbours in memory are other instances."""
    inner = dims[-1:]
    return {d: min(_ceiling(size[d]), width) if d == inner else 1 for d in grid}


def _programs(size, lane):
    """How many programs there are, or blocks that programs take in turn."""
    return prod(-(-size[d] // n) for d, n in lane.items())


def _several(size, lane, rest):
    """Of small instances several per program, while enough programs are left."""
    lane = dict(lane)
    for d in reversed(lane):
        while lane[d] < size[d] and prod(lane.values()) * rest < SMALL:
            if _programs(size, lane) < 2 * PROGRAMS:
                break
            lane[d] *= 2
    return lane


def _loops(dims, size, lane, sweeps, most):
    """Tiles for each sweep, long along what lies together in memory, and the largest of them."""
    extents = {d.upper(): n for d, n in lane.items()}
    largest = 1
    for i, walked in enumerate(sweeps):
        tile = prod(lane.values())
        for d in sorted(walked, key=dims.index, reverse=True):
            extents[f"{d.upper()}{i}"] = extent = _tight(size[d], max(1, most // tile))
            tile *= extent
        largest = max(largest, tile)
    return extents, largest


def _tight(size, most):
    """The largest power of two up to ``most`` whose last block is not mostly empty."""
    block = min(_ceiling(size), _ceiling(most + 1) // 2)
    while block > 64 and -(-size // block) * block > 1.125 * size:
        block //= 2
    return block


def _ceiling(size):
    """The least power of two that is not less."""
    return 1 << max(0, size - 1).bit_length()


def _options(elements):
    """Warps: eight elements per thread, more in a large tile; a warp of an AMD GPU is wider.

    Products and sums are not contracted: what is computed twice, in forward and in backward, has to
    be the same number, so that a tie of max or min is found again.
    """
    warps = max(1, min(16, elements // 256))
    warps = max(1, warps // 2) if torch.version.hip else warps
    return {"num_warps": warps, "enable_fp_fusion": False}


SUM = {"BLOCK_PARTS": 32, "BLOCK": 64, **_options(32 * 64)}
'''
