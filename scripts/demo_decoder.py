"""A small language model whose attention and KV cache are served; a part of scripts/demo.py.

The model is a Llama of transformers with seeded random weights: its text means nothing, but it must
be the same text, token by token, as the library's own. Each token's hidden states cross the wire
once per layer; keys and values never do.
"""

import sys
import time
from contextlib import contextmanager

import attnd

MODEL = "tiny-llama"
LAYERS = 4
VOCABULARY = "abcdefghijklmnopqrstuvwxyz      .,"
PROMPT = "the cache of a language model lives on the server, "
TOKENS = 48
BRANCH_TOKENS = 24


class WrongTokens(Exception):
    """Served attention that leads to other tokens than local attention."""


def save_model(directory):
    """Writes the model as hubs lay it out, and returns it with local attention."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=1024,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(7)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:  # logits that differ: a random model's default is a flat one
                parameter.normal_(
                    std=(4.0 if "embed" in name else 1.3) * parameter.shape[1] ** -0.5
                )
    disable_progress_bar()
    model.save_pretrained(directory)
    return model


def show(client, server, model):
    import torch

    prompt = torch.tensor([[VOCABULARY.index(character) for character in PROMPT]])
    local = _local_tokens(model, prompt, TOKENS)
    print(
        f"  {LAYERS} layers of 8 query and 2 key-value heads; prompt of {prompt.shape[1]} tokens\n"
    )
    print(f"  {PROMPT}", end="", flush=True)
    with client.open_session(MODEL) as session, client.stream() as stream:
        decoder = ServedDecoder(model, stream.forward, session)
        start = time.perf_counter()
        sent_before = client.traffic.bytes_sent
        tokens = decoder.greedy(prompt, TOKENS, on_token=_print_token)
        seconds = time.perf_counter() - start
        print(f"\n\n  {TOKENS / seconds:.0f} tokens/s over one stream", end="")
        print(f", {(client.traffic.bytes_sent - sent_before) / 1024:.0f} KiB sent in all")
        _check("the streamed tokens", tokens, local)
        state = session.get()
        print(f"  cache on the server: {state.layers[0].length} tokens in each of ", end="")
        print(f"{len(state.layers)} layers, {state.bytes / 1024:.0f} KiB")
        _fork(client, server, model, stream, session, prompt, tokens)
        _lose_an_answer(client, server, model, session, prompt, tokens)


class ServedDecoder:
    """The model with each layer's attention replaced by a Forward, as a stream sends it."""

    def __init__(self, model, forward, session):
        self._model = model
        self._forward = forward
        self._session = session
        self.step = max((layer.last_step for layer in session.get().layers), default=0)

    def logits(self, ids):
        """Feeds tokens as the next step; the logits behind the last one."""
        import torch

        self.step += 1
        with torch.no_grad(), self._served_attention():
            return self._model(input_ids=ids, use_cache=False).logits[0, -1]

    def greedy(self, ids, count, on_token=lambda token: None):
        import torch

        tokens = []
        for _ in range(count):
            tokens.append(int(self.logits(ids).argmax()))
            on_token(tokens[-1])
            ids = torch.tensor([[tokens[-1]]])
        return tokens

    @contextmanager
    def _served_attention(self):
        attentions = [layer.self_attn for layer in self._model.model.layers]

        def served(index):
            def forward(hidden_states, **_):
                call = self._forward(
                    hidden_states,
                    model=MODEL,
                    layer=index,
                    sessions=[self._session],
                    step=self.step,
                )
                return call.result().output, None

            return forward

        for index, attention in enumerate(attentions):
            attention.forward = served(index)
        try:
            yield
        finally:
            for attention in attentions:
                del attention.forward  # the class's own is seen again


def _fork(client, server, model, stream, session, prompt, tokens):
    """Two continuations of one cache: the most likely next token, and the second one."""
    import torch

    print("\n  two forks of the session, which share its cache and go on differently")
    forks = session.fork(2)
    models = {model.spec.name: model for model in client.list_models()}
    held = _metric(server, "attention_cache_bytes")
    print(f"  three caches of {models[MODEL].cache_bytes / 1024 / 3:.0f} KiB, for which ", end="")
    print(f"the server holds {held / 1024:.0f} KiB")
    # The session has not seen its last token yet: each fork begins with it.
    start = torch.tensor([[tokens[-1]]])
    for rank, fork in enumerate(forks):
        with fork:
            decoder = ServedDecoder(model, stream.forward, fork)
            first = int(decoder.logits(start).topk(2).indices[rank])
            rest = decoder.greedy(torch.tensor([[first]]), BRANCH_TOKENS)
            known = torch.tensor([[*prompt[0].tolist(), *tokens, first]])
            _check(f"fork {rank + 1}", rest, _local_tokens(model, known, BRANCH_TOKENS))
            print(f"    {rank + 1}: ...{_text(tokens[-12:])}|{_text([first, *rest])}")


def _lose_an_answer(client, server, model, session, prompt, tokens):
    """A connection dies in the middle of a step; the step is made again under the same number."""
    import torch

    token = torch.tensor([[tokens[-1]]])
    with attnd.Client(server.address) as doomed:
        stream = doomed.stream()
        calls = 0

        def dying_forward(*arguments, **named):
            nonlocal calls
            call = stream.forward(*arguments, **named)
            calls += 1
            if calls > LAYERS // 2:  # the first layers' answers came, this one's does not
                stream.close(wait=False)
            return call

        decoder = ServedDecoder(model, dying_forward, session)
        lost = decoder.step + 1
        try:
            decoder.logits(token)
        except attnd.AttndError as failure:
            print(f"\n  a connection killed in the middle of step {lost}: {failure.code.name}")
        else:
            raise WrongTokens("the killed connection's step had an answer")
    before = [layer.length for layer in session.get().layers]
    with client.stream() as stream:
        decoder = ServedDecoder(model, stream.forward, session)
        for _ in range(2):
            decoder.step = lost - 1
            again = int(decoder.logits(token).argmax())
        replayed = [layer.length for layer in session.get().layers]
        rest = decoder.greedy(torch.tensor([[again]]), BRANCH_TOKENS - 1)
    print(f"    tokens in the layers' caches then {before}, after two replays {replayed}")
    known = torch.tensor([[*prompt[0].tolist(), *tokens]])
    _check("the replayed step", [again, *rest], _local_tokens(model, known, BRANCH_TOKENS))
    if replayed != [known.shape[1]] * LAYERS:
        raise WrongTokens(f"the caches hold {replayed} tokens instead of {known.shape[1]}")
    print("    no token was lost or doubled, and the text goes on as it should")


def _local_tokens(model, ids, count):
    import torch

    with torch.no_grad():
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return tokens[0, ids.shape[1] :].tolist()


def _check(what, served, local):
    if served != local:
        raise WrongTokens(f"{what}: {_text(served)!r}, but local attention gives {_text(local)!r}")
    print(f"  {what}: all {len(served)} tokens as with local attention")


def _metric(server, name):
    for line in server.metrics().splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    raise WrongTokens(f"the server does not export {name}")


def _text(tokens):
    return "".join(VOCABULARY[token] for token in tokens)


def _print_token(token):
    sys.stdout.write(VOCABULARY[token])
    sys.stdout.flush()
