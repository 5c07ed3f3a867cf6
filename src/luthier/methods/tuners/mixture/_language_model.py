"""Language adapters on a model: which language each row is in."""

from __future__ import annotations

from luthier.methods.tuners.mixture._routed import NamedRows


class LanguageModel(NamedRows):
    """Rows are read under the adapter of their column `language`."""

    column, listed = "language", "languages"
