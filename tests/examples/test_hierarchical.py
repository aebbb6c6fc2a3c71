"""The hierarchical example: its functions, and padding at both levels."""

import ast
import functools

import jax
import numpy as np
import pytest

import _python_source
import hierarchical
import tdjax.linen
from hierarchical import CHANGES, LINES, VOCABULARY, WORDS

SOURCE = '''\
import x
class A:
    @property
    def f(self, a=1):  # a comment
        """Text
        of two lines."""
        for i in range(3):

            if a[i:] == f"""{i}
            """:
                g(a,
                  i)
        return 'é'
    async def short(self):
        return 1
def last():
    if x: return
    with y:
        while z:
            with y:
                pass
    def inner(): return b'    '
    end()
'''
FOUND = [
    [
        "@property",
        "def f(self, a=1):",
        '    """text"""',
        "    for i in range(3):",
        "        if a[i:] == f'{i}text':",
        "            g(a, i)",
        "    return 'text'",
    ],
    [
        "def last():",
        "    if x:",
        "        return",
        "    with y:",
        "        while z:",
        "            with y:",
        "                pass",
        "    def inner():",
        "        return b'    '",
        "    end()",
    ],
]
IN, SAME, OUT, OUT2, OUT3 = range(len(CHANGES))
EXPECTED = [
    [SAME, IN, SAME, IN, IN, OUT2],
    [IN, IN, OUT, IN, IN, IN, OUT3, IN, OUT],
]


def test_functions_have_a_line_for_each_statement_and_no_comments():
    found = sorted(hierarchical.read_functions(SOURCE), key=len)
    assert found == FOUND


def test_a_long_function_is_cut():
    source = "def f():\n" + "    x = 1\n" * 100
    (lines,) = hierarchical.read_functions(source)
    assert lines == source.splitlines()[:LINES]


def test_no_function_of_the_library_has_a_broken_line():
    sources, _ = _python_source.read_sources(40)
    for lines in [f for x in sources.values() for f in hierarchical.read_functions(x)]:
        depths = [(len(line) - len(line.lstrip())) / 4 for line in lines]
        assert set(depths) <= {*range(20)}
        for before, depth, line in zip(lines, np.diff(depths), lines[1:]):
            assert (depth > 0) == (before.endswith(":") and depth == 1), (before, line)
        if len(lines) < LINES:
            ast.parse("\n".join(lines))


@pytest.mark.parametrize("which", [0, 1])
def test_labels_are_the_changes_of_depth(which):
    assert hierarchical.depth_changes(FOUND[which]).tolist() == EXPECTED[which]


def test_words_of_a_line():
    assert hierarchical.WORD.findall("x_1 = f('text', 2):") == [
        *("x_1", "=", "f", "(", "'text'", ",", "2", ")", ":")
    ]


def test_functions_are_padded_at_both_levels():
    words, word_mask, line_counts, labels = hierarchical.pad(FOUND)
    assert words.shape == word_mask.shape == (2, LINES, WORDS)
    assert line_counts.tolist() == [7, 10]
    assert word_mask[0].sum(axis=1)[:8].tolist() == [2, 10, 1, 8, 16, 6, 2, 0]
    np.testing.assert_array_equal(word_mask[0, 2], np.arange(WORDS) < 1)
    np.testing.assert_array_equal(words > 0, word_mask)
    assert labels[1, :11].tolist() == [-1, *EXPECTED[1], -1]
    # "y", ":" and "with" have one id each, whatever is around.
    assert words[1, 3, :3].tolist() == words[1, 5, :3].tolist()
    assert len({*words[1, 3, :3].tolist()}) == 3
    assert words.max() < VOCABULARY


def test_a_long_line_is_cut():
    words, word_mask, _, _ = hierarchical.pad([["def f():", "    " + "x, " * 100]])
    assert word_mask[0, 1].all()
    assert len({*words[0, 1].tolist()}) == 2


def test_no_file_is_on_both_sides_of_the_split():
    train, held_out = _python_source.read_sources(60)
    assert not train.keys() & held_out.keys()
    assert min(len(train), len(held_out)) > 0


def test_bags_have_the_words_of_a_line_and_of_the_line_before():
    bags = hierarchical.two_line_bags(
        [["if x:", "    y"], ["def f:", "    a", "    b"]]
    )
    assert [sorted(bag) for bag in bags] == [
        ["before: :", "before: if", "before: x", "y"],
        ["a", "before: :", "before: def", "before: f"],
        ["b", "before: a"],
    ]


