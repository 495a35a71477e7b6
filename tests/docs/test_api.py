"""docs/api.md is what the code says of itself."""

from __future__ import annotations

import compressor
from tests.docs.api_page import PAGE, render


def test_the_page_is_that_of_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "python -m tests.docs.api_page writes it anew"


def test_every_public_name_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in set(compressor.__all__) - {"SCHEMES", "__version__"}:
        assert f"### `{name}`\n" in text
    assert "| `finetune(train_loader, val=None, " in text, "members are listed, too"
