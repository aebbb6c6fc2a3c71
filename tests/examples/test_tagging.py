"""The tagging example: its data and its model."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import _conllu
import _python_source
import tagging
import tdjax
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
    assert ids.tolist() == [97, 10, 128, 128]


def test_no_file_is_on_both_sides_of_the_split():
    train, held_out = _python_source.read_sources()
    assert not train.keys() & held_out.keys()
    assert not {*train.values()} & {*held_out.values()}
    assert len(train) > 5 * len(held_out) > 0


def test_windows_hold_every_symbol_once(monkeypatch):
    monkeypatch.setattr(tagging, "LENGTH", 2)
    sequences = [(np.arange(n)[:, None] + 100, np.arange(n)) for n in (5, 2)]
    ids, labels, lengths = tagging.windows(sequences)
    assert lengths.tolist() == [2, 2, 1, 2]
    assert labels.tolist() == [[0, 1], [2, 3], [4, 0], [0, 1]]
    assert ids[:3, :, 0].tolist() == [[100, 101], [102, 103], [104, 0]]


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


@functools.cache
def small_tagger():
    model = tagging.Tagger(vocabulary=20, tags=3)
    ids, lengths = jnp.arange(20).reshape(2, 5, 2), jnp.array([3, 5])
    return model, jax.jit(model.init)(jax.random.key(0), ids, lengths), ids, lengths


def test_padding_never_reaches_the_logits():
    model, variables, ids, lengths = small_tagger()
    apply = jax.jit(model.apply)
    logits = apply(variables, ids, lengths)
    padded = apply(variables, ids.at[0, 3:].set(7), lengths)
    np.testing.assert_array_equal(padded[0, :3], logits[0, :3])
    alone = apply(variables, ids[:1, :3], lengths[:1])
    np.testing.assert_allclose(padded[0, :3], alone[0], rtol=1e-5, atol=1e-6)


def test_the_masked_head_alone_gives_zeros_at_padding():
    model, variables, ids, lengths = small_tagger()
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    valid = np.asarray(tdjax.lengths_to_mask(lengths, 5))
    models = model, model.clone(bare_head=True)
    masked, bare = (np.asarray(m.apply(variables, ids, lengths)) for m in models)
    assert not masked[~valid].any()
    assert bare[~valid].all()
    np.testing.assert_array_equal(masked[valid], bare[valid])


def test_the_baseline_counts_valid_steps_alone(monkeypatch):
    monkeypatch.setattr(tagging, "LENGTH", 4)
    train = None, np.array([[2, 2, 0, 0], [1, 0, 0, 0]]), np.array([2, 1])
    held_out = None, np.array([[2, 1, 2, 2], [1, 2, 2, 2]]), np.array([3, 1])
    assert tagging.majority_baseline(train, held_out) == (2, 0.5)


def test_conllu_files_are_tagged_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tagging, "HIDDEN", 8)
    monkeypatch.setattr(tagging, "LENGTH", 8)
    path = tmp_path / "x.conllu"
    path.write_text("\n\n".join(sentences(60)))
    result = tagging.main(60, tmp_path / "run", [str(path), str(path)])
    # The last letter of a word tells its part of speech.
    assert result["tagger"] > 0.85 > 2 * result["baseline"]
    output = capsys.readouterr().out
    assert "baseline, always" in output
    assert (tmp_path / "run" / "learning_curve.png").exists()


@pytest.mark.slow
def test_python_source_is_tagged_far_better_than_by_the_majority(tmp_path):
    result = tagging.main(out=tmp_path)
    assert result["tagger"] > 0.97
    assert 0.2 < result["baseline"] < 0.4
