"""Any transformers model with its attention on an attnd server.

    attnd.huggingface.register("127.0.0.1:7700")
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="attnd")
    with attnd.huggingface.SessionCache() as cache:
        model.generate(**inputs, past_key_values=cache)  # sends new tokens alone, keeps none

Without a SessionCache it works as well, encoders and vision models included: keys and values then
travel with every call. Needs transformers (the extra `attnd[huggingface]`).
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as _error:
    raise ImportError(
        "attnd.huggingface needs transformers and torch: pip install 'attnd[huggingface]'"
    ) from _error

from attnd.huggingface.attention import register
from attnd.huggingface.cache import SessionCache

__all__ = ["SessionCache", "register"]
