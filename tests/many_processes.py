"""What each process of `test_processes` runs: index, port, checkpoint, what to do, where to.

`calls` and `analyses` are what one process of eight devices does too, to compare with.
"""

import errno
import json
import sys
from pathlib import Path

import jax
import numpy as np

import grokkit
from grokkit import Capture, processes, stored_captures
from grokkit.analysis import attention, attribution, causal_routing, lens, patching
from grokkit.batching import ContinuousBatch
from grokkit.checkpoint import read
from grokkit.errors import GrokkitError
from grokkit.runners import InferenceRunner, LanguageModelConfig, ModelRunner, Request
from grokkit.runners import TransformerConfig as Transformer

N_PROCESSES, PROMPT = 2, "The quick brown"
PAIR = [PROMPT, "She said"]
PROMPTS = [f"{i} and two make" for i in range(6)] + ["x" * 200]  # the last does not fit
BATCH = {"max_len": 9, "slots": 4, "temperature": 1.2, "seed": 3, "progress": False}
CAPTURED = ["embed", "resid_post", Capture("pattern", positions=-1), "expert_indices", "logits"]
REQUEST = Request(PROMPT, 0.8, 0.9, 5, 8)


def calls(lm: grokkit.LanguageModel) -> tuple[dict, dict]:
    """Arrays and texts of the calls that run or continue texts."""
    logits, cache = lm.run_with_cache(PAIR, ["z", "router_probs"])
    edited = lm(PAIR, edits=[grokkit.ForbidExperts([0, 1])]).logits
    texts, fed = lm.generate_with_cache(PAIR, ["pattern", "resid_post"], 12, seed=5)
    scores = lm.score(PROMPT, [" fox", " dog jumps over"])
    arrays = {"edited": grokkit.to_host(edited), "forward": grokkit.to_host(logits)}
    arrays |= {name: np.asarray(value) for name, value in cache.to_host().items()}
    arrays |= {f"fed {name}": value for name, value in fed.items()}
    arrays |= {f"score {i}": score.logprobs for i, score in enumerate(scores)}
    long = "The quick brown fox jumps over the lazy dog. " * 3
    arrays["perplexity"] = np.array(lm.perplexity(long, window=32, progress=False))
    notes = {
        "texts": texts,
        "two": lm.generate(PAIR, 12, 0.8, 0.9, seed=3),
        "stream": "".join(t.text for t in lm.stream(PROMPT, 8, seed=2)),
        "batch": [c.text for c in grokkit.batch(PROMPTS, lm, **BATCH)],
        "requests": requests(lm),
    }
    return arrays, notes


def requests(lm: grokkit.LanguageModel) -> list:
    """Requests that come, go and are cancelled."""
    batch = ContinuousBatch(lm, slots=2, capacity=64, block=4)
    one, two = batch.submit(PROMPT, 20, seed=1), batch.submit("She said", 20, temperature=0.0)
    three = batch.submit("Two", 6, top_k=5, seed=2)
    seen = [token.text for token, _ in zip(one, range(5), strict=False)]
    one.cancel()
    batch.run()
    return [seen, two.text, three.text, one.finish_reason, three.finish_reason]


def analyses(lm: grokkit.LanguageModel) -> dict:
    """What the analyses find that run the model, and one that looks at a capture."""
    difference = patching.LogitDifference(7, 9)
    pattern = lm.run_with_cache(PAIR, "pattern")[1].to_host()["pattern"]
    prompts = PROMPT, "The quick black"[: len(PROMPT)]
    swept = lm.to_tokens(prompts[0])[0], lm.to_tokens(prompts[0])[0][::-1].copy()
    split = attribution.logit_attribution(lm, [PROMPT] * 2, [5, 6])
    return {
        "entropy": np.asarray(attention.attention_entropy(pattern)),
        "lens": lens.logit_lens(lm, PAIR).top_log_probs,
        "attribution": split.experts,
        "router": attribution.router_attribution(lm, [PROMPT] * 2, 1).heads,
        "losses": causal_routing.next_token_losses(lm, [PROMPT] * 2),
        "forced": causal_routing.forced_choices(
            lm, [PROMPT] * 2, layers=[1], rows=28, progress=False
        ).loss,
        "removed": causal_routing.remove_experts(
            lm, [PROMPT] * 2, layers=[1], rows=2, progress=False
        ).loss,
        "patched": patching.patch(lm, *swept, difference, patching.Heads(), progress=False).values,
        "estimated": patching.attribution_patch(lm, *swept, difference, patching.Heads()).values,
    }


def counted() -> list[int]:
    """Bytes read of checkpoints from now on, one entry a read."""
    found, original = [], read.Reader.read

    def counting(reader, buffer, offset):
        found.append(memoryview(buffer).nbytes)
        return original(reader, buffer, offset)

    read.Reader.read = counting
    return found


def keep(folder: Path, index: int, name: str, arrays: dict, notes: dict) -> None:
    np.savez(folder / f"{name} {index}.npz", **arrays)
    (folder / f"{name} {index}.json").write_text(json.dumps(notes))


