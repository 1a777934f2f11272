"""How much a multimodal projector (``--mmproj``) takes: its weights exactly, what it computes with as a guess."""

from __future__ import annotations

from mesh.core.ggml_types import tensor_bytes
from mesh.core.metadata import EstimateError, Metadata
from mesh.core.model_facts import ModelFacts

#: Image patches that are computed at once at most, if the file does not bound them: a picture of 1344 x 1344 pixels.
_MOST_PATCHES = 9216
_F32 = 4


def projector_bytes(mmproj: ModelFacts) -> int:
    """Return the bytes of *mmproj* while it looks at one large picture."""
    sizes = [tensor_bytes(tensor.ggml_type, tensor.shape) for tensor in mmproj.tensors]
    weights = mmproj.file_bytes if None in sizes else sum(size for size in sizes if size is not None)
    try:
        return weights + _graph_bytes(Metadata(mmproj.metadata))
    except EstimateError:
        return 2 * weights


def _graph_bytes(data: Metadata) -> int:
    """Return a guess at the graph of the picture's encoder: a transformer over patches, without flash attention."""
    side = data.number("vision.image_size", 0) // max(1, data.number("vision.patch_size", 1))
    patches = min(max(side * side, 1), _MOST_PATCHES) if side else 0
    width, wide = data.number("vision.embedding_length", 0), data.number("vision.feed_forward_length", 0)
    heads = data.number("vision.attention.head_count", 0)
    return _F32 * patches * (5 * width + max(3 * wide, patches * heads))
