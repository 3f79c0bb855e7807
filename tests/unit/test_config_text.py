"""What a terminal would act on is escaped; what people write is not."""

from msa_train.config import one_line, printable


def test_controls_are_escaped_and_text_is_not() -> None:
    assert printable("Müller 模型 e\u0301 👩\u200d🔬 'a b'") == "Müller 模型 e\u0301 👩\u200d🔬 'a b'"
    assert printable("a\x1b[2Jb\x1b]0;t\x07\r\n\x7f") == r"a\x1b[2Jb\x1b]0;t\x07\r\n\x7f"
    # C1 controls, right to left, line separators, a name that is not UTF-8
    assert printable("\x9b2J\u202egpj\u2028\udcff") == r"\x9b2J\u202egpj\u2028\udcff"
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"
    assert printable(7) == "7"


def test_a_message_stays_one_line() -> None:
    assert one_line("run_dir=a:\n  no\x1b[2J\tsuch  file") == r"run_dir=a: no\x1b[2J such file"


def test_words_without_end_hide_no_rule() -> None:
    line = one_line(f"model.name={'a' * 20_000}: must be short; use a name")
    assert line.endswith(": must be short; use a name")
    assert line.startswith("model.name=aaa")
    assert "(20,012 characters)" in line
    assert len(line) < 300
    path = f"/{'b' * 900}"
    assert one_line(f"{path}: no such file") == f"{path}: no such file"
