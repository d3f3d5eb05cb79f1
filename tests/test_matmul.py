"""fromfound.matmul against torch, on inputs that nobody chose: results, refusals, dtypes, devices."""
import inspect
import re

import pytest
import torch
from fastcore.docments import docments
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fromfound import matmul as module
from fromfound.matmul import (
    broadcast_shape, einsum, matmul, matmul_broadcast, matmul_dot, matmul_einsum, matmul_loops, matmul_rows,
    need_floats, need_tensors,
)

LADDER = [matmul_loops, matmul_dot, matmul_rows, matmul_broadcast, matmul_einsum]
ALL = [*LADDER, matmul]
each_rung = pytest.mark.parametrize("rung", LADDER, ids=lambda f: f.__name__)
each_product = pytest.mark.parametrize("product", ALL, ids=lambda f: f.__name__)
few = settings(max_examples=40, deadline=None)
many = settings(max_examples=250, deadline=None)

sizes = st.integers(0, 4)
shapes = st.lists(st.sampled_from([0, 1, 1, 2, 3]), max_size=4).map(tuple)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.complex64]


def numbers(shape, dtype=torch.float64, seed=0):
    "A tensor of small numbers, the same for the same seed; integers for integer dtypes."
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0 if dtype == torch.uint8 else -9, 10, shape, generator=generator).to(dtype)


def awkward(t):
    "The same numbers, neither contiguous nor at the beginning of their memory."
    out = t.new_zeros([n + 1 for n in t.shape][::-1]).permute(tuple(reversed(range(t.ndim))))
    out = out[tuple(slice(1, None) for _ in t.shape)]
    return out.copy_(t)


def outcome(f, *args, errors=(Exception,)):
    "What f returns, or None if it refuses."
    try: return f(*args)
    except errors: return None


# the ladder

@each_rung
@given(n=sizes, p=sizes, m=sizes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), odd=st.booleans())
@few
def test_a_rung_gives_what_torch_gives(rung, n, p, m, dtype, seed, odd):
    a, b = numbers((n, p), dtype, seed), numbers((p, m), dtype, seed + 1)
    if odd: a, b = awkward(a), awkward(b)
    kept = a.clone(), b.clone()
    assert_close(rung(a, b), a @ b)  # dtype, shape and device as well
    assert torch.equal(a, kept[0]) and torch.equal(b, kept[1])


@each_product
def test_vectors_and_numbers_only_where_they_have_a_meaning(product):
    vector, matrix, number, batch = torch.ones(3), torch.ones(3, 3), torch.tensor(2.0), torch.ones(2, 3, 3)
    for a, b in [(number, matrix), (matrix, number), (number, number)]:
        with pytest.raises(ValueError, match=rf"{product.__name__}: (a is \(\)|.*b is \(\))"): product(a, b)
    for a, b in [(vector, matrix), (matrix, vector), (batch, matrix), (matrix, batch)]:
        if product is matmul: assert_close(product(a, b), a @ b)
        else:
            with pytest.raises(ValueError, match=f"{product.__name__}: [ab] is .*two dimensions"):
                product(a, b)


@given(a=shapes, b=shapes)
@many
def test_matmul_takes_what_torch_takes(a, b):
    a, b = numbers(a), numbers(b, seed=1)
    expected = outcome(torch.matmul, a, b, errors=(RuntimeError,))
    actual = outcome(matmul, a, b, errors=(ValueError,))
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
    ((2, 0), (3, 4), ""),
])
def test_inner_dimensions(product, a, b, hint):
    message = f"{product.__name__}: inner dimensions differ: a is {a}, b is {b}{hint}"
    a, b = numbers(a), numbers(b)
    kept = a.clone(), b.clone()
    with pytest.raises(ValueError) as error: product(a, b)
    assert str(error.value) == message
    assert torch.equal(a, kept[0]) and torch.equal(b, kept[1])


@given(a=shapes, b=shapes)
@many
def test_a_hint_always_helps(a, b):
    a, b = numbers(a), numbers(b)
    try: matmul(a, b)
    except ValueError as error:
        hints = re.search(r"did you mean (.*)\?", str(error))
        for hint in hints[1].split(" or ") if hints else []:
            name, _, transpose = hint.partition(".")
            assert transpose == ("T" if {"a": a, "b": b}[name].ndim == 2 else "mT")
            matmul(*(getattr(t, transpose) if name == which else t for which, t in (("a", a), ("b", b))))


