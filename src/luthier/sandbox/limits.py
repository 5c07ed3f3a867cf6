"""Every limit on what a model wrote, in one place."""

from __future__ import annotations

OUTPUT = 64 * 1024  # bytes of standard output, of standard error and of verdicts; the rest is dropped
DISK_MB = 64  # what a program may write in all (one file, where there is no disk of its own)
FILES = 10_000  # files and folders of a program
PROCESSES = 32  # processes and threads of one program
CODE = 200_000  # characters of a program; a longer one does not run
PARSED = 20_000  # characters of a text that are parsed here to see whether it needs its prompt
TEXT = 1_000_000  # characters of a text in which code is searched; of a longer one the end is read
ANSWER = 20_000  # characters of a text in which a mathematical answer is searched; of a longer one the end
DIGITS = 2_000  # digits in a row; a text with a longer number has no answer that is mathematics
BRACKETS = 100  # brackets that may be open at once in mathematics
GRACE = 3.0  # seconds after a program's time in which the sandbox has to report its end
START = 60.0  # seconds in which a cell of the sandbox has to start
SQL_STEPS = 2_000_000  # of sqlite's machine, for one query
SQL_ROWS = 10_000  # rows that a query may give
