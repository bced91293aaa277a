"""Faults in the cache, in generation, in recorded steps and in the warm-up."""

from ..fault import Fault

CACHE, GENERATION, KEYE = (f"keye_kernels/model/{name}.py" for name in ("cache", "generation", "keye"))
CAPTURE, STATE, COPIES = "keye_kernels/model/graphs.py", "keye_kernels/model/token_state.py", "keye_kernels/host_copy.py"
STATES = "tests/model/test_token_state.py"
GRAPH, WARM_UP, SMALL = "keye_kernels/model/step_graph.py", "keye_kernels/warm_up.py", "keye_kernels/small.py"
CALLS, TESTS, GROWTH = (f"tests/model/test_{name}.py" for name in ("calls", "generation", "cache_growth"))
TURNS, CONFIGS = "tests/model/test_later_turns.py", "tests/model/test_config.py"
GRAPHS, SIZES, WARMUPS = (f"tests/model/test_{name}.py" for name in ("step_graph", "warmup_sizes", "warmup"))
OPTIONS = "tests/model/test_small.py -k options"

FAULTS = [
    # Cache
    Fault(CACHE, "if used + tokens <= self.max_length:", "if used + tokens < self.max_length:", CALLS),
    Fault(CACHE, "if used + tokens <= self.max_length:", "if tokens <= self.max_length:", CALLS),
    Fault(CACHE, "stored.index_copy_(1, slots, new.detach()", "stored.index_copy_(1, slots, new", CALLS),
    Fault(
        CACHE,
        "((self.keys[layer], key), (self.values[layer], value))",
        "((self.keys[layer], value), (self.values[layer], key))",
        TESTS,
    ),
    Fault(CACHE, "self.valid.index_copy_(1, slots, attention_mask.bool())", "self.valid.index_fill_(1, slots, True)", TESTS),
    Fault(CACHE, "return self.length + torch.arange(tokens,", "return self.length * 0 + torch.arange(tokens,", TESTS),
    Fault(CACHE, ".to(stored.dtype))", ")", TESTS),
    # Sampling
    Fault(GENERATION, "/ (self.temperature or 1.0)", "* (self.temperature or 1.0)", TESTS),
    Fault(GENERATION, "logits < threshold", "logits <= threshold", TESTS),
    Fault(GENERATION, "topk(self.top_k).values[:, -1:]", "topk(self.top_k + 1).values[:, -1:]", TESTS),
    Fault(GENERATION, "- probability >= self.top_p", "- probability > self.top_p", TESTS),
    Fault(GENERATION, "probability.cumsum(-1) - probability >=", "probability.cumsum(-1) >=", TESTS),
    Fault(GENERATION, "removed.scatter(1, order, removed)", "removed", CALLS),
    Fault(GENERATION, "ordered, order = logits.sort(", "ordered, order = (logits * (self.temperature or 1.0)).sort(", CALLS),
    Fault(GENERATION, "None if self.seed is None else torch", "None if not self.seed else torch", TESTS),
    Fault(GENERATION, "exponential_(generator=self.generator)", "exponential_()", TESTS),
    Fault(GENERATION, "(probabilities / torch.empty_like", "(probabilities * torch.empty_like", STATES),
    Fault(GENERATION, "first_given(given[name], defaults.get(name))", "first_given(defaults.get(name), given[name])", CALLS),
    Fault(
        KEYE,
        '"top_p": top_p, "seed": seed}',
        '"top_p": None, "seed": seed}',
        CALLS,
    ),
    Fault(GENERATION, "cls(do_sample, **", 'cls(do_sample or bool(defaults.get("do_sample")), **', CALLS),
    # End tokens, padding, streaming
    Fault(
        KEYE,
        'first_given(eos_token_id, defaults.get("eos_token_id"), self.config.eos_token_id)',
        'first_given(eos_token_id, defaults.get("eos_token_id"))',
        CONFIGS,
    ),
    Fault(KEYE, 'first_given(pad_token_id, defaults.get("pad_token_id"), self', "first_given(pad_token_id, self", CONFIGS),
    Fault(KEYE, "self.config.pad_token_id, *ends[:1], 0)", "self.config.pad_token_id, 0)", CONFIGS),
    Fault(STATE, ".masked_fill(self.finished, self.pad_token_id)", "", TESTS),
    Fault(STATE, "self.finished |= (self.last == self.end_tokens)", "self.finished |= (self.last == self.end_tokens[:1])", TESTS),
    Fault(STATE, "        self.finished.zero_()\n", "", STATES),
    Fault(STATE, "        self.sums.zero_()\n", "", STATES),
    Fault(STATE, "        if index:\n            step()\n", "        step()\n", STATES),
    Fault(STATE, "if len(pending) > copies.delay:", "if len(pending) > 0:", STATES),
    Fault(STATE, "    for finish in pending:\n        yield finish()\n", "", STATES),
    Fault(COPIES, "copy = tensor.clone()\n", "copy = tensor\n", TESTS),
    Fault(COPIES, "            event.synchronize()\n", "", STATES),
    Fault(COPIES, "        event.record(torch.cuda.current_stream(self.device))\n", "", STATES),
    Fault(GENERATION, "finished |= torch.isin(chosen, ends)", "finished |= torch.isin(chosen, ends[:1])", TESTS),
    Fault(GENERATION, "or finished.all()", "or finished.any()", TESTS),
    Fault(GENERATION, "if count == max_new_tokens or", "if count + 1 == max_new_tokens or", CALLS),
    Fault(GENERATION, "state.sums[length : length + new]", "state.sums[length:]", STATES),
    Fault(GENERATION, "state.sums[length : length + new]", "state.sums[length : length + 1]", TESTS),
    Fault(GENERATION, "cache=cache, logits_to_keep=1)", "cache=cache)", CALLS),
    Fault(
        GENERATION,
        "min(slots_for(length), max_length)",
        "slots_for(length)",
        CALLS,
    ),
    Fault(GENERATION, "min(slots_for(length), max_length)", "max_length", GROWTH),
    Fault(GENERATION, "cache.reserve(batch_size, 1, max_length)", "cache.reserve(batch_size, 1)", GROWTH),
    Fault(CACHE, "slots = max(2 * self.max_length, slots_for(used + tokens))", "slots = slots_for(used + tokens)", GROWTH),
    Fault(
        CACHE,
        "self.keys[layer], self.values[layer]\n            self",
        "self.keys[layer], self.keys[layer]\n            self",
        GROWTH,
    ),
    Fault(CACHE, "    @torch.inference_mode(False)\n", "", GROWTH),
    Fault(CACHE, "self.is_empty, self.count = True, 0", "self.is_empty = True", GROWTH),
    Fault(GRAPH, "if self.cache.max_length != self.slots:", "if False:", GRAPHS),
    Fault(GRAPH, "self.graph, self.is_warm, self.slots = None, False,", "self.graph, self.slots = None,", GRAPHS),
    Fault(GRAPH, "        self.cache.count = count  # a capture runs nothing\n", "", GRAPHS),
    Fault(GENERATION, "max_new_tokens - 1, generator)", "max_new_tokens, generator)", CALLS),
    Fault(GENERATION, "            streamer.put(chosen)\n", "            streamer.put(chosen[:1])\n", TESTS),
    Fault(GENERATION, "        self._write_new(self.decode(self.ids))\n        self.ids", "        self.ids", CALLS),
    Fault(
        GENERATION,
        "self.ids, self.chars_written, self.prompt_seen = [], 0, False",
        "self.chars_written, self.prompt_seen = 0, False",
        TESTS,
    ),
    Fault(GENERATION, 'if not text.endswith("\\ufffd"):', "if text:", TESTS),
    Fault(KEYE, "    @torch.no_grad()\n    def generate(", "    def generate(", CALLS),
    # Recorded steps
    Fault(GRAPH, "            self.is_warm = True\n", "", GRAPHS),
    Fault(GRAPH, "        self.graph.replay()\n", "", GRAPHS),
    Fault(GRAPH, ", generator=self.generator)", ")", GRAPHS),
    Fault(GRAPH, "steps >= MIN_STEPS_TO_RECORD", "steps > MIN_STEPS_TO_RECORD", GRAPHS),
    Fault(GRAPH, "m._forward_hooks or m._forward_pre_hooks", "m._forward_hooks", GRAPHS),
    Fault(GRAPH, 'and not torch.is_autocast_enabled("cuda")', "", GRAPHS),
    Fault(GRAPH, "            _failed.add(self.model)\n", "", GRAPHS),
    Fault(CAPTURE, "        stream.wait_stream(current)\n", "", GRAPHS),
    Fault(CAPTURE, "    current.wait_stream(stream)\n", "", GRAPHS),
    Fault(CAPTURE, 'capture_error_mode="thread_local"', 'capture_error_mode="global"', GRAPHS),
    Fault(CAPTURE, "            _recover(device, pool, generator)\n", "", GRAPHS),
    Fault(CAPTURE, "        end(index, pool)\n", "", GRAPHS),
    Fault(CAPTURE, "        torch._C._cuda_releasePool(index, pool)\n", "", GRAPHS),
    Fault(CAPTURE, "torch.cuda.graph_pool_handle(), generator)", "pool, generator)", GRAPHS),
    # Warm-up and the small model
    Fault(WARM_UP, "layers=module.layers[:1]", "layers=module.layers", SIZES),
    Fault(WARM_UP, "replace(model.config, num_hidden_layers=1)", "model.config", SIZES),
    Fault(WARM_UP, "        reduced(ids[:, -1:], cache=cache)\n", "", SIZES),
    Fault(WARM_UP, "cache=cache, logits_to_keep=1)", "cache=cache)", SIZES),
    Fault(WARM_UP, "else model.dtype\n    if note", "else torch.float32\n    if note", SIZES),
    Fault(WARM_UP, "not 1 <= length < max_tokens", "not 1 <= length <= max_tokens", SIZES),
    Fault(WARM_UP, " or isinstance(length, bool)", "", SIZES),
    Fault(WARM_UP, "        for step in steps:\n            step()\n", "", SIZES),
    Fault(WARM_UP, "disable=not progress", "disable=progress", SIZES),
    Fault(WARM_UP, "WarmupReport(compiled, cached, seconds", "WarmupReport(cached, compiled, seconds", SIZES),
    Fault(WARM_UP, 'if os.environ.get("TRITON_INTERPRET") == "1":', "if False:", WARMUPS + " -k interpreter"),
    Fault(SMALL, "return Keye.from_pretrained(SMALL, **options)", "return Keye.from_pretrained(SMALL)", OPTIONS),
    Fault(SMALL, "KeyeProcessor.from_pretrained(SMALL, **options)", "KeyeProcessor.from_pretrained(SMALL)", OPTIONS),
]
