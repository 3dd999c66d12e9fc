"""Mistakes: what people write, and what they are told; the tables are also their own test.

`SYNTAX` is read by lark's `match_examples`: an error in a user's text gets the message of the
example that fails in the same parser state at a token of the same kind. Where no example fits, the
message says what was expected (`EXPECTED`). `CHARACTERS` explains the printable characters that no
token starts with, `WORDS` the words of Python that formulas do not have, `FOREIGN` functions that
other libraries have.
"""

from __future__ import annotations

SYNTAX: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "an operator is missing here, perhaps `*`",
        (
            *("2x", "2 2", "2(x)", "2√x", "2 where(x > 0, 1, 2)"),
            *("x y", "x 2", "x√x", "-x y", "-x 2", "-x√y"),
            *("(x)y", "(x)2", "(x)(y)", "(x)√y", "x²y", "x²2", "x²(y)", "x²√y"),
            *("exp(x)y", "exp(x)2", "exp(x)(y)", "max(x, y)y", "max(x, y)(y)", "max(x, y)2"),
            *("mean[n](x)y", "mean[n](x)2", "mean[n](x)(y)", "where(x > 0, 1, 2)y"),
        ),
    ),
    (
        "an operand is missing between two operators (a power is `**`, and there is no `//`)",
        ("x//2", "x*²", "x+*2", "x+**2", "x+²", "x***2", "x**²", "x - -*2", "√*x", "√**x"),
    ),
    (
        "the formula ends in the middle of an expression",
        ("x +", "x++", "x *", "x **", "√", "h ="),
    ),
    (
        "the line ends in the middle of an expression; only inside parentheses it may go on",
        ("x +\nx", "x +-\nx", "x *\nx", "x **\nx", "√\nx", "h =\nx"),
    ),
    (
        "an operand is missing before this operator",
        ("*x", "**x", "²", "(*x)", "(**x)", "(²)", "exp(*x)", "exp(**x)", "h = *x", "h = **x",
         "max(x, *x)", "max(x, **x)", "x\n, *x", "\n*x", "\n\n*x", "h = 2\n*x"),
    ),
    (
        "the last statement has to be a result, not a definition or a declaration",
        ("h = x", "h = x\n", "h = x\nk = x\n", "param v", "param v[c]", "param v = 2",
         "param v = -2", "param v[c] = 2", "input r", "input r[n]"),
    ),
    (
        "only the last statement is a result; commas separate several results",
        (
            *("x\nx", "x\n2", "x\n(x)", "x\n-x", "x\n√x", "x\nwhere(x > 0, 1, 2)"),
            *("x\nparam v", "x\ninput r", "h = x\nh\nx", "h = x\nh\n2", "h = x\nh\n(x)"),
            *("h = x\nh\n-x", "h = x\nh\nparam v", "h = x\nh\ninput r"),
        ),
    ),
    (
        "`=` gives a name its value at the start of a line; equality is `==`, inside where, and "
        "eps and groups are given to the call or the layer",
        ("2 = x", "-x = 2", "(x) = 2", "x² = 2", "exp(x) = 2", "where(x = 1, 2, 3)", "h = = 2",
         "group_std(x, eps = 2)"),
    ),
    (
        "a comparison can only be the condition of where(a > b, c, d)",
        (
            *("x > 0", "h = x > 0\nh", "x, x > 0", "(x > 0)*x", "exp(x > 0)", "max(x, x > 0)"),
            *("mean[n](x > 0)", "where(x > 0, x > 1, 2)", "where(x > 0, 1, x > 2)"),
        ),
    ),
    (
        "comparisons cannot be chained; put one where inside another",
        ("where(0 < x < 1, 2, 3)",),
    ),
    (
        "the condition of where is a comparison, such as x > 0",
        ("where(x, 1, 2)", "where(x)", "where((x), 1, 2)", "where(, 1, 2)"),
    ),
    (
        "where takes three arguments: where(x > 0, a, b)",
        ("where(x > 0)", "where(x > 0, 1)", "where(x > 0, 1, 2, 3)", "where()", "2*where",
         "where*2", "where\n2"),
    ),
    (
        "these parentheses are empty",
        ("()", "exp()", "mean[n]()"),
    ),
    (
        "an expression is missing at this comma",
        ("max(x,)", "max(,x)", "max(x,,y)", "max(x, y,)", "x,,y", "x,", ",x", "(,)", "x,\ny"),
    ),
    (
        "a statistic takes one argument",
        ("mean[n](x, y)",),
    ),
    (
        "parentheses hold one expression; commas separate arguments and results",
        ("(x, y)", "h = x, y\nh"),
    ),
    (
        "a statement cannot end inside parentheses",
        ("(x; y)", "(;)", "exp(x; y)", "exp(;)", "max(x, y; x)", "mean[n](x; y)", "(x +; y)"),
    ),
    (
        "square brackets give a statistic its axes, as in mean[n,s](x)",
        (
            *("x[0]", "x[-1]", "x[(n)]", "x[n]", "x[n]*2", "x[n] + 2", "x[n], 2", "x[n]\n2"),
            *("[x]", "2[x]", "(x)[n]", "exp(x)[n]", "-x + [x]", "x[n][s]", "max(x, y)[n]"),
        ),
    ),
    (
        "axes are letters with commas between them, as in [n,s]",
        (
            *("mean[](x)", "mean[,n](x)", "mean[n,](x)", "mean[n,s,](x)", "mean[n s](x)"),
            *("mean[n,k s](x)", "mean[n, 2](x)", "mean[n+s](x)"),
            *("param v[]", "param v[2]", "input r[]"),
        ),
    ),
    (
        "`param` declares a parameter and its name has to follow, as in: param v[c] = 1",
        ("param", "param\nx", "param = 2", "param 2", "param[c]", "param(v)", "param input",
         "param*2"),
    ),
    (
        "`input` declares a tensor and its name has to follow; the input itself is called `x`",
        (
            *("input", "input\nx", "input = 2", "input 2", "input[c]", "input(r)", "input + 2"),
            *("input*2", "input**2", "input²", "2*input", "input, 2", "exp(input)", "x + input"),
        ),
    ),
    (
        "a declaration stands on its own line and has the form: param v[c] = 1, or input r[n]",
        (
            *("param v w", "param v, w", "param v 2", "param v + 2", "param v(2)", "param v == 2"),
            *("param v[c], w", "param v[c] 2", "param v = 2, w", "param v = 2 x", "param v = -2 x"),
            *("input r s", "input r, s", "input r 2", "input r[n], s", "input r + 2", "x + param"),
        ),
    ),
    (
        "an initial value is a number, as in: param v[c] = 1",
        (
            *("param v =", "param v =\nx", "param v = x", "param v = (2)", "param v = -x"),
            *("param v = -", "param v = --2", "param v = 2*3", "param v = 2 + 3", "param v = 2**3"),
            *("param v = -2*3", "param v = -2 + 3"),
            *("param v[c] = x", "param v[c] =", "param v[c] = (2)"),
        ),
    ),
    (
        "an input has no initial value",
        ("input r = 2", "input r[n] = 2"),
    ),
)  # fmt: skip

