"""The offsets of a form's parts."""

from __future__ import annotations

from mesh.core.form import Form, FormFile


def test_the_last_field_of_a_name_counts() -> None:
    form = Form((("model", "a"), ("x", ""), ("model", "b")), (FormFile("file", "a.wav", 3, 5),))
    assert (form.get("model"), form.get("x"), form.get("file")) == ("b", "", None)