def test_batches_that_do_not_broadcast():
    a = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=r"leading .* not broadcast: a is \(2, 3, 4\), b is \(3, 4, 5\)"):
        matmul(a, torch.ones(3, 4, 5))
    with pytest.raises(ValueError, match=r"did you mean b.mT\?$"): matmul(a, torch.ones(2, 5, 4))
    with pytest.raises(ValueError, match=r"did you mean a.mT\?$"): matmul(a.mT, torch.ones(4, 5))


@each_product
@pytest.mark.parametrize("bad, kind", [
    ([[1.0]], "a list"), (torch.ones(1, 1).numpy(), "a ndarray"), (2.0, "a float"), (3, "an int"),
    (None, "None"), ("x", "a str"),
])
def test_what_is_no_tensor(product, bad, kind):
    good = torch.ones(1, 1)
    for args, name in [((bad, good), "a"), ((good, bad), "b")]:
        with pytest.raises(TypeError, match=f"^{product.__name__}: {name} is {kind}, not a tensor"):
            product(*args)


@each_product
def test_dtypes_that_differ_or_cannot_be_added(product):
    a = torch.ones(2, 2)
    for b in (a.double(), a.half(), a.int(), a.bool()):
        with pytest.raises(TypeError, match=f"dtypes differ: a is torch.float32, b is {b.dtype}"):
            product(a, b)
    with pytest.raises(TypeError, match=f"{product.__name__}: a and b are torch.bool"):
        product(a.bool(), a.bool())


@each_product
def test_devices(product):
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    out = product(a.to("meta"), b.to("meta"))
    assert out.device.type == "meta" and out.shape == (2, 4)
    with pytest.raises(ValueError, match="devices differ: a is on cpu, b is on meta"):
        product(a, b.to("meta"))
    if torch.cuda.is_available():
        assert_close(product(a.cuda(), b.cuda()), (a @ b).cuda())


@each_product
def test_gradients_flow_through(product):
    a, b = numbers((3, 4)).requires_grad_(), numbers((4, 2), seed=1).requires_grad_()
    incoming = numbers((3, 2), seed=2)
    actual = torch.autograd.grad(product(a, b), (a, b), incoming)
    assert_close(actual, torch.autograd.grad(a @ b, (a, b), incoming))


@each_product
def test_a_long_sum_of_halves(product):
    for dtype in (torch.float16, torch.bfloat16):
        ones = torch.ones(1, 4096, dtype=dtype)
        assert product(ones, ones.T).item() == 4096  # added in 16 bits it stops at 2048 or 256


@each_product
def test_integers_are_exact_and_wrap_as_torch_wraps(product):
    big = torch.tensor([[2**53 + 1]])
    assert product(big, torch.tensor([[1]])).item() == 2**53 + 1
    wrapped = torch.full((1, 3), 100, dtype=torch.int8)
    assert torch.equal(product(wrapped, wrapped.T), wrapped @ wrapped.T)


# broadcasting

@given(st.lists(st.one_of(shapes, shapes.map(list), shapes.map(torch.Size), st.integers(0, 3)), max_size=4))
@many
def test_broadcast_shape_is_torchs(given_shapes):
    expected = outcome(torch.broadcast_shapes, *given_shapes, errors=(RuntimeError,))
    if expected is None:
        with pytest.raises(ValueError, match=r"in dimension -\d the sizes are \d and \d$"):
            broadcast_shape(*given_shapes)
    else:
        actual = broadcast_shape(*given_shapes)
        assert actual == expected and isinstance(actual, torch.Size)


@given(shapes, shapes)
@many
def test_broadcast_shape_is_what_addition_does(a, b):
    total = outcome(torch.add, torch.zeros(a), torch.zeros(b), errors=(RuntimeError,))
    assert outcome(broadcast_shape, a, b, errors=(ValueError,)) == (None if total is None else total.shape)


def test_broadcast_shape_refuses():
    assert broadcast_shape() == () == torch.broadcast_shapes()
    message = "(5, 3, 4) and (1, 4) and (2, 1) do not broadcast: in dimension -2 the sizes are 3 and 2"
    with pytest.raises(ValueError, match=re.escape(f"broadcast_shape: {message}")):
        broadcast_shape((5, 3, 4), (1, 4), (2, 1))
    for negative in [(-1,), (2, -3)]:
        with pytest.raises(ValueError, match="negative"): broadcast_shape(negative, (1,))
    with pytest.raises(ValueError, match="negative"): broadcast_shape(-1)
    for wrong in [2.0, (2.0,), None, "23", ("2",), torch.ones(2, 3)]:
        with pytest.raises(TypeError, match="broadcast_shape: a shape is a tuple of ints"):
            broadcast_shape((2, 3), wrong)


