"""What each process of `test_processes` runs: index, port, checkpoint, what to do."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

import grokkit
from grokkit import processes
from grokkit.checkpoint import tensor_file

N_PROCESSES, PROMPT = 2, "The quick brown"


def main(index: int, port: str, checkpoint: str, task: str, folder: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    grokkit.virtual_devices(4)
    # Where none dies, a machine that is busy with other things may take its time.
    heartbeat = 10 if task == "generate forever" else 100
    processes.start(f"127.0.0.1:{port}", N_PROCESSES, index, timeout=60, heartbeat=heartbeat)
    read = 0
    original = tensor_file._fill

    def counting(descriptor, buffers, offset):
        nonlocal read
        read += sum(buffer.nbytes for buffer in buffers)
        return original(descriptor, buffers, offset)

    tensor_file._fill = counting
    lm = grokkit.load(checkpoint, dtype="float32", progress=False)
    assert dict(lm.mesh.shape) == {"data": 1, "model": 8}
    if task == "generate forever":
        print("ready", flush=True)
        while True:
            lm.generate(PROMPT, max_len=60, seed=1)
    texts, fed = lm.generate_with_cache(PROMPT, ["logits", "pattern", "resid_post"], 12, seed=5)
    arrays = dict(fed.items())
    notes = {"texts": texts, "read": read}
    if task == "more":
        logits, cache = lm.run_with_cache(PROMPT, ["z", "router_probs"])
        assert not cache["z"].is_fully_addressable
        on_host = cache.to_host()
        edited = lm(PROMPT, edits=[grokkit.ForbidExperts([0, 1])]).logits
        arrays |= {"edited": grokkit.to_host(edited), "forward": grokkit.to_host(logits)}
        arrays |= dict(on_host.items())
        notes |= {"two": lm.generate([PROMPT, "She said"], 12, 0.8, 0.9, seed=3)}
        notes |= {"stream": "".join(t.text for t in lm.stream(PROMPT, 8, seed=2))}
    np.savez(Path(folder) / f"{index}.npz", **arrays)
    (Path(folder) / f"{index}.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
