"""``mesh.models.whisper``: what ggml whisper models say, and that no bytes are too strange for it."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.whisper_estimate import weight_bytes
from mesh.core.whisper_facts import WhisperFacts
from mesh.errors import ConfigError
from mesh.models import whisper

#: n_vocab, then audio: context, state, heads, layers, then the same of text, mels, ftype
SMALL = (51865, 64, 32, 2, 1, 32, 32, 2, 1, 4, 1)
FACTS = WhisperFacts(*SMALL)
TENSORS = 11 + 15 + 24


def model(
    numbers: Sequence[int] = SMALL,
    *,
    magic: bytes = b"lmgg",
    filters: tuple[int, int] | None = None,
    words: Sequence[bytes] = (b"a", b"", b"xyz"),
    count: int | None = None,
    weights: int | None = None,
) -> bytes:
    """A whole file, right or as wrong as a test wants it; *weights* None = none at all."""
    mels, bins = filters or (numbers[9], 5)
    head = magic + struct.pack("<11i", *numbers) + struct.pack("<2i", mels, bins)
    head += bytes(4 * numbers[9] * 5) + struct.pack("<I", len(words) if count is None else count)
    head += b"".join(struct.pack("<I", len(word)) + word for word in words)
    return head + bytes(weights or 0)


#: as many bytes as all tensors have at the least
WHOLE = weight_bytes(FACTS) + 12 * TENSORS


def changed(**fields: Any) -> bytes:
    """The small model with other hyperparameters, by whisper.cpp's names."""
    numbers = dict(zip(whisper._NAMES, SMALL, strict=True)) | fields
    return model([*numbers.values()])


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refusal(path: Path) -> str:
    """What ``read`` has to say against *path*; it names the file."""
    with pytest.raises(whisper.WhisperModelError) as caught:
        whisper.read(path)
    assert caught.value.message.startswith(str(path))
    return caught.value.message


class TestFacts:
    def test_small(self, tmp_path: Path) -> None:
        data = model(weights=WHOLE)
        facts = whisper.read(written(tmp_path / "m.bin", data))
        assert facts == WhisperFacts(
            vocabulary=51865, audio_context=64, audio_state=32, audio_heads=2, audio_layers=1, text_context=32,
            text_state=32, text_heads=2, text_layers=1, mels=4, ftype=1, file_bytes=len(data),
        )  # fmt: skip
        assert facts.multilingual

    def test_a_model_without_weights(self, tmp_path: Path) -> None:
        """whisper.cpp loads it, and uses such files in its tests."""
        assert whisper.read(written(tmp_path / "m.bin", model())).audio_state == 32

    def test_quantized(self, tmp_path: Path) -> None:
        """The version of the format stands in the thousands."""
        facts = whisper.read(written(tmp_path / "m.bin", changed(ftype=2008)))
        assert facts.weight_type == 6  # q5_0

    def test_weights_are_not_read(self, tmp_path: Path) -> None:
        """3 GB of weights cost no more than the header's bound."""
        path = written(tmp_path / "m.bin", model(weights=WHOLE))
        os.truncate(path, 3 << 30)
        tracemalloc.start()
        try:
            assert whisper.read(path).file_bytes == 3 << 30
            assert tracemalloc.get_traced_memory()[1] < 6 << 20
        finally:
            tracemalloc.stop()