# einsum

LETTERS = "abcAB"


@st.composite
def einsums(draw):
    "An equation and the shapes of its operands, mostly fitting."
    size = {letter: draw(st.sampled_from([0, 1, 2, 2, 3, 3])) for letter in LETTERS}
    under_dots = draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))
    terms, operand_shapes = [], []
    for _ in range(draw(st.integers(1, 3))):
        letters = draw(st.lists(st.sampled_from(LETTERS), max_size=3))
        shape = [draw(st.sampled_from([size[letter]] * 8 + [1])) for letter in letters]
        if draw(st.integers(0, 3)) == 0:
            at, rank = draw(st.integers(0, len(letters))), draw(st.integers(0, 2))
            letters.insert(at, "...")
            shape[at:at] = [draw(st.sampled_from([n, n, 1])) for n in under_dots[2 - rank:]]
        terms.append("".join(letters))
        operand_shapes.append(tuple(shape))
    equation = draw(st.sampled_from([",", ", ", " ,"])).join(terms)
    if draw(st.booleans()):
        used = sorted(set("".join(terms)) - {"."})
        output = draw(st.permutations(used))[:draw(st.integers(0, len(used)))]
        if draw(st.booleans()): output.insert(draw(st.integers(0, len(output))), "...")
        equation += draw(st.sampled_from(["->", " -> "])) + "".join(output)
    return equation, operand_shapes


def agree(equation, operands):
    expected = outcome(torch.einsum, equation, *operands, errors=(RuntimeError,))
    actual = outcome(einsum, equation, *operands, errors=(ValueError,))
    assert (actual is None) == (expected is None), (equation, actual, expected)
    if expected is not None: assert_close(actual, expected)


@given(einsums(), st.sampled_from([torch.float64, torch.int64, torch.complex128]), st.booleans())
@many
def test_einsum_is_torchs(case, dtype, odd):
    equation, operand_shapes = case
    operands = [numbers(shape, dtype, seed) for seed, shape in enumerate(operand_shapes)]
    agree(equation, [awkward(t) for t in operands] if odd else operands)


@given(einsums(), st.data())
@many
def test_einsum_refuses_what_torch_refuses(case, data):
    "One change to a good equation or to one shape: the verdict is torch's."
    equation, operand_shapes = case
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(equation)))
        extra = data.draw(st.sampled_from(["a", "z", ",", ".", "1", ">", "->", "...", "é", "α"]))
        equation = equation[:at] + extra + equation[at:]
    else:
        k = data.draw(st.integers(0, len(operand_shapes) - 1))
        change = data.draw(st.sampled_from([lambda s: s[1:], lambda s: s + (2,), lambda s: s[:-1] + (5,)]))
        operand_shapes = [change(s) if k == i else s for i, s in enumerate(operand_shapes)]
    agree(equation, [numbers(shape, seed=seed) for seed, shape in enumerate(operand_shapes)])


@pytest.mark.parametrize("equation, operand_shapes, message", [
    ("ij,jk->ik", [(2, 3)], "einsum: 'ij,jk->ik' has 2 terms, but operands: 1"),
    ("ij", [(2, 3), (3, 4)], "einsum: 'ij' has 1 terms, but operands: 2"),
    ("i1->i", [(2, 3)], "einsum: cannot read 'i1->i': unknown '1'"),
    ("i->j->k", [(2,)], "einsum: cannot read 'i->j->k': one -> at most"),
    ("i,j->i,j", [(2,), (3,)], "einsum: cannot read 'i,j->i,j': one -> at most, no comma after it"),
    ("...i...", [(2,)], "einsum: cannot read '...i...': one -> at most, no comma after it, one ... at most"),
    ("i->j", [(2,)], "einsum: output letter 'j' is in no input of 'i->j'"),
    ("i->ii", [(2,)], "einsum: output letter 'i' is repeated in 'i->ii'"),
    ("ij->i", [(2,)], "einsum: 'ij' names 2 dimensions, but operands[0] has 1"),
    ("i->i", [(2, 3)], "einsum: 'i' names 1 dimensions, but operands[0] has 2"),
    ("...ij->i", [(2,)], "einsum: '...ij' names 2 dimensions, but operands[0] has 1"),
    ("ij,jk->ik", [(2, 3), (4, 5)],
     "letter 'j' is 3 in operands[0], which is (2, 3), but 4 in operands[1], which is (4, 5)"),
    ("ii->i", [(2, 3)], "letter 'i' is 2 and 3 in operands[0], which is (2, 3): a diagonal needs equal"),
    ("ii->i", [(3, 1)], "letter 'i' is 3 and 1 in operands[0], which is (3, 1): a diagonal needs equal"),
    ("...,...", [(2, 3), (4,)], "a dimension under '...' is 3 in operands[0], which is (2, 3), but 4 in"),
])
def test_einsum_says_what_is_wrong(equation, operand_shapes, message):
    operands = [numbers(shape) for shape in operand_shapes]
    kept = [t.clone() for t in operands]
    with pytest.raises(ValueError, match=re.escape(message)): einsum(equation, *operands)
    for t, k in zip(operands, kept): assert torch.equal(t, k)


