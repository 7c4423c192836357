from typing import Any

import pytest


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tokenizer of the built-in tiny model, with its chat template."""
    from transformers import AutoTokenizer

    from tensafe_nb.engine.models.load import ASSETS

    return AutoTokenizer.from_pretrained(ASSETS / "tiny")


@pytest.fixture
def plain_tokenizer() -> Any:
    """The same without a chat template."""
    from transformers import AutoTokenizer

    from tensafe_nb.engine.models.load import ASSETS

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    tokenizer.chat_template = None
    return tokenizer
