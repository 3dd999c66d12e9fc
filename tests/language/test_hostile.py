"""Hostile text: refused with a FormulaError, at once, and nothing of it is ever executed."""

import os
import sys
import time
from contextlib import contextmanager

import pytest

from normc.errors import FormulaError
from normc.language.parse import parse

MILLISECONDS = 50

WATCHED = ("open", "exec", "compile", "import", "marshal", "pickle", "code.", "function.")
WATCHED += ("os.", "subprocess.", "socket.", "ctypes.", "shutil.", "tempfile.", "urllib.")

CLASSES = {
    "code injection": """
        __import__('os').system('true')
        import os
        import os; x
        from os import system
        exec("x")
        eval("1+1")
        eval(x)
        exec(x)
        compile(x, x, x)
        open(x)
        print(x)
        globals()
        getattr(x, v)
        x; import sys
        x\\nimport sys
        os.system("true")
        breakpoint()
        exit()
        x or exit()
        [x for x in x]
        (x:=2)
        del x
        assert x
        raise x
        return x
        yield x
        await x
        async def f(): x
        def f(x): return x
        class A: pass
        while True: pass
        for x in x: x
        with x: x
        try: x
        global x
        nonlocal x
        pass
        print "x"
        %run x
        !true
        $(true)
        `true`
        x && true
        x || true
        x | true
        x > /dev/null
        ${x}
        {{x}}
        {% x %}
        <script>x</script>
        '; drop table x; --
        #include <x>
        @decorator
        ...
        """,
    "dunder": """
        __class__
        __builtins__
        x.__class__
        x.__class__.__base__.__subclasses__()
        ().__class__
        __name__*x
        x*__x
        _x
        _
        __
        x + _private(x)
        param __v__; __v__
        __class__ = x; __class__
        input __file__; x
        group___std(x)
        """,
    "attribute and index": """
        x.y
        x.shape
        (x).real
        1.real
        x[0]
        x[-1]
        x[:]
        x[...]
        x[x]
        x[0][0]
        x[n]
        (x)[0]
        x()
        x()()
        x(x)(x)
        mean[0](x)
        mean[n:s](x)
        mean[*n](x)
        mean[n](x)[0]
        mean[__n](x)
        """,
    "lambda, comprehension, f-string": """
        lambda: x
        lambda x: x
        (lambda x: x)(x)
        lambda_x: 2
        [x for v in x]
        {x for v in x}
        {x: x for v in x}
        (x for v in x)
        f'{x}'
        f"{__import__('os')}"
        f'''{x}'''
        '%s' % x
        "x".format(x)
        b'x'
        r"x"
        'x'
        "x"
        '''x'''
        x if x else x
        not x
        x and v
        x or v
        x in v
        x is v
        *x
        **x
        x, *v
        max(*x)
        max(**x)
        max(x=x)
        """,
    "syntax": """
        x +
        x +* v
        (
        )
        ((x)
        x))
        [
        ]
        {}
        ,
        x,,v
        ;;;
        =
        x =
        = x
        x == v
        x != v
        x <> v
        x := v
        x += v
        x -> v
        x => v
        x ? v : x
        x // v
        x % v
        x ^ v
        x @ v
        ~x
        x!
        x'
        2x
        x 2
        1..2
        1e
        1e+
        0x10
        1_000
        1j
        0b1
        where
        where(x)
        where(x, x, x)
        where(x > v > 1, x, x)
        param
        input
        param v
        param 2
        param v[n]; v
        param v[] ; v
        input r[q]; r
        """,
    "names with a meaning": """
        x = 2; x
        eps = 2; x
        where = x; x
        param = x; x
        groups*x
        channel_dim*x
        exp
        sigmoid + x
        group_std
        mean
        mean(x)
        exp = x; x
        unknown(x)
        add(x, x)
        neg(x)
        count(x)
        h = x; x
        h = x; h = x; h
        param v; x
        k = h; h = x; h + k
        """,
    "names of sympy as functions": """
        E(x)
        I(x)
        N(x)
        S(x)
        O(x)
        Q(x)
        C(x)
        S("__import__('os')")
        Symbol(x)
        symbols(x)
        sympify(x)
        parse_expr(x)
        lambdify(x, x)
        Lambda(x, x)
        Function(x)
        Integer(x)
        Float(x)
        beta(x, x)
        gamma(x)
        zeta(x)
        pi(x)
        Sum(x, x)
        Integral(x)
        diff(x)
        solve(x)
        limit(x, x, x)
        factorial(x)
        binomial(x, x)
        Piecewise(x)
        evalf(x)
        """,
}

