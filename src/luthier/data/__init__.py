"""From files to rows: loading, formats, splits, quarantine, profile."""
