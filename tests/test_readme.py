"""The README's code runs as it stands."""

import re
import runpy
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_ten_lines(tmp_path, capsys):
    section = README.read_text().split("## Ten lines\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    script = tmp_path / "ten_lines.py"
    script.write_text(code)
    runpy.run_path(str(script))
    layout, *text_and_tokens, shape = capsys.readouterr().out.rstrip("\n").split("\n")
    assert "'model': 8" in layout
    assert len(text_and_tokens) >= 6
    assert re.fullmatch(r"\(1, \d+, 4096\)", shape)
