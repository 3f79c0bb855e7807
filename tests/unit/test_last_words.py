"""How a worker tells its end where no launcher of ours listens, as under torchrun and srun."""

import pytest

from msa_train.parallel.faults import ExchangeError
from msa_train.training.last_words import LAUNCHER_PID, record
from msa_train.training.watchdog import StalledError


@pytest.mark.parametrize("kind", [ExchangeError, StalledError])
def test_the_first_line_names_the_cause(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (LAUNCHER_PID, "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    record(kind("layer 2, fetching keys (kv): rank 3 does not answer"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "msa-train: rank 1 failed: layer 2, fetching keys (kv): rank 3 does not answer"
    assert (len(lines) > 1) == (kind is ExchangeError), "a traceback, but where the stacks are printed"