class TestMalformed:
    """Trap 48: the error names the file and what is wrong."""

    def test_it_is_the_operators_error(self) -> None:
        assert issubclass(whisper.WhisperModelError, ConfigError)

    @pytest.mark.parametrize(
        ("data", "problem"),
        [
            (b"", "is empty; is the download complete?"),
            (b"lmg", "is truncated: its hyperparameters should reach byte 48 at least, the file has 3"),
            (b"lmgg", "is truncated: its hyperparameters"),
            (b"GGUF\3\0\0\0", "is no ggml whisper model: GGUF, for llama-server; whisper-server reads ggml models"),
            (b"PK\3\4", "a zip or PyTorch file; convert it"),
            (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs"),
            (b"<html>", "it begins with b'<htm'"),
            (model(magic=b"ggml"), "it begins with b'ggml'"),
            (changed(n_vocab=0), "is corrupt: n_vocab is 0; is it another kind of ggml file?"),
            (changed(n_vocab=(1 << 31) - 1), "n_vocab is 2147483647"),
            (changed(n_text_layer=-1), "n_text_layer is -1"),
            (changed(n_audio_ctx=1 << 17), "n_audio_ctx is 131072"),
            (changed(ftype=-1), "ftype is -1"),
            (changed(ftype=4), "has the unknown ftype 4"),
            (changed(n_text_state=64), "n_audio_state is 32, n_text_state 64"),
            (changed(n_text_head=3), "32 is not divided by 2 and 3 heads"),
            (changed(n_audio_head=3), "32 is not divided by 3 and 2 heads"),
            (changed(ftype=12), "is corrupt: rows of 32 weights cannot be q4_K"),
            (model(filters=(5, 5)), "its mel filters are 5 x 5, for 4 mels"),
            (model(filters=(4, 0)), "its mel filters are 4 x 0"),
            (model(filters=(4, (1 << 31) - 1)), "is truncated: its mel filters should reach byte 34359738"),
            (model(words=[], count=51866), "its vocabulary has 51866 words, n_vocab is 51865"),
            (model(words=[], count=51865), "is truncated: its vocabulary"),
            (model(count=2) + b"\xff" * 8, "is truncated: the last tensor"),
            (model(words=[b"a"], count=2) + b"\xff" * 8, "is truncated: its vocabulary should reach byte 4294967"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_says_what_is_wrong(self, data: bytes, problem: str, tmp_path: Path) -> None:
        assert problem in refusal(written(tmp_path / "m.bin", data))

    def test_half_a_download(self, tmp_path: Path) -> None:
        """whisper-server would load it, and hear nonsense."""
        path = tmp_path / "m.bin"
        size = len(model()) + WHOLE
        for missing in (1, WHOLE // 2, WHOLE - 1):
            said = refusal(written(path, model(weights=WHOLE - missing)))
            known = f"the last tensor should reach byte {size} at least, the file has {size - missing}"
            assert said.endswith(f"is truncated: {known}; is the download complete?")

    def test_cut_anywhere_in_the_header(self, tmp_path: Path) -> None:
        path, data = tmp_path / "m.bin", model()
        for size in range(len(data)):
            refusal(written(path, data[:size]))

    def test_a_header_without_end(self, tmp_path: Path) -> None:
        """Lengths that a huge file could hold are still not believed, and not read."""
        path = written(tmp_path / "m.bin", model(words=[], count=1) + struct.pack("<I", 1 << 31))
        os.truncate(path, 8 << 30)
        tracemalloc.start()
        try:
            assert "its vocabulary would reach byte 2147483" in refusal(path)
            assert tracemalloc.get_traced_memory()[1] < 6 << 20
        finally:
            tracemalloc.stop()

    def test_not_a_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        assert refusal(tmp_path / "pipe").endswith("is not a file")
        assert refusal(tmp_path).endswith("is not a file")
        assert refusal(tmp_path / "none.bin").endswith("there is no such file")
        with pytest.raises(whisper.WhisperModelError, match="cannot be read"):
            whisper.read("a\0b")

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_any_bytes(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        """A few bytes of a good file changed, or cut: facts, or a clear error."""
        content = bytearray(model(weights=data.draw(st.sampled_from([0, WHOLE]))))
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, min(len(content), 300) - 1))
            size = data.draw(st.sampled_from([1, 2, 4, 8]))
            content[at : at + size] = data.draw(
                st.one_of(
                    st.binary(max_size=8), st.sampled_from([b"\xff" * 4, bytes(4), b"\0\0\0\x80", b"\xff\xff\xff\x7f"])
                )
            )
        assert_parses_or_refuses(tmp_path_factory.getbasetemp() / "any.bin", bytes(content))

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.integers(-(1 << 31), (1 << 31) - 1) | st.integers(0, 4), min_size=11, max_size=11), st.binary())
    def test_any_numbers(self, tmp_path_factory: pytest.TempPathFactory, numbers: list[int], tail: bytes) -> None:
        content = b"lmgg" + struct.pack("<11i", *numbers) + tail
        assert_parses_or_refuses(tmp_path_factory.getbasetemp() / "any.bin", content)


def assert_parses_or_refuses(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        facts = whisper.read(path)
    except whisper.WhisperModelError as error:
        refused = error.message
    else:
        refused = str(path)
        assert weight_bytes(facts) > 0
    assert refused.startswith(str(path))
