"""Loss curves are drawn from the logs."""

import json

from PIL import Image

from causal_forcing.training import curves


def test_a_panel_a_stage(tmp_path):
    for stage in ("vae", "ar"):
        (tmp_path / stage).mkdir()
        lines = [json.dumps({"step": step, "loss": 1 / (1 + step)}) for step in range(40)]
        (tmp_path / stage / "log.jsonl").write_text("\n".join(lines))
    assert curves.draw(tmp_path, tmp_path / "out" / "curves.png") == 2
    with Image.open(tmp_path / "out" / "curves.png") as image:
        assert image.size == (2 * curves.PANEL[0], curves.PANEL[1])


def test_nothing_to_draw(tmp_path):
    assert curves.draw(tmp_path, tmp_path / "curves.png") == 0
    assert not (tmp_path / "curves.png").exists()
