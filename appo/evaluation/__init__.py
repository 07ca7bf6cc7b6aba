"""Published benchmarks: their prompts, their scoring, their tables, from local copies (docs/evaluation.md)."""
