"""What PTX says about a kernel: which of its loads and stores go to which argument."""

import re
from dataclasses import dataclass

_SIZE = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "f32": 4, "f64": 8, "u16": 2, "u32": 4, "u64": 8}
_MOVES = ("mov", "cvta", "add", "sub", "mad", "selp", "shl", "mul", "cvt", "or")


@dataclass(frozen=True)
class Access:
    """One instruction that reads or writes memory."""

    vector: int  # registers
    size: int  # bytes of one

    @property
    def bytes(self):
        """What one thread moves."""
        return self.vector * self.size


def accesses(text, argument, kind="ld"):
    """The loads ("ld") or stores ("st") through the pointer that is the given argument.

    An address is followed from the parameter through moves and sums; in what Triton prints no
    address comes out of memory or of a call.
    """
    known, found = set(), []
    for line in text.splitlines():
        words = re.sub(r"^@!?%\w+\s+", "", line.strip()).rstrip(";")
        name, _, rest = words.partition("\t")
        name, rest = (name, rest) if rest else words.partition(" ")[::2]
        registers = re.findall(r"%\w+", rest)
        if name.startswith("ld.param") and re.search(rf"_param_{argument}\]", rest):
            known.add(registers[0])
        elif name.startswith(f"{kind}.global"):
            inside = re.findall(r"\[\s*(%\w+)", rest)
            if inside and inside[0] in known:
                vector = re.search(r"\.v(\d)", name)
                found.append(Access(int(vector[1]) if vector else 1, _SIZE[name.split(".")[-1]]))
        elif name.split(".")[0] in _MOVES and set(registers[1:]) & known:
            known |= {r for r in registers[:1] if r.startswith("%rd")}
    return found
