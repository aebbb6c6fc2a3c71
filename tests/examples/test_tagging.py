"""The tagging example: its data, its loss, and runs that are killed and go on."""

import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import _checkpoints  # noqa: E402
import _conllu  # noqa: E402
import _options  # noqa: E402
import _python_source  # noqa: E402
import _sequences  # noqa: E402
import tagging  # noqa: E402

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
    assert letters('f"{{if{x+=1}}}"'.replace("+=", "//")) == expected


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
    rows = np.concatenate([_sequences.batch_rows(3, step, 4, 10) for step in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
    assert _sequences.batch_rows(4, 0, 100, 3).shape == (100,)


def conllu_line(identifier, form="word", upos="NOUN"):
    return "\t".join([identifier, form, "_", upos, *"______"])


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


def test_a_tag_unseen_in_training_is_an_error_without_a_loss(tmp_path):
    train, dev = tmp_path / "train.conllu", tmp_path / "dev.conllu"
    train.write_text(conllu_line("1", "a", "NOUN"))
    dev.write_text(f"{conllu_line('1', 'a', 'NOUN')}\n{conllu_line('2', 'b', 'VERB')}")
    task = _conllu.conllu_task(str(train), str(dev), 8)
    assert task.tags == ("NOUN",)
    assert _sequences.majority_accuracy(task) == 0.5
    state = tagging.create_state(task, _options.Settings(hidden=2))
    score = tagging.evaluate(state, *task.held_out.arrays)
    assert score.accuracy == 0.5
    assert score.loss == 0


def test_evaluation_counts_each_window_once(tmp_path, monkeypatch):
    path = tmp_path / "x.conllu"
    path.write_text("\n\n".join(sentences(5)))
    task = _conllu.conllu_task(str(path), str(path), 8)
    state = tagging.create_state(task, _options.Settings(hidden=2))
    scores = []
    for size in (2, 5, 7):
        monkeypatch.setattr(tagging, "EVALUATION_BATCH", size)
        scores.append(tagging.evaluate(state, *task.held_out.arrays))
    assert len({score.accuracy for score in scores}) == 1
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-5)
    assert scores[0].loss == pytest.approx(scores[2].loss, rel=1e-5)


def sentences(count):
    """Of 2 to 5 words whose last letter tells the part of speech."""
    rng = np.random.default_rng(0)
    uposes = dict(zip("abc", ("NOUN", "VERB", "ADJ")))
    for _ in range(count):
        ends = rng.choice([*"abc"], rng.integers(2, 6))
        yield "\n".join(
            conllu_line(str(i), f"w{rng.integers(50)}{end}", uposes[end])
            for i, end in enumerate(ends, 1)
        )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "x.conllu"
    path.write_text("\n\n".join(sentences(40)))
    return str(path)


def command(*arguments):
    return [sys.executable, str(EXAMPLES / "tagging.py"), *map(str, arguments)]


# Enough that a signal after the first line comes long before the end.
STEPS = 1500


def tiny(corpus, out, *arguments):
    sizes = ("--hidden", 4, "--batch-size", 4, "--steps", STEPS)
    often = ("--checkpoint-every", 75, "--out", out)
    return command("--conllu", corpus, corpus, *sizes, *often, *arguments)


def start(arguments):
    # In a group of its own, so that a signal to it is none to the tests.
    options = {"text": True, "start_new_session": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(arguments, **options, **pipes)


def finish(process):
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def stop_in_training(arguments, signal_number):
    """Sends the signal once some steps are done; returns what was printed."""
    process, printed = start(arguments), ""
    for line in process.stdout:
        printed += line
        if line.startswith("step"):
            break
    os.killpg(process.pid, signal_number)
    code, rest = finish(process)
    return code, printed + rest


def parameters(output):
    return output.split("parameters ")[1].split()[0]


def steps_saved(out):
    names = [path.name for path in (out / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


class Runs:
    """One run without a break, one killed and one interrupted, which then went on."""

    def __init__(self, corpus, folder):
        self.whole, self.killed, self.interrupted = (
            folder / name for name in ("whole", "killed", "interrupted")
        )
        killed = tiny(corpus, self.killed)
        # Only the interrupt makes a checkpoint.
        interrupted = tiny(corpus, self.interrupted, "--checkpoint-every", STEPS)
        # Side by side, for most of a run's time is the start of JAX.
        signals = {signal.SIGKILL: killed, signal.SIGINT: interrupted}
        with ThreadPoolExecutor() as pool:
            stopped = pool.map(stop_in_training, signals.values(), signals)
            self.kill, self.interrupt = stopped
        self.saved_by_killed = steps_saved(self.killed)
        self.saved_by_interrupted = steps_saved(self.interrupted)
        commands = [tiny(corpus, self.whole)]
        commands += [[*broken, "--resume"] for broken in (killed, interrupted)]
        processes = [start(arguments) for arguments in commands]
        self.whole_end, self.killed_end, self.interrupted_end = map(finish, processes)


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    return Runs(corpus, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def finished(runs):
    """The folder of a finished run."""
    assert runs.whole_end[0] == 0
    return runs.whole


def test_a_run_reports_accuracy_and_baseline_and_leaves_its_files(runs):
    code, output = runs.whole_end
    assert code == 0, output
    assert "warning" not in output.lower()
    numbers = json.loads((runs.whole / "learning_curve.json").read_text())
    assert [point["step"] for point in numbers["curve"]] == [
        *range(150, STEPS + 1, 150)
    ]
    final = numbers["curve"][-1]["held_out_accuracy"]
    assert f"{final:.2%}" in output
    assert "majority-class baseline" in output
    assert f"{numbers['majority_class']:.2%}" in output
    assert final > 0.95 > 2 * numbers["majority_class"]
    assert (runs.whole / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert steps_saved(runs.whole)[-1] == STEPS
    files = ["checkpoints", "learning_curve.json", "learning_curve.png"]
    assert sorted(path.name for path in runs.whole.iterdir()) == files


def test_a_killed_run_goes_on_to_the_same_parameters(runs):
    assert runs.kill[0] == -signal.SIGKILL
    saved = runs.saved_by_killed[-1]
    assert 0 < saved < STEPS
    code, output = runs.killed_end
    assert code == 0, output
    assert f"Goes on from step {saved} of {STEPS}" in output
    assert parameters(output) == parameters(runs.whole_end[1])
    for name in ("learning_curve.json", "learning_curve.png"):
        assert (runs.killed / name).read_bytes() == (runs.whole / name).read_bytes()


def test_an_interrupted_run_says_how_to_go_on_and_does(runs):
    code, printed = runs.interrupt
    assert code == 130, printed
    (saved,) = runs.saved_by_interrupted
    assert saved < STEPS
    assert "Traceback" not in printed
    advice = printed.strip().splitlines()[-1]
    assert advice.startswith("Interrupted. Go on with: python ")
    assert advice.endswith("--resume")
    code, output = runs.interrupted_end
    assert code == 0, output
    assert f"Goes on from step {saved} of {STEPS}" in output
    assert parameters(output) == parameters(runs.whole_end[1])


def refused(capsys, arguments):
    assert tagging.main(arguments[2:]) == 2
    return capsys.readouterr().err


def test_other_settings_are_refused_by_name(finished, corpus, capsys):
    message = refused(
        capsys, tiny(corpus, finished, "--hidden", 5, "--seed", 1, "--resume")
    )
    assert "--hidden is 5, was 4" in message
    assert "--seed is 1, was 0" in message
    assert "--steps" not in message
    assert steps_saved(finished)[-1] == STEPS


def test_other_data_is_refused_by_name(finished, tmp_path, capsys):
    path = tmp_path / "x.conllu"
    path.write_text(conllu_line("1"))
    message = refused(capsys, tiny(path, finished, "--resume"))
    assert "tags is ['NOUN'], was ['ADJ', 'NOUN', 'VERB']" in message
    assert "training data" in message


def test_a_run_is_not_overwritten(finished, corpus, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    message = refused(capsys, tiny(corpus, finished))
    assert "--resume" in message
    assert "--out" in message
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}


def test_unusable_files_are_refused_without_a_traceback(tmp_path, capsys):
    path = tmp_path / "x.conllu"
    path.write_text("1\tword")
    arguments = ["--conllu", str(path), str(path), "--out", str(tmp_path / "run")]
    assert tagging.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}:1: found 2 column(s)")
    assert tagging.main([*arguments[:2], str(tmp_path / "none"), *arguments[3:]]) == 2
    assert tagging.main(["--conllu", "none", "none", *arguments[3:]]) == 2
    assert "No such file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--batch-size", "-1"],
        ["--length", "1.5"],
        ["--hidden", "x"],
        ["--learning-rate", "nan"],
        ["--learning-rate", "0"],
        ["--seed", "-1"],
        ["--seed", str(2**32)],
        ["--checkpoint-every", "0"],
        ["--conllu", "only-one"],
    ],
)
def test_options_are_checked(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        tagging.main(arguments)
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_python_source_is_tagged_from_end_to_end(tmp_path, capsys):
    sizes = ["--steps", "20", "--hidden", "8", "--batch-size", "8", "--length", "256"]
    assert tagging.main([*sizes, "--out", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    assert "majority-class baseline" in output
    assert "tags predicted for" in output
    curve = json.loads((tmp_path / "run/learning_curve.json").read_text())
    assert 0.2 < curve["majority_class"] < 0.4
    assert curve["curve"][-1]["held_out_loss"] < curve["curve"][0]["held_out_loss"]


def test_the_checksum_sees_every_bit():
    tree = {"a": np.zeros(3, np.float32), "b": np.ones(2, np.float32)}
    same = jax.tree.map(np.copy, tree)
    assert _checkpoints.checksum(tree) == _checkpoints.checksum(same)
    same["a"][1] = -0.0
    assert _checkpoints.checksum(tree) != _checkpoints.checksum(same)
    swapped = {"a": tree["b"], "b": tree["a"]}
    assert _checkpoints.checksum(tree) != _checkpoints.checksum(swapped)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    _checkpoints.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _checkpoints.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]
