"""The tagging example: its data and its loss."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import _batches
import _conllu
import _python_source
import _sequences
import _training
import tagging
from conllu_text import conllu_line, sentences

LETTERS = {"other": ".", "keyword": "k", "name": "n", "number": "0"}
LETTERS |= {"string": "s", "comment": "c", "operator": "o"}


def letters(source):
    labels = _python_source.label_characters(source)
    return "".join(LETTERS[_python_source.TAGS[label]] for label in labels)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("if x1 >= 2.5:  # é\n", "kk.nn.oo.000o..ccc."),
        ("def f():\n\treturn None\n", "kkk.nooo..kkkkkk.kkkk."),
        ("é = 'é' \\\n  + b\n", "n.o.sss....." + "o.n."),
        ('"""a\n  b"""\nc', "sssssssssss.n"),
        ("", ""),
    ],
)
def test_labels_of_a_small_source(source, expected):
    assert letters(source) == expected


def test_an_f_string_is_a_string_up_to_its_expressions():
    inside = "noo0" if sys.version_info >= (3, 12) else "ssss"
    around = "oo" if sys.version_info >= (3, 12) else "ss"
    expected = f"ssssss{around[0]}{inside}{around[1]}sss"
    assert letters('f"{{if{x//1}}}"') == expected


def test_characters_beyond_ascii_share_one_id():
    ids = _python_source.character_ids("a\né😀")
    assert ids.tolist() == [[97], [10], [128], [128]]


def test_no_file_is_on_both_sides_of_the_split():
    train, held_out = _python_source.read_split()
    sides = [{file.source for file in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert [len(names) for names in sides] == [len(train), len(held_out)]
    assert len(train) > 5 * len(held_out) > 0
    texts = [{file.symbols for file in side} for side in (train, held_out)]
    assert not texts[0] & texts[1]


def sequence(length):
    symbols = [f"word{i}" for i in range(length)]
    labels = np.arange(length, dtype=np.int32)
    return _sequences.Tagged("source", symbols, labels[:, None] + 100, labels)


def test_windows_hold_every_symbol_once():
    sequences = [sequence(5), sequence(2), sequence(4)]
    windows, _ = _sequences.cut(sequences, sequences, 2)
    assert windows.lengths.tolist() == [2, 2, 1, 2, 2, 2]
    assert windows.labels.tolist() == [[0, 1], [2, 3], [4, -1], [0, 1], [0, 1], [2, 3]]
    assert windows.ids[:3, :, 0].tolist() == [[100, 101], [102, 103], [104, 0]]
    assert sum(map(len, windows.symbols)) == 5 + 2 + 4


def test_windows_are_no_longer_than_the_longest_sequence():
    train, held_out = _sequences.cut([sequence(3)], [sequence(7)], 1000)
    assert train.ids.shape == (1, 7, 1)
    assert held_out.ids.shape == (1, 7, 1)


def test_the_order_is_a_permutation_in_each_epoch_also_across_batches():
    rows = np.concatenate([_batches.batch_rows(3, step, 4, 10) for step in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
    assert _batches.batch_rows(4, 0, 100, 3).shape == (100,)


SENTENCE = """\
# text = vámonos al mar
1-2	vámonos	_	_	_	_	_	_	_	_
1	vamos	_	VERB	_	_	_	_	_	_
2	nos	_	PRON	_	_	_	_	_	_
2.1	ya	_	ADV	_	_	_	_	_	_
3-4	al	_	_	_	_	_	_	_	_
3	a	_	ADP	_	_	_	_	_	_
4	el	_	DET	_	_	_	_	_	_
5	mar	_	NOUN	_	_	_	_	_	_
"""


def test_conllu_words_without_ranges_and_empty_nodes(tmp_path):
    path = tmp_path / "x.conllu"
    path.write_text(f"{SENTENCE}\n\n# no words\n\n{conllu_line('1', 'é', 'X')}")
    words = [("vamos", "VERB"), ("nos", "PRON"), ("a", "ADP"), ("el", "DET")]
    expected = [[*words, ("mar", "NOUN")], [("é", "X")]]
    assert _conllu.read_conllu(path) == expected
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert _conllu.read_conllu(path) == expected


@pytest.mark.parametrize(
    ("lines", "number", "message"),
    [
        (["1 word NOUN"], 1, "1 column(s) in '1 word NOUN', expected 10 columns"),
        (["# a", conllu_line("2")], 2, "word ID 2, expected 1"),
        ([conllu_line("1"), conllu_line("1")], 2, "word ID 1, expected 2"),
        ([conllu_line("one")], 1, "ID 'one', expected a number"),
        ([conllu_line("9" * 5000)], 1, "expected a number"),
        ([conllu_line("1", form="")], 1, "an empty FORM, expected a word"),
        ([conllu_line("1", upos="Noun")], 1, "UPOS 'Noun', expected one of ADJ"),
        ([conllu_line("1", upos="_")], 1, "UPOS '_', expected one of ADJ"),
        ([conllu_line("2-3")], 1, "range 2-3, expected one from word 1"),
        ([conllu_line("1"), conllu_line("2-1")], 2, "range 2-1, expected one"),
        ([conllu_line("1-2"), conllu_line("1"), "", "x"], 2, "expected word 2"),
        ([conllu_line("2.1")], 1, "empty node 2.1, expected 0.1"),
        ([conllu_line("1"), "", "\udcff"], 3, r"b'\xff', expected text in UTF-8"),
    ],
)
def test_malformed_conllu_is_refused_with_its_line(tmp_path, lines, number, message):
    path = tmp_path / "x.conllu"
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"found .*expected") as error:
        _conllu.read_conllu(path)
    assert str(error.value).startswith(f"{path}:{number}: found ")
    assert message in str(error.value)


def test_conllu_without_words_is_refused(tmp_path):
    path = tmp_path / "x.conllu"
    path.write_text("# only a comment\n\n")
    with pytest.raises(ValueError, match="no words, expected at least one sentence"):
        _conllu.read_conllu(path)


def test_words_share_the_buckets_of_what_they_share():
    ids = {word: _conllu.word_ids(word) for word in ("walking", "talking", "Walking")}
    assert len({*map(len, ids.values())}) == 1
    assert len({*ids["walking"]} & {*ids["talking"]}) >= 5
    assert {*ids["walking"]} != {*ids["Walking"]}
    # Fixed numbers: they must not change from run to run as `hash` does.
    assert _conllu.word_ids("a")[:2] == [2542, 9177]


def test_the_loss_is_the_mean_of_the_labelled_steps_alone():
    logits = jnp.log(jnp.array([[[0.25, 0.75], [0.5, 0.5]], [[0.9, 0.1], [0.5, 0.5]]]))
    labels = jnp.array([[1, -1], [0, -1]])
    expected = -(math.log(0.75) + math.log(0.9)) / 2
    loss = tagging.masked_cross_entropy(logits, labels)
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e30])
def test_the_loss_and_its_gradient_ignore_what_is_in_padding(garbage):
    logits = jnp.arange(12.0).reshape(2, 3, 2) ** 2
    labels = jnp.array([[0, 1, -1], [1, -1, -1]])
    dirty = jnp.where(labels[..., None] < 0, garbage, logits)
    compute = jax.value_and_grad(tagging.masked_cross_entropy)
    clean_loss, clean_gradient = compute(logits, labels)
    loss, gradient = compute(dirty, labels)
    assert loss == clean_loss
    np.testing.assert_array_equal(gradient, clean_gradient)
    assert not gradient[labels < 0].any()


def test_the_loss_of_nothing_is_zero():
    labels = jnp.full((2, 3), -1)
    compute = jax.value_and_grad(tagging.masked_cross_entropy)
    loss, gradient = compute(jnp.ones((2, 3, 4)), labels)
    assert loss == 0
    assert not gradient.any()


def test_padding_never_reaches_the_logits():
    model = tagging.Tagger(vocabulary=20, tags=3, hidden=4)
    ids = jnp.arange(20).reshape(2, 5, 2)
    lengths = jnp.array([3, 5])
    variables = jax.jit(model.init)(jax.random.key(0), ids, lengths)
    padded = model.apply(variables, ids.at[0, 3:].set(7), lengths)
    np.testing.assert_array_equal(
        padded[0, :3], model.apply(variables, ids, lengths)[0, :3]
    )
    alone = model.apply(variables, ids[:1, :3], lengths[:1])
    np.testing.assert_allclose(padded[0, :3], alone[0], rtol=1e-5, atol=1e-6)


def small_tagging(train, held_out, **options):
    sizes = {"hidden": 2, "length": 8, "conllu": (train, held_out)}
    problem = tagging.Tagging(tagging.TaggingSettings(**sizes, **options))
    return problem, problem.init(jax.random.key(0))


@pytest.fixture
def ragged_corpus(tmp_path):
    path = tmp_path / "x.conllu"
    path.write_text("\n\n".join(sentences(12)))
    return str(path)


@pytest.mark.slow
def test_both_heads_train_to_the_same_losses_and_parameters(ragged_corpus):
    ends = {}
    for head in tagging.HEADS:
        problem, _ = small_tagging(ragged_corpus, ragged_corpus, head=head)
        settings = tagging.TaggingSettings(steps=5)
        assert len(set(problem.train[2].tolist())) > 1
        state, losses = _training.create_state(problem, settings), []
        for _ in range(5):
            state, metrics = _training.train_step(state, problem.train)
            losses.append(float(metrics["loss"]))
        ends[head] = losses, state.params
    (masked_losses, masked), (losses, params) = ends.values()
    assert masked_losses == losses
    assert len({*losses}) == 5
    jax.tree.map(np.testing.assert_array_equal, masked, params)


def test_the_masked_head_alone_gives_zeros_at_padding(ragged_corpus):
    problem, params = small_tagging(ragged_corpus, ragged_corpus)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    ids, _, lengths = problem.train
    there = np.arange(ids.shape[1]) < lengths[:, None]
    models = (problem.model.clone(head=head) for head in tagging.HEADS)
    outputs = [model.apply({"params": params}, ids, lengths) for model in models]
    masked, bare = map(np.asarray, outputs)
    assert not there.all()
    assert not masked[~there].any()
    assert bare[~there].all()
    np.testing.assert_array_equal(masked[there], bare[there])
    rows = tagging.compare_heads(problem.model, params, problem.train)
    assert len({row["loss"] for row in rows.values()}) == 1
    assert len({row["parameters"] for row in rows.values()}) == 1
    paddings = [row["largest logit at padding"] for row in rows.values()]
    assert paddings == ["0.00", f"{np.abs(bare[~there]).max():.2f}"]


def test_a_tag_unseen_in_training_is_an_error_without_a_loss(tmp_path):
    train, dev = tmp_path / "train.conllu", tmp_path / "dev.conllu"
    train.write_text(conllu_line("1", "a", "NOUN"))
    dev.write_text(f"{conllu_line('1', 'a', 'NOUN')}\n{conllu_line('2', 'b', 'VERB')}")
    problem, params = small_tagging(str(train), str(dev))
    assert problem.task.tags == ("NOUN",)
    assert problem.baselines == {"accuracy": {"majority class": 0.5}}
    score = problem.evaluate(params, problem.held_out)
    assert score == {"loss": 0, "accuracy": 0.5}


def test_evaluation_counts_each_window_once(tmp_path, monkeypatch):
    path = tmp_path / "x.conllu"
    path.write_text("\n\n".join(sentences(5)))
    problem, params = small_tagging(str(path), str(path))
    scores = []
    for size in (2, 5, 7):
        monkeypatch.setattr(tagging, "EVALUATION_BATCH", size)
        scores.append(problem.evaluate(params, problem.held_out))
    assert len({score["accuracy"] for score in scores}) == 1
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=1e-5)
    assert scores[0]["loss"] == pytest.approx(scores[2]["loss"], rel=1e-5)