GENERATED = {
    "homoglyphs": [
        *(
            "х",
            "а*x",
            "x*ѕigmoid(x)",
            "ехр(x)",
            "x + ν0ο",
            "Α*x",
            "x*с",
            "іnput r; r",
            "раram v; v",
        ),
        *(
            "group_stԁ(x)",
            "x ∗ v",
            "x ⁄ v",
            "x – v",
            "x — v",
            "x ﹢ v",
            "x＋v",
            "（x）",
            "x；v",
            "ⅼog(x)",
        ),
    ],
    "NFKC": [
        *(
            "ｘ",
            "𝐱*x",
            "𝑥",
            "ℯxp(x)",
            "ﬁ*x",
            "x₁",
            "x¹",
            "xⁿ",
            "½*x",
            "①",
            "٣*x",
            "x**２",
            "Ⅳ",
            "ª",
            "ſ",
        ),
        *("ｅｖａｌ(x)", "＿＿class＿＿", "\u212a*x", "\u212b", "µ̂", "é", "e\u0301", "ﷺ", "㍿"),
    ],
    "invisible": [
        *("x\u200b", "\u200bx", "x\u200d*v", "x\u2060*v", "\ufeffx", "x\u00ad", "x\u00a0+ v"),
        *(
            "x\u2028v",
            "x\u2029v",
            "x\u3000",
            "\u202ex",
            "x\u2066v",
            "x\u061c",
            "x\u180e",
            "\u2062x",
        ),
        *("x\ud800", "\udfff", "x\U000e0041", "\U0010ffff"),
    ],
    "control characters": [f"x{chr(code)}" for code in (*range(1, 9), *range(11, 32), 127, 133)],
    "NUL inside": ["\0", "x\0", "\0x", "x*\0v", "ex\0p(x)", "x#\0", "x\0;import os"],
    "empty": ["", " ", "\t", "\n", " \n \t\n", ";", "\n;\n", "#", "# x", "# x\n# v\n", "   # x"],
    "huge numbers": [
        *("9" * 21, "x*" + "1" * 4000, "1" + "0" * 4094, "1e999999", "-1e999999*x", "1e-999999*x"),
        *("x**1e999999", "1e31", "1e-31*x", "x + 1e308*10", "1e" + "9" * 20, "1e" + "9" * 4000),
        *("0." + "0" * 30 + "1", "param v = 1e999; v", "param v = " + "9" * 400 + "; v", "x**17"),
        *("x**-17", "x**99999999999999999999", "x**1e9", "2.5e400", "." + "1" * 30),
    ],
    "towers": [
        *("9**9**9", "9**9**9**9**9", "x**x**x", "2**-2**x", "x**(x**x)", "x**(2*x**2)", "x**x²"),
        *("x**(exp(x**x))", "x" + "**x" * 1000, "x" + "**2" * 1000, "h = x**x; x**h", "9**9**9**x"),
        *("x**√x²", "x**(" * 60 + "x" + ")" * 60),
    ],
    "nesting": [
        *("(" * 100_000, ")" * 100_000, "(" * 50_000 + ")" * 50_000, "[" * 100_000, "(" * 2_000),
        *("(" * 100 + "x" + ")" * 100, "(" * 65 + "x" + ")" * 65, "exp(" * 800, "()" * 2_000),
        *("exp(" * 70 + "x" + ")" * 70, "mean[" * 800, "([" * 1_000, "where(" * 600, "(" * 4_096),
        *("(" * 65_536 + "x" + ")" * 65_536, "group_std(" * 70 + "x" + ")" * 70),
    ],
    "long chains": [
        *(
            "-" * 100_000 + "x",
            "-" * 4_000 + "x",
            "+" * 4_096,
            "- " * 2_000 + "x",
            "√" * 4_000 + "x",
        ),
        *("x" + "²" * 4_000, "x" + "+x" * 3_000, "+".join(f"a{i}" for i in range(800))),
        *("+".join(f"{i}*x" for i in range(600)), "x" + "-1" * 2_000, "x" + "*2+1" * 900),
        *("x" + "/v" * 2_000, "-√" * 2_000 + "x", "x" + "+1" * 200, "x" * 4_096, "x " * 2_000),
        *(
            "x," * 2_000 + "x",
            "max(" + "x," * 2_000 + "x)",
            "mean[" + "n," * 2_000 + "n](x)",
            "x;" * 2_000 + "x",
            "x\n" * 2_000,
            "h=x;" * 1_000 + "h",
            "," * 4_000,
        ),
        *("param v;" * 500 + "v", "input r;" * 500 + "r", ";" * 4_096, "\n" * 100_000, " " * 4_096),
        *("h0=x*x;" + "".join(f"h{i + 1}=h{i}*h{i};" for i in range(300)) + "h300",),
        *("".join(f"h{i}=x**h;" for i in range(400)) + "x",),
        *("h=" + "-" * 1_000 + "x;" + "x**h*" * 500 + "x",),
    ],
    "long names": [
        *("a" * 65, "a" * 4_096, "x*" + "a" * 4_000, "a" * 100_000, "γ" * 64, "group_" + "s" * 60),
        *(
            "a" * 65 + "(x)",
            "mean[" + "n" * 4_000 + "](x)",
            "param " + "v" * 65 + "; x",
            "σ" * 4_000,
        ),
        *("x*" + "_" * 4_000, "e" * 64 + "(x)", "group_std" * 7 + "(x)", "1e" + "x" * 4_000),
    ],
    "long comments": ["x #" + "x" * 4_096, "#" * 4_096, "#\n" * 2_000, "x # \u0430", "#" * 100_000],
    "many mistakes": [
        "x y " * 1_000,
        "2x" * 2_000,
        "^" * 4_096,
        "x." * 2_000,
        "'" * 4_096,
        "a(" * 60,
    ],
}