def of_all_calls(index: int, checkpoint: str, folder: Path) -> None:
    read = counted()
    lm = load(checkpoint, folder, read)
    arrays, notes = calls(lm)
    notes |= {"read": sum(read)}
    read.clear()
    keep(folder, index, "in memory", arrays | analyses(lm), notes)

    lm = load(checkpoint, folder, read, stream=True)
    before = sum(read)
    lm(PROMPT).logits.block_until_ready()
    a_pass = sum(read) - before
    arrays, notes = calls(lm)
    keep(folder, index, "streamed", arrays, notes | {"read": a_pass})

    lm = load(checkpoint, folder, read, mesh=grokkit.make_mesh(2, 4))
    arrays, notes = calls(lm)
    keep(folder, index, "cut batch", arrays | analyses(lm), notes)


def load(checkpoint, folder, read, **options) -> grokkit.LanguageModel:
    """Load, and count what is read from after the comparison of checkpoints on."""
    original = grokkit.loading.agree

    def agree(*arguments):
        found = original(*arguments)
        read.clear()
        return found

    grokkit.loading.agree = agree
    try:
        return grokkit.load(checkpoint, dtype="float32", progress=False, **options)
    finally:
        grokkit.loading.agree = original


def message(call) -> str:
    """Kind and text of the error that a call ends with."""
    try:
        call()
    except GrokkitError as e:
        return f"{type(e).__name__}: {e}"
    return "no error"


def of_files(index: int, checkpoint: str, folder: Path) -> None:
    lm = grokkit.load(checkpoint, dtype="float32", progress=False)
    own = folder / f"of {index}"  # what only this process sees
    mine = [PROMPT, "She said"][index]
    errors = {
        "call": message(lambda: lm(mine)),
        "kinds": message(lambda: lm.generate(PROMPT) if index else lm.score(PROMPT, " fox")),
        "seeds": message(lambda: lm.generate(PROMPT, seed=index)),
        "batch": message(lambda: grokkit.batch(PROMPTS, lm, **BATCH | {"max_len": 9 + index})),
        "file": message(lambda: grokkit.batch(PROMPTS, lm, own / "notes.txt", **BATCH)),
        "captures": message(lambda: capture(lm, folder / "x", CAPTURED[: 3 + index])),
        "unseen": message(lambda: capture(lm, own / "y")),
    }
    completions = grokkit.batch(PROMPTS, lm, own / "out.jsonl", **BATCH)
    found = capture(lm, folder / "whole")
    errors["full"] = message(lambda: full_disk(lambda: capture(lm, folder / "resumed"), 3))
    capture(lm, folder / "resumed")
    capture(lm, folder / "resumed")  # once all is there nothing runs
    notes = {
        "errors": errors,
        "batch": [c.text for c in completions],
        "shapes": {name: value.shape for name, value in found.items()},
        "runners": [answer(lm, checkpoint, between) for between in ((1, 2), (2, 1))],
    }
    keep(folder, index, "files", {}, notes)


def capture(lm, directory, captures=CAPTURED):
    return lm.capture_to(directory, [*PAIR, "Two"], captures, rows=2, progress=False)


def full_disk(act, files: int) -> None:
    """Do something while the disk has room for so many more files of captures."""
    original, opened = stored_captures.CaptureFile.put, []

    def put(file, *arguments):
        opened.extend([file] if file not in opened else [])
        if len(opened) > files:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file, *arguments)

    stored_captures.CaptureFile.put = put
    try:
        act()
    finally:
        stored_captures.CaptureFile.put = original


def answer(lm, checkpoint: str, between: tuple[int, int]) -> list:
    """What the original's interface answers on a mesh over both processes."""
    sizes = lm.config.to_dict()
    inner = {k: v for k, v in sizes.pop("model").items()
             if k not in ("attention_softcap", "rope_base", "norm_eps")}  # fmt: skip
    model = LanguageModelConfig(model=Transformer(**inner), fprop_dtype=np.float32, **sizes)
    runner = InferenceRunner(
        "test", ModelRunner(model, bs_per_device=0.5, checkpoint_path=checkpoint), checkpoint,
        f"{checkpoint}/tokenizer.model", (1, 4), between, (32,),
    )  # fmt: skip
    runner.initialize()
    server = runner.run()
    next(server)
    return [dict(runner.mesh.shape), server.send(REQUEST), server.send([REQUEST] * 3)]


def main(index: int, port: str, checkpoint: str, task: str, folder: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    grokkit.virtual_devices(4)
    # Where none dies, a machine that is busy with other things may take its time.
    heartbeat = 10 if task == "generate forever" else 100
    processes.start(f"127.0.0.1:{port}", N_PROCESSES, index, timeout=60, heartbeat=heartbeat)
    if task == "all calls":
        of_all_calls(index, checkpoint, Path(folder))
        return
    if task == "files":
        of_files(index, checkpoint, Path(folder))
        return
    lm = grokkit.load(checkpoint, dtype="float32", progress=False)
    assert dict(lm.mesh.shape) == {"data": 1, "model": 8}
    print("ready", flush=True)
    while True:
        lm.generate(PROMPT, max_len=60, seed=1)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