def test_the_baselines_are_right_as_often_as_they_say():
    """The line before tells the label, but for the last of the new functions."""
    functions = [["if a", "    x", "    y"], ["if a", "    y", "    x", "    x"]]
    labels = np.array([-1, IN, SAME, -1, IN, SAME, SAME])
    new = [["if a", "    x"], ["b", "x", "x"], ["b", "if a", "x"]]
    new_labels = np.array([[-1, IN, -1], [-1, SAME, SAME], [-1, OUT, OUT]])
    by_words, majority, share = hierarchical.baselines(
        functions, labels, new, new_labels
    )
    assert (by_words, majority, share) == (3 / 5, SAME, 2 / 5)


@pytest.fixture(scope="module")
def inputs():
    """Random functions with padding at both levels."""
    rng = np.random.default_rng(0)
    words = rng.integers(VOCABULARY, size=(3, 5, 4), dtype=np.int32)
    line_counts = np.array([5, 1, 3], np.int32)
    word_counts = rng.integers(1, 5, size=(3, 5))
    word_counts *= np.arange(5) < line_counts[:, None]
    return words, np.arange(4) < word_counts[..., None], line_counts


@pytest.fixture(scope="module")
def params(inputs):
    """With biases that are not zero."""
    init = jax.jit(hierarchical.Indenter(9).init)
    return jax.tree.map(lambda x: x + 0.1, init(jax.random.key(0), *inputs))


@functools.partial(jax.jit, static_argnames="capacity")
def logits(params, inputs, capacity=9):
    return hierarchical.Indenter(capacity).apply(params, *inputs)


def test_padding_words_and_lines_change_nothing(inputs, params):
    words, word_mask, line_counts = inputs
    lines = np.arange(5) < line_counts[:, None]
    other_words = np.where(word_mask, words, (words + 1) % VOCABULARY)
    other_mask = word_mask | ~lines[..., None]
    expected = logits(params, inputs)
    other = logits(params, (other_words, other_mask, line_counts))
    assert (other_words != words).any()
    np.testing.assert_array_equal(other, expected)
    assert not expected[~lines].any()
    assert expected[lines].all()


def test_more_capacity_and_more_padding_change_nothing(inputs, params):
    words, word_mask, line_counts = inputs
    wide = (0, 0), (0, 3), (0, 2)
    padded = np.pad(words, wide), np.pad(word_mask, wide), line_counts
    expected = logits(params, inputs)
    wider = logits(params, padded, capacity=24)
    np.testing.assert_allclose(wider[:, :5], expected, rtol=1e-5, atol=1e-6)


def test_a_function_alone_has_the_same_logits(inputs, params):
    words, word_mask, line_counts = inputs
    alone = logits(params, (words[2:, :3], word_mask[2:, :3], line_counts[2:]))
    together = logits(params, inputs)[2, :3]
    np.testing.assert_allclose(alone[0], together, rtol=1e-5, atol=1e-6)


def test_the_order_of_the_words_of_a_line_counts(inputs, params):
    words, _, line_counts = inputs
    inputs = [words, np.ones(words.shape, bool), line_counts]
    swapped = [words[:, :, ::-1], *inputs[1:]]
    difference = np.abs(logits(params, swapped) - logits(params, inputs))
    assert difference[np.arange(5) < line_counts[:, None]].max() > 1e-3


def lines_that_change(apply, words):
    """`(lines changed, lines of the result)`: whether it differs in every function."""
    expected, rows = apply(words), []
    for line in range(words.shape[1]):
        changed = words.copy()
        changed[:, line] = (changed[:, line] + 1) % VOCABULARY
        rows.append((apply(changed) != expected).any(axis=-1).all(axis=0))
    return np.array(rows)


def test_every_line_counts_for_every_label(inputs, params):
    words, counts = inputs[0], np.full(3, 5, np.int32)
    mask = np.ones(words.shape, bool)
    apply = lambda words: logits(params, (words, mask, counts), capacity=15)
    assert lines_that_change(apply, words).all()


def test_lines_are_encoded_one_by_one(inputs):
    words, mask = inputs[0], np.ones(inputs[0].shape, bool)
    encoder = tdjax.linen.TimeDistributed(hierarchical.LineEncoder(), method="fold")
    variables = jax.jit(encoder.init)(jax.random.key(0), words, mask)
    apply = jax.jit(lambda words: encoder.apply(variables, words, mask))
    np.testing.assert_array_equal(lines_that_change(apply, words), np.eye(5) > 0)


@pytest.mark.slow
def test_the_model_beats_the_baselines_on_new_files(tmp_path):
    accuracies = hierarchical.main(out=tmp_path)
    assert accuracies["model"] > accuracies["linear"] + 0.02
    assert accuracies["linear"] > accuracies["majority"] + 0.3
    assert (tmp_path / "indented.png").stat().st_size > 10_000
