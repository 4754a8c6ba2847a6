"""Decodes with a model of transformers whose attention layers are calls to the server.

Embeddings, residuals, norms and MLPs stay the library's own; what they are given of earlier tokens
comes out of the server's sessions alone. Each row of a batch is one session, and rows may bring
different numbers of tokens to a call, none included.
"""

from contextlib import contextmanager

import torch


class Decoder:
    def __init__(self, client, model, name):
        self.client = client
        self.model = model
        self.name = name
        self.calls = 1  # how often each Forward is sent, always with the same number
        self.implementation = ""
        self._step = 0

    def open(self, **options):
        return self.client.open_session(self.name, **options)

    @torch.no_grad()
    def feed(self, sessions, rows, truncate=None):
        """The logits behind each row's last token; those of a row without tokens say nothing.

        `rows` holds each session's next tokens. `truncate` first cuts every layer of a session.
        """
        self._step += 1
        lengths = [len(row) for row in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
        for row, row_tokens in enumerate(rows):
            ids[row, : lengths[row]] = torch.tensor(row_tokens, dtype=torch.int64)
        arguments = {
            "sessions": sessions,
            "query_lengths": lengths,
            "truncate": truncate,
            "step": self._step,
        }
        with self._remote_attention(arguments):
            logits = self.model(input_ids=ids, use_cache=False).logits
        return [logits[row, max(length, 1) - 1] for row, length in enumerate(lengths)]

    def greedy(self, sessions, rows, count):
        """Feeds the rows, then greedy tokens until `count` of them are known for each row."""
        logits = self.feed(sessions, rows)
        found = [[] for _ in rows]
        for index in range(count):
            for row_tokens, row_logits in zip(found, logits, strict=True):
                row_tokens.append(int(row_logits.argmax()))
            if index + 1 < count:
                logits = self.feed(sessions, [row_tokens[-1:] for row_tokens in found])
        return found

    @contextmanager
    def _remote_attention(self, arguments):
        attentions = [layer.self_attn for layer in self.model.model.layers]
        try:
            for index, attention in enumerate(attentions):
                attention.forward = self._forward_of(index, arguments)
            yield
        finally:
            for attention in attentions:
                del attention.forward  # the class' own is seen again

    def _forward_of(self, index, arguments):
        def forward(hidden_states, **_):
            outputs = [
                self.client.forward(
                    hidden_states,
                    model=self.name,
                    layer=index,
                    implementation=self.implementation,
                    **arguments,
                ).output
                for _ in range(self.calls)
            ]
            for repeated in outputs[1:]:
                assert torch.equal(repeated, outputs[0])
            return outputs[-1], None

        return forward


@torch.no_grad()
def library_greedy(model, prompt, count):
    """The library's own greedy continuation of one prompt: eager attention, its own cache."""
    ids = torch.tensor([prompt])
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return generated[0, len(prompt) :].tolist()
