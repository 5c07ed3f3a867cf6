"""What a user is told in place of a traceback: each outcome is a type, so that callers never search
sentences.
"""

from __future__ import annotations


class RecipeError(ValueError):
    """A recipe that cannot work. The message says where, what was meant, and what to do (exit code 2)."""
