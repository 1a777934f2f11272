"""What the header of a ggml whisper model says. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: The type of the large matrices (see ``mesh.core.ggml_types``) by whisper.cpp's ftype, as ``ggml_ftype_to_ggml_type``
#: has it in ggml 0.13.1.
TYPE_OF_FTYPE: Mapping[int, int] = {
    0: 0, 1: 1, 2: 2, 3: 3, 7: 8, 8: 6, 9: 7, 10: 10, 11: 11, 12: 12, 13: 13, 14: 14, 15: 16, 16: 17, 17: 18, 18: 19,
    19: 20, 20: 21, 21: 22, 22: 23, 23: 29, 24: 30, 25: 39, 26: 40, 27: 41,
}  # fmt: skip
#: An ftype is this, times the version of the quantized formats, plus the number itself.
_VERSION_FACTOR = 1000
#: whisper.cpp: ``whisper_vocab::is_multilingual``
_MULTILINGUAL_VOCABULARY = 51865


@dataclass(frozen=True, slots=True)
class WhisperFacts:
    """The hyperparameters of a whisper model, in the file's order and in whisper.cpp's words."""

    vocabulary: int  #: n_vocab, with the tokens that the file does not spell out
    audio_context: int  #: n_audio_ctx: positions of a window of 30 s
    audio_state: int
    audio_heads: int
    audio_layers: int
    text_context: int  #: n_text_ctx: tokens
    text_state: int
    text_heads: int
    text_layers: int
    mels: int
    ftype: int
    file_bytes: int = 0

    @property
    def weight_type(self) -> int | None:
        """The ggml type of the large matrices; None if no ftype means that."""
        return TYPE_OF_FTYPE.get(self.ftype % _VERSION_FACTOR)

    @property
    def multilingual(self) -> bool:
        """Whether it knows languages besides English, and can translate."""
        return self.vocabulary >= _MULTILINGUAL_VOCABULARY
