import re

import jax
import numpy as np
import pytest

import grokkit
from grokkit import demo
from grokkit.checkpoint import save_params
from grokkit.model import initialise


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_config, tiny_tokenizer_file):
    """A random model that reads and writes text."""
    directory = tmp_path_factory.mktemp("demo") / "random"
    model = initialise(tiny_config, jax.random.key(0))
    save_params(model, tiny_config, directory, tiny_tokenizer_file, progress=False)
    return directory


def test_demo_shows_layout_text_and_experts(checkpoint, capsys):
    prompt = "The answer"
    arguments = [str(checkpoint), "--prompt", prompt, "--max-len", "6", "--seed", "3"]
    assert demo.main(arguments) == 0
    printed = capsys.readouterr().out

    lm = grokkit.load(checkpoint, progress=False)
    assert (
        "32 outputs x 32 inputs in int8: each of 8 devices holds the rows of 1 of its 8 heads"
        in printed
    )
    assert all(f"CPU {device}" in printed for device in range(8))
    new = list(lm.stream(prompt, max_len=6, temperature=0.7, top_p=0.95, seed=3))
    assert f"\n{prompt}{''.join(map(str, new))}\n" in printed

    ids = lm.tokenizer.encode(prompt) + [token.id for token in new]
    _, cache = lm.run_with_cache(ids, "router_probs")
    probs = np.asarray(cache["router_probs"])[:, 0]  # [layer, position, expert]
    best = np.argsort(-probs, axis=-1)[..., :2]
    rows = printed.split("layer 1\n")[1].splitlines()
    expected = [[f"{a}+{b}" for a, b in best[:, i]] for i in range(len(ids))]
    assert [row.split()[-2:] for row in rows] == expected

    # On a terminal the same, with a colour for each expert.
    demo.show_experts(lm, ids, colour=True)
    coloured = capsys.readouterr().out
    assert "\x1b[" not in printed  # an escape alone may be a token of the text
    assert printed.endswith(re.sub("\x1b\\[[0-9]+m", "", coloured))
    colours = set(re.findall("\x1b\\[([0-9]+)m([0-9])\x1b\\[0m", coloured))
    assert {expert for _, expert in colours} == set(map(str, best.flat))
    assert len(colours) == len({colour for colour, _ in colours})


def test_demo_refuses_what_is_no_checkpoint(tmp_path, capsys):
    assert demo.main([str(tmp_path)]) == 2
    assert "expected: a checkpoint directory" in capsys.readouterr().err
