"""``mesh.models.gguf``: what model files say, and that no bytes are too strange for it."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf as format_library
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.model_facts import ModelFacts, Tensor
from mesh.errors import ConfigError
from mesh.models import gguf, gguf_reader
from tests import synthetic_models
from tests.models import gguf_bytes as raw


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refusal(path: Path) -> str:
    """What ``read`` has to say against *path*; it names the file."""
    with pytest.raises(gguf.GgufError) as caught:
        gguf.read(path)
    assert str(path) in caught.value.message
    return caught.value.message


def small_model() -> bytes:
    return raw.model(
        [
            raw.entry("general.architecture", raw.STRING, raw.text("llama")),
            raw.u32("llama.block_count", 2),
            raw.entry("llama.attention.head_count_kv", raw.ARRAY, raw.array(raw.U32, 2, struct.pack("<2I", 4, 0))),
            raw.entry("tokenizer.ggml.tokens", raw.ARRAY, raw.array(raw.STRING, 2, raw.text("a") + raw.text("bc"))),
        ],
        [raw.tensor("token_embd.weight", (8, 4)), raw.tensor("output.weight", (32, 2), 8, 128)],
        data=128 + 68,
    )


class TestFacts:
    def test_small(self, tmp_path: Path) -> None:
        facts = gguf.read(written(tmp_path / "m.gguf", small_model()))
        assert facts.metadata == {
            "general.architecture": "llama",
            "llama.block_count": 2,
            "llama.attention.head_count_kv": (4, 0),
            "tokenizer.ggml.tokens.length": 2,
        }
        assert facts.tensors == (Tensor("token_embd.weight", 0, (8, 4)), Tensor("output.weight", 8, (32, 2)))
        assert (facts.file_bytes, facts.shards) == (len(small_model()), 1)

    def test_every_type_that_the_format_has(self, tmp_path: Path) -> None:
        path = tmp_path / "types.gguf"
        writer = format_library.GGUFWriter(str(path), "test")
        number = format_library.GGUFValueType
        values = {
            number.UINT8: 255, number.INT8: -128, number.UINT16: 65535, number.INT16: -32768, number.UINT32: 2**32 - 1,
            number.INT32: -(2**31), number.UINT64: 2**64 - 1, number.INT64: -(2**63), number.FLOAT32: 0.5,
            number.FLOAT64: 0.1, number.BOOL: True, number.STRING: "früh",
        }  # fmt: skip
        for kind, value in values.items():
            writer.add_key_value(f"one.{kind.name}", value, kind)
            if kind is not number.STRING:
                writer.add_key_value(f"many.{kind.name}", [value] * 3, number.ARRAY, sub_type=kind)
        writer.add_array("words", ["a", "b"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        metadata = gguf.read(path).metadata
        for kind, value in values.items():
            assert metadata[f"one.{kind.name}"] == value
            assert type(metadata[f"one.{kind.name}"]) is type(value)
            if kind is not number.STRING:
                assert metadata[f"many.{kind.name}"] == (value,) * 3
        assert metadata["words.length"] == 2
        assert "words" not in metadata

    @pytest.mark.parametrize("kind", list(synthetic_models.KINDS))
    def test_agrees_with_the_formats_own_reader(self, kind: str, tmp_path: Path) -> None:
        path = synthetic_models.write(kind, tmp_path / "m.gguf")
        facts, reader = gguf.read(path), format_library.GGUFReader(path)
        assert [(t.name, t.ggml_type, t.shape) for t in facts.tensors] == [
            (t.name, int(t.tensor_type), tuple(t.shape.tolist())) for t in reader.tensors
        ]
        for name, known in reader.fields.items():
            if name.startswith("GGUF."):
                continue
            contents: Any = known.contents()
            if isinstance(contents, list):
                assert f"{name}.length" in facts.metadata or facts.metadata[name] == tuple(contents)
            else:
                assert facts.metadata[name] == pytest.approx(contents)

    @pytest.mark.parametrize("chunk_bytes", [1, 7, 8, 64])
    def test_chunks_end_anywhere(self, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = synthetic_models.write("hybrid", tmp_path / "m.gguf", vocab=300)
        whole = gguf.read(path)
        monkeypatch.setattr(gguf_reader, "_CHUNK_BYTES", chunk_bytes)
        assert gguf.read(path) == whole

    def test_version_2(self, tmp_path: Path) -> None:
        data = raw.model([raw.u32("a", 1)], version=2)
        assert gguf.read(written(tmp_path / "m.gguf", data)).metadata == {"a": 1}

    def test_long_values_leave_their_length(self, tmp_path: Path) -> None:
        entries = [
            raw.entry("numbers", raw.ARRAY, raw.array(raw.F32, 4097, bytes(4 * 4097))),
            raw.entry("fitting", raw.ARRAY, raw.array(raw.BOOL, 4096, b"\1" * 4096)),
            raw.entry("prose", raw.STRING, raw.text("x" * 65537)),
            raw.u32("after", 7),
        ]
        metadata = gguf.read(written(tmp_path / "m.gguf", raw.model(entries))).metadata
        assert metadata == {"numbers.length": 4097, "fitting": (True,) * 4096, "prose.length": 65537, "after": 7}

    def test_a_text_that_is_not_utf8_does_not_matter(self, tmp_path: Path) -> None:
        """llama-server loads such a file, so its memory must be computable (trap 48)."""
        data = raw.model([raw.entry("general.author", raw.STRING, raw.text(b"Andr\xe9"))])
        assert gguf.read(written(tmp_path / "m.gguf", data)).metadata == {"general.author": "Andr�"}

    def test_tensor_of_a_type_from_the_future(self, tmp_path: Path) -> None:
        data = raw.model([], [raw.tensor("new", (32, 2), 999)], data=32)
        assert gguf.read(written(tmp_path / "m.gguf", data)).tensors == (Tensor("new", 999, (32, 2)),)

    def test_tensor_data_is_not_touched(self, tmp_path: Path) -> None:
        """40 GiB of weights cost a megabyte."""
        path = written(tmp_path / "m.gguf", raw.model([], [raw.tensor("w", (1 << 20, 10 << 10))], data=32))
        os.truncate(path, 41 << 30)
        tracemalloc.start()
        try:
            assert gguf.read(path).file_bytes == 41 << 30
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()


class TestMalformed:
    """Trap 48: malformed metadata cannot crash sizing; the error names the file and what is wrong."""

    def test_it_is_the_operators_error(self) -> None:
        assert issubclass(gguf.GgufError, ConfigError)

    @pytest.mark.parametrize(
        ("data", "problem"),
        [
            (b"", "is empty"),
            (b"GG", "no GGUF file: it begins with b'GG'"),
            (b"GGUF", "truncated"),
            (b"version https://git-lfs.github.com/spec/v1\n", "no GGUF file: it begins with b'vers'"),
            (raw.model(magic=b"FUGG"), "no GGUF file"),
            (raw.model(version=1), "GGUF version 1"),
            (raw.model(version=4), "GGUF version 4"),
            (raw.model(version=0x03000000), "big-endian"),
            (raw.model(counts=(1 << 62, 0)), "is corrupt: the number of tensors, 4611686018427387904, would"),
            (raw.model(counts=(0, (1 << 64) - 1)), "is corrupt: the number of metadata entries, 18446744073709551615"),
            (raw.model(counts=(0, 2)), "truncated"),
            (raw.model([struct.pack("<Q", 1 << 60) + bytes(9)]), "is corrupt: the length of a metadata key"),
            (raw.model([raw.entry(b"\xff\xfe", raw.U8, b"\0")]), "a metadata key is not UTF-8"),
            (raw.model([raw.entry("k" * 70000, raw.U8, b"\0")]), "a metadata key is 70000 bytes long"),
            (raw.model([raw.entry("k", 13, bytes(8))]), "k has the unknown type 13"),
            (raw.model([raw.entry("k", raw.STRING, struct.pack("<Q", 1 << 63))]), "is corrupt: the length of k, "),
            (raw.model([raw.entry("k", raw.ARRAY, raw.array(raw.U64, 1 << 61))]), "is corrupt: k, "),
            (raw.model([raw.entry("k", raw.ARRAY, raw.array(raw.STRING, 1 << 40))]), "k, 1099511627776, ends at byte"),
            (raw.model([raw.entry("k", raw.ARRAY, raw.array(99, 1))]), "an array of the unsupported type 99"),
            (
                raw.model([raw.entry("k", raw.ARRAY, raw.array(raw.ARRAY, 1, raw.array(raw.U8, 1, b"\0")))]),
                "an array of the unsupported type 9",
            ),
            (raw.model([raw.u32("k", 1), raw.u32("k", 2)]), "the key k is there twice"),
            (raw.model([], [raw.tensor("t", (1,)), raw.tensor("t", (1,))], 64), "the tensor t is there twice"),
            (raw.model([], [raw.tensor("t", (1,) * 5)], 32), "the tensor t has 5 dimensions"),
            (raw.model([], [raw.tensor("t", (8,), offset=1 << 63)], 32), "corrupt: the tensor t would end"),
            (raw.model([], [raw.tensor("t", (1 << 62, 1 << 62, 1 << 62))], 32), "corrupt: the tensor t would end"),
            (raw.model([], [raw.tensor("t", (31, 2), 8)], 128), "the rows of the tensor t are not whole blocks"),
            (raw.model([raw.u32("general.alignment", 0)]), "general.alignment is 0, not a power of two"),
            (raw.model([raw.u32("general.alignment", 48)]), "general.alignment is 48"),
            (raw.model([raw.entry("general.alignment", raw.STRING, raw.text("x"))]), "general.alignment is x"),
            (raw.model([raw.entry("split.count", raw.STRING, raw.text("x"))]), "split.count is not a number"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_says_what_is_wrong(self, data: bytes, problem: str, tmp_path: Path) -> None:
        assert problem in refusal(written(tmp_path / "m.gguf", data))

    def test_half_a_download(self, tmp_path: Path) -> None:
        data = small_model()
        said = refusal(written(tmp_path / "m.gguf", data[:-1]))
        assert said.endswith(
            f"is truncated: the tensor output.weight ends at byte {len(data)}, the file has {len(data) - 1};"
            " is the download complete?"
        )

    def test_cut_anywhere(self, tmp_path: Path) -> None:
        path, data = tmp_path / "m.gguf", small_model()
        for size in range(len(data)):
            refusal(written(path, data[:size]))

    def test_lengths_are_not_believed(self, tmp_path: Path) -> None:
        """A length of almost the whole file, where a text belongs, allocates nothing."""
        path = written(tmp_path / "m.gguf", raw.model([raw.entry("k", raw.STRING, struct.pack("<Q", 100 << 20))]))
        os.truncate(path, 200 << 20)
        tracemalloc.start()
        try:
            assert gguf.read(path).metadata == {"k.length": 100 << 20}
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()

    def test_a_header_without_end(self, tmp_path: Path) -> None:
        """A count that a huge file could hold is still no count that a model has."""
        path = written(tmp_path / "m.gguf", raw.model([raw.entry("k", raw.ARRAY, raw.array(raw.STRING, 1 << 32))]))
        os.truncate(path, 1 << 40)
        assert "far more than any model has" in refusal(path)

    def test_the_file_shrinks_meanwhile(self) -> None:
        reader = gguf_reader.GgufReader(io.BytesIO(b"1234"), "m.gguf", 1000)
        with pytest.raises(gguf.GgufError, match=r"m\.gguf: is truncated: it ends at byte 8"):
            reader.take(8, "it")

    def test_not_a_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        assert refusal(tmp_path / "pipe").endswith("is not a file")
        assert refusal(tmp_path).endswith("is not a file")
        assert refusal(tmp_path / "none.gguf").endswith("there is no such file")
        with pytest.raises(gguf.GgufError, match="cannot be read"):
            gguf.read("a\0b")

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_any_bytes(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        """A few bytes of a good file changed, or cut: facts, or a clear error."""
        content = bytearray(small_model())
        for _ in range(data.draw(st.integers(1, 6))):
            at = data.draw(st.integers(0, len(content) - 1))
            size = data.draw(st.sampled_from([1, 2, 4, 8]))
            content[at : at + size] = data.draw(
                st.one_of(st.binary(max_size=16), st.sampled_from([b"\xff" * 8, bytes(8), b"\0\0\0\0\0\0\0\x80"]))
            )
            if not content:
                break
        assert_parses_or_refuses(tmp_path_factory.getbasetemp() / "any.gguf", bytes(content))

    @settings(max_examples=300, deadline=None)
    @given(st.binary(max_size=400), st.integers(0, 20), st.integers(0, 20))
    def test_any_header(
        self, tmp_path_factory: pytest.TempPathFactory, tail: bytes, tensors: int, entries: int
    ) -> None:
        content = raw.model([tail], counts=(tensors, entries))
        assert_parses_or_refuses(tmp_path_factory.getbasetemp() / "any.gguf", content)


def assert_parses_or_refuses(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        facts = gguf.read(path)
    except gguf.GgufError as error:
        refused = error.message
    else:
        refused = str(path)
        assert isinstance(facts, ModelFacts)
        assert all(isinstance(key, str) for key in facts.metadata)
    assert refused.startswith(str(path))
