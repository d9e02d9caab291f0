import jax
import numpy as np
import pytest

import grokkit
from grokkit import demo
from grokkit.checkpoint import save_params
from grokkit.model import initialise

CONFIG = grokkit.GrokConfig(
    vocab_size=320, d_model=32, n_layers=2, n_heads=16, n_kv_heads=8, d_head=4, d_ff=64,
    context_length=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_tokenizer_file):
    directory = tmp_path_factory.mktemp("demo") / "random"
    model = initialise(CONFIG, jax.random.key(0))
    save_params(model, CONFIG, directory, tiny_tokenizer_file, progress=False)
    return directory


def test_demo_shows_layout_text_and_experts(checkpoint, capsys):
    prompt = "The answer"
    demo.main([str(checkpoint), "--prompt", prompt, "--max-len", "6", "--seed", "3"])
    printed = capsys.readouterr().out

    lm = grokkit.load(checkpoint, progress=False)
    assert "32 x 64 in int8: each of 8 devices holds the columns of 2 of its 16 heads" in printed
    assert all(f"CPU {device}" in printed for device in range(8))
    text = "".join(map(str, lm.stream(prompt, max_len=6, temperature=0.7, top_p=0.95, seed=3)))
    assert f"\n{prompt}{text}\n" in printed

    ids = lm.to_tokens(prompt)
    _, cache = lm.run_with_cache(ids, "router_probs")
    ranked = np.argsort(
        -np.asarray(cache["router_probs"])[:, 0], axis=-1
    )  # [layer, position, expert]
    table = printed.split("layer 1\n")[1].splitlines()
    for position, line in enumerate(table[: ids.shape[1]]):
        assert line.split()[-2:] == [f"{a}+{b}" for a, b in ranked[:, position, :2]]
    assert len(table) == ids.shape[1] + len(lm.tokenizer.encode(prompt + text)[ids.shape[1] :])


def test_demo_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(grokkit.GrokkitError):
        demo.main([str(tmp_path)])
