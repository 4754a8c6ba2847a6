"""The API's own messages, as the control plane takes and returns them.

proto/attention/v1 documents every field.
"""

from attnd._proto.attention.v1.admin_pb2 import (
    MODALITY_LANGUAGE,
    MODALITY_MULTIMODAL,
    MODALITY_VISION,
    BenchmarkProgress,
    BenchmarkResult,
    GetHardwareResponse,
    Implementation,
    LayerSpec,
    LayerStack,
    ModelSpec,
    ModelStatus,
    RotaryEmbedding,
    SelectAttentionResponse,
    SessionStatus,
    SwitchAttentionResponse,
)
from attnd._proto.attention.v1.attention_pb2 import (
    GetServerInfoResponse,
    GetSessionResponse,
    LayerCache,
)
from attnd._proto.attention.v1.types_pb2 import (
    DATA_TYPE_BFLOAT16,
    DATA_TYPE_FLOAT16,
    DATA_TYPE_FLOAT32,
    AttentionOptions,
    PerHeadValues,
)

__all__ = [
    "DATA_TYPE_BFLOAT16",
    "DATA_TYPE_FLOAT16",
    "DATA_TYPE_FLOAT32",
    "MODALITY_LANGUAGE",
    "MODALITY_MULTIMODAL",
    "MODALITY_VISION",
    "AttentionOptions",
    "BenchmarkProgress",
    "BenchmarkResult",
    "GetHardwareResponse",
    "GetServerInfoResponse",
    "GetSessionResponse",
    "Implementation",
    "LayerCache",
    "LayerSpec",
    "LayerStack",
    "ModelSpec",
    "ModelStatus",
    "PerHeadValues",
    "RotaryEmbedding",
    "SelectAttentionResponse",
    "SessionStatus",
    "SwitchAttentionResponse",
]
