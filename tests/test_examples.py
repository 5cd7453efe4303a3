"""The examples run, and the composed policy does what they say."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_data_then_compose_and_act(tmp_path, capsys):
    own_data = runpy.run_path(str(EXAMPLES / "own_data.py"))
    own_data["main"](tmp_path, steps=300)
    moves = runpy.run_path(str(EXAMPLES / "compose_and_act.py"))["main"](tmp_path)
    (right, up), (most_right, _), (_, most_up) = moves[0.5], moves[0.0], moves[1.0]
    assert most_right > 1 and most_up > 1
    assert 0 < right < most_right and 0 < up < most_up
    assert capsys.readouterr().out.count("\n") == 5
