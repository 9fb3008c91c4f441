"""The toy world: 32 facts, 384 prompts, 36 possible answers each, and the exact value of every token."""
