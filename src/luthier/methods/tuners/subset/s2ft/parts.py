"""Which parts of a layer S2FT trains, and by which setting."""

from __future__ import annotations

READS = {"o": "o_ratio", "down": "d_ratio"}  # parts that gain columns -> their setting
WRITES = {"v": "v_ratio", "up": "u_ratio", "gate": "g_ratio"}  # parts that gain rows
