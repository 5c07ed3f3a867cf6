"""Two layers are enough for many runs."""

from helpers.shallow import tiny  # noqa: F401
