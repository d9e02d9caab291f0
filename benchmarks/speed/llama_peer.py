"""The same shape in llama.cpp, for comparison. Runs where llama-cpp-python and gguf are installed.

    python llama_peer.py convert WEIGHTS.npz OUT.gguf
    python llama_peer.py serve FILE.gguf

`convert` turns what `mid.export` wrote into Q8_0 matrices; `serve` answers as worker.py does.
"""

import sys
import time

import numpy as np

PROMPT, STEPS, CONTEXT, THREADS = 256, 24, 512, 2


def convert(weights: str, out: str) -> None:
    import gguf

    arrays = np.load(weights)
    writer = gguf.GGUFWriter(out, "grok")
    n_layers, _, d_ff, d_model = arrays["ffn_gate_exps.weight"].shape
    d_head = 96
    n_heads = arrays["attn_q.weight"].shape[1] // d_head
    n_kv_heads = arrays["attn_k.weight"].shape[1] // d_head
    writer.add_block_count(n_layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(d_model)
    writer.add_feed_forward_length(d_ff)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_key_length(d_head)
    writer.add_value_length(d_head)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(d_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    writer.add_vocab_size(arrays["token_embd"].shape[0])
    writer.add_tokenizer_model("none")

    def add(name: str, array: np.ndarray, quantise: bool) -> None:
        if not quantise:
            writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
            return
        q8 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(array.astype(np.float32), q8), raw_dtype=q8)

    add("token_embd.weight", arrays["token_embd"], True)
    add("output_norm.weight", arrays["output_norm"], False)
    for name in sorted({n.split(".")[0] for n in arrays.files} - {"token_embd", "output_norm"}):
        for layer in range(n_layers):
            if f"{name}.weight" not in arrays.files:
                add(f"blk.{layer}.{name}.weight", arrays[name][layer], False)
                continue
            weight, scales = arrays[f"{name}.weight"][layer], arrays[f"{name}.scales"][layer]
            *lead, n, k = weight.shape
            groups = scales.shape[-2]
            parts = weight.reshape(*lead, n, groups, k // groups)
            floats = parts * np.swapaxes(scales, -1, -2)[..., None]
            add(f"blk.{layer}.{name}.weight", floats.reshape(weight.shape), True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Timings:
    """llama.cpp's own prefill and decode, as its library does them."""

    def __init__(self, path: str) -> None:
        import llama_cpp

        self.lib = lib = llama_cpp
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT, PROMPT, PROMPT
        settings.n_threads = settings.n_threads_batch = THREADS
        self.context = lib.llama_init_from_model(self.model, settings)
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def _run(self, tokens: list[int]) -> int:
        array = (self.lib.llama_token * len(tokens))(*tokens)
        batch = self.lib.llama_batch_get_one(array, len(tokens))
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def prefill(self) -> float:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        tokens = np.random.default_rng(1).integers(3, self.vocab, PROMPT).tolist()
        start = time.perf_counter()
        self.last = self._run(tokens)
        return time.perf_counter() - start

    def decode(self) -> float:
        self.prefill()
        start = time.perf_counter()
        for _ in range(STEPS):
            self.last = self._run([self.last])
        return (time.perf_counter() - start) / STEPS


def serve(path: str) -> None:
    timings = Timings(path)
    timings.decode()
    print("ready", flush=True)
    for line in sys.stdin:
        print(getattr(timings, line.strip())(), flush=True)


if __name__ == "__main__":
    {"convert": convert, "serve": serve}[sys.argv[1]](*sys.argv[2:])