EXPECTED = {
    "NUMBER": "a number, a name or `(`",
    "TIMES": "an operator",
    "SIGN": "an operator",
    "NAME": "a name",
    "COMPARE": "a comparison",
    "EQUAL": "`=`",
    "COMMA": "`,`",
    "LPAR": "`(`",
    "RPAR": "`)`",
    "RSQB": "`]`",
    "_END": "a new line",
    "$END": "the end of the formula",
}
"""What a terminal of the grammar is called in an error, the most telling first."""

CHARACTERS = {
    "^": "a power is written `**`",
    ".": "a `.` stands only inside a number; nothing has attributes",
    ":": "formulas have no `:`; a declaration is `param v[c] = 1`",
    "'": "formulas contain no quoted text",
    '"': "formulas contain no quoted text",
    "`": "formulas contain no quoted text",
    "{": "formulas have no braces; use parentheses",
    "}": "formulas have no braces; use parentheses",
    "&": "formulas have no `&`; put one where inside another",
    "|": "formulas have no `|`; an absolute value is abs(x)",
    "~": "formulas have no `~`",
    "!": "formulas have no `!`; unequal is `!=`, inside where",
    "@": "formulas have no matrix product; `*` works element by element",
    "%": "formulas have no remainder",
    "?": "formulas have no `?`; a choice is where(x > 0, a, b)",
    "$": "formulas are plain text, without `$`",
    "\\": "formulas are not LaTeX, and a line goes on only inside parentheses",
}

WORDS = {
    "if": "a choice is where(x > 0, a, b)",
    "else": "a choice is where(x > 0, a, b)",
    "and": "put one where inside another",
    "or": "put one where inside another",
    "not": "turn the comparison around",
}

FOREIGN = {
    word: hint
    for words, hint in (
        ("swish", "it is called silu(x)"),
        ("pow power", "a power is written `**`"),
        ("ln", "the natural logarithm is log(x)"),
        ("arctan", "it is called atan(x)"),
        ("clip", "it is called clamp(x, -1, 1)"),
        ("maximum", "it is called max(x, y)"),
        ("minimum", "it is called min(x, y)"),
        ("softmax", "it is written out: exp(x)/channel_sum(exp(x))"),
        ("norm", "a length is l2 over some axes: channel_l2(x)"),
        ("median quantile percentile sort topk argmax argmin", "nothing is sorted or searched"),
        ("dropout rand randn noise", "a formula draws no random numbers"),
        ("matmul conv conv2d linear", "a formula has no learned matrices; layers around it do"),
        ("layernorm layer_norm", "a norm is written out: (x - layer_mean(x))/layer_std(x)"),
        ("groupnorm group_norm", "a norm is written out: (x - group_mean(x))/group_std(x)"),
        ("batchnorm batch_norm", "a norm is written out: (x - batch_mean(x))/batch_std(x)"),
        ("instancenorm instance_norm",
         "a norm is written out: (x - instance_mean(x))/instance_std(x)"),
        ("rmsnorm rms_norm", "a norm is written out: x/channel_rms(x)"),
    )
    for word in words.split()
}  # fmt: skip
"""What other libraries call a function and formulas do not have, or have under another name."""
