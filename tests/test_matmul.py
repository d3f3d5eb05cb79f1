"""fromfound.matmul against torch, on inputs that nobody chose."""
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fromfound.matmul import (
    broadcast_shape, einsum, matmul, matmul_broadcast, matmul_dot, matmul_einsum, matmul_loops, matmul_rows,
)

LADDER = [matmul_loops, matmul_dot, matmul_rows, matmul_broadcast, matmul_einsum]
each_rung = pytest.mark.parametrize("rung", LADDER, ids=lambda f: f.__name__)
each_product = pytest.mark.parametrize("product", [*LADDER, matmul], ids=lambda f: f.__name__)
few, many = settings(max_examples=40, deadline=None), settings(max_examples=250, deadline=None)

sizes = st.integers(0, 4)
shapes = st.lists(st.sampled_from([0, 1, 1, 2, 3]), max_size=4).map(tuple)


def numbers(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).to(dtype)


def outcome(f, *args, errors=(Exception,)):
    "What f returns, or None if it refuses."
    try: return f(*args)
    except errors: return None


@each_rung
@given(n=sizes, p=sizes, m=sizes, dtype=st.sampled_from([torch.float32, torch.float64, torch.int64]), seed=st.integers(0, 99))
@few
def test_a_rung_gives_what_torch_gives(rung, n, p, m, dtype, seed):
    a, b = numbers((n, p), dtype, seed), numbers((m, p), dtype, seed + 1).T  # b isn't contiguous
    kept = a.clone(), b.clone()
    assert_close(rung(a, b), a @ b)  # dtype and shape as well
    assert torch.equal(a, kept[0]) and torch.equal(b, kept[1])


@given(a=shapes, b=shapes)
@many
def test_matmul_takes_what_torch_takes(a, b):
    a, b = numbers(a), numbers(b, seed=1)
    expected, actual = outcome(torch.matmul, a, b), outcome(matmul, a, b)
    assert (actual is None) == (expected is None)
    if expected is not None: assert_close(actual, expected)


@each_product
@pytest.mark.parametrize("a, b, hint", [
    ((5, 784), (10, 784), "; did you mean b.T?"),
    ((784, 5), (784, 10), "; did you mean a.T?"),
    ((3, 5), (3, 5), "; did you mean b.T or a.T?"),
    ((5, 3), (4, 7), ""),
    ((2, 1), (3, 4), ""),  # without a check, the 1 would broadcast
    ((2, 3), (1, 4), ""),
])
def test_inner_dimensions(product, a, b, hint):
    with pytest.raises(ValueError) as error: product(numbers(a), numbers(b))
    assert str(error.value) == f"inner dimensions differ: a is {a}, b is {b}{hint}"


@given(a=shapes, b=shapes)
@many
def test_a_hint_always_helps(a, b):
    a, b = numbers(a), numbers(b)
    try: matmul(a, b)
    except (ValueError, RuntimeError) as error:
        hints = re.search(r"did you mean (.*)\?", str(error))
        for hint in hints[1].split(" or ") if hints else []:
            name, _, transpose = hint.partition(".")
            turned = {"a": a, "b": b}
            turned[name] = getattr(turned[name], transpose)
            assert turned["a"].shape[-1] == turned["b"].shape[-2 if turned["b"].ndim > 1 else -1]


@given(st.lists(shapes, max_size=4))
@many
def test_broadcast_shape_is_torchs(given_shapes):
    expected = outcome(torch.broadcast_shapes, *given_shapes)
    if expected is None:
        with pytest.raises(ValueError, match=r"in dimension -\d the sizes are \d and \d"): broadcast_shape(*given_shapes)
    else: assert broadcast_shape(*given_shapes) == expected


def test_broadcast_shape_says_where():
    message = "(5, 3, 4) and (1, 4) and (2, 1) don't broadcast: in dimension -2 the sizes are 2 and 3"
    with pytest.raises(ValueError, match=re.escape(message)): broadcast_shape((5, 3, 4), (1, 4), (2, 1))


@st.composite
def einsums(draw):
    "An equation and the shapes of its operands."
    size = {letter: draw(st.sampled_from([0, 1, 2, 2, 3, 3])) for letter in "abcAB"}
    under_dots = draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))
    terms, operand_shapes = [], []
    for _ in range(draw(st.integers(1, 3))):
        letters = draw(st.lists(st.sampled_from("abcAB"), max_size=3))
        shape = [size[letter] for letter in letters]
        if draw(st.integers(0, 3)) == 0:
            at, rank = draw(st.integers(0, len(letters))), draw(st.integers(0, 2))
            letters.insert(at, "...")
            shape[at:at] = [draw(st.sampled_from([n, n, 1])) for n in under_dots[2 - rank:]]
        terms.append("".join(letters))
        operand_shapes.append(tuple(shape))
    equation = draw(st.sampled_from([",", ", "])).join(terms)
    if draw(st.booleans()):
        used = sorted(set("".join(terms)) - {"."})
        output = draw(st.permutations(used))[:draw(st.integers(0, len(used)))]
        if draw(st.booleans()): output.insert(draw(st.integers(0, len(output))), "...")
        equation += draw(st.sampled_from(["->", " -> "])) + "".join(output)
    return equation, operand_shapes


@given(einsums())
@many
def test_einsum_is_torchs(case):
    equation, operand_shapes = case
    operands = [numbers(shape, seed=seed) for seed, shape in enumerate(operand_shapes)]
    assert_close(einsum(equation, *operands), torch.einsum(equation, *operands))


@pytest.mark.parametrize("equation, operand_shapes, message", [
    ("ij,jk->ik", [(2, 3)], "'ij,jk->ik' has 2 terms for 1 operands"),
    ("ij->i", [(2,)], "'ij' of 'ij->i' doesn't fit an operand of shape (2,)"),
    ("ij,jk->ik", [(2, 3), (4, 5)], "'j' of 'ij,jk->ik' is both 3 and 4"),
    ("ii->i", [(2, 3)], "'i' of 'ii->i' is both 2 and 3"),
    ("i->j", [(2,)], "'i->j': a letter of the result is in no operand"),
])
def test_einsum_says_what_is_wrong(equation, operand_shapes, message):
    with pytest.raises(ValueError, match=re.escape(message)): einsum(equation, *map(numbers, operand_shapes))