def test_einsum_wants_a_string_and_tensors_of_one_kind():
    a = torch.ones(2, 2)
    with pytest.raises(TypeError, match="equation is a Tensor"): einsum(a, [0, 1])
    with pytest.raises(TypeError, match=r"operands\[1\] is a list"): einsum("ij,jk", a, [[1.0, 2.0]])
    with pytest.raises(TypeError, match=r"dtypes differ: operands\[0\] is torch.float32, operands\[1\] is "):
        einsum("ij,jk", a, a.double())
    with pytest.raises(ValueError, match="no operands"): einsum("")
    with pytest.raises(ValueError, match="devices differ"): einsum("ij,jk", a, a.to("meta"))


def test_einsum_dtypes_devices_and_gradients():
    a, b = numbers((3, 4)), numbers((4, 2), seed=1)
    for dtype in DTYPES:
        c, d = numbers((3, 4), dtype), numbers((4, 2), dtype, seed=1)
        assert_close(einsum("ik,kj->ij", c, d), c @ d)
    assert einsum("ij->i", a.int()).dtype == a.int().sum(1).dtype  # one operand: as sum does
    ones = torch.ones(4096, dtype=torch.float16)
    assert einsum("i,i->", ones, ones).item() == 4096
    assert einsum("ik,kj", a.to("meta"), b.to("meta")).device.type == "meta"
    a.requires_grad_(), b.requires_grad_()
    g = numbers((3,), seed=2)
    assert_close(torch.autograd.grad(einsum("ik,kj,kj->i", a, b, b), (a, b), g),
                 torch.autograd.grad(torch.einsum("ik,kj,kj->i", a, b, b), (a, b), g))


def test_einsum_on_one_operand_is_a_view_as_in_torch():
    a = numbers((3, 3))
    for equation in ("ij->ji", "ii->i", "ij->ij"):
        assert einsum(equation, a).data_ptr() == torch.einsum(equation, a).data_ptr() == a.data_ptr()
        assert einsum(equation, a) is not a


# the guards of all modules, and the documentation

def test_guards():
    x = torch.ones(2)
    assert need_tensors("f", a=x, b=torch.nn.Parameter(x)) is None
    assert need_floats("f", a=x, b=x.half()) is None
    with pytest.raises(TypeError, match=r"^f: b is a list, not a tensor; torch.as_tensor\(b\) makes one$"):
        need_tensors("f", a=x, b=[1.0])
    with pytest.raises(TypeError, match="^f: weight is None, not a tensor$"):
        need_floats("f", input=x, weight=None)
    for t in (x.int(), x.bool()):
        with pytest.raises(TypeError, match=rf"^f: x is {t.dtype}, but floating-point .*; try x.float\(\)$"):
            need_floats("f", x=t)
    with pytest.raises(TypeError, match="^f: x is torch.complex64, but .* needed$"):
        need_floats("f", x=x.to(torch.complex64))


@pytest.mark.parametrize("name", module.__all__)
def test_every_public_function_is_documented(name):
    f = getattr(module, name)
    assert f.__doc__.startswith("Return "), f.__doc__
    comments = docments(f)
    assert comments["return"] or f in (need_tensors, need_floats)
    for parameter in inspect.signature(f).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD: continue  # docments leaves these out
        assert comments[parameter.name], f"{name}: {parameter.name} has no comment"
        assert parameter.annotation is not parameter.empty, f"{name}: {parameter.name} has no type"