HOSTILE = [
    (kind, text)
    for table in ({kind: block.split("\n") for kind, block in CLASSES.items()}, GENERATED)
    for kind, texts in table.items()
    for text in (texts if table is GENERATED else filter(None, map(str.strip, texts)))
]

_events: list[str] | None = None


def _record(event, _arguments):
    if _events is not None and event.startswith(WATCHED):
        _events.append(event)


sys.addaudithook(_record)


@contextmanager
def watching():
    """The watched events that the interpreter reports in this block."""
    global _events
    _events = []
    try:
        yield _events
    finally:
        _events = None


@pytest.fixture(scope="module", autouse=True)
def warm():
    for text in ("x*sigmoid(v*x)/group_std(x)", "2x", "x^2", "gruop_std(x)", "х"):
        try:
            parse(text)
        except FormulaError as error:
            str(error)


def refuse(text):
    try:
        parse(text)
    except FormulaError as error:
        return error
    raise AssertionError(f"accepted: {text[:80]!r}")


def test_the_watch_sees():
    with watching() as seen:
        open(os.devnull).close()
        compile("1", "", "eval")
    assert {"open", "compile"} <= set(seen)


def test_there_are_many():
    assert len(HOSTILE) >= 300
    assert len({text for _, text in HOSTILE}) == len(HOSTILE)
    assert len(CLASSES) + len(GENERATED) >= 15


@pytest.mark.parametrize(
    ("kind", "text"), HOSTILE, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(HOSTILE)]
)
def test_hostile(kind, text):
    with watching() as seen:
        error = refuse(text)
        str(error)
    assert seen == []
    assert error.position is not None and 0 <= error.position <= len(text)
    assert len(str(error)) < 600
    str(error).encode("utf-8")
    assert min(seconds(text) for _ in range(3)) < MILLISECONDS / 1000


def seconds(text):
    """Processor time, which does not depend on what else the machine is doing."""
    start = time.thread_time()
    refuse(text)
    return time.thread_time() - start


def test_the_largest_legal_formulas_are_quick_too():
    terms = "+".join(f"({'+'.join(f'{i}*x' for i in range(n, n + 12))})" for n in range(0, 84, 12))
    chains = "\n".join(["h0 = x + v", *(f"h{i + 1} = h{i}*h{i} + {i}" for i in range(40)), "h40"])
    for text in (terms, chains, "-" * 99 + "x", "(" * 64 + "x" + ")" * 64, "x" + "+x" * 90):
        start = time.thread_time()
        parse(text)
        assert time.thread_time() - start < MILLISECONDS / 1000
