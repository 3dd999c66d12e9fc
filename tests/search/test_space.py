"""Spaces and genomes: drawn, changed, read back, and lowered to formulas."""

import random

import pytest

import normc
from normc.errors import NormcError
from normc.search.genome import Genome, Node, draw, formula, mutate, read, reads_input
from normc.search.pareto import front, hypervolume
from normc.search.space import EVONORM, Space


def drawn(count, seed=0):
    chance = random.Random(seed)
    return [draw(EVONORM, chance) for _ in range(count)]


def test_the_space_of_the_paper():
    """Table 2: 12 element-wise operations, 3 moments over 4 sets of axes, 14 nodes."""
    statistics = [n for n in EVONORM.operations if "_" in n]
    assert len(EVONORM.operations) == 24 and len(statistics) == 12
    assert len(EVONORM.initial) + EVONORM.nodes == 14
    assert [p.init for p in EVONORM.params.values()] == [0, 1]  # v0 and v1


def test_a_graph_is_drawn_node_after_node():
    for genome in drawn(200):
        assert len(genome.nodes) == 10
        for place, node in enumerate(genome.nodes, len(EVONORM.initial)):
            assert len(node.inputs) == EVONORM.operation(node.op).arity
            assert all(0 <= i < place for i in node.inputs)


def test_a_mutation_changes_one_node():
    chance = random.Random(1)
    for genome in drawn(100):
        other = mutate(genome, EVONORM, chance)
        assert sum(a != b for a, b in zip(genome.nodes, other.nodes, strict=True)) <= 1


def test_a_genome_is_read_from_its_code():
    for genome in drawn(200):
        assert read(genome.code, EVONORM) == genome


@pytest.mark.parametrize(
    "code",
    [
        "",
        "ADD:0",
        "ADD:0,4",
        "FOO:0",
        "ADD:a,b",
        "ADD:0,x,1",
        "NEG:-1",
        "NEG:²",
        "__import__('os'):0",
    ],
)
def test_a_code_that_fits_no_space_is_told(code):
    with pytest.raises(NormcError):
        read(code, EVONORM)


def test_dead_nodes_are_not_in_the_formula():
    """The graph of EvoNorm-S0, with a dead exponential: v1*x, sigmoid, std, division, product."""
    nodes = [("MUL", (3, 0)), ("SIGMOID", (4,)), ("group_std", (0,)), ("EXP", (0,))]
    nodes += [("DIV", (0, 6)), ("MUL", (5, 8))]
    genome = Genome(tuple(Node(*n) for n in nodes))
    assert genome.live(EVONORM) == (True, True, True, False, True, True)
    text = formula(genome.expr(EVONORM), EVONORM)
    s0 = normc.parse("x*sigmoid(v1*x)/group_std(x)*gamma + beta")
    assert normc.parse(text).canonical().text == s0.canonical().text


def test_every_drawn_layer_is_a_formula():
    for genome in drawn(100):
        expr = genome.expr(EVONORM)
        if reads_input([expr]):
            names = {p.name for p in normc.parse(formula(expr, EVONORM)).params}
            assert {"gamma", "beta"} <= names <= {"v0", "v1", "gamma", "beta"}


def test_another_space_is_data():
    small = Space({"SIN": "sin(a)", "CLIP": "clamp(a, -1, b)"}, ("x", "alpha"), nodes=3)
    assert small.operation("CLIP").arity == 2
    with pytest.raises(NormcError, match="reads no node"):
        Space({"ONE": "1 + x"})
    with pytest.raises(normc.FormulaError):
        Space({"BAD": "a +"})


def test_what_is_not_finite_is_never_on_the_front():
    nan, inf = float("nan"), float("inf")
    assert front([(nan, 9), (1, 2), (inf, 0), (2, 1), (0, 0), (2, 1)]) == [1, 3, 5]
    assert front([(nan, nan)]) == [] and hypervolume([(nan, 1)], (0, 0)) == 0
    assert hypervolume([(1, 2), (2, 1), (nan, 9)], (0, 0)) == 3
