"""Runs code and comparisons that are not trusted in processes of their own."""
