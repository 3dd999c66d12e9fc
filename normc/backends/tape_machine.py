"""The tape's machine: one C function that runs any plan, compiled once.

It reads instructions of five numbers: what to do, the register or axis it is done to, and operands.
Scalar registers are doubles; vector registers are blocks of elements along the axis of the loop
``blocks``. Vector instructions and scalar ones (``s``) compute in the type of the tensors, wide
ones (``w``) in double. Which functions there are follows from the table of spellings.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

from normc.backends.c_spelling import NARROW, WIDE, declarations
from normc.backends.emit import Spelling, write
from normc.language.expr import call, var
from normc.language.primitives import PRIMITIVES

BLOCK = 512
"""Elements of a vector register: short enough for a dozen of them to stay in L1."""

WIDTH = 5
"""Numbers of an instruction."""

CONTROL = ("end", "kernel", "loop", "blocks")
MOVES = ("load_s", "load_v", "store_s", "store_v", "fill_s", "copy_w", "sum_v", "max_v", "min_v")
"""What an instruction can do besides computing a function."""


def spelling(dtype: str) -> Spelling:
    """How scalar and vector instructions compute: which primitives they know."""
    return WIDE if dtype == "float64" else NARROW


@cache
def opcodes(dtype: str) -> dict[str, int]:
    """The number of every instruction, ``mul_sv`` with the kinds of its operands in its name."""
    names = [*CONTROL, *MOVES, *(name for name, _ in _functions(dtype))]
    return {name: number for number, name in enumerate(names)}


def _functions(dtype: str) -> Iterator[tuple[str, str]]:
    """Every function for every kind of operands, with its text in x, y and z."""
    for kinds, how in (("sv", spelling(dtype)), ("w", WIDE)):
        for fn in sorted(how.known):
            operands = [var(name) for name in "xyz"[: len(PRIMITIVES[fn].args)]]
            text = write(call(fn, *operands), how, {id(v): v.name for v in operands})
            for mixed in product(kinds, repeat=len(operands)):
                if len(operands) < 3 or len(set(mixed)) == 1:
                    yield f"{fn}_{''.join(mixed)}", text


def machine(dtype: str) -> str:
    """The C text of the machine for tensors of a dtype."""
    numbers = opcodes(dtype)
    cases = [f"  case {numbers[name]}: {_case(name, text)}" for name, text in _functions(dtype)]
    names = ", ".join(f"{name.upper()} = {numbers[name]}" for name in (*CONTROL, *MOVES))
    text = _MACHINE % {"block": BLOCK, "width": WIDTH, "names": names, "cases": "\n".join(cases)}
    return f"{_HEAD}{declarations(text, dtype)}\n{text}"


def _case(name: str, text: str) -> str:
    """One function, ``/* mul_sv */ { ... }``: over vectors a loop, over scalars a statement."""
    kinds = name.rpartition("_")[2]
    places = list(zip("abc", "pqo", "xyz", kinds, strict=False))
    if "v" not in kinds:
        kind = "wide" if "w" in kinds else "real"
        read = " ".join(f"const {kind} {x} = s[{a}];" for a, _, x, _ in places)
        return f"/* {name} */ {{ {read} s[d] = ({kind})({text}); break; }}"
    outside = [f"const real *{p} = v[{a}];" if k == "v" else f"const real {x} = s[{a}];"
               for a, p, x, k in places]  # fmt: skip
    inside = " ".join(f"const real {x} = {p}[i];" for _, p, x, k in places if k == "v")
    return f"/* {name} */ {{ {' '.join(outside)} TO; EACH {{ {inside} r[i] = {text}; }} break; }}"


_HEAD = """\
/* The machine that runs tapes: see normc/backends/tape_machine.py
 */
"""

_MACHINE = """
enum { BLOCK = %(block)d, WIDTH = %(width)d };
enum { %(names)s };

typedef struct {
  const int *code;
  void **ptr;
  const i64 *stride, *size;
  i64 at[4];  /* the indices over N, G, K, S */
  int axis;  /* of the blocks */
  i64 n;  /* elements of the block */
  double *s;
  real **v;  /* where the vectors are: in their own room, or in a tensor */
  real *room;
} state;

static inline real *place(const state *t, int tensor) {
  const i64 *step = t->stride + 4*tensor, *at = t->at;
  return (real *)t->ptr[tensor] + at[0]*step[0] + at[1]*step[1] + at[2]*step[2] + at[3]*step[3];
}

#define EACH _Pragma("omp simd") for (i64 i = 0; i < n; i++)
#define TO real *r = v[d] = t->room + BLOCK*d

static void run(state *t, i64 pc) {
  double *s = t->s;
  real **v = t->v;
  const i64 n = t->n;
  for (;; pc += WIDTH) {
    const int *code = t->code + pc;
    const int d = code[1], a = code[2], b = code[3], c = code[4];
    switch (code[0]) {
    case END: return;
    case LOOP:
      for (t->at[d] = 0; t->at[d] < t->size[d]; t->at[d]++) run(t, pc + WIDTH);
      t->at[d] = 0, pc = a;
      break;
    case BLOCKS:
      t->axis = d;
      for (i64 from = 0; from < t->size[d]; from += BLOCK) {
        t->at[d] = from, t->n = least(BLOCK, t->size[d] - from), s[b] = t->n;
        run(t, pc + WIDTH);
      }
      t->at[d] = 0, pc = a;
      break;
    case LOAD_S: s[d] = *place(t, a); break;
    case STORE_S: *place(t, d) = s[a]; break;
    case LOAD_V: {
      const i64 step = t->stride[4*a + t->axis];
      real *from = place(t, a);
      if (step == 1) { v[d] = from; break; }
      TO; EACH r[i] = from[i*step];
      break;
    }
    case STORE_V: {
      const i64 step = t->stride[4*d + t->axis];
      real *to = place(t, d);
      const real *p = v[a];
      if (step == 1) EACH to[i] = p[i];
      else EACH to[i*step] = p[i];
      break;
    }
    case FILL_S: { const real x = s[a]; TO; EACH r[i] = x; break; }
    case COPY_W: s[d] = s[a]; break;
    case SUM_V: {
      const real *p = v[a];
      real sum = 0;
      _Pragma("omp simd reduction(+:sum)") for (i64 i = 0; i < n; i++) sum += p[i];
      s[d] = sum;
      break;
    }
    case MAX_V: {
      const real *p = v[a];
      real m = p[0];
      for (i64 i = 1; i < n; i++) m = max_(p[i], m);
      s[d] = m;
      break;
    }
    case MIN_V: {
      const real *p = v[a];
      real m = p[0];
      for (i64 i = 1; i < n; i++) m = min_(p[i], m);
      s[d] = m;
      break;
    }
%(cases)s
    }
  }
}

void tape(const int *code, const double *numbers, int scalars, int vectors, void **ptr,
          const i64 *stride, const i64 *size, int threads) {
  for (i64 pc = 0; code[pc] == KERNEL; pc = code[pc + 1]) {
    const int axes = code[pc + 2], count = code[pc + 3];
    i64 total = 1;
    for (int i = 0; i < count; i++) total *= size[axes >> 2*i & 3];
    #pragma omp parallel num_threads(least(threads, total)) if(threads > 1 && total > 1)
    {
      double s[scalars];
      real *v[vectors + 1], wide_room[vectors*BLOCK + 64];
      real *room = (real *)(((unsigned long)wide_room + 63) & ~63ul);
      for (int i = 0; i < scalars; i++) s[i] = numbers[i];
      state t = {code, ptr, stride, size, {0}, 0, 0, s, v, room};
      #pragma omp for schedule(static)
      for (i64 at = 0; at < total; at++) {
        i64 left = at;
        for (int i = 0; i < count; i++) {
          const int axis = axes >> 2*i & 3;
          t.at[axis] = left %% size[axis], left /= size[axis];
        }
        run(&t, pc + WIDTH);
      }
    }
  }
}
"""
